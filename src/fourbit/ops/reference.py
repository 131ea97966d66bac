"""The plain PyTorch kernel of every op: the truth that faster kernels are compared with.

Bits: codes and scales equal bitsandbytes' CPU kernels (float32 arithmetic, midpoints as
thresholds, the tail block divided instead of multiplied by a reciprocal); nested codes are the
nearest of all 256 values. `docs/formats.md` lists where bitsandbytes gives another answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fourbit import codebook, native
from fourbit.ops.schema import default_kernel

_TINY = 1e-38  # keeps 1/absmax finite for an all-zero block
_PER_CODE = 7.874015718698502e-3  # 1 / 127
_HALF_MAX = 65504.0  # the largest float16
_WORD = 0xFFFFFFFF
_CHUNK = 1 << 20  # weights handled at once: fp32 temporaries stay inside the last-level cache


def _no_autocast(x: Tensor) -> torch.autocast:
    # The ops answer in the dtype of x; backward, which runs outside autocast, relies on it.
    return torch.autocast(x.device.type, enabled=False)


def float_bits(scales: Tensor) -> Tensor:
    """Scales as float32, whichever way they are held."""
    return scales.view(torch.float32) if scales.dtype == torch.int32 else scales


def _scaled_blocks(values: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """``[n]`` to values in [-1, 1] ``[n]`` and float32 absmax ``[b]``."""
    flat = values.float()
    full = flat.numel() - flat.numel() % blocksize
    blocks = flat[:full].view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=_TINY))[:, None]).clamp_(-1, 1).view(-1)
    if full < flat.numel():
        tail_absmax = flat[full:].abs().max().clamp(min=_TINY)
        absmax = torch.cat((absmax, tail_absmax[None]))
        scaled = torch.cat((scaled, (flat[full:] / tail_absmax).clamp_(-1, 1)))
    return scaled, absmax


@default_kernel("quantize_4bit")
def quantize_4bit(weight: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    """Packed uint8 ``[ceil(n/2)]`` (high nibble first) and float32 absmax ``[b]``."""
    flat = weight.reshape(-1)
    inside, table = codebook.bins(quant_type, weight.device)
    packed = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-flat.numel() // blocksize), dtype=torch.float32, device=weight.device)
    for start in range(0, flat.numel(), _CHUNK):
        scaled, scales = _scaled_blocks(flat[start : start + _CHUNK], blocksize)
        if scaled.numel() % 2:
            scaled = torch.nn.functional.pad(scaled, (0, 1))
        # Two lookups and one comparison; a search over the thresholds takes ten times as long.
        bins = codebook.bin_of(scaled)
        above = scaled > inside.index_select(0, bins)
        codes = table.index_select(0, bins.mul_(2).add_(above))
        first = start // 2
        packed[first : first + codes.numel() // 2] = (codes[::2] << 4) | codes[1::2]
        absmax[start // blocksize : start // blocksize + scales.numel()] = scales
    return packed, absmax


@default_kernel("quantize_absmax")
def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes float32 absmax ``[b]`` again: codes ``[b]``, scales ``[m]``, offset ``[1]``."""
    if absmax.numel() == 0:
        empty = absmax.new_empty(0)
        return empty.to(torch.uint8), empty, absmax.new_zeros(1)
    offset = nested_mean(absmax)
    scaled, nested_absmax = _scaled_blocks(absmax - offset, codebook.NESTED_BLOCKSIZE)
    bounds = codebook.signed_thresholds(absmax.device)
    codes = torch.bucketize(scaled, bounds, out_int32=True).to(torch.uint8)
    return codes, nested_absmax, offset[None]


def nested_mean(absmax: Tensor) -> Tensor:
    """The offset of double quantization, a 0-dim float32.

    Summed in float64: torch's float32 mean depends on the number of threads.
    """
    return absmax.double().mean().float()


def scales_float32(
    absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None
) -> Tensor:
    """The float32 scale of each block ``[b]``, whichever way it is stored."""
    if nested_absmax is None or nested_offset is None:
        return float_bits(absmax)
    nested = float_bits(nested_absmax)
    codes = absmax.to(torch.int32)
    scales = codebook.signed_dynamic_map(absmax.device).index_select(0, codes)
    full = scales.numel() // codebook.NESTED_BLOCKSIZE
    blocks = scales[: full * codebook.NESTED_BLOCKSIZE].view(-1, codebook.NESTED_BLOCKSIZE)
    blocks.mul_(nested[:full, None])
    scales[full * codebook.NESTED_BLOCKSIZE :] *= nested[-1:]
    return scales.add_(float_bits(nested_offset))


