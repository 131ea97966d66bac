"""Absmax quantization to integers, in its plainest form: to learn from and to compare with.

``codes = round(x * scale)`` with ``scale = levels / max|x|``, for a whole tensor or block by block.
The formats that models are stored in live in `fourbit.quantize`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourbit.quantize import check_finite

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def quantize_absmax(
    x: Tensor, *, bits: int = 8, blocksize: int | None = None, name: str = "tensor"
) -> tuple[Tensor, Tensor]:
    """Rounds ``x`` to signed integers of ``bits`` bits; halves go to the even integer.

    The largest magnitude becomes ``levels = 2**(bits-1) - 1`` (127 at 8 bits) and zero becomes 0.
    Where every value is zero, or so small that ``levels / max|x|`` exceeds float32 (below 3.8e-37),
    the scale is 1 and the codes are 0.

    Args:
        x: float32, float16 or bfloat16 of any shape; blocks run over it flat, row by row.
        bits: 2 to 8.
        blocksize: values that share one scale, the last block may be short; None for one scale in
            all.
        name: how errors call the tensor.

    Returns:
        Codes, int8 of the shape of ``x`` (one a byte, not packed), and the scale, float32: 0-dim
        without blocks, else ``[ceil(numel / blocksize)]``.

    Raises:
        ModelError: NaN or Inf in ``x``, naming tensor and flat index.
        ValueError: an unsupported dtype, number of bits or block size.
    """
    if x.dtype not in _FLOATS:
        raise ValueError(f"{name}: cannot quantize {x.dtype}; use float32, float16 or bfloat16")
    if not isinstance(bits, int) or bits not in range(2, 9):
        raise ValueError(f"bits {bits!r} is not one of 2, 3, 4, 5, 6, 7, 8")
    count, size = _blocks(x.numel(), blocksize)
    check_finite(x, name=name)
    flat = x.detach().float().reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, count * size - flat.numel())).view(count, size)
    scale = (2 ** (bits - 1) - 1) / blocks.abs().amax(dim=1)
    scale = torch.where(torch.isfinite(scale), scale, 1.0)
    # torch.round goes to the even integer at a half.
    codes = (blocks * scale[:, None]).round_().to(torch.int8)
    codes = codes.view(-1)[: flat.numel()].view(x.shape)
    return codes, scale if blocksize is not None else scale[0]


def dequantize_absmax(
    codes: Tensor,
    scale: Tensor,
    *,
    blocksize: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``codes / scale``: the inverse of `quantize_absmax`, up to half a step of ``1 / scale``.

    Args:
        codes: int8, any shape.
        scale: as `quantize_absmax` returned it; the number of bits is in it.
        blocksize: the one it was quantized with.
        dtype: of the result.

    Raises:
        ValueError: ``codes`` is not int8, or ``scale`` does not have one value for each block.
    """
    if codes.dtype != torch.int8:
        raise ValueError(f"codes are {codes.dtype}; quantize_absmax returns int8")
    count, size = _blocks(codes.numel(), blocksize)
    shape = () if blocksize is None else (count,)
    if scale.shape != shape:
        raise ValueError(
            f"scale has shape {list(scale.shape)}, but {codes.numel()} codes with"
            f" blocksize {blocksize} have scales of shape {list(shape)};"
            " give the blocksize of quantize_absmax"
        )
    scales = scale.float().reshape(-1).repeat_interleave(size)[: codes.numel()]
    # Near float32's maximum the quotient can round up to infinity.
    largest = torch.finfo(torch.float32).max
    values = (codes.reshape(-1).float() / scales).clamp_(-largest, largest)
    return values.to(dtype).view(codes.shape)


def _blocks(numel: int, blocksize: int | None) -> tuple[int, int]:
    """Number of blocks and values in each; a tensor smaller than a block needs no larger one."""
    if blocksize is None:
        return 1, max(numel, 1)
    if not isinstance(blocksize, int) or isinstance(blocksize, bool) or blocksize < 1:
        raise ValueError(f"blocksize {blocksize!r} is not a positive whole number or None")
    return -(-numel // blocksize), min(blocksize, max(numel, 1))
