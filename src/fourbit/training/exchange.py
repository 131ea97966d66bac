"""Which process computes which micro-batch, and how the results become those of all.

Micro-batches are dealt in turn: the first to rank 0, the second to rank 1. Losses and gradients
are added in the order of the micro-batches, so a run is the same on any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from fourbit.distributed import ALONE, OrderedSum, Ranks, is_shard
from fourbit.training.sharding import Sharding

Loss = float | Tensor
"""A tensor need not have been computed yet."""
Compute = Callable[[int], Loss]
"""Computes the micro-batch of this number, and gives the sum of its losses."""


class Exchange:
    """Deals micro-batches; does nothing of its own where there is one process.

    Args:
        parameters: those that are trained.
        ranks: the processes.
        sharding: where each process holds only a part of the layers.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        ranks: Ranks = ALONE,
        sharding: Sharding | None = None,
    ) -> None:
        self.ranks, self._sharding = ranks, sharding
        replicated = [p for p in parameters if not is_shard(p)]
        self._sum = OrderedSum(ranks, replicated) if not ranks.alone else None

    @property
    def divided(self) -> bool:
        """Whether a micro-batch can only be computed by all processes at once."""
        return self._sharding is not None

    @property
    def moved(self) -> int:
        """Bytes this process has sent for gradients and for gathering layers."""
        summed = 0 if self._sum is None else self._sum.moved
        return summed + (0 if self._sharding is None else self._sharding.moved)

    def most(self, count: int) -> int:
        """The most micro-batches of a step of ``count`` that one process computes."""
        return -(-count // self.ranks.size)

    def gradients(self, count: int, compute: Compute) -> Sequence[Loss]:
        """The losses of all micro-batches; the parameters then have the sum of their gradients.

        Args:
            count: micro-batches of the step.
            compute: also adds the gradients to the parameters.
        """
        if self._sum is None:
            return [compute(index) for index in range(count)]
        losses: list[float] = []
        self._sum.begin()
        for number, (index, active) in enumerate(self._rounds(count)):
            if self._sharding is not None:
                self._sharding.begin_round(active, first=number == 0)
            loss = self._turn(index, count, compute)
            self._sum.add(active)
            losses += self.ranks.gather(float(loss))[:active]
        self._sum.finish()
        return losses

    def losses(
        self, count: int, compute: Compute, *, stop: Callable[[], bool]
    ) -> list[float] | None:
        """The losses of all micro-batches, without gradients; None when any process is to stop."""
        losses: list[float] = []
        for index, active in self._rounds(count):
            if self.ranks.alone:
                if stop():
                    return None
                losses.append(float(compute(index)))
                continue
            found = self.ranks.gather([stop(), float(self._turn(index, count, compute))])
            if any(wants for wants, _ in found):
                return None
            losses += [loss for _, loss in found[:active]]
        return losses

    def _rounds(self, count: int) -> list[tuple[int, int]]:
        """For each round this process's micro-batch, and how many processes have one."""
        size, rank = self.ranks.size, self.ranks.rank
        return [(first + rank, min(size, count - first)) for first in range(0, count, size)]

    def _turn(self, index: int, count: int, compute: Compute) -> Loss:
        if index < count:
            loss = compute(index)
        else:
            loss = 0.0
            if self.divided:
                compute(count - 1)  # whose layers the others gather; the result is left aside
        self.ranks.tick()
        return loss
