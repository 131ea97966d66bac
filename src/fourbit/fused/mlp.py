"""The feed-forward half of a decoder layer: ``x + c * [norm](down(act(up(norm(x)))))``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fourbit.fused.parts import Norm
from fourbit.fused.primitives import (
    activate,
    activate_backward,
    normalize,
    normalize_backward,
    statistics_like,
)
from fourbit.fused.projection import Group, split_adapters
from fourbit.fused.residual import Residual
from fourbit.fused.scratch import SCRATCH


@dataclass(frozen=True)
class MlpBlock:
    """What one call of `mlp_block` computes.

    Attributes:
        norm: before the projections.
        up: gate and up side by side, or one projection.
        down: back to the model's width.
        activation: ``silu`` or ``gelu_tanh``.
        gated: whether the activated first half multiplies the second.
        residual: how the result is added to the input.
    """

    norm: Norm
    up: Group
    down: Group
    activation: str
    gated: bool
    residual: Residual

    @property
    def width(self) -> int:
        """Columns of the activated values."""
        return self.up.width // (2 if self.gated else 1)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: MlpBlock, *adapters: Tensor) -> Tensor:  # type: ignore[override]
        up_adapters, down_adapters = split_adapters(adapters, block.up, block.down)
        statistics = statistics_like(x, block.norm)
        h = SCRATCH.take("normed", tuple(x.shape), x)
        normalize(x, block.norm, h, statistics)
        wide = x.new_empty(x.shape[0], block.up.width)
        up_kept = block.up.forward(h, up_adapters, wide)
        activated = SCRATCH.take("activated", (x.shape[0], block.width), x)
        activate(wide, activated, kind=block.activation, gated=block.gated)
        y, kept, down_kept = block.residual.forward(
            x, lambda out, added: block.down.forward(activated, down_adapters, out, added)
        )
        ctx.block, ctx.counts = block, (len(adapters), len(up_kept), len(down_kept))
        ctx.save_for_backward(x, statistics, wide, *kept, *adapters, *up_kept, *down_kept)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        block: MlpBlock = ctx.block
        x, statistics, wide, *rest = ctx.saved_tensors
        kept, rest = block.residual.split(rest)
        count, up_count, _ = ctx.counts
        adapters, rest = rest[:count], rest[count:]
        up_adapters, down_adapters = split_adapters(adapters, block.up, block.down)
        up_kept, down_kept = rest[:up_count], rest[up_count:]

        grad = grad.contiguous()
        grad_z = block.residual.backward(grad, kept)
        grad_activated = SCRATCH.take("grad activated", (x.shape[0], block.width), x)
        grad_wide = SCRATCH.take("grad wide", tuple(wide.shape), x)

        def activated() -> Tensor:
            h = SCRATCH.take("activated", (x.shape[0], block.width), x)
            activate_backward(
                wide, grad_activated, grad_wide, h, kind=block.activation, gated=block.gated
            )
            return h

        def normed() -> Tensor:
            h = SCRATCH.take("normed", tuple(x.shape), x)
            normalize(x, block.norm, h, statistics)
            return h

        # `activated` also makes the gradient that goes on, from the one that is there by then
        grads_down = block.down.backward(
            grad_z, activated, down_adapters, down_kept, grad_x=grad_activated
        )
        needed = ctx.needs_input_grad[0]
        grad_h = torch.empty_like(x) if needed else None
        grads_up = block.up.backward(grad_wide, normed, up_adapters, up_kept, grad_x=grad_h)
        if grad_h is not None:
            normalize_backward(grad_h, x, block.norm, statistics, grad_h, added=grad)
        return (grad_h, None, *grads_up, *grads_down)


def mlp_block(x: Tensor, block: MlpBlock) -> Tensor:
    """``[M, D]`` to ``[M, D]``; differentiable in ``x`` and the adapters."""
    return _Mlp.apply(x, block, *block.up.adapters, *block.down.adapters)
