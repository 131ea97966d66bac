"""PEFT's prompt tuning and P-tuning: made, put before the text, counted, saved.

PEFT keeps a learned prompt outside the model, in ``PeftModel.prompt_encoder``, and puts its output
before the embeddings of the text in its own ``forward``. We do the same one level lower, so that
the backbone can be called without the head. Public names of `PeftModel` are used
(``get_prompt``, ``word_embeddings``, ``prompt_encoder``, ``prompt_tokens``), each with a test in
``tests/integrations/test_peft_prompts.py``.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from peft import (
    PeftModel,
    PeftType,
    PromptEncoder,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptTuningConfig,
    PromptTuningInit,
    get_peft_model,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from fourbit.errors import ModelError
from fourbit.prompts import PromptSettings, prompt_parameters

PROMPT_KEY = "prompt_embeddings"
"""The one tensor of a saved prompt."""

_ENCODER_PREFIX = "prompt_encoder.default."


def prompted(model: nn.Module) -> PeftModel | None:
    """``model`` itself when it is PEFT's wrapper with a learned prompt (or prefix), else None."""
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return model
    return None


def token_embeddings(model: PreTrainedModel) -> nn.Embedding:
    """The table that a prompt's virtual tokens stand beside.

    Raises:
        ModelError: the model has none.
    """
    words = model.get_input_embeddings()
    if not isinstance(words, nn.Embedding):
        raise _no_prompts(model)
    return words


def _no_prompts(model: PreTrainedModel) -> ModelError:
    return ModelError(
        "no-prompts",
        where="method",
        what=f"{model.config.model_type} takes no embeddings that a prompt could stand before",
        fix="use method: qlora",
    )


def _words(model: PeftModel) -> nn.Embedding:
    words = model.word_embeddings
    assert isinstance(words, nn.Embedding)
    return words


def _encoder(model: PeftModel) -> nn.Module:
    encoders = model.prompt_encoder
    assert isinstance(encoders, nn.ModuleDict)
    return encoders[str(model.active_adapter)]


def _embedding(model: PeftModel) -> nn.Embedding:
    embedding = _encoder(model).embedding
    assert isinstance(embedding, nn.Embedding)
    return embedding


def add_prompt(
    model: PreTrainedModel,
    settings: PromptSettings,
    *,
    method: str,
    init_ids: Sequence[int] | None = None,
) -> PeftModel:
    """Wraps the frozen base with a prompt in float32; on a meta model the prompt is meta too.

    Args:
        model: the frozen base.
        settings: the prompt.
        method: ``prompt_tuning`` or ``p_tuning``.
        init_ids: tokens whose embeddings the prompt starts from, one per position; None starts
            from noise.

    Raises:
        ModelError: the architecture takes no embeddings as input.
    """
    words = token_embeddings(model)
    if "inputs_embeds" not in inspect.signature(model.base_model.forward).parameters:
        raise _no_prompts(model)
    config = _config(settings, method, words.embedding_dim)
    # PEFT asks for both of every model; only prefixes of attention use them.
    text = model.config.get_text_config()
    config.num_layers = getattr(text, "num_hidden_layers", None) or 1
    config.num_attention_heads = getattr(text, "num_attention_heads", None) or 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on settings that we choose ourselves
        with torch.device("meta") if words.weight.is_meta else nullcontext():
            wrapped = get_peft_model(model, config)
    assert isinstance(wrapped, PeftModel)
    wrapped.prompt_tokens["default"] = torch.arange(settings.num_virtual_tokens, device="cpu")
    if wrapped.word_embeddings is not words:
        raise _no_prompts(model)
    if init_ids is not None:
        with torch.no_grad():
            start = words(torch.tensor(init_ids, device=words.weight.device))
            _embedding(wrapped).weight.copy_(start)
    return wrapped


def _config(
    settings: PromptSettings, method: str, token_dim: int
) -> PromptTuningConfig | PromptEncoderConfig:
    common: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": settings.num_virtual_tokens,
        "token_dim": token_dim,
    }
    if method == "prompt_tuning":
        # The start is ours: PEFT would load a tokenizer by name, ours may come from a GGUF file.
        return PromptTuningConfig(**common, prompt_tuning_init="RANDOM")
    return PromptEncoderConfig(
        **common,
        encoder_reparameterization_type=PromptEncoderReparameterizationType(
            settings.encoder_reparameterization_type.upper()
        ),
        encoder_hidden_size=settings.encoder_hidden_size or token_dim,
        encoder_num_layers=settings.encoder_num_layers,
        encoder_dropout=settings.encoder_dropout,
    )


def prompt_length(model: nn.Module) -> int:
    """Positions the prompt takes; 0 without one."""
    wrapper = prompted(model)
    if wrapper is None:
        return 0
    config: Any = wrapper.active_peft_config
    return config.num_virtual_tokens


