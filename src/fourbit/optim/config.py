"""The optimizer's settings, parameter groups and learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import nn

from fourbit.optim.adamw import AdamW, Paging
from fourbit.settings import Settings

Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
]


class OptimConfig(Settings):
    """AdamW and its schedule."""

    lr: float = Field(default=2e-4, gt=0, le=10, description="peak learning rate")
    optim_bits: Literal[32, 8] = Field(default=32, description="bits of the optimizer's state")
    paged: Paging = Field(
        default="auto",
        description="optimizer's state in pages: auto pages when memory runs short,"
        " always keeps three pages in memory, off keeps all",
    )
    weight_decay: float = Field(default=0.0, ge=0, lt=1, description="decoupled weight decay")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="decay of the second moment")
    eps: float = Field(default=1e-8, gt=0, description="keeps the update finite")
    max_grad_norm: float = Field(default=0.3, ge=0, description="gradient clipping; 0 for none")
    schedule: Schedule = Field(default="cosine", description="learning-rate schedule")
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1, description="share of steps to warm up")

    @field_validator("paged", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        return "off" if value is False else value  # what YAML makes of it


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    config: OptimConfig,
    *,
    paged: Paging | None = None,
    folder: Path | None = None,
) -> AdamW:
    """AdamW over the trainable parameters; vectors (norms, biases, magnitudes) are not decayed.

    Args:
        parameters: what is trained.
        config: the settings.
        paged: instead of the setting, where a plan decided.
        folder: where pages of a CPU's state may go.
    """
    trainable = list(parameters)
    decayed = [p for p in trainable if p.dim() >= 2]
    others = [p for p in trainable if p.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": config.weight_decay}]
    if others:
        groups.append({"params": others, "weight_decay": 0.0})
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        optim_bits=config.optim_bits,
        paged=paged or config.paged,
        folder=folder,
    )


def lr_factors(config: OptimConfig, *, total_steps: int) -> Callable[[int], float]:
    """The schedule as a pure function: steps already done -> factor on the peak rate.

    Transformers' schedules are functions of the step; taken as such there is no scheduler state
    that a resume could lose.
    """
    from transformers import get_scheduler

    parameter = nn.Parameter(torch.zeros(1))
    scheduler = get_scheduler(
        config.schedule,
        torch.optim.SGD([parameter], lr=1.0),
        num_warmup_steps=round(config.warmup_ratio * total_steps),
        num_training_steps=max(total_steps, 1),
    )
    return scheduler.lr_lambdas[0]  # type: ignore[attr-defined]  # every schedule above is a LambdaLR
