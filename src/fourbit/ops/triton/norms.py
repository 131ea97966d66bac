"""RMS norm and layer norm, forward and backward, a row (or a head of a row) a program."""

# A kernel's call takes more than its definition says, and sizes become constants of Triton's.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fourbit.ops.triton.language import rounded
from fourbit.ops.triton.registry import launch


@triton.jit
def rms_forward(
    x, weight, y, statistics, x_stride, y_stride, groups, eps, shift,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, group)."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    live = column < WIDTH
    place = group * WIDTH + column
    wide = tl.load(x + row * x_stride + place, mask=live, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, axis=0) / WIDTH + eps)
    scale = tl.load(weight + column, mask=live, other=0.0).to(tl.float32) + shift
    tl.store(statistics + row * groups + group, rstd)
    tl.store(
        y + row * y_stride + place, rounded(wide * rstd * scale, y.dtype.element_ty), mask=live
    )


@triton.jit
def rms_backward(
    grad, x, weight, statistics, added, dx, x_stride, dx_stride, groups, shift,
    ADD: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, group); ``grad`` and ``added`` are laid out as ``dx``."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    live = column < WIDTH
    place = group * WIDTH + column
    rstd = tl.load(statistics + row * groups + group)
    xhat = tl.load(x + row * x_stride + place, mask=live, other=0.0).to(tl.float32) * rstd
    scale = tl.load(weight + column, mask=live, other=0.0).to(tl.float32) + shift
    target = row * dx_stride + place
    scaled = tl.load(grad + target, mask=live, other=0.0).to(tl.float32) * scale
    dot = tl.sum(scaled * xhat, axis=0) / WIDTH
    result = rstd * (scaled - xhat * dot)
    if ADD:
        result += tl.load(added + target, mask=live, other=0.0).to(tl.float32)
    tl.store(dx + target, rounded(result, dx.dtype.element_ty), mask=live)


@triton.jit
def layer_forward(
    x, weight, bias, y, statistics, x_stride, y_stride, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row); ``statistics`` is ``[M, 2]``."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    live = column < WIDTH
    wide = tl.load(x + row * x_stride + column, mask=live, other=0.0).to(tl.float32)
    mean = tl.sum(wide, axis=0) / WIDTH
    centred = tl.where(live, wide - mean, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=0) / WIDTH + eps)
    tl.store(statistics + 2 * row, mean)
    tl.store(statistics + 2 * row + 1, rstd)
    result = centred * rstd * tl.load(weight + column, mask=live, other=0.0).to(tl.float32)
    result += tl.load(bias + column, mask=live, other=0.0).to(tl.float32)
    tl.store(y + row * y_stride + column, rounded(result, y.dtype.element_ty), mask=live)


@triton.jit
def layer_backward(
    grad, x, weight, statistics, added, dx, x_stride, dx_stride,
    ADD: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row); ``grad`` and ``added`` are laid out as ``dx``."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    live = column < WIDTH
    mean, rstd = tl.load(statistics + 2 * row), tl.load(statistics + 2 * row + 1)
    wide = tl.load(x + row * x_stride + column, mask=live, other=0.0).to(tl.float32)
    xhat = tl.where(live, (wide - mean) * rstd, 0.0)
    target = row * dx_stride + column
    scaled = tl.load(grad + target, mask=live, other=0.0).to(tl.float32)
    scaled *= tl.load(weight + column, mask=live, other=0.0).to(tl.float32)
    average, dot = tl.sum(scaled, axis=0) / WIDTH, tl.sum(scaled * xhat, axis=0) / WIDTH
    result = rstd * (scaled - average - xhat * dot)
    if ADD:
        result += tl.load(added + target, mask=live, other=0.0).to(tl.float32)
    tl.store(dx + target, rounded(result, dx.dtype.element_ty), mask=live)


def _warps(width: int) -> int:
    return 4 if width <= 2048 else 8 if width <= 8192 else 16


def rms_norm(
    x: Tensor, weight: Tensor, y: Tensor, statistics: Tensor, *, eps: float, shift: float,
    groups: int,
) -> None:  # fmt: skip
    """See `fourbit.fused.primitives.normalize`; ``shift`` is added to the weight."""
    width = x.shape[1] // groups
    if not x.numel():
        return
    launch(rms_forward, (x.shape[0], groups))(
        x, weight, y, statistics, x.stride(0), y.stride(0), groups, eps, shift,
        WIDTH=width, BLOCK=triton.next_power_of_2(width), num_warps=_warps(width),
    )  # fmt: skip


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, statistics: Tensor, dx: Tensor,
    added: Tensor | None, *, shift: float, groups: int,
) -> None:  # fmt: skip
    """See `fourbit.fused.primitives.normalize_backward`."""
    width = x.shape[1] // groups
    if not x.numel():
        return
    launch(rms_backward, (x.shape[0], groups))(
        grad, x, weight, statistics, grad if added is None else added, dx, x.stride(0),
        dx.stride(0), groups, shift, ADD=added is not None, WIDTH=width,
        BLOCK=triton.next_power_of_2(width), num_warps=_warps(width),
    )  # fmt: skip


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, statistics: Tensor, *, eps: float
) -> None:
    """See `fourbit.fused.primitives.normalize`."""
    width = x.shape[1]
    if not x.numel():
        return
    launch(layer_forward, (x.shape[0],))(
        x, weight, bias, y, statistics, x.stride(0), y.stride(0), eps,
        WIDTH=width, BLOCK=triton.next_power_of_2(width), num_warps=_warps(width),
    )  # fmt: skip


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, statistics: Tensor, dx: Tensor, added: Tensor | None
) -> None:
    """See `fourbit.fused.primitives.normalize_backward`."""
    width = x.shape[1]
    if not x.numel():
        return
    launch(layer_backward, (x.shape[0],))(
        grad, x, weight, statistics, grad if added is None else added, dx, x.stride(0),
        dx.stride(0), ADD=added is not None, WIDTH=width, BLOCK=triton.next_power_of_2(width),
        num_warps=_warps(width),
    )  # fmt: skip
