"""One optimizer step, the same for all sides of a training comparison, whatever the device.

All take the same ids, clip to the same norm and update with AdamW; what differs is what loads them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

RANK, ALPHA, LR, CLIP = 16, 32, 2e-4, 0.3
Loss = Callable[[Tensor], Tensor]


@dataclass
class Trainee:
    """A model ready to be trained.

    Attributes:
        model: with its adapters.
        loss: mean token loss of ``[B, T]`` ids.
        norm: of the gradients of the last step, before they were clipped.
    """

    model: nn.Module
    loss: Loss
    norm: Tensor | None = None

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        fused = self.parameters[0].is_cuda  # one launch instead of some hundred
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            self.parameters, lr=LR, weight_decay=0.0, fused=fused or None
        )

    def step(self, ids: Tensor) -> float:
        """Forward, backward, clip, update; the loss before the update."""
        loss = self.loss(ids)
        loss.backward()
        self.norm = nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def lora(dropout: float = 0.0, r: int = RANK) -> Any:
    """PEFT's configuration of all sides that use PEFT themselves."""
    from peft import LoraConfig

    return LoraConfig(
        r=r,
        lora_alpha=2 * r,
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def own_loss(model: nn.Module) -> Loss:
    """The loss that the model itself computes from labels."""

    def loss(ids: Tensor) -> Tensor:
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss

    return loss


def as_batch(ids: Tensor, *, packed: bool) -> Any:
    """Our batch: every token carries loss; packed, each row holds documents of mixed lengths."""
    from fourbit.data import Batch

    rows, length = ids.shape
    positions = torch.arange(length).repeat(rows, 1)
    labels = ids.clone()
    if packed:
        starts = document_starts(length)
        for start in starts:
            positions[:, start:] = torch.arange(length - start)
            labels[:, start] = -100
    supervised = int((labels[:, 1:] != -100).sum())
    return Batch(ids, positions, labels, num_supervised=supervised, rows=[])


def document_starts(length: int) -> list[int]:
    """Documents of 60, 120, 240, 60, ... tokens: their median is that of short chats."""
    starts, at = [], 0
    while True:
        for size in (60, 120, 240, 90):
            at += size
            if at >= length:
                return starts
            starts.append(at)
