"""Several linear layers with adapters that read the same input, their results side by side.

Legend: M rows, K columns of the input, N_i columns of the i-th result, r_i its rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fourbit.fused.parts import Projection
from fourbit.fused.primitives import drop
from fourbit.fused.products import add_expanded_, gradient, multiplies, multiply, reduce
from fourbit.fused.scratch import SCRATCH
from fourbit.fused.weights import Weights


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
    def parts(self) -> list[tuple[Projection, slice]]:
        """Each projection, and its columns of the joint result."""
        found, start = [], 0
        for projection in self.projections:
            found.append((projection, slice(start, start + projection.shape[0])))
            start += projection.shape[0]
        return found

    @cached_property
    def adapted(self) -> list[tuple[int, Projection, slice, int]]:
        """``(place among the adapters, projection, its columns, its seed)`` of those with one."""
        found = []
        for (projection, columns), seed in zip(self.parts, self.seeds, strict=True):
            if projection.lora_A is not None:
                found.append((len(found), projection, columns, seed))
        return found

    @property
    def adapters(self) -> list[Tensor]:
        """A and B of each adapter in turn: what autograd is told this group depends on."""
        return [t for _, p, _, _ in self.adapted for t in (p.lora_A, p.lora_B) if t is not None]

    def forward(
        self, x: Tensor, adapters: Sequence[Tensor], out: Tensor, added: Tensor | None = None
    ) -> list[Tensor]:
        """Writes the joint result, plus ``added``, into ``out``.

        Args:
            x: ``[M, K]``.
            adapters: as `adapters` lists them.
            out: ``[M, N]``.
            added: ``[M, N]``.

        Returns:
            ``drop(x) · Aᵀ``, ``[M, r]`` for each adapter: what `backward` needs.
        """
        kept = self._reduced(x, adapters)
        if len(self.parts) > 1 and not multiplies(x):
            self._together(x, adapters, kept, out, added)
            return kept
        thin = {
            columns.start: (u, adapters[2 * index + 1].t(), projection.scaling)
            for (index, projection, columns, _), u in zip(self.adapted, kept, strict=True)
        }
        for projection, columns in self.parts:
            bias = projection.base.bias
            multiply(
                x,
                Weights((projection.base,)).t(),
                out[:, columns],
                thin=thin.get(columns.start),
                bias=None if bias is None else bias.detach().to(x.dtype),
                added=None if added is None else added[:, columns],
            )
        return kept

    def _together(
        self,
        x: Tensor,
        adapters: Sequence[Tensor],
        kept: Sequence[Tensor],
        out: Tensor,
        added: Tensor | None,
    ) -> None:
        """`forward` with one product of the library for all weights, then the adapters."""
        multiply(x, Weights(tuple(p.base for p in self.projections)).t(), out, added=added)
        for projection, columns in self.parts:
            if projection.base.bias is not None:
                out[:, columns].add_(projection.base.bias.detach().to(out.dtype))
        for (index, projection, columns, _), u in zip(self.adapted, kept, strict=True):
            factor = adapters[2 * index + 1].t()
            add_expanded_(out[:, columns], u, factor, scale=projection.scaling)

    def _reduced(self, x: Tensor, adapters: Sequence[Tensor]) -> list[Tensor]:
        ranks = [A.shape[0] for A in adapters[::2]]
        joint = x.new_empty(x.shape[0], sum(ranks))
        parts = list(joint.split(ranks, dim=1))
        if ranks and not self._dropping:
            reduce(x, _joined(adapters[::2]), joint)
            return parts
        for (index, projection, _, seed), part in zip(self.adapted, parts, strict=True):
            reduce(self._dropped(x, projection, seed), adapters[2 * index], part)
        return parts

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
        make_x: Callable[[], Tensor],
        adapters: Sequence[Tensor],
        kept: Sequence[Tensor],
        *,
        grad_x: Tensor | None,
    ) -> list[Tensor]:
        """Gradients of the adapters, and of the input into ``grad_x``.

        Args:
            grad: ``[M, N]``, of the joint result.
            make_x: gives ``[M, K]``, the same as in `forward`; called once, after ``grad_x`` is
                there.
            adapters: as in `forward`.
            kept: what `forward` returned.
            grad_x: ``[M, K]``, written; None when nobody asks for it.

        Returns:
            For each of ``adapters`` its gradient in its own dtype.
        """
        As, Bs = adapters[::2], adapters[1::2]
        joint = grad.new_empty(grad.shape[0], sum(A.shape[0] for A in As))
        reduced = joint.split([A.shape[0] for A in As], dim=1)
        grads = [torch.empty_like(adapter) for adapter in adapters]
        for (index, projection, columns, _), u in zip(self.adapted, kept, strict=True):
            reduce(grad[:, columns], Bs[index].t(), reduced[index], scale=projection.scaling)
            gradient(u, grad[:, columns], grads[2 * index + 1].t(), scale=projection.scaling)
        together = As and not self._dropping
        if grad_x is not None:
            thin = (joint, _joined(As), 1.0) if together else None
            weights = Weights(tuple(p.base for p in self.projections))
            multiply(grad, weights, grad_x, thin=thin)
            if not together:
                self._add_dropped_(grad_x, reduced, As)
        x = make_x()
        if together:
            grads[::2] = self._gradients(joint, x, As)
            return grads
        for (index, projection, _, seed), part in zip(self.adapted, reduced, strict=True):
            gradient(part, self._dropped(x, projection, seed), grads[2 * index])
        return grads

    def _gradients(self, joint: Tensor, x: Tensor, As: Sequence[Tensor]) -> list[Tensor]:
        """Of all A at once: x is read only once."""
        whole = As[0].new_empty(joint.shape[1], x.shape[1])
        gradient(joint, x, whole)
        parts = whole.split([A.shape[0] for A in As])
        return [part.to(A.dtype) for part, A in zip(parts, As, strict=True)]

    def _add_dropped_(self, grad_x: Tensor, parts: Sequence[Tensor], As: Sequence[Tensor]) -> None:
        for (index, projection, _, seed), part in zip(self.adapted, parts, strict=True):
            if projection.dropout == 0:
                add_expanded_(grad_x, part, As[index])
                continue
            through = SCRATCH.take("dropped", tuple(grad_x.shape), grad_x)
            torch.mm(part, As[index].to(part.dtype), out=through)
            drop(through, grad_x, seed=seed, dropout=projection.dropout, add=True)


def _joined(factors: Sequence[Tensor]) -> Tensor:
    return factors[0].detach() if len(factors) == 1 else torch.cat(list(factors))


def split_adapters(values: Sequence[Any], *groups: Group) -> list[Sequence[Any]]:
    """Cuts one flat sequence of adapters into the parts that belong to each group."""
    parts, start = [], 0
    for group in groups:
        count = 2 * len(group.adapted)
        parts.append(values[start : start + count])
        start += count
    return parts