@default_kernel("dequantize_4bit")
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
    """``code[index] * absmax[block]`` in float32, then one rounding to ``dtype``; any ``shape``."""
    out = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    flat, codes = out.view(-1), packed.reshape(-1)
    scales = scales_float32(absmax, nested_absmax, nested_offset)
    # One 64-bit lookup yields both float32 values of a byte.
    pairs = codebook.byte_pairs(quant_type, packed.device).view(torch.int64).reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        stop = min(start + _CHUNK, flat.numel())
        index = codes[start // 2 : (stop + 1) // 2].to(torch.int32)
        values = pairs.index_select(0, index).view(torch.float32)[: stop - start]
        blocks = scales[start // blocksize : -(-stop // blocksize)]
        full = values.numel() - values.numel() % blocksize
        values[:full].view(-1, blocksize).mul_(blocks[: full // blocksize, None])
        if full < values.numel():
            values[full:] *= blocks[-1]
        flat[start:stop] = values
    return out


@default_kernel("quantize_int8")
def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``round(w * 127 / absmax)`` of each row, from the float16 of ``weight``, half to even.

    LLM.int8 (arXiv 2208.07339), section 2.1. A row of zeros has absmax 0 and codes 0.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    absmax = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    rows = max(1, _CHUNK // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        codes[part], absmax[part] = _int8_rows(weight[part].to(torch.float16).float())
    return codes, absmax


def _int8_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """``[M, K]`` float32 to int8 ``[M, K]`` and absmax ``[M]``."""
    absmax = values.abs().amax(dim=1) if values.shape[1] else values.new_zeros(values.shape[0])
    factors = (127.0 / absmax).masked_fill_(absmax == 0, 0.0)
    return torch.round(values * factors[:, None]).to(torch.int8), absmax


@default_kernel("dequantize_int8")
def dequantize_int8(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """``code * absmax[row] / 127`` in float32, then one rounding to ``dtype``.

    In bitsandbytes' order of multiplications, so that the bits agree.
    """
    return (codes.float() * float_bits(absmax)[:, None]).mul_(_PER_CODE).to(dtype)


@default_kernel("linear_int8")
def _linear_int8(
    x: Tensor, weight: Tensor, absmax: Tensor | None, bias: Tensor | None, threshold: float
) -> Tensor:
    return linear_int8(x, weight, absmax, bias, threshold)


def linear_int8(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    bias: Tensor | None,
    threshold: float,
    *,
    product: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """LLM.int8: ``x · dequant(W)ᵀ + bias`` with both factors in 8 bits, outlier columns apart.

    Columns of ``x`` in which some magnitude is at or above ``threshold`` (0: none) are multiplied
    in ``x.dtype`` with the dequantized weights; the rest as int8 · int8 in int32. With ``absmax``
    None the weight is a floating one, quantized here. ``product`` multiplies int8 matrices;
    `int8_product` where None.
    """
    codes, scales = (weight, float_bits(absmax)) if absmax is not None else quantize_int8(weight)
    flat = x.reshape(-1, x.shape[-1])
    halves = flat.clamp(-_HALF_MAX, _HALF_MAX).to(torch.float16).float()
    outliers = None
    if threshold > 0:
        large = halves.abs() >= threshold
        outliers = large.any(dim=0).nonzero()[:, 0]
        # a large value takes no part in its row's scale, its column none in the int8 product
        halves = halves.masked_fill(large, 0.0)
    x_codes, x_scales = _int8_rows(halves)
    # float16's range is clamped to, but an Inf must not come out as a number
    x_scales.masked_fill_(flat.isinf().any(dim=1), torch.nan)
    if outliers is not None:
        x_codes[:, outliers] = 0
    with _no_autocast(x):
        y = (product or int8_product)(x_codes, codes).float()
    y.mul_(x_scales[:, None] * scales).mul_(_PER_CODE * _PER_CODE)
    if outliers is not None and outliers.numel():
        y += outlier_product(flat, codes, scales, outliers).float()
    if bias is not None:
        y += bias.float()
    return torch.ops.aten._unsafe_view(y.to(x.dtype), [*x.shape[:-1], codes.shape[0]])


FEWEST_OUTLIERS = 16
"""Columns of the smallest product of outliers."""


def outlier_product(x: Tensor, codes: Tensor, scales: Tensor, columns: Tensor) -> Tensor:
    """Some columns of ``x · dequant(W)ᵀ``, in ``x.dtype``.

    Their number differs from batch to batch, and oneDNN keeps a compiled product of some 10 kB for
    each shape it has seen: columns of zeros make it a power of two.
    """
    count = columns.numel()
    spare = max(FEWEST_OUTLIERS, 1 << (count - 1).bit_length()) - count
    columns = torch.nn.functional.pad(columns, (0, spare))
    x = x[:, columns]
    x[:, count:] = 0
    weight = dequantize_int8(codes[:, columns], scales, x.dtype)
    with _no_autocast(x):
        return x @ weight.t()


def int8_product(x: Tensor, weight: Tensor) -> Tensor:
    """Exact ``x · weightᵀ`` of int8 matrices, int32 ``[M, N]``.

    Float32 holds sums of up to 1,040 such products without rounding, so K is taken in pieces.
    """
    y = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.int32, device=x.device)
    for start in range(0, x.shape[1], 1024):
        part = slice(start, start + 1024)
        y += (x[:, part].float() @ weight[:, part].float().t()).to(torch.int32)
    return y


def count_nonfinite(x: Tensor) -> tuple[int, int]:
    """``(first flat index, count)`` of NaN and Inf; the index is past the end when there is none.

    A sum is NaN or Inf whenever an element is; it costs one pass and no mask. In pieces, because a
    mapped tensor must not be copied as a whole.
    """
    flat = x.reshape(-1)
    size = _CHUNK if flat.device.type == "cpu" else max(flat.numel(), 1)
    first, count = flat.numel(), 0
    for start in range(0, flat.numel(), size):
        part = flat[start : start + size]
        if torch.isfinite(part.sum()):
            continue
        bad = torch.nonzero(~torch.isfinite(part))
        if bad.numel():
            first = min(first, start + int(bad[0]))
            count += bad.numel()
    return first, count


@default_kernel("dropout_mask")
def dropout_mask(x: Tensor, seed: Tensor, dropout: float) -> Tensor:
    """Zero with probability ``dropout``, else ``1 / (1 - dropout)``; contiguous, like ``x``.

    Element i is decided by 32 bits mixed from i and the 64 bits of ``seed``, so that the mask is
    the same on every device and for any way of computing it.
    """
    number = int(native.value(seed))
    low, high = number & _WORD, (number >> 32) & _WORD
    keep = torch.empty(x.numel(), dtype=torch.bool, device=x.device)
    for start in range(0, x.numel(), _CHUNK):
        index = torch.arange(start, min(start + _CHUNK, x.numel()), device=x.device)
        bits = ((index & _WORD) * 0x9E3779B1 + low) & _WORD
        bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & _WORD
        bits = (bits ^ (bits >> 13)) + high + (index >> 32) * 0x27D4EB2F
        bits = ((bits & _WORD) * 0xC2B2AE35) & _WORD
        torch.ge(bits ^ (bits >> 16), dropout_threshold(dropout), out=keep[start : start + _CHUNK])
    return keep.view(x.shape).to(x.dtype).div_(1.0 - dropout)


def seed_after(seed: Tensor, elements: int) -> Tensor:
    """The seed whose mask is that of ``seed`` from element ``elements`` on.

    For masks that end before element ``2**32`` of ``seed``'s.
    """
    low = ((seed & _WORD) + (elements * 0x9E3779B1 & _WORD)) & _WORD
    return (seed & ~_WORD) | low


def dropout_threshold(dropout: float) -> int:
    """An element is kept when its 32 random bits reach this number."""
    return min(round(dropout * 2**32), _WORD)


@default_kernel("linear_4bit")
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
    """``x · dequant(W)ᵀ + bias`` in ``x.dtype``."""
    weight = torch.ops.fourbit.dequantize_4bit(
        packed,
        absmax,
        nested_absmax,
        nested_offset,
        blocksize,
        quant_type,
        [out_features, x.shape[-1]],
        x.dtype,
    )
    with _no_autocast(x):
        rows = x.reshape(-1, x.shape[-1])
        y = torch.nn.functional.linear(rows, weight, None if bias is None else bias.to(x.dtype))
    # A view could not be changed in place by whoever calls the layer, as AdaLoRA does.
    return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], out_features])


@default_kernel("lora_linear_4bit")
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
    """``x · dequant(W)ᵀ + bias + scaling · (drop(x) · Aᵀ) · Bᵀ`` and ``drop(x) · Aᵀ``."""
    y = linear_4bit(
        x,
        packed,
        absmax,
        nested_absmax,
        nested_offset,
        bias,
        blocksize,
        quant_type,
        lora_B.shape[0],
    )
    return y, add_adapter_(y, x, lora_A, lora_B, seed, scaling, dropout, _dropped)


def _dropped(x: Tensor, seed: Tensor, dropout: float) -> Tensor:
    return x * dropout_mask(x, seed, dropout)


def add_adapter_(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
    drop: Callable[[Tensor, Tensor, float], Tensor],
) -> Tensor:
    """Adds ``scaling · (drop(x) · Aᵀ) · Bᵀ`` to ``y`` in place; returns ``drop(x) · Aᵀ``."""
    flat_x = x.reshape(-1, x.shape[-1])
    if seed is not None and dropout > 0:
        flat_x = drop(flat_x, seed, dropout)
    with _no_autocast(x):
        xa = flat_x @ lora_A.to(x.dtype).t()
        y.view(-1, y.shape[-1]).addmm_(xa, lora_B.to(x.dtype).t(), alpha=scaling)
    return xa.view(*x.shape[:-1], xa.shape[-1])
