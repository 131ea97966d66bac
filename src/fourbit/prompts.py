"""Learned prompts: virtual tokens whose embeddings are trained while the model stays frozen.

Prompt tuning (arXiv 2104.08691) trains the embeddings themselves; P-tuning (arXiv 2103.10385)
trains a small network that produces them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from fourbit.settings import Settings

_INITIAL = ("prompt_tuning_init", "prompt_tuning_init_text")
_ENCODER = (
    "encoder_reparameterization_type",
    "encoder_hidden_size",
    "encoder_num_layers",
    "encoder_dropout",
)
_READ_BY = {"prompt_tuning": _INITIAL, "p_tuning": _ENCODER}


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


class PromptSettings(Settings):
    """The prompt. Names and meanings are PEFT's."""

    num_virtual_tokens: int = Field(
        default=20, ge=1, le=65536, description="trained positions in front of every sequence"
    )
    prompt_tuning_init: Annotated[
        Literal["sample_vocab", "random", "text"], BeforeValidator(_lower)
    ] = Field(
        default="sample_vocab",
        description="prompt_tuning starts from random tokens' embeddings, noise, or a text's",
    )
    prompt_tuning_init_text: str | None = Field(
        default=None,
        min_length=1,
        description="the text of prompt_tuning_init: text, repeated or cut to fit",
    )
    encoder_reparameterization_type: Annotated[Literal["mlp", "lstm"], BeforeValidator(_lower)] = (
        Field(default="mlp", description="the network of p_tuning")
    )
    encoder_hidden_size: int | None = Field(
        default=None, ge=1, le=2**20, description="its width; null takes the model's hidden size"
    )
    encoder_num_layers: int = Field(
        default=2, ge=1, le=64, description="layers of an lstm; an mlp has its fixed three"
    )
    encoder_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="dropout between the layers of an lstm"
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> PromptSettings:
        has_text = self.prompt_tuning_init_text is not None
        if has_text and self.prompt_tuning_init != "text":
            raise ValueError("prompt_tuning_init_text needs prompt_tuning_init: text")
        if self.prompt_tuning_init == "text" and not (self.prompt_tuning_init_text or "").strip():
            raise ValueError("prompt_tuning_init: text needs prompt_tuning_init_text")
        if self.encoder_reparameterization_type == "mlp":
            for name in ("encoder_num_layers", "encoder_dropout"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is for encoder_reparameterization_type: lstm")
            return self
        if self.num_virtual_tokens < 2:
            raise ValueError("an lstm needs num_virtual_tokens of 2 or more; use mlp for one")
        if self.encoder_dropout and self.encoder_num_layers < 2:
            raise ValueError("encoder_dropout lies between layers: encoder_num_layers is 1")
        return self

    def unread(self, method: str) -> list[str]:
        """Settings that differ from their default although ``method`` does not read them."""
        return [
            name
            for reader, names in _READ_BY.items()
            if reader != method
            for name in names
            if getattr(self, name) != type(self).model_fields[name].default
        ]


def prompt_parameters(
    num_virtual_tokens: int,
    token_dim: int,
    *,
    encoder: Literal["mlp", "lstm"] | None = None,
    hidden_size: int = 0,
    num_layers: int = 2,
) -> int:
    """Trainable parameters by formula.

    Args:
        num_virtual_tokens: positions of the prompt.
        token_dim: width of the model's embeddings.
        encoder: the network of P-tuning; None for prompt tuning.
        hidden_size: its width.
        num_layers: layers of the LSTM; it runs in both directions.
    """
    count = num_virtual_tokens * token_dim
    if encoder is None:
        return count
    if encoder == "mlp":
        return count + _linear(token_dim, hidden_size, hidden_size, token_dim)
    both = 2 * hidden_size
    # four gates of each direction: weights on input and state, and two biases
    count += sum(
        2 * 4 * hidden_size * (width + hidden_size + 2)
        for width in [token_dim, *[both] * (num_layers - 1)]
    )
    return count + _linear(both, both, token_dim)


def _linear(*widths: int) -> int:
    return sum((a + 1) * b for a, b in zip(widths, widths[1:], strict=False))
