"""How the result of a half layer is added to its input: ``y = x + c * [norm](z)``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fourbit.fused.parts import Norm
from fourbit.fused.primitives import normalize, normalize_backward, statistics_like
from fourbit.fused.scratch import SCRATCH


@dataclass(frozen=True)
class Residual:
    """The addition at the end of a block.

    Attributes:
        norm: of the result before it is added, where the architecture has one.
        scale: of the result.
    """

    norm: Norm | None = None
    scale: float = 1.0

    def buffer(self, x: Tensor) -> Tensor:
        """Where the block's result z ``[M, D]`` goes: kept for backward only if a norm follows."""
        return (
            SCRATCH.take("result", tuple(x.shape), x) if self.norm is None else x.new_empty(x.shape)
        )

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """y, and what `backward` needs."""
        if self.norm is None:
            return torch.add(x, z, alpha=self.scale), ()
        statistics = statistics_like(z, self.norm)
        normed = SCRATCH.take("result", tuple(x.shape), x)
        normalize(z, self.norm, normed, statistics)
        return torch.add(x, normed, alpha=self.scale), (z, statistics)

    def split(self, values: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """What `forward` kept, and the rest, from a sequence that begins with it."""
        count = 0 if self.norm is None else 2
        return values[:count], values[count:]

    def backward(self, grad: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """The gradient of z, given that of y."""
        if self.norm is None and self.scale == 1.0:
            return grad
        result = SCRATCH.take("grad result", tuple(grad.shape), grad)
        torch.mul(grad, self.scale, out=result)
        if self.norm is not None:
            z, statistics = kept
            normalize_backward(result, z, self.norm, statistics, result)
        return result
