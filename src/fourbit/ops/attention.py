"""Softmax attention over visible ranges of keys.

Legend: B batch, T tokens, H query heads over KV key/value heads, D width of a head (values may
have another, Dv). Query t of entry b sees the keys ``first[b, t] ... t``: causal masks, packed
documents, sliding windows and left padding are such ranges. ``first[b, t] > t`` means that it
sees nothing: its output is 0 and nothing flows back. With ``shared``, query t also sees the keys
``0 ... shared[b, t] - 1``; only forward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourbit.ops import attention_schema as plain
from fourbit.ops.cpu import attention as cpu
from fourbit.ops.triton import imagining, serves


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    first: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    shared: Tensor | None = None,
) -> Tensor:
    """``softmax(scale · q kᵀ) v`` for each head, over what each query sees; differentiable.

    Args:
        q: ``[B, T, H, D]``.
        k: ``[B, T, KV, D]``; KV divides H.
        v: ``[B, T, KV, Dv]``.
        first: int32 ``[B, T]``, the first key that each query sees; None: key 0.
        scale: of the scores; None: ``D ** -0.5``.
        softcap: scores become ``softcap · tanh(score / softcap)``; 0: they stay.
        shared: int32 ``[B, T]``, how many keys at the row's beginning each query also sees.

    Returns:
        ``[B, T, H, Dv]``, contiguous.

    Raises:
        RuntimeError: a gradient is asked for where ``shared`` is given.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.fourbit.attention(q, k, v, first, scale, softcap, shared)[0]


def attention_forward(
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
    """Attention into a buffer at hand, for whoever keeps what backward needs itself.

    All tensors have one dtype and any steps between batches, tokens and heads, so they may be
    parts of one buffer; with the elements of a head side by side no copy is made.

    Args:
        q: ``[B, T, H, D]``.
        k: ``[B, T, KV, D]``.
        v: ``[B, T, KV, Dv]``.
        first: int32 ``[B, T]``, contiguous; None: every query sees from key 0 on.
        scale: of the scores.
        softcap: 0 for none.
        out: ``[B, T, H, Dv]``, overwritten.
        shared: int32 ``[B, T]``, contiguous: each query also sees so many keys of the beginning.

    Returns:
        Logarithms of sums, float32 ``[B, H, T]``, for `attention_backward`.
    """
    if scale > 0 and cpu.fits(q, k, v, out):
        return cpu.run_forward(q, k, v, first, scale=scale, softcap=softcap, out=out, shared=shared)
    if imagining():
        return _sums(q)
    if serves(q, k, v, out):
        from fourbit.ops.triton import attention as gpu

        return gpu.run_forward(q, k, v, first, scale=scale, softcap=softcap, out=out, shared=shared)
    result, lse = plain.attention(q, k, v, first, scale, softcap, shared)
    out.copy_(result)
    return lse


def _sums(q: Tensor) -> Tensor:
    return torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)


def attention_backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    first: Tensor | None,
    *,
    scale: float,
    softcap: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Gradients into buffers at hand: ``dq``, ``dk`` and ``dv`` are overwritten.

    Args:
        grad_o: ``[B, T, H, Dv]``.
        q: as `attention_forward` had it.
        k: likewise.
        v: likewise.
        o: what it wrote.
        lse: what it returned.
        first: as it had it.
        scale: likewise.
        softcap: likewise.
        dq: shaped like ``q``; overlaps no other tensor.
        dk: shaped like ``k``; likewise.
        dv: shaped like ``v``; likewise.
    """
    if scale > 0 and cpu.fits(q, k, v, o, grad_o, dq, dk, dv):
        cpu.run_backward(
            grad_o,
            (q, k, v, o),
            lse,
            first,
            scale=scale,
            softcap=softcap,
            grads=(dq, dk, dv),
        )
        return
    if imagining():
        _sums(q)  # the products of outputs and gradients
        return
    if serves(q, k, v, o, grad_o, dq, dk, dv):
        from fourbit.ops.triton import attention as gpu

        form = {"scale": scale, "softcap": softcap}
        gpu.run_backward(grad_o, (q, k, v, o), lse, first, **form, grads=(dq, dk, dv))
        return
    found = plain.attention_backward(grad_o, q, k, v, o, lse, first, scale, softcap)
    for buffer, grad in zip((dq, dk, dv), found, strict=True):
        buffer.copy_(grad)
