"""How the result of a half layer is added to its input: ``y = x + c * [norm](z)``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    def forward(
        self, x: Tensor, product: Callable[[Tensor, Tensor | None], list[Tensor]]
    ) -> tuple[Tensor, tuple[Tensor, ...], list[Tensor]]:
        """y, what `backward` needs, and what ``product`` returned.

        Args:
            x: ``[M, D]``.
            product: ``(out, added)``: writes z plus ``added`` into ``out``.
        """
        if self.norm is None and self.scale == 1.0:
            y = torch.empty_like(x)
            return y, (), product(y, x)
        if self.norm is None:
            result = SCRATCH.take("result", tuple(x.shape), x)
            returned, kept = product(result, None), ()
        else:
            z = torch.empty_like(x)
            returned = product(z, None)
            kept = z, statistics_like(z, self.norm)
            result = SCRATCH.take("result", tuple(x.shape), x)
            normalize(z, self.norm, result, kept[1])
        return torch.add(x, result, alpha=self.scale), kept, returned

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
