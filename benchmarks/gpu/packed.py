"""Weights in 4 bits for the kernels' sections: many different ones, so that no cache holds them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fourbit import ops
from fourbit.quantize import quantize_4bit
from gpu.floors import BYTES_4BIT
from inside import Skipped, imported

ROTATED = 128 << 20
"""Packed bytes that are gone through before a weight comes again; an H200 caches 60 MB."""
FORMAT: dict[str, Any] = {"blocksize": 64, "quant_type": "nf4"}


@dataclass(frozen=True)
class Packed:
    """Copies of a layer's weight, each with values of its own.

    Attributes:
        shape: ``(N, K)``.
        plain: the first, before it was quantized.
        ours: packed weight and scales of each.
        theirs: the same weights as bitsandbytes packs them, ``(packed, state)``; empty without it.
    """

    shape: tuple[int, int]
    plain: Tensor
    ours: list[ops.Scales]
    theirs: list[tuple[Tensor, Any]]

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


def bitsandbytes_functional() -> Any:
    """bitsandbytes' functions; None where it is not there."""
    try:
        return imported("bitsandbytes.functional")
    except Skipped:
        return None


def make(shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Packed:
    """Random weights; as many as fill `ROTATED` on a GPU, two on a CPU."""
    count = 2
    if device.type == "cuda":
        count = max(2, min(24, math.ceil(ROTATED / (math.prod(shape) * BYTES_4BIT))))
    generator = torch.Generator(device).manual_seed(0)
    functional = bitsandbytes_functional()
    ours, theirs, plain = [], [], None
    for _ in range(count):
        weight = torch.empty(shape, device=device, dtype=dtype)
        weight.normal_(0, 0.02, generator=generator)
        packed, state = quantize_4bit(weight, double_quant=True, name="weight", **FORMAT)
        ours.append((packed, state.absmax, state.nested_absmax, state.nested_offset))
        if functional is not None:
            theirs.append(functional.quantize_4bit(weight, compress_statistics=True, **FORMAT))
        plain = weight if plain is None else plain
    assert plain is not None
    return Packed(shape, plain, ours, theirs)


def scales_of(theirs: tuple[Tensor, Any]) -> ops.Scales:
    """What bitsandbytes packed, in the form our operations take."""
    packed, state = theirs
    return packed, state.absmax, state.state2.absmax, state.offset.reshape(1)


def reference(packed: Packed, index: int, dtype: torch.dtype) -> Tensor:
    """The weight as the plain PyTorch operations restore it."""
    from fourbit.ops import reference as plain

    return plain.dequantize_4bit(
        *packed.ours[index], FORMAT["blocksize"], FORMAT["quant_type"], packed.shape, dtype
    )
