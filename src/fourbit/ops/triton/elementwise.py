"""Rotation by position, activations and dropout, each in one pass over its rows."""

# A kernel's call takes more than its definition says, and sizes become constants of Triton's.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourbit.ops.reference import dropout_threshold
from fourbit.ops.triton.language import rounded, sigmoid, tanh
from fourbit.ops.triton.registry import launch

_BLOCK = 1024
_ROOT = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
_CUBE = tl.constexpr(0.044715)


@triton.jit
def rotate(
    x, cos, sin, stride, positions, heads,
    BACK: tl.constexpr, HEAD: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, head): pairs ``(i, i + HALF)`` of a head's first columns."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, BLOCK)
    live = i < HALF
    place = x + row * stride + head * HEAD + i
    angle = (row % positions) * (2 * HALF) + i
    low = tl.load(place, mask=live, other=0.0).to(tl.float32)
    high = tl.load(place + HALF, mask=live, other=0.0).to(tl.float32)
    c1 = tl.load(cos + angle, mask=live, other=0.0).to(tl.float32)
    c2 = tl.load(cos + angle + HALF, mask=live, other=0.0).to(tl.float32)
    s1 = tl.load(sin + angle, mask=live, other=0.0).to(tl.float32)
    s2 = tl.load(sin + angle + HALF, mask=live, other=0.0).to(tl.float32)
    if BACK:
        first, second = low * c1 + high * s2, high * c2 - low * s1
    else:
        first, second = low * c1 - high * s1, high * c2 + low * s2
    tl.store(place, rounded(first, x.dtype.element_ty), mask=live)
    tl.store(place + HALF, rounded(second, x.dtype.element_ty), mask=live)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, *, heads: int, back: bool) -> None:
    """See `fourbit.fused.primitives.rotate_`."""
    half = cos.shape[1] // 2
    if not x.numel() or not half:
        return
    launch(rotate, (x.shape[0], heads))(
        x, cos.contiguous(), sin.contiguous(), x.stride(0), cos.shape[0], heads, BACK=back,
        HEAD=x.shape[1] // heads, HALF=half, BLOCK=triton.next_power_of_2(half), num_warps=1,
    )  # fmt: skip


@triton.jit
def _act(a, GELU: tl.constexpr):
    if GELU:
        return 0.5 * a * (1.0 + tanh(_ROOT * (a + _CUBE * a * a * a)))
    return a * sigmoid(a)


@triton.jit
def _slope(a, GELU: tl.constexpr):
    if GELU:
        t = tanh(_ROOT * (a + _CUBE * a * a * a))
        inner = _ROOT * (1.0 + 3.0 * _CUBE * a * a)
        return 0.5 * (1.0 + t) + 0.5 * a * (1.0 - t * t) * inner
    s = sigmoid(a)
    return s * (1.0 + a * (1.0 - s))


@triton.jit
def act_forward(
    x, h, width, x_stride, h_stride,
    GELU: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, block of columns)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = column < width
    source = x + row * x_stride + column
    value = _act(tl.load(source, mask=live, other=0.0).to(tl.float32), GELU)
    if GATED:
        value *= tl.load(source + width, mask=live, other=0.0).to(tl.float32)
    tl.store(h + row * h_stride + column, rounded(value, h.dtype.element_ty), mask=live)


@triton.jit
def act_backward(
    x, grad, dx, h, width, x_stride, grad_stride, dx_stride, h_stride,
    GELU: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, block of columns); writes the result into ``h`` again."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = column < width
    source, target = x + row * x_stride + column, dx + row * dx_stride + column
    a = tl.load(source, mask=live, other=0.0).to(tl.float32)
    g = tl.load(grad + row * grad_stride + column, mask=live, other=0.0).to(tl.float32)
    value = _act(a, GELU)
    da = g * _slope(a, GELU)
    if GATED:
        b = tl.load(source + width, mask=live, other=0.0).to(tl.float32)
        tl.store(target + width, rounded(g * value, dx.dtype.element_ty), mask=live)
        da *= b
        value *= b
    tl.store(target, rounded(da, dx.dtype.element_ty), mask=live)
    tl.store(h + row * h_stride + column, rounded(value, h.dtype.element_ty), mask=live)


def activate(x: Tensor, h: Tensor, *, gelu: bool, gated: bool) -> None:
    """See `fourbit.fused.primitives.activate`."""
    rows, width = h.shape
    if not h.numel():
        return
    launch(act_forward, (rows, triton.cdiv(width, _BLOCK)))(
        x, h, width, x.stride(0), h.stride(0), GELU=gelu, GATED=gated, BLOCK=_BLOCK
    )


def activate_backward(
    x: Tensor, grad: Tensor, dx: Tensor, h: Tensor, *, gelu: bool, gated: bool
) -> None:
    """See `fourbit.fused.primitives.activate_backward`."""
    rows, width = grad.shape
    if not grad.numel():
        return
    launch(act_backward, (rows, triton.cdiv(width, _BLOCK)))(
        x, grad, dx, h, width, x.stride(0), grad.stride(0), dx.stride(0), h.stride(0),
        GELU=gelu, GATED=gated, BLOCK=_BLOCK,
    )  # fmt: skip


@triton.jit
def _random(index, low, high):
    """The 32 bits of element ``index``, as `fourbit.ops.reference.dropout_mask` mixes them."""
    bits = index.to(tl.uint32) * 0x9E3779B1 + low
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) + high + (index >> 32).to(tl.uint32) * 0x27D4EB2F
    bits = bits * 0xC2B2AE35
    return bits ^ (bits >> 16)


@triton.jit
def mask_out(
    x, out, seed, threshold, keep, numel,
    USE: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The mask itself, ``x`` times it (USE), or that added to ``out`` (ADD).

    ``seed`` is int64, ``threshold`` of 32 bits in an int64, ``keep`` is ``1 / (1 - dropout)``.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = index < numel
    number, bound = tl.load(seed), tl.load(seed + 1)
    low, high = number.to(tl.uint32), (number >> 32).to(tl.uint32)
    kept = _random(index, low, high) >= bound.to(tl.uint32)
    dtype = out.dtype.element_ty
    # rounded where the reference rounds: the mask, then its product
    value = rounded(tl.where(kept, keep, 0.0).to(tl.float32), dtype)
    if USE:
        factor = tl.load(x + index, mask=live, other=0.0).to(tl.float32)
        value = rounded(value.to(tl.float32) * factor, dtype)
    if ADD:
        before = tl.load(out + index, mask=live, other=0.0).to(tl.float32)
        value = rounded(before + value.to(tl.float32), dtype)
    tl.store(out + index, value, mask=live)


def drop(x: Tensor | None, out: Tensor, *, seed: Tensor, dropout: float, add: bool = False) -> None:
    """Writes the mask (without ``x``), or ``x`` times it, into ``out``, or adds it there.

    Args:
        x: contiguous, like ``out``.
        out: contiguous.
        seed: int64 ``[1]``, on any device: its value is not waited for.
        dropout: probability.
        add: add to what ``out`` holds.
    """
    numel = out.numel()
    if not numel:
        return
    bound = torch.tensor([dropout_threshold(dropout)], dtype=torch.int64)
    numbers = torch.cat((seed.reshape(1).to(out.device), bound.to(out.device)))
    # as the reference divides: 1 in the tensor's dtype by a float64
    keep = float((torch.ones(1, dtype=out.dtype) / (1.0 - dropout)).item())
    launch(mask_out, (triton.cdiv(numel, _BLOCK),))(
        out if x is None else x, out, numbers, 0, keep, numel,
        USE=x is not None, ADD=add, BLOCK=_BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
