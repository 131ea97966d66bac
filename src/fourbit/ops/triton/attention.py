"""Attention over ranges of keys, block by block, so that no matrix of all scores exists.

The order of work is FlashAttention-2's (Dao, arXiv 2307.08691): a program keeps one block of
queries (of keys, for their gradients) and passes over what it meets. Scores, weights and sums are
float32; weights are rounded to the inputs' dtype before they are multiplied again. No atomics: the
same inputs give the same bits.

Legend: B batch, T tokens, H query heads over KV key/value heads, D width of a head (values may have
another, DV). Ranges are those of `fourbit.ops.attention_schema`.
"""

# A kernel's call takes more than its definition says, and sizes become constants of Triton's.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourbit.ops.triton.language import INTERPRETED, rounded, tanh
from fourbit.ops.triton.registry import launch

_LOG2E = tl.constexpr(1.4426950408889634)
_LEAST_WIDTH = 16  # of an operand of a product on tensor cores
_WIDE = 128


@triton.jit
def _dot(a, b, total):
    if INTERPRETED:  # whose bf16 products are wrong
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _places(base, start, stride, T, ROWS: tl.constexpr, WIDTH: tl.constexpr, FULL: tl.constexpr):
    """Pointers ``[ROWS, FULL]`` to rows of a head from ``start`` on, and which are inside."""
    row, column = tl.arange(0, ROWS), tl.arange(0, FULL)
    # 64 bits for where the block begins, 32 for what lies inside
    place = base + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + column[None, :])
    live = (row + start < T)[:, None]
    if WIDTH != FULL:
        live = live & (column < WIDTH)[None, :]
    return place, live


@triton.jit
def _block(base, start, stride, T, ROWS: tl.constexpr, WIDTH: tl.constexpr, FULL: tl.constexpr):
    """Rows of a head, 0 outside."""
    place, live = _places(base, start, stride, T, ROWS, WIDTH, FULL)
    return tl.load(place, mask=live, other=0.0)


@triton.jit
def _store(base, start, stride, T, values, ROWS: tl.constexpr, WIDTH: tl.constexpr,
           FULL: tl.constexpr):  # fmt: skip
    place, live = _places(base, start, stride, T, ROWS, WIDTH, FULL)
    tl.store(place, rounded(values, base.dtype.element_ty), mask=live)


@triton.jit
def _scores(q, k, query, key, first, shared, T, scale, softcap,
            CAPPED: tl.constexpr, SHARED: tl.constexpr):  # fmt: skip
    """Scores ``[BM, BN]`` to the base 2, -inf where nothing is seen; slope of the cap."""
    score = _dot(q, tl.trans(k), tl.zeros((q.shape[0], k.shape[0]), tl.float32)) * scale
    slope = score * 0.0 + 1.0
    if CAPPED:
        squashed = tanh(score / softcap)
        score, slope = softcap * squashed, 1.0 - squashed * squashed
    seen = (key[None, :] <= query[:, None]) & (key[None, :] >= first[:, None])
    if SHARED:
        seen = seen | (key[None, :] < shared[:, None])
    seen = seen & (key < T)[None, :]
    return tl.where(seen, score * _LOG2E, float("-inf")), slope


