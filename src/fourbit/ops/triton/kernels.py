"""The ops' CUDA kernels. Each imports its Triton kernel when it is first called."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fourbit.ops import attention_schema as plain_attention
from fourbit.ops import loss as plain_loss
from fourbit.ops import reference
from fourbit.ops.triton.registry import (
    DTYPES,
    cuda_kernel,
    imagining,
    multiplies,
    serves,
)

_MOST_ROWS = 64
"""Up to here a fused product reads 4-bit weights faster than the library reads expanded ones."""
_INT_ROWS = 32  # the library's int8 product takes more than 16 rows
_INT_MULTIPLE = 8


@cuda_kernel("quantize_4bit")
def quantize_4bit(weight: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    """As `fourbit.ops.reference.quantize_4bit`."""
    if not serves(weight):
        return reference.quantize_4bit(weight, blocksize, quant_type)
    from fourbit.ops.triton.quantize import quantize_4bit

    return quantize_4bit(weight, blocksize, quant_type)


@cuda_kernel("dequantize_4bit")
def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """As `fourbit.ops.reference.dequantize_4bit`."""
    arguments = packed, absmax, nested_absmax, nested_offset, blocksize, quant_type, shape, dtype
    if dtype not in DTYPES or not serves(packed, absmax):
        return reference.dequantize_4bit(*arguments)
    from fourbit.ops.triton.dequantize import dequantize_4bit

    return dequantize_4bit(*arguments)


def dequantize_into(
    scales: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    *,
    blocksize: int,
    quant_type: str,
    out: Tensor,
    first: int,
) -> bool:
    """Fills ``out`` as `fourbit.ops.dequantize_into`; False where no kernel serves."""
    if imagining():
        return True
    if first % blocksize or not out.is_contiguous() or not serves(out, scales[0], scales[1]):
        return False
    from fourbit.ops.triton import dequantize

    dequantize.dequantize_into(
        scales, blocksize=blocksize, quant_type=quant_type, out=out, first=first
    )
    return True


@cuda_kernel("linear_4bit")
def linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    blocksize: int,
    quant_type: str,
    out_features: int,
) -> Tensor:
    """As `fourbit.ops.reference.linear_4bit`; few rows without expanding the weight."""
    scales = packed, absmax, nested_absmax, nested_offset
    rows = x.reshape(-1, x.shape[-1])
    few = rows.shape[0] <= _MOST_ROWS and multiplies(x.device)
    if few and serves(rows, packed, absmax):
        from fourbit.ops.triton.product import linear_few

        y = linear_few(
            rows,
            scales,
            bias,
            blocksize=blocksize,
            quant_type=quant_type,
            out_features=out_features,
        )
        if y is not None:
            return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], out_features])
    return reference.linear_4bit(x, *scales, bias, blocksize, quant_type, out_features)


@cuda_kernel("lora_linear_4bit")
def lora_linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    blocksize: int,
    quant_type: str,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """As `fourbit.ops.reference.lora_linear_4bit`."""
    weight = packed, absmax, nested_absmax, nested_offset
    y = linear_4bit(x, *weight, bias, blocksize, quant_type, lora_B.shape[0])
    return y, reference.add_adapter_(y, x, lora_A, lora_B, seed, scaling, dropout, dropped)


def dropped(x: Tensor, seed: Tensor, dropout: float) -> Tensor:
    """``x`` times its mask."""
    if not serves(x):
        return x * reference.dropout_mask(x, seed, dropout)
    from fourbit.ops.triton.elementwise import drop

    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    drop(x, out, seed=seed, dropout=dropout)
    return out


@cuda_kernel("dropout_mask")
def dropout_mask(x: Tensor, seed: Tensor, dropout: float) -> Tensor:
    """As `fourbit.ops.reference.dropout_mask`."""
    if not serves(x):
        return reference.dropout_mask(x, seed, dropout)
    from fourbit.ops.triton.elementwise import drop

    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    drop(None, out, seed=seed, dropout=dropout)
    return out


@cuda_kernel("cross_entropy_rows_")
def cross_entropy_rows_(
    logits: Tensor, labels: Tensor, scale: float, softcap: float | None, gradient: bool
) -> Tensor:
    """As `fourbit.ops.loss.cross_entropy_rows_`."""
    if not serves(logits) or (logits.shape[1] > 1 and logits.stride(1) != 1):
        return plain_loss.cross_entropy_rows_(logits, labels, scale, softcap, gradient)
    from fourbit.ops.triton import loss

    return loss.cross_entropy_rows_(logits, labels, scale, softcap, gradient)


@cuda_kernel("linear_int8")
def linear_int8(
    x: Tensor, weight: Tensor, absmax: Tensor | None, bias: Tensor | None, threshold: float
) -> Tensor:
    """As `fourbit.ops.reference.linear_int8`, its sums by the library's int8 product."""
    return reference.linear_int8(x, weight, absmax, bias, threshold, product=int8_product)


def int8_product(x: Tensor, weight: Tensor) -> Tensor:
    """Exact ``x · weightᵀ`` of int8 matrices, int32 ``[M, N]``.

    The library takes more than 16 rows, and depths and widths that are multiples of 8.
    """
    rows, width = x.shape[0], weight.shape[0]
    if not x.numel() or not weight.numel():
        return reference.int8_product(x, weight)
    short = -x.shape[1] % _INT_MULTIPLE
    pad = torch.nn.functional.pad
    x = pad(x, (0, short, 0, max(0, _INT_ROWS - rows)))
    weight = pad(weight, (0, short, 0, -width % _INT_MULTIPLE))
    return torch.ops.aten._int_mm(x, weight.t())[:rows, :width]


@cuda_kernel("attention")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor | None,
    scale: float,
    softcap: float,
    shared: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `fourbit.ops.attention_schema.attention`, without a matrix of all scores."""
    if not (serves(q, k, v) and multiplies(q.device)):
        return plain_attention.attention(q, k, v, first, scale, softcap, shared)
    from fourbit.ops.triton.attention import run_forward

    out = q.new_empty((*q.shape[:3], v.shape[-1]))
    return out, run_forward(q, k, v, first, scale=scale, softcap=softcap, out=out, shared=shared)


@cuda_kernel("attention_backward")
def attention_backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    first: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fourbit.ops.attention_schema.attention_backward`."""
    if not (serves(grad_o, q, k, v, o) and multiplies(q.device)):
        return plain_attention.attention_backward(grad_o, q, k, v, o, lse, first, scale, softcap)
    from fourbit.ops.triton.attention import run_backward

    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    form = {"scale": scale, "softcap": softcap}
    run_backward(grad_o, (q, k, v, o), lse, first, **form, grads=grads)
    return grads