def name_start(model: PeftModel, settings: PromptSettings, *, tokenizer: str) -> None:
    """Writes into PEFT's configuration what the prompt was started from, for who reads it."""
    config: Any = model.peft_config["default"]
    config.prompt_tuning_init = PromptTuningInit(settings.prompt_tuning_init.upper())
    if settings.prompt_tuning_init == "text":
        config.prompt_tuning_init_text = settings.prompt_tuning_init_text
        config.tokenizer_name_or_path = tokenizer


def require_prompt_fits(model: nn.Module) -> None:
    """Refuses a loaded prompt whose width is not that of the model's embeddings.

    Raises:
        ValueError: both widths.
    """
    wrapper = prompted(model)
    if wrapper is None:
        return
    found, wanted = _embedding(wrapper).embedding_dim, _words(wrapper).embedding_dim
    if found != wanted:
        raise ValueError(f"its virtual tokens have {found} values, the model's tokens {wanted}")


def with_prompt(model: PeftModel, ids: Tensor) -> Tensor:
    """``[B, V + T, H]``: the prompt, then the embeddings of ``ids [B, T]``, in their dtype."""
    words = _words(model)(ids)
    prompt = model.get_prompt(batch_size=ids.shape[0]).to(words.dtype)
    return torch.cat((prompt, words), dim=1)


def generation_inputs(model: PeftModel, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Inputs of ``generate`` for prompts that are padded on the left.

    The virtual tokens stand between padding and text, so that every row sees them at the distance
    it was trained with. (PEFT's own ``generate`` puts them before the padding.)

    Args:
        model: the wrapper.
        ids: ``[B, T]``, padded on the left.
        mask: ``[B, T]``, 0 on padding.
    """
    words = _words(model)(ids)
    prompt = model.get_prompt(batch_size=ids.shape[0]).to(words.dtype)
    padding = (mask == 0).sum(1).tolist()
    rows = [
        torch.cat((words[row, :pad], prompt[row], words[row, pad:]))
        for row, pad in enumerate(padding)
    ]
    places = torch.arange(words.shape[1] + prompt.shape[1], device=mask.device)
    starts = torch.tensor(padding, device=mask.device)[:, None]
    return {"inputs_embeds": torch.stack(rows), "attention_mask": (places >= starts).to(mask.dtype)}


@torch.no_grad()
def prompt_state(model: nn.Module) -> dict[str, Tensor] | None:
    """What PEFT's folder holds of a learned prompt: the prompt itself; None for other adapters.

    Computed without dropout: PEFT would save one random draw of a network in training mode.
    """
    wrapper = prompted(model)
    if wrapper is None:
        return None
    encoder = _encoder(wrapper)
    training = encoder.training
    encoder.eval()
    prompt = wrapper.get_prompt_embedding_to_save(str(wrapper.active_adapter))
    encoder.train(training)
    return {PROMPT_KEY: prompt.contiguous()}


def prompt_count(model: nn.Module) -> int | None:
    """Trainable parameters of the prompt by formula; None when the model has none that we know."""
    wrapper = prompted(model)
    if wrapper is None:
        return None
    config: Any = wrapper.active_peft_config
    width = _words(wrapper).embedding_dim
    if config.peft_type == PeftType.PROMPT_TUNING:
        return prompt_parameters(config.num_virtual_tokens, width)
    if config.peft_type != PeftType.P_TUNING:
        return None
    return prompt_parameters(
        config.num_virtual_tokens,
        width,
        encoder="lstm" if config.encoder_reparameterization_type == "LSTM" else "mlp",
        hidden_size=config.encoder_hidden_size,
        num_layers=config.encoder_num_layers,
    )


@torch.no_grad()
def encode(tensors: Mapping[str, Tensor], settings: PromptSettings, *, method: str) -> Tensor:
    """The prompt ``[V, H]`` that a checkpoint's tensors stand for, computed again on the CPU.

    Args:
        tensors: the trained tensors by their names in the model.
        settings: the prompt.
        method: ``prompt_tuning`` or ``p_tuning``.

    Raises:
        RuntimeError: the tensors do not fit the settings.
        KeyError: a tensor is missing.
    """
    state = {name.removeprefix(_ENCODER_PREFIX): tensor for name, tensor in tensors.items()}
    if method == "prompt_tuning":
        return state["embedding.weight"]
    config: Any = _config(settings, method, state["embedding.weight"].shape[1])
    config.num_transformer_submodules = 1
    encoder = PromptEncoder(config).eval()
    encoder.load_state_dict(state)
    return encoder(torch.arange(settings.num_virtual_tokens)[None])[0]
