"""4-bit weights to floating ones in one launch, nested scales included; bits as the reference.

The value of a weight depends on its code and its block alone: a block's 16 possible values are
multiplied and rounded once, then looked up 64 times.
"""

# A kernel's call takes more than its definition says, and sizes become constants of Triton's.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourbit import codebook
from fourbit.ops.triton.language import rounded
from fourbit.ops.triton.registry import launch

TILE = 8192
"""Weights of one program."""


@triton.jit
def expand(
    packed, absmax, nested, offset, table, dynamic, out, first, blocks, numel,
    BLOCKSIZE: tl.constexpr, ROWS: tl.constexpr, DOUBLE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """``ROWS`` blocks a program; ``first`` is the block that ``out`` begins with.

    WHOLE says that the last block is as long as the others: only rows need masks then.
    """
    half: tl.constexpr = BLOCKSIZE // 2
    start = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    live = row < blocks - start
    block = start + first + row
    if DOUBLE:
        code = tl.load(absmax + block, mask=live, other=0).to(tl.int32)
        scale = tl.load(dynamic + code) * tl.load(nested + block // 256, mask=live, other=0.0)
        scale += tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=live, other=0.0)
    values = tl.load(table + tl.arange(0, 16))[None, :] * scale[:, None]
    values = rounded(values, out.dtype.element_ty)
    # 64 bits for where a program begins, 32 for what lies inside
    source, target = packed + (start + first) * half, out + start * BLOCKSIZE
    place = row[:, None] * half + tl.arange(0, half)[None, :]
    index = row[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    if WHOLE:
        byte = tl.load(source + place, mask=live[:, None], other=0).to(tl.int32)
    else:
        byte = tl.load(source + place, mask=2 * place < numel - start * BLOCKSIZE, other=0)
        byte = byte.to(tl.int32)
    both = tl.interleave(tl.gather(values, byte >> 4, 1), tl.gather(values, byte & 15, 1))
    if WHOLE:
        tl.store(target + index, both, mask=live[:, None])
    else:
        tl.store(target + index, both, mask=index < numel - start * BLOCKSIZE)


def dequantize_into(
    scales: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    *,
    blocksize: int,
    quant_type: str,
    out: Tensor,
    first: int = 0,
) -> None:
    """Fills ``out``, contiguous, with the weights from flat index ``first`` on.

    ``first`` is a multiple of ``blocksize``. The tensors are on one device.
    """
    packed, absmax, nested, offset = scales
    double = nested is not None and offset is not None
    numel, device = out.numel(), out.device
    if numel == 0:
        return
    blocks = triton.cdiv(numel, blocksize)
    rows = max(1, TILE // blocksize)
    absmax = absmax.contiguous() if double else float32(absmax)
    launch(expand, (triton.cdiv(blocks, rows),))(
        packed.reshape(-1),
        absmax,
        float32(nested) if nested is not None else absmax,
        float32(offset) if offset is not None else absmax,
        codebook.code(quant_type, device),
        codebook.signed_dynamic_map(device),
        out,
        first // blocksize,
        blocks,
        numel,
        BLOCKSIZE=blocksize,
        ROWS=rows,
        DOUBLE=double,
        WHOLE=numel % blocksize == 0,
        num_warps=4,
        # bitsandbytes rounds the nested product and the sum apart
        enable_fp_fusion=False,
    )


def float32(scales: Tensor) -> Tensor:
    """Scales as contiguous float32, whichever way they are held."""
    scales = scales.contiguous()
    return scales.view(torch.float32) if scales.dtype == torch.int32 else scales


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
    out = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    scales = packed, absmax, nested_absmax, nested_offset
    dequantize_into(scales, blocksize=blocksize, quant_type=quant_type, out=out)
    return out
