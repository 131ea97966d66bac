"""What a run does differently when it trains a prompt: settings, lengths, injection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fourbit.errors import InputError
from fourbit.integrations.prompts import add_prompt, name_start, token_embeddings
from fourbit.methods import DEFAULT_LR, trains_prompt
from fourbit.training.config import TrainConfig

_SHORTEST = 8
"""The least that `data.max_length` allows."""


@dataclass(frozen=True)
class Adjusted:
    """A setting that was left at its default and is another one for this method."""

    key: str
    origin: str
    line: str


def settle(config: TrainConfig) -> tuple[TrainConfig, list[Adjusted]]:
    """Replaces general defaults that do not suit the method; what the user set stays.

    Returns:
        The configuration, and what was changed, to be shown and recorded.
    """
    notes: list[Adjusted] = []
    lr = DEFAULT_LR.get(config.method)
    if lr is not None and "lr" not in config.optim.model_fields_set:
        optim = config.optim.model_copy(update={"lr": lr})
        config = config.model_copy(update={"optim": optim})
        origin = f"default of {config.method}"
        notes.append(Adjusted("optim.lr", origin, f"optim.lr: {lr:g}, the {origin}"))
    if trains_prompt(config.method) and config.data.packing:
        data = config.data.model_copy(update={"packing": False})
        config = config.model_copy(update={"data": data})
        line = f"data.packing: false, since with {config.method} every row begins with the prompt"
        notes.append(Adjusted("data.packing", f"method {config.method}", line))
    return config, notes


def text_context(config: TrainConfig, model: PretrainedConfig) -> int | None:
    """Tokens of text the model's context has room for; None when the model names no limit.

    Raises:
        InputError: the virtual tokens leave no room.
    """
    context = getattr(model.get_text_config(), "max_position_embeddings", None)
    if not context or not trains_prompt(config.method):
        return context or None
    count = config.prompt.num_virtual_tokens
    room = context - count
    if room < _SHORTEST:
        raise InputError(
            "no-room",
            where="prompt.num_virtual_tokens",
            what=f"{count} virtual tokens leave no room in the model's context of {context}",
            fix=f"at most {context - _SHORTEST}" if context > _SHORTEST else "use method: qlora",
        )
    if "max_length" in config.data.model_fields_set and config.data.max_length > room:
        raise InputError(
            "max-length",
            where="data.max_length",
            what=f"{config.data.max_length} and {count} virtual tokens are more than the model's"
            f" context of {context}",
            fix=f"at most data.max_length: {room}",
        )
    return room


def inject_prompt(
    model: PreTrainedModel,
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    base: str,
) -> PeftModel:
    """Puts a fresh prompt before a frozen model; initial values are a function of the seed.

    Args:
        model: quantized or plain.
        config: the run.
        tokenizer: reads the text the prompt starts from.
        base: what the saved prompt names as its base model.

    Raises:
        InputError: the initial text holds no token.
        ModelError: the architecture takes no embeddings as input.
    """
    torch.manual_seed(config.seed)
    ids = None
    if config.method == "prompt_tuning":
        ids = start_ids(config, tokenizer, rows=token_embeddings(model).num_embeddings)
    wrapped = add_prompt(model, config.prompt, method=config.method, init_ids=ids)
    wrapped.peft_config["default"].base_model_name_or_path = base
    if config.method == "prompt_tuning":
        name_start(wrapped, config.prompt, tokenizer=base)
    return wrapped


def start_ids(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, *, rows: int
) -> list[int] | None:
    """The tokens whose embeddings the prompt starts from; None for noise.

    A text is repeated, or cut, to as many tokens as the prompt has.

    Args:
        config: the run; random tokens come from torch's generator.
        tokenizer: the model's.
        rows: of the model's embedding, which may have more than the tokenizer has tokens.

    Raises:
        InputError: the text holds no token.
    """
    prompt = config.prompt
    count = prompt.num_virtual_tokens
    if prompt.prompt_tuning_init == "random":
        return None
    if prompt.prompt_tuning_init == "text":
        found = tokenizer(prompt.prompt_tuning_init_text, add_special_tokens=False).input_ids
        if not found:
            raise InputError(
                "empty-text",
                where="prompt.prompt_tuning_init_text",
                what="the tokenizer makes no token of it",
                fix="give words, or prompt_tuning_init: sample_vocab",
            )
        return [found[place % len(found)] for place in range(count)]
    special = set(tokenizer.all_special_ids)
    ordinary = [token for token in range(min(rows, len(tokenizer))) if token not in special]
    return [ordinary[place] for place in torch.randint(len(ordinary), (count,)).tolist()]
