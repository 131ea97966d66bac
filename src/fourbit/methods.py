"""The methods of fine-tuning: how each holds the base, and which settings it reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Method = Literal["qlora", "lora", "full", "prompt_tuning", "p_tuning"]

_QUANTIZED = frozenset({"qlora", "prompt_tuning", "p_tuning"})
_PROMPT = frozenset({"prompt_tuning", "p_tuning"})

READ_BY: Mapping[str, frozenset[str]] = {
    "quant": _QUANTIZED,
    "lora": frozenset({"qlora", "lora"}),
    "prompt": _PROMPT,
}
"""Settings sections that only some methods read."""

DEFAULT_LR: Mapping[str, float] = {"prompt_tuning": 3e-2, "p_tuning": 3e-3}
"""Peak learning rates of the methods for which that of `OptimConfig` is far too small."""


def quantized_base(method: str) -> bool:
    """Whether the method trains on a frozen base of 4 (or 8) bits."""
    return method in _QUANTIZED


def trains_prompt(method: str) -> bool:
    """Whether the method trains virtual tokens in front of the text, and nothing in the model."""
    return method in _PROMPT
