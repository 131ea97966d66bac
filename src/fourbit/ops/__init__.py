"""Typed functions over the registered ops; importing this registers the plain PyTorch kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fourbit import native

# The imports register kernels: an op without a default one could be defined but not called.
from fourbit.ops import attention_schema as attention_schema
from fourbit.ops import cpu as cpu
from fourbit.ops import loss as loss
from fourbit.ops import reference as reference
from fourbit.ops import schema
from fourbit.ops.cpu import quantize as cpu_quantize
from fourbit.ops.reference import dropout_threshold as dropout_threshold
from fourbit.ops.schema import dropout_mask as dropout_mask
from fourbit.ops.triton import kernels as gpu
from fourbit.ops.triton import registry as triton

Scales = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""``(packed, absmax, nested_absmax, nested_offset)`` as in `fourbit.ops.schema`."""


def has_kernels(device: torch.device) -> bool:
    """Whether a device has kernels of ours: those of csrc/ on a CPU, Triton's on a GPU."""
    if triton.imagining() or triton.interpreted():
        return True
    return triton.multiplies(device) if device.type == "cuda" else native.isa() is not None


def fused_dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """Dtypes of activations that attention and the parts of fused layers take on a device."""
    if device.type == "cuda":
        return triton.DTYPES
    return (torch.float32, torch.bfloat16) if device.type == "cpu" else ()


def quantize_4bit(weight: Tensor, *, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    """Packed codes uint8 ``[ceil(n/2)]`` and float32 absmax ``[b]`` of any floating tensor."""
    return torch.ops.fourbit.quantize_4bit(weight, blocksize, quant_type)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization: codes uint8 ``[b]``, nested absmax ``[m]``, offset ``[1]``."""
    return torch.ops.fourbit.quantize_absmax(absmax)


def dequantize_4bit(
    scales: Scales, *, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The weight as ``shape`` in ``dtype``."""
    return torch.ops.fourbit.dequantize_4bit(*scales, blocksize, quant_type, list(shape), dtype)


def dequantize_into(
    scales: Scales, *, blocksize: int, quant_type: str, out: Tensor, first: int = 0
) -> Tensor:
    """Fills ``out``, contiguous, with the weights from flat index ``first`` on, in its dtype.

    For callers that expand one weight after the other into the same memory; not for graphs.
    """
    if gpu.dequantize_into(
        scales, blocksize=blocksize, quant_type=quant_type, out=out, first=first
    ):
        return out
    return cpu_quantize.dequantize_into(
        scales, blocksize=blocksize, quant_type=quant_type, out=out, first=first
    )


def count_nonfinite(x: Tensor) -> tuple[int, int]:
    """``(first flat index, count)`` of NaN and Inf in ``x``; the index is past the end if none."""
    return cpu_quantize.count_nonfinite(x)


def linear_4bit(
    x: Tensor,
    scales: Scales,
    bias: Tensor | None,
    *,
    blocksize: int,
    quant_type: str,
    out_features: int,
) -> Tensor:
    """``x · dequant(W)ᵀ + bias``; differentiable in ``x`` and ``bias``."""
    return torch.ops.fourbit.linear_4bit(x, *scales, bias, blocksize, quant_type, out_features)


def draw_seed(width: int) -> Tensor:
    """A dropout seed, int64 ``[1]``, for activations of ``width`` columns."""
    seed = torch.randint(2**62, (1,))
    return seed if _before == 0 else reference.seed_after(seed, _before * width)


_before = 0


@contextmanager
def dropout_after(positions: int) -> Iterator[None]:
    """Inside, activations are part of a batch, ``positions`` of which come before them.

    Masks are then that part of the whole batch's masks: a batch in pieces drops what it would have
    dropped in one.
    """
    global _before  # noqa: PLW0603  # backward may run in threads of autograd's own
    outside, _before = _before, positions
    try:
        yield
    finally:
        _before = outside


def lora_linear_4bit(
    x: Tensor,
    scales: Scales,
    bias: Tensor | None,
    adapter: tuple[Tensor, Tensor, float, float],
    *,
    blocksize: int,
    quant_type: str,
) -> Tensor:
    """Base and adapter as one operation; ``adapter`` is ``(lora_A, lora_B, scaling, dropout)``.

    With dropout a seed is drawn from torch's CPU generator, so that gradient checkpointing, which
    restores that generator, recomputes with the same mask.
    """
    lora_A, lora_B, scaling, dropout = adapter
    seed = draw_seed(x.shape[-1]) if dropout > 0 else None
    y, _xa = torch.ops.fourbit.lora_linear_4bit(
        x, *scales, bias, lora_A, lora_B, seed, blocksize, quant_type, scaling, dropout
    )
    return y


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Row-wise INT8 of ``[N, K]``: codes int8 ``[N, K]`` and float32 absmax ``[N]``."""
    return schema.quantize_int8(weight)


def dequantize_int8(codes: Tensor, absmax: Tensor, *, dtype: torch.dtype) -> Tensor:
    """``code * absmax / 127`` as ``[N, K]`` in ``dtype``."""
    return torch.ops.fourbit.dequantize_int8(codes, absmax, dtype)


def linear_int8(
    x: Tensor, weight: Tensor, absmax: Tensor | None, bias: Tensor | None, *, threshold: float
) -> Tensor:
    """LLM.int8 product; differentiable in ``x``, ``bias`` and a floating ``weight``."""
    return torch.ops.fourbit.linear_int8(x, weight, absmax, bias, threshold)


def cross_entropy_rows_(
    logits: Tensor,
    labels: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    gradient: bool = True,
) -> Tensor:
    """Losses float32 ``[M]`` of logits ``[M, V]``, which become the gradient of the losses' sum.

    Args:
        logits: changed in place, unless ``gradient`` is false; any floating dtype.
        labels: ``[M]``, each in ``[0, V)``.
        scale: of the logits, before the softcap.
        softcap: ``softcap * tanh(scale * logits / softcap)`` counts, where it is given.
        gradient: whether the gradient is wanted.
    """
    return torch.ops.fourbit.cross_entropy_rows_(logits, labels, scale, softcap, gradient)
