"""Checks of a saved prompt that `fourbit verify` makes from the files alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fourbit.integrations.prompts import PROMPT_KEY, encode
from fourbit.prompts import prompt_parameters
from fourbit.training.config import TrainConfig

_SAME_SUM = 1e-5
"""Relative difference of the same products summed in another order."""


def tensor_check(tensors: Mapping[str, Tensor], config: TrainConfig) -> tuple[str, bool, str]:
    """The file holds one prompt of the configured length, every position of it alive."""
    name, count = "adapter_tensors", config.prompt.num_virtual_tokens
    prompt = tensors.get(PROMPT_KEY)
    if prompt is None or len(tensors) != 1:
        return name, False, f"holds {', '.join(sorted(tensors)[:3])} and not {PROMPT_KEY} alone"
    if prompt.dim() != 2 or prompt.shape[0] != count:
        return name, False, f"shape {list(prompt.shape)}, {count} virtual tokens are configured"
    dead = int((prompt == 0).all(1).sum())
    if dead:
        return name, False, f"{dead} virtual tokens are zero"
    return name, True, f"{count} virtual tokens of {prompt.shape[1]} finite values"


def count_check(
    folder: Path, prompt: Tensor, config: TrainConfig, recorded: object
) -> tuple[str, bool, str]:
    """adapter_config.json describes this prompt, and the recorded count follows from it."""
    try:
        values = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        length, width = int(values["num_virtual_tokens"]), int(values["token_dim"])
        kind = str(values["peft_type"]).lower()
        lstm = str(values.get("encoder_reparameterization_type")).upper() == "LSTM"
        hidden = int(values.get("encoder_hidden_size") or 0)
        layers = int(values.get("encoder_num_layers") or 2)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return "adapter_config", False, f"adapter_config.json is unreadable ({error})"
    if kind != config.method or [length, width] != list(prompt.shape):
        found = f"{kind} with {length} x {width}"
        return "adapter_count", False, f"{found} described, {list(prompt.shape)} in the file"
    encoder = None if kind == "prompt_tuning" else ("lstm" if lstm else "mlp")
    count = prompt_parameters(length, width, encoder=encoder, hidden_size=hidden, num_layers=layers)
    if count != recorded:
        return "adapter_count", False, f"{count:,} parameters by the settings, {recorded} recorded"
    detail = f"{count:,} parameters were trained, {length} x {width} are kept"
    return "adapter_count", True, detail


def checkpoint_difference(
    tensors: Mapping[str, Tensor], saved: Tensor | None, config: TrainConfig
) -> str | None:
    """How the saved prompt differs from what a checkpoint's tensors give; None when equal.

    Prompt tuning is compared bit by bit; P-tuning's network is computed again, where another
    machine may sum in another order.
    """
    if saved is None:
        return PROMPT_KEY
    try:
        wanted = encode(tensors, config.prompt, method=config.method).to(saved.dtype)
    except (KeyError, RuntimeError) as error:
        return f"its tensors ({str(error).splitlines()[0]})"
    if wanted.shape != saved.shape:
        return f"shape {list(saved.shape)}"
    if config.method == "prompt_tuning":
        return None if torch.equal(wanted, saved) else PROMPT_KEY
    tolerance = max(_SAME_SUM, 2 * torch.finfo(saved.dtype).eps)
    difference = (wanted.float() - saved.float()).abs().max()
    return None if difference <= tolerance * wanted.float().abs().max() else PROMPT_KEY
