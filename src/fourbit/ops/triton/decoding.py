"""What a decoding step does beside norms and activations: joint products, attention over a cache.

Launches are what a token of a small model costs, so layers with the same input share one, and
what is added to a product (bias, adapter, residual) is added where its parts are summed.

Legend: M rows, N columns of a result, K depth, R rank, C positions of a cache.
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
from fourbit.ops.triton.dequantize import float32
from fourbit.ops.triton.language import INTERPRETED, rounded, tanh
from fourbit.ops.triton.product import few_rows, step_of

_LEAST = 16
"""Rows and columns of a product on tensor cores."""
_PROGRAMS = 264
"""Twice the multiprocessors of an H100."""
_MOST_ROWS = 64
_MOST_MEMBERS = 3
_RANK = 64  # of a step of the adapters' product

Scales = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


@triton.jit
def few_rows_of(
    x, packed, absmax, nested, offset, packed1, absmax1, nested1, offset1,
    packed2, absmax2, nested2, offset2, table, dynamic, out, M, N, K, first1, first2,
    MEMBERS: tl.constexpr, BLOCKSIZE: tl.constexpr, DOUBLE: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """`few_rows` of weights that would lie one under another; members begin at whole programs.

    A program moves its member's pointers back, so that columns count from the first member's.
    """
    column = tl.program_id(0) * BN
    first = 0
    # two conditions each, as the first is known when the kernel is compiled
    if MEMBERS > 1:  # noqa: SIM102
        if column >= first1:
            first = first1
            packed, absmax, nested, offset = packed1, absmax1, nested1, offset1
    if MEMBERS > 2:  # noqa: SIM102
        if column >= first2:
            first = first2
            packed, absmax, nested, offset = packed2, absmax2, nested2, offset2
    block = tl.cast(first, tl.int64) * (K // BLOCKSIZE)
    few_rows(
        x, packed - tl.cast(first, tl.int64) * (K // 2), absmax - block, nested - block // 256,
        offset, table, dynamic, out, M, N, K, BLOCKSIZE, DOUBLE, BM, BN, BK, STEPS,
    )  # fmt: skip


@triton.jit
def finish(
    sums, bias, low, expand, added, out, M, N, rank, low_stride,
    PARTS: tl.constexpr, BIAS: tl.constexpr, THIN: tl.constexpr, ADDED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Program (rows, columns): the parts of a product, and all that is added to it.

    THIN is the number of steps over the rank, 0 without an adapter.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    rows, columns = m < M, column < N
    live = rows[:, None] & columns[None, :]
    place = m.to(tl.int64)[:, None] * N + column[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for part in range(PARTS):
        total += tl.load(sums + tl.cast(part, tl.int64) * M * N + place, mask=live, other=0.0)
    if BIAS:
        total += tl.load(bias + column, mask=columns, other=0.0).to(tl.float32)[None, :]
    for step in range(THIN):
        r = step * BR + tl.arange(0, BR)
        inside = r < rank
        u = tl.load(
            low + m[:, None] * low_stride + r[None, :], mask=rows[:, None] & inside[None, :],
            other=0.0,
        )  # fmt: skip
        b = tl.load(
            expand + r.to(tl.int64)[:, None] * N + column[None, :],
            mask=inside[:, None] & columns[None, :], other=0.0,
        )  # fmt: skip
        if INTERPRETED:  # whose bf16 products are wrong
            u, b = u.to(tl.float32), b.to(tl.float32)
        total = tl.dot(u, b, total, input_precision="ieee")
    if ADDED:
        total += tl.load(added + place, mask=live, other=0.0).to(tl.float32)
    tl.store(out + place, rounded(total, out.dtype.element_ty), mask=live)


def linear_group(
    x: Tensor,
    scales: Sequence[Scales],
    widths: Sequence[int],
    *,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    thin: tuple[Tensor, Tensor] | None = None,
    added: Tensor | None = None,
) -> Tensor | None:
    """Products of one input with several packed weights, side by side, in two launches.

    Args:
        x: ``[M, K]``.
        scales: of each layer, all in the same format.
        widths: rows of each weight.
        blocksize: of all.
        quant_type: of all.
        bias: ``[N]``.
        thin: ``[M, R]`` and ``[R, N]``, whose product is added.
        added: ``[M, N]`` in the dtype of ``x``.

    Returns:
        ``[M, N]`` in the dtype of ``x``; None where a layer would begin inside a program's columns
        or a second-level block, K does not divide into whole blocks, or there are too many rows.
    """
    (rows, depth), width = x.shape, sum(widths)
    step, double = step_of(depth, blocksize), scales[0][2] is not None
    columns = 64 if width >= 64 else _LEAST
    firsts = [sum(widths[:index]) for index in range(1, len(widths))]
    whole = 256 if double else 1
    if step == 0 or not 0 < rows <= _MOST_ROWS or len(scales) > _MOST_MEMBERS:
        return None
    if any(first % columns or first * (depth // blocksize) % whole for first in firsts):
        return None
    programs = triton.cdiv(width, columns)
    parts = max(1, min(_PROGRAMS // programs, depth // (8 * step)))
    steps = triton.cdiv(depth // step, parts)
    parts = triton.cdiv(depth // step, steps)
    sums = torch.empty(parts, rows, width, dtype=torch.float32, device=x.device)
    pointers = [_pointers(each) for each in scales]
    pointers += pointers[:1] * (_MOST_MEMBERS - len(pointers))
    firsts += [width] * (_MOST_MEMBERS - 1 - len(firsts))
    few_rows_of[(programs, parts)](
        x.contiguous(),
        *(pointer for each in pointers for pointer in each),
        codebook.code(quant_type, x.device),
        codebook.signed_dynamic_map(x.device),
        sums,
        rows,
        width,
        depth,
        *firsts,
        MEMBERS=len(scales),
        BLOCKSIZE=blocksize,
        DOUBLE=double,
        BM=max(_LEAST, triton.next_power_of_2(rows)),
        BN=columns,
        BK=step,
        STEPS=steps,
        num_warps=4,
        num_stages=3,
        enable_fp_fusion=False,
    )
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    low, expand = (sums, sums) if thin is None else thin
    rank = 0 if thin is None else expand.shape[0]
    tile = 128 if width >= 128 else _LEAST
    finish[(triton.cdiv(rows, _LEAST), triton.cdiv(width, tile))](
        sums,
        sums if bias is None else bias,
        low,
        expand.contiguous(),
        sums if added is None else added.contiguous(),
        out,
        rows,
        width,
        rank,
        low.stride(0),
        PARTS=parts,
        BIAS=bias is not None,
        THIN=triton.cdiv(rank, _RANK),
        ADDED=added is not None,
        BM=_LEAST,
        BN=tile,
        BR=_RANK,
        num_warps=4,
    )
    return out


def _pointers(scales: Scales) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    packed, absmax, nested, offset = scales
    if nested is None or offset is None:
        absmax = float32(absmax)
        return packed.reshape(-1), absmax, absmax, absmax
    return packed.reshape(-1), absmax.contiguous(), float32(nested), float32(offset)


@triton.jit
def attend_part(
    q, keys, values, places, sums, peaks, weights, q_stride, row_stride, head_stride, scale, cap,
    window, CAPPED: tl.constexpr, WINDOW: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr,
    BG: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Program (row, key head, part of the positions): its queries' sums, not yet divided.

    Positions that a row does not see are not read, so a cache may be longer than its text.
    """
    row, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    g, d = tl.arange(0, BG), tl.arange(0, BD)
    inside, member = d < HEAD, g < GROUP
    last = tl.load(places + row).to(tl.int32)
    source = q + row * q_stride + (head * GROUP + g)[:, None] * HEAD + d[None, :]
    query = tl.load(source, mask=member[:, None] & inside[None, :], other=0.0)
    base = row * row_stride + head * head_stride
    peak = tl.full((BG,), -float("inf"), tl.float32)
    weight = tl.zeros((BG,), tl.float32)
    total = tl.zeros((BG, BD), tl.float32)
    for step in range(STEPS):  # a constant: the interpreter takes no other
        at = (part * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        seen = at <= last
        if WINDOW:
            seen = seen & (at > last - window)
        key = tl.load(
            keys + base + at[None, :] * HEAD + d[:, None], mask=seen[None, :] & inside[:, None],
            other=0.0,
        )  # fmt: skip
        value = tl.load(
            values + base + at[:, None] * HEAD + d[None, :], mask=seen[:, None] & inside[None, :],
            other=0.0,
        )  # fmt: skip
        if INTERPRETED:  # whose bf16 products are wrong
            scores = tl.dot(query.to(tl.float32), key.to(tl.float32), input_precision="ieee")
        else:
            scores = tl.dot(query, key, input_precision="ieee")
        scores *= scale
        if CAPPED:
            scores = tanh(scores / cap) * cap
        scores = tl.where(seen[None, :], scores, -float("inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        # while nothing was seen there is no peak to compare with
        level = tl.where(higher == -float("inf"), 0.0, higher)
        p = tl.exp(scores - level[:, None])
        old = tl.exp(peak - level)
        weight = weight * old + tl.sum(p, axis=1)
        short = rounded(p, values.dtype.element_ty)
        if INTERPRETED:
            more = tl.dot(short.to(tl.float32), value.to(tl.float32), input_precision="ieee")
        else:
            more = tl.dot(short, value, input_precision="ieee")
        total = total * old[:, None] + more
        peak = higher
    heads = tl.num_programs(1) * GROUP
    place = (part * tl.num_programs(0) + row) * heads + head * GROUP + g
    tl.store(peaks + place, peak, mask=member)
    tl.store(weights + place, weight, mask=member)
    target = sums + place[:, None] * HEAD + d[None, :]
    tl.store(target, total, mask=member[:, None] & inside[None, :])


@triton.jit
def attend_whole(
    sums, peaks, weights, out, count, HEAD: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr
):
    """Program (row and query head): its parts joined; ``count`` of these programs."""
    index = tl.program_id(0).to(tl.int64)
    d, part = tl.arange(0, BD), tl.arange(0, PARTS)
    inside = d < HEAD
    place = part.to(tl.int64) * count + index
    peak = tl.load(peaks + place)
    factor = tl.exp(peak - tl.max(peak, axis=0))
    whole = tl.sum(factor * tl.load(weights + place), axis=0)
    parts = tl.load(sums + place[:, None] * HEAD + d[None, :], mask=inside[None, :], other=0.0)
    total = tl.sum(parts * factor[:, None], axis=0) / whole
    tl.store(out + index * HEAD + d, rounded(total, out.dtype.element_ty), mask=inside)


def attention_tile(wide: int) -> tuple[int, int]:
    """Positions of a step of attention over heads of this padded width, and warps: no spills."""
    return (64 if wide <= 128 else 32), (4 if wide <= 64 else 8)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    places: Tensor,
    *,
    scale: float,
    softcap: float,
    window: int | None,
) -> Tensor:
    """One query a row over the positions of its cache up to its place, in two launches.

    Args:
        query: ``[M, heads * head_dim]``, elements of a row side by side.
        keys: ``[M, kv_heads, C, head_dim]``, positions and elements side by side.
        values: likewise, with the strides of ``keys``.
        places: int64 ``[M]``, below C.
        scale: of the scores.
        softcap: of the scores; 0 for none.
        window: number of positions seen, the place itself included; None for all.

    Returns:
        ``[M, heads * head_dim]`` in the dtype of ``query``.
    """
    rows, kv_heads, capacity, head = keys.shape
    group = query.shape[1] // (kv_heads * head)
    wide = max(_LEAST, triton.next_power_of_2(head))
    positions, warps = attention_tile(wide)
    heads, blocks = kv_heads * group, triton.cdiv(capacity, positions)
    wanted = triton.next_power_of_2(triton.cdiv(_PROGRAMS, rows * kv_heads))
    parts = min(triton.next_power_of_2(blocks), wanted)
    made = {"dtype": torch.float32, "device": query.device}
    sums = torch.empty(parts, rows, heads, head, **made)
    peaks, weights = torch.empty(2, parts, rows, heads, **made)
    attend_part[(rows, kv_heads, parts)](
        query,
        keys,
        values,
        places,
        sums,
        peaks,
        weights,
        query.stride(0),
        keys.stride(0),
        keys.stride(1),
        scale,
        softcap,
        0 if window is None else window,
        CAPPED=softcap != 0,
        WINDOW=window is not None,
        GROUP=group,
        HEAD=head,
        BG=max(_LEAST, triton.next_power_of_2(group)),
        BD=wide,
        BLOCK=positions,
        STEPS=triton.cdiv(blocks, parts),
        num_warps=warps,
    )
    out = torch.empty(rows, heads * head, dtype=query.dtype, device=query.device)
    attend_whole[(rows * heads,)](
        sums, peaks, weights, out, rows * heads, HEAD=head, BD=wide, PARTS=parts, num_warps=1
    )
    return out
