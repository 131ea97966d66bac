"""Norms, rotation, activations and dropout into given buffers, forward and backward.

Each is one pass of a native kernel on a CPU and of a Triton kernel on a GPU; the plain PyTorch form
beside them is the truth, and serves where neither is. All take float32 or bfloat16; statistics are
float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import torch
from torch import Tensor

from fourbit import native, ops
from fourbit.fused.parts import Norm
from fourbit.ops.cpu.dropout import run_dropout
from fourbit.ops.triton import imagining, serves

_KINDS = {"silu": 0, "gelu_tanh": 1}
_Given = ParamSpec("_Given")


def _left_out_of_plans(function: Callable[_Given, None]) -> Callable[_Given, None]:
    """A plan for a GPU has nothing to compute, and a kernel allocates nothing."""

    @wraps(function)
    def call(*args: _Given.args, **kwargs: _Given.kwargs) -> None:
        if not imagining():
            function(*args, **kwargs)

    return call


def _call(name: str, arguments: str, x: Tensor, *values: object) -> None:
    code = (native.DTYPES[x.dtype], torch.get_num_threads())
    native.kernel(name, arguments + "ii")(*values, *code)


def statistics_like(x: Tensor, norm: Norm, *, groups: int = 1) -> Tensor:
    """An empty buffer for what the backward pass of ``norm`` needs."""
    columns = groups if norm.bias is None else 2
    return torch.empty(x.shape[0], columns, dtype=torch.float32, device=x.device)


@_left_out_of_plans
def normalize(x: Tensor, norm: Norm, y: Tensor, statistics: Tensor, *, groups: int = 1) -> None:
    """Writes the norm of ``x`` into ``y``.

    Args:
        x: ``[M, groups * D]``, rows contiguous inside.
        norm: over ``D``; a layer norm has one group.
        y: same shape; may be a view with another row stride.
        statistics: ``[M, groups]`` (1/rms) or ``[M, 2]`` (mean, 1/deviation), written.
        groups: independent norms in a row.
    """
    width = x.shape[1] // groups
    if norm.bias is not None:
        if native.reads(x):
            pointers = native.addresses(x, norm.weight, norm.bias, y)
            sizes = (native.address(statistics), x.shape[0], width, norm.eps)
            _call("layer_norm", "pppppllf", x, *pointers, *sizes)
            return
        if serves(x, y):
            from fourbit.ops.triton import norms

            norms.layer_norm(x, norm.weight, norm.bias, y, statistics, eps=norm.eps)
            return
        wide = x.float()
        mean = wide.mean(1, keepdim=True)
        rstd = torch.rsqrt((wide - mean).square().mean(1, keepdim=True) + norm.eps)
        statistics.copy_(torch.cat((mean, rstd), 1))
        y.copy_((wide - mean) * rstd * norm.weight.float() + norm.bias.float())
        return
    if native.reads(x):
        pointers = native.addresses(x, norm.weight, y, statistics)
        sizes = (x.shape[0], groups, width, x.stride(0), y.stride(0), norm.eps, norm.offset)
        _call("rms_norm", "pppplllllff", x, *pointers, *sizes)
        return
    if serves(x, y):
        from fourbit.ops.triton import norms

        shape = {"eps": norm.eps, "shift": norm.offset, "groups": groups}
        norms.rms_norm(x, norm.weight, y, statistics, **shape)
        return
    wide = x.float().reshape(-1, groups, width)
    rstd = torch.rsqrt(wide.square().mean(2, keepdim=True) + norm.eps)
    statistics.copy_(rstd[..., 0])
    y.copy_((wide * rstd * (norm.weight.float() + norm.offset)).reshape(x.shape))


@_left_out_of_plans
def normalize_backward(
    grad: Tensor,
    x: Tensor,
    norm: Norm,
    statistics: Tensor,
    dx: Tensor,
    *,
    added: Tensor | None = None,
    groups: int = 1,
) -> None:
    """Writes the gradient with respect to ``x`` into ``dx``, plus ``added``.

    Args:
        grad: with respect to the norm's result, laid out as ``dx``, which may be the same memory.
        x: the norm's input.
        norm: as in `normalize`.
        statistics: as written there.
        dx: ``[M, groups * D]``.
        added: laid out as ``dx``.
        groups: as in `normalize`.
    """
    width = x.shape[1] // groups
    extra = native.address(added)
    if norm.bias is not None:
        if native.reads(x):
            pointers = native.addresses(grad, x, norm.weight)
            rest = (native.address(statistics), extra, native.address(dx), x.shape[0], width)
            _call("layer_norm_backward", "ppppppll", x, *pointers, *rest)
            return
        if serves(grad, x, dx, added):
            from fourbit.ops.triton import norms

            norms.layer_norm_backward(grad, x, norm.weight, statistics, dx, added)
            return
        rstd = statistics[:, 1:]
        xhat = (x.float() - statistics[:, :1]) * rstd
        scaled = grad.float() * norm.weight.float()
        mean, dot = scaled.mean(1, keepdim=True), (scaled * xhat).mean(1, keepdim=True)
        result = rstd * (scaled - mean - xhat * dot)
    else:
        if native.reads(x):
            pointers = native.addresses(grad, x, norm.weight)
            rest = native.address(statistics), extra, native.address(dx), x.shape[0], groups, width
            strides = (x.stride(0), dx.stride(0), norm.offset)
            _call("rms_norm_backward", "pppppplllllf", x, *pointers, *rest, *strides)
            return
        if serves(grad, x, dx, added):
            from fourbit.ops.triton import norms

            scale = {"shift": norm.offset, "groups": groups}
            norms.rms_norm_backward(grad, x, norm.weight, statistics, dx, added, **scale)
            return
        rstd = statistics[..., None]
        xhat = x.float().reshape(-1, groups, width) * rstd
        scaled = grad.float().reshape(-1, groups, width) * (norm.weight.float() + norm.offset)
        dot = (scaled * xhat).mean(2, keepdim=True)
        result = (rstd * (scaled - xhat * dot)).reshape(x.shape)
    dx.copy_(result if added is None else result + added.float())


@_left_out_of_plans
def rotate_(x: Tensor, cos: Tensor, sin: Tensor, *, heads: int, back: bool = False) -> None:
    """Turns the first columns of each head by its row's position, in place.

    Args:
        x: ``[M, heads * D]``, a view with any row stride.
        cos: ``[P, rotary]`` in the dtype of ``x``; row m takes row ``m % P``.
        sin: likewise.
        heads: number of heads in a row.
        back: turn a gradient back instead.
    """
    head_dim, rotary = x.shape[1] // heads, cos.shape[1]
    if native.reads(x):
        sizes = (x.shape[0], heads, head_dim, rotary, x.stride(0), cos.shape[0], int(back))
        _call("rotate", "ppplllllli", x, *native.addresses(x, cos, sin), *sizes)
        return
    if serves(x, cos, sin):
        from fourbit.ops.triton import elementwise

        elementwise.rotate_(x, cos, sin, heads=heads, back=back)
        return
    half = rotary // 2
    view = x.view(-1, cos.shape[0], heads, head_dim)
    low, high = (part.float().clone() for part in view[..., :rotary].split(half, -1))
    c, s = cos.float()[:, None], sin.float()[:, None]
    (c1, c2), (s1, s2) = c.split(half, -1), s.split(half, -1)
    if back:
        view[..., :half] = low * c1 + high * s2
        view[..., half:rotary] = high * c2 - low * s1
    else:
        view[..., :half] = low * c1 - high * s1
        view[..., half:rotary] = high * c2 + low * s2


@_left_out_of_plans
def activate(x: Tensor, h: Tensor, *, kind: str, gated: bool) -> None:
    """Writes ``act(a) * b`` (gated: a row of ``x`` is a, then b) or ``act(x)`` into ``h``."""
    if native.reads(x):
        sizes = (h.shape[0], h.shape[1], _KINDS[kind], int(gated))
        _call("activate", "ppllii", x, *native.addresses(x, h), *sizes)
        return
    if serves(x, h):
        from fourbit.ops.triton import elementwise

        elementwise.activate(x, h, gelu=kind == "gelu_tanh", gated=gated)
        return
    a = x[:, : h.shape[1]].float()
    value = _activation(a, kind)
    h.copy_(value * x[:, h.shape[1] :].float() if gated else value)


@_left_out_of_plans
def activate_backward(
    x: Tensor, grad: Tensor, dx: Tensor, h: Tensor, *, kind: str, gated: bool
) -> None:
    """Writes the gradient with respect to ``x`` into ``dx``, given that of the result.

    The result itself is written into ``h`` again, as `activate` does.
    """
    width = grad.shape[1]
    if native.reads(x):
        sizes = (grad.shape[0], width, _KINDS[kind], int(gated))
        pointers = native.addresses(x, grad, dx, h)
        _call("activate_backward", "ppppllii", x, *pointers, *sizes)
        return
    if serves(x, grad, dx, h):
        from fourbit.ops.triton import elementwise

        elementwise.activate_backward(x, grad, dx, h, gelu=kind == "gelu_tanh", gated=gated)
        return
    with torch.enable_grad():
        wide = x.float().detach().requires_grad_()
        value = _activation(wide[:, :width], kind)
        value = value * wide[:, width:] if gated else value
        (result,) = torch.autograd.grad(value, wide, grad.float())
    h.copy_(value.detach())
    dx.copy_(result)


def _activation(x: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        return torch.nn.functional.silu(x)
    return torch.nn.functional.gelu(x, approximate="tanh")


@_left_out_of_plans
def drop(x: Tensor, out: Tensor, *, seed: int, dropout: float, add: bool = False) -> None:
    """Writes ``x * mask / (1 - dropout)`` into ``out``, or adds it there; both contiguous.

    The mask is that of `ops.dropout_mask`.
    """
    if native.reads(x):
        run_dropout(x, out, seed=seed, dropout=dropout, add=add)
        return
    if serves(x, out):
        from fourbit.ops.triton import elementwise

        elementwise.drop(x, out, seed=torch.tensor([seed]), dropout=dropout, add=add)
        return
    mask = ops.reference.dropout_mask(x, torch.tensor([seed]), dropout)
    out.copy_(out + x * mask if add else x * mask)
