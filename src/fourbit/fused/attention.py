"""The attention half of a decoder layer: ``x + c * [norm](out(attend(rotate(qkv(norm(x))))))``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fourbit.fused.parts import Heads, Norm
from fourbit.fused.primitives import normalize, normalize_backward, rotate_, statistics_like
from fourbit.fused.projection import Group, split_adapters
from fourbit.fused.residual import Residual
from fourbit.fused.scratch import SCRATCH
from fourbit.ops.attention import attention_backward, attention_forward


@dataclass(frozen=True)
class AttentionBlock:
    """What one call of `attention_block` computes.

    Attributes:
        norm: before the projections.
        qkv: query, key and value side by side.
        heads: their shape, and the scores.
        head_norms: of each query head and each key head, where the architecture has them.
        rotary: cos and sin, ``[P, rotary]`` with P dividing the rows; None without rotation.
        first: int32 ``[B, T]``, the first key each query sees; None for plain causal attention.
        shared: int32 ``[B, T]``, keys at the beginning that it sees besides; not where gradients
            are wanted.
        batch: B.
        out: back to the model's width.
        residual: how the result is added to the input.
        keep: is shown key and value, ``[B, T, heads, head_dim]``, which it must copy: a cache.
    """

    norm: Norm
    qkv: Group
    heads: Heads
    head_norms: tuple[Norm, Norm] | None
    rotary: tuple[Tensor, Tensor] | None
    first: Tensor | None
    batch: int
    out: Group
    residual: Residual
    keep: Callable[[Tensor, Tensor], object] | None = None
    shared: Tensor | None = None

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value as ``[B, T, heads, head_dim]`` views of their joint buffer."""
        kinds = (self.heads.heads, self.heads.kv_heads, self.heads.kv_heads)
        parts = qkv.view(self.batch, -1, qkv.shape[1]).split(self.heads.widths, dim=2)
        return tuple(  # type: ignore[return-value]
            part.unflatten(2, (kind, self.heads.head_dim))
            for part, kind in zip(parts, kinds, strict=True)
        )

    def positioned(self, raw: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The joint buffer with its heads normed and turned, and the norms' statistics.

        Without head norms this happens in ``raw`` itself, which needs no more to go back.
        """
        if self.head_norms is None:
            self._rotate(raw, back=False)
            return raw, ()
        turned = SCRATCH.take("turned", tuple(raw.shape), raw)
        statistics = []
        for columns, norm, count in self._normed_parts():
            kept = statistics_like(raw, norm, groups=count)
            normalize(raw[:, columns], norm, turned[:, columns], kept, groups=count)
            statistics.append(kept)
        value = slice(turned.shape[1] - self.heads.widths[2], None)
        turned[:, value] = raw[:, value]
        self._rotate(turned, back=False)
        return turned, tuple(statistics)

    def turn_back(self, grad: Tensor, raw: Tensor, statistics: Sequence[Tensor]) -> None:
        """The gradient of ``raw`` from that of what `positioned` gave, in place."""
        self._rotate(grad, back=True)
        if self.head_norms is None:
            return
        for (columns, norm, count), kept in zip(self._normed_parts(), statistics, strict=True):
            part = grad[:, columns]
            normalize_backward(part, raw[:, columns], norm, kept, part, groups=count)

    def _normed_parts(self) -> list[tuple[slice, Norm, int]]:
        assert self.head_norms is not None
        query, key, _ = self.heads.widths
        return [
            (slice(0, query), self.head_norms[0], self.heads.heads),
            (slice(query, query + key), self.head_norms[1], self.heads.kv_heads),
        ]

    def _rotate(self, qkv: Tensor, *, back: bool) -> None:
        if self.rotary is None:
            return
        query, key, _ = self.heads.widths
        count = self.heads.heads + self.heads.kv_heads
        rotate_(qkv[:, : query + key], *self.rotary, heads=count, back=back)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, block: AttentionBlock, *adapters: Tensor
    ) -> Tensor:
        qkv_adapters, out_adapters = split_adapters(adapters, block.qkv, block.out)
        norm_statistics = statistics_like(x, block.norm)
        h = SCRATCH.take("normed", tuple(x.shape), x)
        normalize(x, block.norm, h, norm_statistics)
        raw = x.new_empty(x.shape[0], block.qkv.width)
        qkv_kept = block.qkv.forward(h, qkv_adapters, raw)
        turned, head_statistics = block.positioned(raw)
        q, k, v = block.split(turned)
        if block.keep is not None:
            block.keep(k, v)
        o = x.new_empty(x.shape[0], block.heads.widths[0])
        lse = attention_forward(
            q,
            k,
            v,
            block.first,
            scale=block.heads.scale,
            softcap=block.heads.softcap,
            out=o.view(q.shape),
            shared=block.shared,
        )
        y, kept, out_kept = block.residual.forward(
            x, lambda out, added: block.out.forward(o, out_adapters, out, added)
        )
        ctx.block = block
        ctx.counts = (len(head_statistics), len(adapters), len(qkv_kept))
        ctx.save_for_backward(
            x,
            norm_statistics,
            raw,
            o,
            lse,
            *kept,
            *head_statistics,
            *adapters,
            *qkv_kept,
            *out_kept,
        )
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        block: AttentionBlock = ctx.block
        x, norm_statistics, raw, o, lse, *rest = ctx.saved_tensors
        kept, rest = block.residual.split(rest)
        heads, count, qkv_count = ctx.counts
        head_statistics, rest = rest[:heads], rest[heads:]
        adapters, rest = rest[:count], rest[count:]
        qkv_adapters, out_adapters = split_adapters(adapters, block.qkv, block.out)
        qkv_kept, out_kept = rest[:qkv_count], rest[qkv_count:]

        grad = grad.contiguous()
        grad_z = block.residual.backward(grad, kept)
        grad_o = SCRATCH.take("grad o", tuple(o.shape), x)
        grads_out = block.out.backward(grad_z, lambda: o, out_adapters, out_kept, grad_x=grad_o)
        # Without head norms the saved buffer is the turned one already.
        turned = raw if block.head_norms is None else block.positioned(raw)[0]
        grad_qkv = SCRATCH.take("grad qkv", tuple(raw.shape), x)
        q, k, v = block.split(turned)
        dq, dk, dv = block.split(grad_qkv)
        attention_backward(
            grad_o.view(q.shape),
            q,
            k,
            v,
            o.view(q.shape),
            lse,
            block.first,
            scale=block.heads.scale,
            softcap=block.heads.softcap,
            dq=dq,
            dk=dk,
            dv=dv,
        )
        block.turn_back(grad_qkv, raw, head_statistics)

        def normed() -> Tensor:
            h = SCRATCH.take("normed", tuple(x.shape), x)
            normalize(x, block.norm, h, norm_statistics)
            return h

        grad_h = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grads_qkv = block.qkv.backward(grad_qkv, normed, qkv_adapters, qkv_kept, grad_x=grad_h)
        if grad_h is not None:
            normalize_backward(grad_h, x, block.norm, norm_statistics, grad_h, added=grad)
        return (grad_h, None, *grads_qkv, *grads_out)


def attention_block(x: Tensor, block: AttentionBlock) -> Tensor:
    """``[B * T, D]`` to ``[B * T, D]``; differentiable in ``x`` and the adapters."""
    return _Attention.apply(x, block, *block.qkv.adapters, *block.out.adapters)
