"""Several linear layers with adapters that read the same input, as one product.

Legend: M rows, K columns of the input, N_i columns of the i-th result, r_i its rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fourbit.fused.parts import Projection
from fourbit.fused.primitives import drop
from fourbit.fused.scratch import SCRATCH


@dataclass(frozen=True)
class Group:
    """Projections that share an input; their results lie side by side in one buffer.

    Attributes:
        projections: in the order of their columns.
        seeds: of each projection's dropout; see `parts.draw_seeds`.
    """

    projections: tuple[Projection, ...]
    seeds: tuple[int, ...]

    @property
    def width(self) -> int:
        """Columns of the joint result."""
        return sum(p.shape[0] for p in self.projections)

    @cached_property
    def adapted(self) -> list[tuple[int, Projection, slice, int]]:
        """``(place among the adapters, projection, its columns, its seed)`` of those with one."""
        found, start = [], 0
        for projection, seed in zip(self.projections, self.seeds, strict=True):
            columns = slice(start, start + projection.shape[0])
            if projection.lora_A is not None:
                found.append((len(found), projection, columns, seed))
            start = columns.stop
        return found

    @property
    def adapters(self) -> list[Tensor]:
        """A and B of each adapter in turn: what autograd is told this group depends on."""
        return [t for _, p, _, _ in self.adapted for t in (p.lora_A, p.lora_B) if t is not None]

    def weight(self, like: Tensor) -> Tensor:
        """The joint weight ``[N, K]`` in the dtype of ``like``; valid until the next call."""
        if len(self.projections) == 1:
            plain = self.projections[0].plain_weight()
            if plain is not None:
                return plain.to(like.dtype)
        joint = SCRATCH.take("weight", (self.width, self.projections[0].shape[1]), like)
        start = 0
        for projection in self.projections:
            rows = projection.shape[0]
            projection.weight_into(joint[start : start + rows])
            start += rows
        return joint

    def bias(self, like: Tensor) -> Tensor | None:
        """The joint bias ``[N]``; None where no projection has one."""
        biases = [p.base.bias for p in self.projections]
        if all(bias is None for bias in biases):
            return None
        return torch.cat(
            [
                like.new_zeros(p.shape[0]) if bias is None else bias.detach().to(like.dtype)
                for p, bias in zip(self.projections, biases, strict=True)
            ]
        )

    def forward(self, x: Tensor, adapters: Sequence[Tensor], out: Tensor) -> list[Tensor]:
        """Writes the joint result into ``out``.

        Args:
            x: ``[M, K]``.
            adapters: as `adapters` lists them.
            out: ``[M, N]``.

        Returns:
            ``drop(x) · Aᵀ``, ``[M, r]`` for each adapter: what `backward` needs.
        """
        weight, bias = self.weight(x), self.bias(x)
        if bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(bias, x, weight.t(), out=out)
        kept = self._reduced(x, adapters)
        for (index, projection, columns, _), xa in zip(self.adapted, kept, strict=True):
            B = adapters[2 * index + 1].to(x.dtype)
            out[:, columns].addmm_(xa, B.t(), alpha=projection.scaling)
        return kept

    def _reduced(self, x: Tensor, adapters: Sequence[Tensor]) -> list[Tensor]:
        ranks = [A.shape[0] for A in adapters[::2]]
        if not ranks:
            return []
        if not self._dropping:
            joint = x @ torch.cat([A.to(x.dtype) for A in adapters[::2]]).t()
            return list(joint.split(ranks, dim=1))
        return [
            self._dropped(x, projection, seed) @ adapters[2 * index].to(x.dtype).t()
            for index, projection, _, seed in self.adapted
        ]

    @cached_property
    def _dropping(self) -> bool:
        return any(p.dropout > 0 for _, p, _, _ in self.adapted)

    def _dropped(self, x: Tensor, projection: Projection, seed: int) -> Tensor:
        if projection.dropout == 0:
            return x
        dropped = SCRATCH.take("dropped", tuple(x.shape), x)
        drop(x, dropped, seed=seed, dropout=projection.dropout)
        return dropped

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        adapters: Sequence[Tensor],
        kept: Sequence[Tensor],
        *,
        grad_x: Tensor | None,
    ) -> list[Tensor | None]:
        """Gradients of the adapters, and of the input into ``grad_x``.

        Args:
            grad: ``[M, N]``, of the joint result.
            x: ``[M, K]``, the same as in `forward`.
            adapters: as in `forward`.
            kept: what `forward` returned.
            grad_x: ``[M, K]``, written; None when nobody asks for it.

        Returns:
            For each of ``adapters`` its gradient in its own dtype.
        """
        if grad_x is not None:
            torch.mm(grad, self.weight(x), out=grad_x)
        reduced = [
            (grad[:, columns] @ adapters[2 * index + 1].to(x.dtype)).mul_(projection.scaling)
            for index, projection, columns, _ in self.adapted
        ]
        grads: list[Tensor | None] = []
        for (index, projection, columns, _), xa in zip(self.adapted, kept, strict=True):
            B = adapters[2 * index + 1]
            grads += [None, (grad[:, columns].t() @ xa).to(B.dtype).mul_(projection.scaling)]
        if reduced and not self._dropping:
            joint = torch.cat(reduced, dim=1)
            ranks = [A.shape[0] for A in adapters[::2]]
            for index, part in enumerate((joint.t() @ x).split(ranks)):
                grads[2 * index] = part.to(adapters[2 * index].dtype)
            if grad_x is not None:
                grad_x.addmm_(joint, torch.cat([A.to(x.dtype) for A in adapters[::2]]))
            return grads
        for (index, projection, _, seed), part in zip(self.adapted, reduced, strict=True):
            A = adapters[2 * index]
            grads[2 * index] = (part.t() @ self._dropped(x, projection, seed)).to(A.dtype)
            if grad_x is not None:
                self._add_dropped_(grad_x, part, A, projection, seed)
        return grads

    def _add_dropped_(
        self, grad_x: Tensor, part: Tensor, A: Tensor, projection: Projection, seed: int
    ) -> None:
        if projection.dropout == 0:
            grad_x.addmm_(part, A.to(part.dtype))
            return
        through = SCRATCH.take("dropped", tuple(grad_x.shape), grad_x)
        torch.mm(part, A.to(part.dtype), out=through)
        drop(through, grad_x, seed=seed, dropout=projection.dropout, add=True)


def split_adapters(values: Sequence[Any], *groups: Group) -> list[Sequence[Any]]:
    """Cuts one flat sequence of adapters into the parts that belong to each group."""
    parts, start = [], 0
    for group in groups:
        count = 2 * len(group.adapted)
        parts.append(values[start : start + count])
        start += count
    return parts