@triton.jit
def _add_keys(
    total, weight, top, q, query, first, shared, start, keys, values, k_row, v_row, T, scale,
    softcap, BN: tl.constexpr, W: tl.constexpr, VW: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, CAPPED: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    key = start + tl.arange(0, BN)
    k = _block(keys, start, k_row, T, BN, W, D)
    score, _ = _scores(q, k, query, key, first, shared, T, scale, softcap, CAPPED, SHARED)
    higher = tl.maximum(top, tl.max(score, axis=1))
    shift = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet
    share = tl.exp2(score - shift[:, None])
    less = tl.exp2(top - shift)
    v = _block(values, start, v_row, T, BN, VW, DV)
    total = _dot(rounded(share, v.dtype), v, total * less[:, None])
    return total, weight * less + tl.sum(share, axis=1), higher


@triton.jit
def _ranges(first, shared, at, query, length, T, RANGED: tl.constexpr, SHARED: tl.constexpr,
            BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Each query's range, and which blocks of keys a block of queries meets.

    Returns:
        First keys, shared keys; blocks from the beginning, start of the others, blocks in all.
    """
    own = tl.zeros((BM,), tl.int32)
    beginning = tl.zeros((BM,), tl.int32)
    if RANGED:
        own = tl.load(first + at + query, mask=query < T, other=length)
    if SHARED:
        beginning = tl.load(shared + at + query, mask=query < T, other=0)
    end = tl.minimum(tl.max(query, axis=0) + 1, T)
    low = tl.minimum(tl.min(own, axis=0), end) // BN * BN
    most = tl.max(beginning, axis=0)
    before = tl.cdiv(tl.minimum(low, most), BN)
    count = before + tl.cdiv(tl.maximum(end, most) - low, BN)
    return own, beginning, before, low, count


@triton.jit
def forward(
    q, k, v, first, shared, out, lse, T, H, GROUP, scale, softcap,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, o_batch, o_row, o_head,
    BM: tl.constexpr, BN: tl.constexpr, W: tl.constexpr, VW: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, CAPPED: tl.constexpr, RANGED: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Program (m, b * H + h) writes a block of queries of a head, the last blocks first."""
    entry = (tl.program_id(1) // H).to(tl.int64)
    head = tl.program_id(1) % H
    place = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    query = place + tl.arange(0, BM)
    own, beginning, before, low, count = _ranges(
        first, shared, entry * T, query, T, T, RANGED, SHARED, BM, BN
    )
    mine = _block(q + entry * q_batch + head * q_head, place, q_row, T, BM, W, D)
    keys = k + entry * k_batch + (head // GROUP) * k_head
    values = v + entry * v_batch + (head // GROUP) * v_head
    total = tl.zeros((BM, DV), tl.float32)
    weight = tl.zeros((BM,), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    if INTERPRETED:  # which takes no scalar of a kernel as an end of a range
        step = before * 0
        while step < count:
            start = tl.where(step < before, step * BN, low + (step - before) * BN)
            total, weight, top = _add_keys(
                total, weight, top, mine, query, own, beginning, start, keys, values, k_row, v_row,
                T, scale, softcap, BN, W, VW, D, DV, CAPPED, SHARED,
            )  # fmt: skip
            step += 1
    else:
        for step in range(0, count):
            start = tl.where(step < before, step * BN, low + (step - before) * BN)
            total, weight, top = _add_keys(
                total, weight, top, mine, query, own, beginning, start, keys, values, k_row, v_row,
                T, scale, softcap, BN, W, VW, D, DV, CAPPED, SHARED,
            )  # fmt: skip
    blind = weight == 0.0
    weight = tl.where(blind, 1.0, weight)
    total = total / weight[:, None]
    _store(out + entry * o_batch + head * o_head, place, o_row, T, total, BM, VW, DV)
    logarithm = tl.where(blind, float("inf"), (top + tl.log2(weight)) / _LOG2E)
    tl.store(lse + (entry * H + head) * T + query, logarithm, mask=query < T)


@triton.jit
def products(
    grad, out, delta, T, H, g_batch, g_row, g_head, o_batch, o_row, o_head,
    BM: tl.constexpr, VW: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """``delta[b, h, t]``: the product of an output with its gradient."""
    entry = (tl.program_id(1) // H).to(tl.int64)
    head = tl.program_id(1) % H
    place = tl.program_id(0) * BM
    query = place + tl.arange(0, BM)
    slope = _block(grad + entry * g_batch + head * g_head, place, g_row, T, BM, VW, DV)
    value = _block(out + entry * o_batch + head * o_head, place, o_row, T, BM, VW, DV)
    total = tl.sum(slope.to(tl.float32) * value.to(tl.float32), axis=1)
    tl.store(delta + (entry * H + head) * T + query, total, mask=query < T)


@triton.jit
def _score_gradient(q, k, v, grad, query, key, first, logarithm, delta, T, scale, softcap,
                    CAPPED: tl.constexpr):  # fmt: skip
    """Weights and the gradient of scores before scaling, each ``[BM, BN]`` in float32."""
    score, slope = _scores(q, k, query, key, first, first, T, scale, softcap, CAPPED, False)
    share = tl.exp2(score - (logarithm * _LOG2E)[:, None])
    share = tl.where(score == float("-inf"), 0.0, share)  # inf - inf where nothing is seen
    through = _dot(grad, tl.trans(v), tl.zeros((q.shape[0], k.shape[0]), tl.float32))
    change = share * (through - delta[:, None]) * scale
    if CAPPED:
        change *= slope
    return share, change


@triton.jit
def _query_part(
    total, q, grad, query, own, logarithm, product, start, keys, values, k_row, v_row, T,
    scale, softcap, BN: tl.constexpr, W: tl.constexpr, VW: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    key = start + tl.arange(0, BN)
    k = _block(keys, start, k_row, T, BN, W, D)
    v = _block(values, start, v_row, T, BN, VW, DV)
    _, change = _score_gradient(
        q, k, v, grad, query, key, own, logarithm, product, T, scale, softcap, CAPPED
    )
    return _dot(rounded(change, k.dtype), k, total)


@triton.jit
def backward_queries(
    grad, q, k, v, lse, delta, first, dq, T, H, GROUP, scale, softcap,
    g_batch, g_row, g_head, q_batch, q_row, q_head, k_batch, k_row, k_head,
    v_batch, v_row, v_head, dq_batch, dq_row, dq_head,
    BM: tl.constexpr, BN: tl.constexpr, W: tl.constexpr, VW: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, CAPPED: tl.constexpr, RANGED: tl.constexpr,
):  # fmt: skip
    """Program (m, b * H + h) writes the gradient of a block of queries."""
    entry = (tl.program_id(1) // H).to(tl.int64)
    head = tl.program_id(1) % H
    place = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    query = place + tl.arange(0, BM)
    own, _, before, low, count = _ranges(
        first, first, entry * T, query, T, T, RANGED, False, BM, BN
    )
    mine = _block(q + entry * q_batch + head * q_head, place, q_row, T, BM, W, D)
    slope = _block(grad + entry * g_batch + head * g_head, place, g_row, T, BM, VW, DV)
    row = (entry * H + head) * T + query
    logarithm = tl.load(lse + row, mask=query < T, other=float("inf"))
    product = tl.load(delta + row, mask=query < T, other=0.0)
    keys = k + entry * k_batch + (head // GROUP) * k_head
    values = v + entry * v_batch + (head // GROUP) * v_head
    total = tl.zeros((BM, D), tl.float32)
    if INTERPRETED:
        step = before * 0
        while step < count:
            total = _query_part(
                total, mine, slope, query, own, logarithm, product, low + step * BN, keys, values,
                k_row, v_row, T, scale, softcap, BN, W, VW, D, DV, CAPPED,
            )  # fmt: skip
            step += 1
    else:
        for step in range(0, count):
            total = _query_part(
                total, mine, slope, query, own, logarithm, product, low + step * BN, keys, values,
                k_row, v_row, T, scale, softcap, BN, W, VW, D, DV, CAPPED,
            )  # fmt: skip
    _store(dq + entry * dq_batch + head * dq_head, place, dq_row, T, total, BM, W, D)


@triton.jit
def _key_part(
    dk, dv, k, v, key, start, queries, grads, q_row, g_row, row, lse, delta, first, T,
    scale, softcap, BM: tl.constexpr, W: tl.constexpr, VW: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, CAPPED: tl.constexpr, RANGED: tl.constexpr,
):  # fmt: skip
    query = start + tl.arange(0, BM)
    own = tl.zeros((BM,), tl.int32)
    if RANGED:
        own = tl.load(first + query, mask=query < T, other=T)
    q = _block(queries, start, q_row, T, BM, W, D)
    grad = _block(grads, start, g_row, T, BM, VW, DV)
    logarithm = tl.load(lse + row + query, mask=query < T, other=float("inf"))
    product = tl.load(delta + row + query, mask=query < T, other=0.0)
    share, change = _score_gradient(
        q, k, v, grad, query, key, own, logarithm, product, T, scale, softcap, CAPPED
    )
    dv = _dot(rounded(tl.trans(share), v.dtype), grad, dv)
    dk = _dot(rounded(tl.trans(change), k.dtype), q, dk)
    return dk, dv


@triton.jit
def backward_keys(
    grad, q, k, v, lse, delta, first, ends, dk, dv, T, KV, GROUP, BLOCKS, scale, softcap,
    g_batch, g_row, g_head, q_batch, q_row, q_head, k_batch, k_row, k_head,
    v_batch, v_row, v_head, dk_batch, dk_row, dk_head, dv_batch, dv_row, dv_head,
    BM: tl.constexpr, BN: tl.constexpr, W: tl.constexpr, VW: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, CAPPED: tl.constexpr, RANGED: tl.constexpr,
):  # fmt: skip
    """Program (n, b * KV + h) writes the gradients of a block of keys and of its values.

    ``ends[b, n]`` is one past the last query that sees one of them.
    """
    entry = (tl.program_id(1) // KV).to(tl.int64)
    kv = tl.program_id(1) % KV
    lowest = tl.program_id(0) * BN
    key = lowest + tl.arange(0, BN)
    mine = _block(k + entry * k_batch + kv * k_head, lowest, k_row, T, BN, W, D)
    value = _block(v + entry * v_batch + kv * v_head, lowest, v_row, T, BN, VW, DV)
    low = lowest // BM * BM
    end = low * 0 + T
    if RANGED:
        end = tl.load(ends + entry * BLOCKS + tl.program_id(0))
    blocks = tl.cdiv(tl.maximum(end - low, 0), BM)
    count = blocks * GROUP
    own_k = tl.zeros((BN, D), tl.float32)
    own_v = tl.zeros((BN, DV), tl.float32)
    if INTERPRETED:
        step = blocks * 0
        while step < count:
            head = kv * GROUP + step // blocks
            own_k, own_v = _key_part(
                own_k, own_v, mine, value, key, low + step % blocks * BM,
                q + entry * q_batch + head * q_head, grad + entry * g_batch + head * g_head,
                q_row, g_row, (entry * (KV * GROUP) + head) * T, lse, delta, first + entry * T,
                T, scale, softcap, BM, W, VW, D, DV, CAPPED, RANGED,
            )  # fmt: skip
            step += 1
    else:
        for step in range(0, count):
            head = kv * GROUP + step // blocks
            own_k, own_v = _key_part(
                own_k, own_v, mine, value, key, low + step % blocks * BM,
                q + entry * q_batch + head * q_head, grad + entry * g_batch + head * g_head,
                q_row, g_row, (entry * (KV * GROUP) + head) * T, lse, delta, first + entry * T,
                T, scale, softcap, BM, W, VW, D, DV, CAPPED, RANGED,
            )  # fmt: skip
    _store(dk + entry * dk_batch + kv * dk_head, lowest, dk_row, T, own_k, BN, W, D)
    _store(dv + entry * dv_batch + kv * dv_head, lowest, dv_row, T, own_v, BN, VW, DV)


@dataclass(frozen=True)
class Tiles:
    """Sizes of blocks of queries and keys, and how a program is run."""

    queries: int
    keys: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, Any]:
        """What is handed to a launch."""
        return {
            "BM": self.queries, "BN": self.keys, "num_warps": self.warps, "num_stages": self.stages,
        }  # fmt: skip


def tiles(dtype: torch.dtype, width: int, *, backward: bool) -> Tiles:
    """What fits in registers and shared memory of every card from sm_80 on without spilling.

    Args:
        dtype: of the inputs.
        width: the larger width of a head, a power of two.
        backward: whether gradients are computed.
    """
    if dtype == torch.float32:
        return Tiles(32, 32, 8, 1) if width <= _WIDE else Tiles(16, 16, 4, 1)
    if width > _WIDE:
        return Tiles(32, 32, 8, 1) if backward else Tiles(64, 32, 8, 1)
    if backward:
        return Tiles(64, 64, 8, 1)
    return Tiles(64, 64, 4, 2) if width == _WIDE else Tiles(128, 64, 8, 2)


def _sizes(width: int, v_width: int) -> dict[str, int]:
    full, v_full = (max(_LEAST_WIDTH, 1 << (n - 1).bit_length()) for n in (width, v_width))
    return {"W": width, "VW": v_width, "D": full, "DV": v_full}


def _flat_heads(*tensors: Tensor) -> list[Tensor]:
    """With the elements of each head side by side, copied where they are not."""
    return [t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in tensors]


def _steps(*tensors: Tensor) -> list[int]:
    return [step for tensor in tensors for step in tensor.stride()[:3]]


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor | None,
    *,
    scale: float,
    softcap: float,
    out: Tensor,
    shared: Tensor | None = None,
) -> Tensor:
    """As `fourbit.ops.attention.attention_forward`."""
    batch, length, heads, width = q.shape
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return lse
    q, k, v = _flat_heads(q, k, v)
    (target,) = _flat_heads(out)
    sizes = _sizes(width, v.shape[-1])
    tile = tiles(q.dtype, max(sizes.values()), backward=False)
    none = lse if first is None else first
    launch(forward, (triton.cdiv(length, tile.queries), batch * heads))(
        q, k, v, none, none if shared is None else shared, target, lse, length, heads,
        heads // k.shape[2], scale, softcap or 1.0, *_steps(q, k, v, target),
        **sizes, CAPPED=softcap > 0, RANGED=first is not None, SHARED=shared is not None,
        **tile.options,
    )  # fmt: skip
    if target is not out:
        out.copy_(target)
    return lse


def run_backward(
    grad_o: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    lse: Tensor,
    first: Tensor | None,
    *,
    scale: float,
    softcap: float,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """As `fourbit.ops.attention.attention_backward`; ``inputs`` is q, k, v and the output."""
    batch, length, heads, width = inputs[0].shape
    if lse.numel() == 0:
        return
    grad, q, k, v, out = _flat_heads(grad_o, *inputs)
    dq, dk, dv = _flat_heads(*grads)
    kv_heads, sizes = k.shape[2], _sizes(width, v.shape[-1])
    tile = tiles(q.dtype, max(sizes.values()), backward=True)
    shape = {**sizes, "CAPPED": softcap > 0, "RANGED": first is not None, **tile.options}
    query_blocks, key_blocks = (triton.cdiv(length, n) for n in (tile.queries, tile.keys))
    delta = torch.empty_like(lse)
    launch(products, (query_blocks, batch * heads))(
        grad, out, delta, length, heads, *_steps(grad, out), BM=tile.queries, VW=sizes["VW"],
        DV=sizes["DV"], num_warps=tile.warps,
    )  # fmt: skip
    none = lse if first is None else first
    common = scale, softcap or 1.0
    group = heads // kv_heads
    launch(backward_queries, (query_blocks, batch * heads))(
        grad, q, k, v, lse, delta, none, dq, length, heads, group, *common,
        *_steps(grad, q, k, v, dq), **shape,
    )  # fmt: skip
    ends = none if first is None else last_queries(first, tile.keys)
    launch(backward_keys, (key_blocks, batch * kv_heads))(
        grad, q, k, v, lse, delta, none, ends, dk, dv, length, kv_heads, group, key_blocks,
        *common, *_steps(grad, q, k, v, dk, dv), **shape,
    )  # fmt: skip
    for buffer, written in zip(grads, (dq, dk, dv), strict=True):
        if buffer is not written:
            buffer.copy_(written)


def last_queries(first: Tensor, keys: int) -> Tensor:
    """One past the last query that sees a key of each block, int32 ``[B, ceil(T / keys)]``.

    Args:
        first: int32 ``[B, T]``, as `fourbit.ops.attention_schema` has it.
        keys: size of a block.
    """
    length = first.shape[1]
    at = torch.arange(length, dtype=first.dtype, device=first.device)
    own = torch.where(first > at, length, first)
    least = own.flip(1).cummin(1).values.flip(1).contiguous()  # over all later queries
    edges = torch.arange(keys, length + keys, keys, dtype=first.dtype, device=first.device)
    edges = edges.clamp(max=length).expand(first.shape[0], -1).contiguous()
    return torch.searchsorted(least, edges, out_int32=True)
