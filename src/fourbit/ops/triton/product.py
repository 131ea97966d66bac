"""``x · dequant(W)ᵀ`` for few rows without the weight ever being written out, as decoding needs it.

Weights are expanded block by block into registers, with the bits of the dequantizing kernel, and
multiplied there. For many rows expanding into memory and the library's product are faster.

Legend: M rows, N columns of the result, K depth.
"""

# A kernel's call takes more than its definition says, and sizes become constants of Triton's.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourbit import codebook
from fourbit.ops.triton.dequantize import float32
from fourbit.ops.triton.language import INTERPRETED, rounded
from fourbit.ops.triton.registry import launch

_FEWEST_COLUMNS = 16  # of a product on tensor cores
_PROGRAMS = 264
"""Twice the multiprocessors of an H100: K is split until there are as many programs."""


@triton.jit
def few_rows(
    x, packed, absmax, nested, offset, table, dynamic, out, M, N, K,
    BLOCKSIZE: tl.constexpr, DOUBLE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """``out`` is float32 ``[parts, M, N]``; program (n, s) takes the s-th ``STEPS * BK`` of K.

    Even and odd columns are multiplied apart, so that the two codes of a byte need not be woven.
    """
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    m = tl.arange(0, BM)
    half = tl.arange(0, BK // 2)
    live, rows = column < N, m < M
    code_values = tl.load(table + tl.arange(0, 16))
    total = tl.zeros((BN, BM), tl.float32)
    # 64 bits for where a row begins, 32 for what lies inside
    source = packed + (column.to(tl.int64) * (K // 2))[:, None] + half[None, :]
    block = column.to(tl.int64) * (K // BLOCKSIZE)
    inside = x + m[None, :] * K + 2 * half[:, None]
    for step in range(STEPS):  # a constant: the interpreter takes no other
        k = (part * STEPS + step) * BK
        held, known = live & (k < K), rows & (k < K)  # the last part may be shorter
        at = block + k // BLOCKSIZE
        if DOUBLE:
            code = tl.load(absmax + at, mask=held, other=0).to(tl.int32)
            scale = tl.load(dynamic + code) * tl.load(nested + at // 256, mask=held, other=0.0)
            scale += tl.load(offset)
        else:
            scale = tl.load(absmax + at, mask=held, other=0.0)
        values = rounded(code_values[None, :] * scale[:, None], x.dtype.element_ty)
        byte = tl.load(source + k // 2, mask=held[:, None], other=0).to(tl.int32)
        high, low = tl.gather(values, byte >> 4, 1), tl.gather(values, byte & 15, 1)
        even = tl.load(inside + k, mask=known[None, :], other=0.0)
        odd = tl.load(inside + k + 1, mask=known[None, :], other=0.0)
        if INTERPRETED:  # whose bf16 products are wrong
            high, low = high.to(tl.float32), low.to(tl.float32)
            even, odd = even.to(tl.float32), odd.to(tl.float32)
        total = tl.dot(high, even, total, input_precision="ieee")
        total = tl.dot(low, odd, total, input_precision="ieee")
    target = (part * M + m[None, :]) * N + column[:, None]
    tl.store(out + target, total, mask=rows[None, :] & live[:, None])


def step_of(depth: int, blocksize: int) -> int:
    """How much of K a program takes at once, inside one block of scales; 0 where none fits."""
    if depth % blocksize:
        return 0  # a row begins inside a block
    return min(blocksize, 128)


def linear_few(
    x: Tensor,
    scales: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    bias: Tensor | None,
    *,
    blocksize: int,
    quant_type: str,
    out_features: int,
) -> Tensor | None:
    """``[M, K]`` to ``[M, N]`` in ``x.dtype``; None where K does not divide into whole blocks."""
    packed, absmax, nested, offset = scales
    rows, depth = x.shape
    step = step_of(depth, blocksize)
    if step == 0 or rows == 0:
        return None
    double, device = nested is not None and offset is not None, x.device
    columns = 64 if out_features >= 64 else _FEWEST_COLUMNS
    programs = triton.cdiv(out_features, columns)
    parts = max(1, min(_PROGRAMS // programs, depth // (8 * step)))
    steps = triton.cdiv(depth // step, parts)
    parts = triton.cdiv(depth // step, steps)
    sums = torch.empty(parts, rows, out_features, dtype=torch.float32, device=device)
    absmax = absmax.contiguous() if double else float32(absmax)
    launch(few_rows, (programs, parts))(
        x.contiguous(),
        packed.reshape(-1),
        absmax,
        float32(nested) if nested is not None else absmax,
        float32(offset) if offset is not None else absmax,
        codebook.code(quant_type, device),
        codebook.signed_dynamic_map(device),
        sums,
        rows,
        out_features,
        depth,
        BLOCKSIZE=blocksize,
        DOUBLE=double,
        BM=max(_FEWEST_COLUMNS, triton.next_power_of_2(rows)),
        BN=columns,
        BK=step,
        STEPS=steps,
        num_warps=4,
        num_stages=3,
        enable_fp_fusion=False,
    )
    # one order of summing, whatever order the programs end in
    y = sums[0] if parts == 1 else sums.sum(0)
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)
