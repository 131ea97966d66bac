"""Attention on the CPU: block by block, so that no matrix of all scores exists."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from fourbit import native
from fourbit.ops import attention_schema as plain
from fourbit.ops.cpu.registry import NARROW_OR_WIDE, cpu_kernel, threads


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
    """Writes ``out`` and returns the logarithms of sums; see `fourbit.ops.attention`."""
    # named, because the defaults may be meta and bf16 while a model is being made
    lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return lse
    layout = _layout(q, k, v, (q, k, v, out))
    scratch = _scratch(layout, q.dtype, backward=False)
    native.kernel("attention_forward", "pppppppppffii")(
        *native.addresses(q, k, v, first, shared, out, lse),
        ctypes.addressof(layout),
        native.address(scratch),
        scale,
        softcap,
        native.DTYPES[q.dtype],
        threads(),
    )
    return lse


def run_backward(
    grad_o: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    lse: Tensor,
    first: Tensor | None,
    *,
    scale: float,
    softcap: float,
    grads: Sequence[Tensor],
) -> None:
    """Writes the gradients of q, k and v; ``inputs`` is q, k, v and the output."""
    if grad_o.numel() == 0:
        return
    q, k, v, out = inputs
    layout = _layout(q, k, v, (q, k, v, out, grad_o, *grads))
    scratch = _scratch(layout, q.dtype, backward=True)
    native.kernel("attention_backward", "ppppppppppppffii")(
        *native.addresses(grad_o, q, k, v, out, lse, first, *grads),
        ctypes.addressof(layout),
        native.address(scratch),
        scale,
        softcap,
        native.DTYPES[q.dtype],
        threads(),
    )


def _layout(q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor]) -> ctypes.Array:
    """Sizes and steps in the order of csrc/kernels/attention.h."""
    values = [*q.shape[:3], k.shape[2], q.shape[3], v.shape[3]]
    for tensor in tensors:
        values += tensor.stride()[:3]
    return (ctypes.c_int64 * len(values))(*values)


def _scratch(layout: ctypes.Array, dtype: torch.dtype, *, backward: bool) -> Tensor:
    size = ctypes.c_int64()
    native.sizes("attention_scratch", "ppiii")(
        ctypes.addressof(layout),
        ctypes.addressof(size),
        int(backward),
        native.DTYPES[dtype],
        threads(),
    )
    return torch.empty(size.value, dtype=torch.float32, device="cpu")


def fits(*tensors: Tensor) -> bool:
    """Whether the kernels were made for q, k, v (and more tensors, of their dtype)."""
    q, k = tensors[:2]
    return (
        q.dtype in NARROW_OR_WIDE
        and q.shape[1] == k.shape[1]
        and all(t.dtype == q.dtype and native.reads(t) for t in tensors)
        and all(t.stride(-1) == 1 or t.shape[-1] == 1 for t in tensors)
    )


def _dense(tensor: Tensor) -> Tensor:
    """With the elements of each head side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _ranges(first: Tensor | None) -> Tensor | None:
    return None if first is None else first.to(torch.int32).contiguous()


@cpu_kernel("attention")
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor | None,
    scale: float,
    softcap: float,
    shared: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    q, k, v = _dense(q), _dense(k), _dense(v)
    if not fits(q, k, v) or scale <= 0:
        return plain.attention(q, k, v, first, scale, softcap, shared)
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype)
    lse = run_forward(
        q, k, v, _ranges(first), scale=scale, softcap=softcap, out=out, shared=_ranges(shared)
    )
    return out, lse


@cpu_kernel("attention_backward")
def _attention_backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    first: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_o, q, k, v, o = (_dense(tensor) for tensor in (grad_o, q, k, v, o))
    if not fits(q, k, v, o, grad_o) or scale <= 0:
        return plain.attention_backward(grad_o, q, k, v, o, lse, first, scale, softcap)
    dq, dk, dv = (torch.empty(tensor.shape, dtype=q.dtype) for tensor in (q, k, v))
    run_backward(
        grad_o,
        (q, k, v, o),
        lse.contiguous(),
        _ranges(first),
        scale=scale,
        softcap=softcap,
        grads=(dq, dk, dv),
    )
    return dq, dk, dv
