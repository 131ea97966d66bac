"""Dropout masks on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fourbit import native
from fourbit.ops import reference
from fourbit.ops.cpu.registry import NARROW_OR_WIDE, cpu_kernel, threads


def run_dropout(x: Tensor, out: Tensor, *, seed: int, dropout: float, add: bool) -> None:
    """Writes ``x * mask`` into ``out``, or adds it there; contiguous, float32 or bfloat16."""
    # rounded as the mask's own values are
    scale = native.value(torch.ones((), dtype=x.dtype, device="cpu").div_(1.0 - dropout))
    native.kernel("dropout", "pplllfiii")(
        *native.addresses(x, out),
        x.numel(),
        seed,
        reference.dropout_threshold(dropout),
        scale,
        int(add),
        native.DTYPES[x.dtype],
        threads(),
    )


@cpu_kernel("dropout_mask")
def dropout_mask(x: Tensor, seed: Tensor, dropout: float) -> Tensor:
    """As `reference.dropout_mask`, for float32 and bfloat16."""
    if native.isa() is None or x.dtype not in NARROW_OR_WIDE:
        return reference.dropout_mask(x, seed, dropout)
    mask = torch.ones(x.shape, dtype=x.dtype, device="cpu")
    run_dropout(mask, mask, seed=int(native.value(seed)), dropout=dropout, add=False)
    return mask
