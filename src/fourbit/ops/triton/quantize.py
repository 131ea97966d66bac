"""Floating weights to packed 4-bit codes and their scales, in one pass; bits as the reference."""

# A kernel's call takes more than its definition says, and sizes become constants of Triton's.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourbit import codebook
from fourbit.ops.triton.dequantize import TILE
from fourbit.ops.triton.language import quotient
from fourbit.ops.triton.registry import launch

_TINY = tl.constexpr(1e-38)


@triton.jit
def pack(
    weight, thresholds, codes, packed, absmax, blocks, numel,
    BLOCKSIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``ROWS`` blocks a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    index = row[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    x = tl.load(weight + index, mask=index < numel, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), axis=1)
    # as a number below float32's normal range it would be taken for a float64
    floor = tl.maximum(largest, tl.full((ROWS,), _TINY, tl.float32))
    # a block that is cut short is divided by its scale, the others multiplied by its inverse
    short = (row + 1) * BLOCKSIZE > numel
    inverse = quotient(tl.full((ROWS,), 1.0, tl.float32), floor)
    scaled = tl.where(short[:, None], quotient(x, floor[:, None] + 0.0 * x), x * inverse[:, None])
    scaled = tl.minimum(tl.maximum(scaled, -1.0), 1.0)
    rank = tl.zeros((ROWS, BLOCKSIZE), tl.int32)
    for number in tl.static_range(15):
        rank += (scaled > tl.load(thresholds + number)).to(tl.int32)
    code = tl.load(codes + rank).to(tl.int32)
    # the last byte of an odd number of weights holds the code of zero in its low half
    high, low = tl.split(tl.reshape(code, (ROWS, BLOCKSIZE // 2, 2)))
    half: tl.constexpr = BLOCKSIZE // 2
    place = row[:, None] * half + tl.arange(0, half)[None, :]
    tl.store(packed + place, ((high << 4) | low).to(tl.uint8), mask=2 * place < numel)
    tl.store(absmax + row, tl.where(short, floor, largest), mask=row < blocks)


def quantize_4bit(weight: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    """As `fourbit.ops.reference.quantize_4bit`."""
    flat = weight.contiguous().view(-1)
    numel, device = flat.numel(), flat.device
    blocks = triton.cdiv(numel, blocksize)
    packed = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=device)
    rows = max(1, TILE // 2 // blocksize)
    if numel:
        launch(pack, (triton.cdiv(blocks, rows),))(
            flat,
            codebook.thresholds(quant_type, device),
            codebook.ascending_codes(quant_type, device),
            packed,
            absmax,
            blocks,
            numel,
            BLOCKSIZE=blocksize,
            ROWS=rows,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return packed, absmax
