"""Definition, fake, autograd and plain PyTorch kernel of softmax attention over ranges of keys.

Legend: B batch, T tokens, H query heads over KV key/value heads, D width of a head (values may
have another). Query t of entry b sees the keys ``first[b, t] ... t``: causal masks, packed
documents, sliding windows and left padding are such ranges. ``first[b, t] > t`` means that it
sees nothing: its output is 0 and nothing flows back. Where ``shared`` is given, query t also sees
the keys ``0 ... shared[b, t] - 1``: several continuations of one text lie in one row. That has no
gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fourbit.ops.schema import LIBRARY, default_kernel

_RANGES = "Tensor? first, float scale, float softcap"

LIBRARY.define(
    f"attention(Tensor q, Tensor k, Tensor v, {_RANGES}, Tensor? shared=None) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "attention_backward(Tensor grad_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse,"
    f" {_RANGES}) -> (Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("fourbit::attention", lib=LIBRARY)
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor | None,
    scale: float,
    softcap: float,
    shared: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    torch._check(heads % k.shape[2] == 0, lambda: "query heads share key/value heads evenly")
    out = q.new_empty((batch, length, heads, v.shape[-1]))
    return out, q.new_empty((batch, heads, length), dtype=torch.float32)


@torch.library.register_fake("fourbit::attention_backward", lib=LIBRARY)
def _(
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
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, first, ctx.scale, ctx.softcap, shared = inputs
    if shared is not None:
        raise RuntimeError("attention over a shared beginning has no gradient")
    ctx.save_for_backward(q, k, v, *output, first)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_o: Tensor | None, _grad_lse: Tensor | None) -> tuple[Any, ...]:
    if grad_o is None:
        return (None,) * 7
    grads = torch.ops.fourbit.attention_backward(grad_o, *ctx.saved_tensors, ctx.scale, ctx.softcap)
    return (*grads, None, None, None, None)


torch.library.register_autograd("fourbit::attention", _backward, setup_context=_setup, lib=LIBRARY)


def _by_group(tensor: Tensor, kv_heads: int) -> Tensor:
    """``[B, T, H, D]`` to ``[B, KV, H / KV, T, D]``, in float32 or more."""
    wide = tensor.double() if tensor.dtype == torch.float64 else tensor.float()
    return wide.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)


def _back(tensor: Tensor, like: Tensor) -> Tensor:
    """The way back to ``[B, T, H, D]``."""
    return tensor.permute(0, 3, 1, 2, 4).flatten(2, 3).to(like.dtype).contiguous()


def _scores(  # noqa: PLR0913  # what the op is given
    q: Tensor,
    k: Tensor,
    first: Tensor | None,
    scale: float,
    softcap: float,
    shared: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores ``[B, KV, G, T, T]``, -inf where nothing is seen, and their slope before scaling."""
    scores = (q @ k.transpose(-1, -2)) * scale
    slope = torch.ones_like(scores)
    if softcap > 0:
        tangent = torch.tanh(scores / softcap)
        scores, slope = softcap * tangent, 1 - tangent * tangent
    at = torch.arange(q.shape[-2], device=q.device)
    seen = at <= at[:, None]
    if first is not None:
        seen = seen & (at >= first[:, :, None])
    if shared is not None:
        seen = seen | (at < shared[:, :, None])
    if seen.dim() == 3:
        seen = seen[:, None, None]
    return scores.masked_fill(~seen, -torch.inf), slope


@default_kernel("attention")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor | None,
    scale: float,
    softcap: float,
    shared: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs ``[B, T, H, Dv]`` and logarithms of sums ``[B, H, T]``, +inf where nothing is seen.

    Everything is float32 until the output is rounded.
    """
    kv_heads = k.shape[2]
    queries, keys, values = (_by_group(tensor, kv_heads) for tensor in (q, k, v))
    scores, _ = _scores(queries, keys, first, scale, softcap, shared)
    lse = scores.logsumexp(-1)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    out = torch.exp(scores - lse[..., None]) @ values
    return _back(out, q), lse.flatten(1, 2).float()


@default_kernel("attention_backward")
def attention_backward(
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
    """Gradients of q, k and v, each contiguous, from what forward kept."""
    kv_heads = k.shape[2]
    grad, queries, keys, values, out = (
        _by_group(tensor, kv_heads) for tensor in (grad_o, q, k, v, o)
    )
    scores, slope = _scores(queries, keys, first, scale, softcap)
    weights = torch.exp(scores - lse.unflatten(1, (kv_heads, -1))[..., None])
    delta = (grad * out).sum(-1, keepdim=True)
    ds = weights * (grad @ values.transpose(-1, -2) - delta) * slope * scale
    dk = (ds.transpose(-1, -2) @ queries).sum(2, keepdim=True)
    dv = (weights.transpose(-1, -2) @ grad).sum(2, keepdim=True)
    return _back(ds @ keys, q), _back(dk, k), _back(dv, v)
