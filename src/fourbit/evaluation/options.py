"""What a user says about an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from fourbit.data import DataConfig
from fourbit.quantize import QuantConfig


@dataclass(frozen=True)
class EvalOptions:
    """How a model is evaluated.

    Attributes:
        adapter: a PEFT folder or a run directory.
        quant: how the base is held; None for plain weights.
        dtype: of activations and unquantized weights; None chooses by hardware.
        chat_template: built-in name or file instead of the tokenizer's template.
        limit: rows of each task; None: all.
        shots: solved rows before each question, the first ones of ``shots_from``.
        shots_from: a file of rows of the same shape.
        batch_size: rows of one forward pass; None: by their length.
        window: tokens of a perplexity window.
        stride: tokens between windows.
        max_new_tokens: of generated answers.
        data: how rows of questions and answers are read.
        include: folder of lm-eval task files, for tasks without a file of their own.
    """

    adapter: Path | None = None
    quant: QuantConfig | None = None
    dtype: torch.dtype | None = None
    chat_template: str | None = None
    limit: int | None = None
    shots: int = 0
    shots_from: Path | None = None
    batch_size: int | None = None
    window: int | None = None
    stride: int | None = None
    max_new_tokens: int = 128
    data: DataConfig = field(default_factory=DataConfig)
    include: Path | None = None
