"""Dropout masks on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fourbit import native
from fourbit.ops import reference
from fourbit.ops.cpu.registry import cpu_kernel, threads


@cpu_kernel("dropout_mask")
def dropout_mask(x: Tensor, seed: Tensor, dropout: float) -> Tensor:
    """As `reference.dropout_mask`, for float32 and bfloat16."""
    if native.isa() is None or x.dtype not in (torch.float32, torch.bfloat16):
        return reference.dropout_mask(x, seed, dropout)
    mask = torch.ones(x.shape, dtype=x.dtype)
    scale = float(torch.ones((), dtype=x.dtype).div_(1.0 - dropout))
    limit = reference.dropout_threshold(dropout)
    native.kernel("dropout", "pplllfiii")(
        mask.data_ptr(),
        mask.data_ptr(),
        x.numel(),
        int(seed.item()),
        limit,
        scale,
        0,
        native.DTYPES[x.dtype],
        threads(),
    )
    return mask
