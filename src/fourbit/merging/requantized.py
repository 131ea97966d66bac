"""What merging back into 4 bits would lose, counted on tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fourbit.quantize import QuantConfig, dequantize_4bit, quantize_4bit

MOST_LOST = 0.5
"""Rounding error relative to the update above which a requantized merge is refused."""


@dataclass(frozen=True)
class Requantized:
    """One or more tensors, merged and rounded to 4 bits again.

    Attributes:
        weights: how many.
        unmoved: whose 4-bit code the update did not move.
        update: sum of squares of what the adapter adds.
        lost: sum of squares of what the rounding takes away or puts in its place.
    """

    weights: int = 0
    unmoved: int = 0
    update: float = 0.0
    lost: float = 0.0

    def __add__(self, other: Requantized) -> Requantized:
        return Requantized(
            self.weights + other.weights,
            self.unmoved + other.unmoved,
            self.update + other.update,
            self.lost + other.lost,
        )

    def line(self) -> str:
        """For people."""
        return (
            f"rounded back to 4 bits: {self.unmoved_share:.1%} of {self.weights:,} weights keep"
            f" their code; the rounding error is {self.lost_share:.2f} of the update"
        )

    @property
    def unmoved_share(self) -> float:
        """Share of the weights whose code stays."""
        return self.unmoved / self.weights if self.weights else 0.0

    @property
    def lost_share(self) -> float:
        """Rounding error relative to the update, by norm: 0 keeps it, 1 is as large as it."""
        return (self.lost / self.update) ** 0.5 if self.update else 0.0


def count_requantized(base: Tensor, merged: Tensor, quant: QuantConfig) -> Requantized:
    """Rounds a merged weight to 4 bits again and says what became of the update.

    Args:
        base: float32 ``[out, in]``, as the 4 bits restore it.
        merged: the same with the adapter's update.
        quant: the 4-bit format of both.

    Raises:
        ValueError: INT8, whose merge needs no such count.
    """
    before, _ = _pack(base, quant)
    after, restored = _pack(merged, quant)
    codes = [torch.stack((p.view(-1) >> 4, p.view(-1) & 15), 1).view(-1)[: base.numel()]
             for p in (before, after)]  # fmt: skip
    return Requantized(
        weights=base.numel(),
        unmoved=int((codes[0] == codes[1]).sum()),
        update=float((merged - base).double().square().sum()),
        lost=float((restored - merged).double().square().sum()),
    )


def _pack(weight: Tensor, quant: QuantConfig) -> tuple[Tensor, Tensor]:
    if quant.quant_type == "int8":
        raise ValueError("only 4-bit formats are counted")
    packed, state = quantize_4bit(
        weight,
        quant_type=quant.quant_type,
        blocksize=quant.blocksize,
        double_quant=quant.double_quant,
    )
    return packed, dequantize_4bit(packed, state, dtype=torch.float32)
