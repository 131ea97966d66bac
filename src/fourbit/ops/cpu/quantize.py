"""The storage formats on the CPU: 4-bit and int8, both ways, with the bytes of the reference.

Native functions check nothing: whatever they were not made for, tensors too short included, goes
to the plain PyTorch kernel, which has the error messages too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fourbit import codebook, native
from fourbit.ops import reference
from fourbit.ops.cpu.registry import cpu_kernel, threads

_CPU = torch.device("cpu")
_WIDE = (torch.float32, torch.int32)


def _served(x: Tensor) -> bool:
    return x.dtype in native.DTYPES and x.device == _CPU and native.isa() is not None


@cpu_kernel("quantize_4bit")
def quantize_4bit(weight: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    """As `fourbit.ops.reference.quantize_4bit`; absmax is NaN or Inf where a block holds such."""
    if not _served(weight) or blocksize not in codebook.BLOCKSIZES:
        return reference.quantize_4bit(weight, blocksize, quant_type)
    weight, count = weight.contiguous(), weight.numel()
    packed = torch.empty((count + 1) // 2, dtype=torch.uint8, device=_CPU)
    absmax = torch.empty(-(-count // blocksize), dtype=torch.float32, device=_CPU)
    native.kernel("quantize_4bit", "pppppllii")(
        *native.addresses(
            weight,
            codebook.thresholds(quant_type, _CPU),
            codebook.ascending_codes(quant_type, _CPU),
            packed,
            absmax,
        ),
        count,
        blocksize,
        native.DTYPES[weight.dtype],
        threads(),
    )
    return packed, absmax


@cpu_kernel("quantize_absmax")
def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `fourbit.ops.reference.quantize_absmax`; the mean stays torch's, sum by sum."""
    if not _served(absmax) or absmax.dtype != torch.float32 or absmax.numel() == 0:
        return reference.quantize_absmax(absmax)
    absmax = absmax.contiguous()
    offset = reference.nested_mean(absmax)
    codes = torch.empty(absmax.shape, dtype=torch.uint8, device=_CPU)
    nested = torch.empty(
        -(-absmax.numel() // codebook.NESTED_BLOCKSIZE), dtype=torch.float32, device=_CPU
    )
    native.kernel("quantize_absmax", "ppfppli")(
        *native.addresses(absmax, codebook.signed_thresholds(_CPU)),
        offset.item(),
        *native.addresses(codes, nested),
        absmax.numel(),
        threads(),
    )
    return codes, nested, offset[None]


@cpu_kernel("dequantize_4bit")
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
    scales = packed, absmax, nested_absmax, nested_offset
    if dtype in native.DTYPES:
        out = torch.empty(tuple(shape), dtype=dtype, device=_CPU)
        if _dequantize(scales, blocksize, quant_type, out, 0):
            return out
    return reference.dequantize_4bit(*scales, blocksize, quant_type, shape, dtype)


def dequantize_into(
    scales: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    *,
    blocksize: int,
    quant_type: str,
    out: Tensor,
    first: int = 0,
) -> Tensor:
    """See `fourbit.ops.dequantize_into`."""
    assert out.is_contiguous()
    stop = first + out.numel()
    if _served(out) and _dequantize(scales, blocksize, quant_type, out, first):
        return out
    whole = torch.ops.fourbit.dequantize_4bit(*scales, blocksize, quant_type, [stop], out.dtype)
    return out.copy_(whole[first:].view(out.shape))


def packed_fields(
    scales: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    *,
    blocksize: int,
    quant_type: str,
    count: int,
) -> list[int] | None:
    """``count`` weights as the C struct ``Packed``, valid as long as the tensors live.

    None where the tensors do not hold what that many need in the form native code reads.
    """
    if not _complete(scales, blocksize, count):
        return None
    packed, absmax, nested_absmax, nested_offset = scales
    nested = [0, 0, 0]
    if nested_absmax is not None and nested_offset is not None:
        map_ = codebook.signed_dynamic_map(_CPU)
        nested = native.addresses(nested_absmax, map_, nested_offset)
    table = native.address(codebook.code(quant_type, _CPU))
    return [*native.addresses(packed, absmax), *nested, table, blocksize, count]


def _complete(
    scales: tuple[Tensor, Tensor, Tensor | None, Tensor | None], blocksize: int, count: int
) -> bool:
    packed, absmax, nested_absmax, nested_offset = scales
    if native.isa() is None or blocksize not in codebook.BLOCKSIZES:
        return False
    for part in scales:
        if part is not None and (part.device != _CPU or not part.is_contiguous()):
            return False
    blocks = -(-count // blocksize)
    if packed.dtype != torch.uint8 or packed.numel() < (count + 1) // 2 or absmax.numel() < blocks:
        return False
    if nested_absmax is None or nested_offset is None:
        return absmax.dtype in _WIDE
    return (
        absmax.dtype == torch.uint8
        and nested_absmax.numel() >= -(-blocks // codebook.NESTED_BLOCKSIZE)
        and nested_offset.numel() >= 1
        and nested_absmax.dtype in _WIDE
        and nested_offset.dtype in _WIDE
    )


def _dequantize(
    scales: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    blocksize: int,
    quant_type: str,
    out: Tensor,
    first: int,
) -> bool:
    """Fills ``out`` with the weights from ``first`` on; False where native code cannot."""
    packed, absmax, *nested = scales
    nested_absmax, nested_offset = (None if t is None else t.contiguous() for t in nested)
    packed, absmax = packed.contiguous(), absmax.contiguous()
    fields = packed_fields(
        (packed, absmax, nested_absmax, nested_offset),
        blocksize=blocksize,
        quant_type=quant_type,
        count=first + out.numel(),
    )
    if fields is None:
        return False
    struct = native.integers(*fields)
    native.kernel("dequantize_4bit", "ppllii")(
        ctypes.addressof(struct),
        native.address(out),
        first,
        out.numel(),
        native.DTYPES[out.dtype],
        threads(),
    )
    return True


@cpu_kernel("quantize_int8")
def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """As `fourbit.ops.reference.quantize_int8`."""
    if not _served(weight) or weight.dim() != 2:
        return reference.quantize_int8(weight)
    weight = weight.contiguous()
    rows, width = weight.shape
    codes = torch.empty(weight.shape, dtype=torch.int8, device=_CPU)
    absmax = torch.empty(rows, dtype=torch.float32, device=_CPU)
    native.kernel("quantize_int8", "pppllii")(
        *native.addresses(weight, codes, absmax),
        rows,
        width,
        native.DTYPES[weight.dtype],
        threads(),
    )
    return codes, absmax


@cpu_kernel("dequantize_int8")
def dequantize_int8(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """As `fourbit.ops.reference.dequantize_int8`."""
    fits = codes.dtype == torch.int8 and codes.dim() == 2 and absmax.shape == codes.shape[:1]
    if not fits or dtype not in native.DTYPES or absmax.dtype not in _WIDE:
        return reference.dequantize_int8(codes, absmax, dtype)
    codes, absmax = codes.contiguous(), absmax.contiguous()
    out = torch.empty(codes.shape, dtype=dtype, device=_CPU)
    native.kernel("dequantize_int8", "pppllii")(
        *native.addresses(codes, absmax, out),
        codes.shape[0],
        codes.shape[1],
        native.DTYPES[dtype],
        threads(),
    )
    return out


@cpu_kernel("linear_int8")
def linear_int8(
    x: Tensor, weight: Tensor, absmax: Tensor | None, bias: Tensor | None, threshold: float
) -> Tensor:
    """As `fourbit.ops.reference.linear_int8`, with oneDNN's int8 product between our two passes."""
    if not _served(x) or x.numel() == 0 or weight.numel() == 0 or weight.dim() != 2:
        return reference.linear_int8(x, weight, absmax, bias, threshold)
    if absmax is None:
        codes, scales = torch.ops.fourbit.quantize_int8(weight)
    else:
        codes, scales = weight, reference.float_bits(absmax)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    x_codes, x_scales, marks = _quantize_activations(flat, threshold)
    extra = None
    # a plan knows no values: its activations have as many outliers as a product takes at once
    known = not isinstance(marks, FakeTensor)
    outliers = marks.nonzero()[:, 0] if known else marks[: reference.FEWEST_OUTLIERS].long()
    if threshold > 0 and outliers.numel():
        x_codes[:, outliers] = 0
        extra = reference.outlier_product(flat, codes, scales, outliers)
    sums = _int8_product(x_codes, codes)
    y = torch.empty(sums.shape, dtype=x.dtype, device=_CPU)
    bias = None if bias is None else bias.float().contiguous()
    native.kernel("finish_int8", "ppppppllii")(
        *native.addresses(sums, x_scales, scales, extra, bias, y),
        sums.shape[0],
        sums.shape[1],
        native.DTYPES[x.dtype],
        threads(),
    )
    return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], codes.shape[0]])


def _int8_product(x: Tensor, weight: Tensor) -> Tensor:
    # Without the VNNI instructions, which this set includes, oneDNN's sums may saturate on the way;
    # and a single column comes out wrong.
    if native.isa() == "avx512_bf16" and x.shape[1] > 1:
        return torch.ops.aten._int_mm(x, weight.t())
    return reference.int8_product(x, weight)


def _quantize_activations(flat: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """int8 ``[M, K]``, float32 ``[M]``, and which columns reach ``threshold``, uint8 ``[K]``."""
    rows, width = flat.shape
    codes = torch.empty(flat.shape, dtype=torch.int8, device=_CPU)
    scales = torch.empty(rows, dtype=torch.float32, device=_CPU)
    marks = torch.zeros(width, dtype=torch.uint8, device=_CPU)
    native.kernel("quantize_activations", "ppppllfii")(
        *native.addresses(flat, codes, scales, marks),
        rows,
        width,
        threshold,
        native.DTYPES[flat.dtype],
        threads(),
    )
    return codes, scales, marks


def count_nonfinite(x: Tensor) -> tuple[int, int]:
    """See `fourbit.ops.count_nonfinite`."""
    if not _served(x) or not x.is_contiguous():
        return reference.count_nonfinite(x)
    found = torch.empty(2, dtype=torch.int64, device=_CPU)
    native.kernel("count_nonfinite", "plpii")(
        native.address(x), x.numel(), native.address(found), native.DTYPES[x.dtype], threads()
    )
    first, count = found.tolist()
    return first, count
