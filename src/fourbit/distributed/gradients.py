"""Gradients of several processes, added in the order in which one process would add them.

An all-reduce adds in an order that depends on the number of processes, so its sums differ in their
last bits. Here every process owns a part of all gradients and is sent this part of each
micro-batch's gradient, adds them one after another as the accumulation of a single process does,
and in the end the parts are handed round. A step of n micro-batches on N processes then moves
``(n / N + 1)`` times the gradients per process, an all-reduce twice; they are the adapters', so
both are little, and the numbers do not depend on N at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fourbit.distributed.ranks import Ranks

_BUCKET_BYTES = 16 << 20


class OrderedSum:
    """Sums the gradients of whole parameters over micro-batches that several processes compute.

    Args:
        ranks: the processes.
        parameters: the same ones in the same order everywhere, none of them divided.

    Attributes:
        moved: bytes this process has sent so far.
    """

    def __init__(self, ranks: Ranks, parameters: Sequence[Tensor]) -> None:
        self._ranks = ranks
        self._buckets = _buckets(parameters)
        self._sums: list[Tensor | None] = [None] * len(self._buckets)
        self._touched = [[False] * len(bucket) for bucket in self._buckets]
        self.moved = 0

    def begin(self) -> None:
        """Forgets what was added."""
        self._sums = [None] * len(self._buckets)
        self._touched = [[False] * len(bucket) for bucket in self._buckets]

    @torch.no_grad()
    def add(self, active: int) -> None:
        """Takes the gradients of one micro-batch of each of the first ``active`` processes.

        The others' are not looked at; the parameters have no gradients afterwards.
        """
        for number, bucket in enumerate(self._buckets):
            theirs = self._exchanged(bucket, self._touched[number], active)
            total = self._sums[number]
            for part in theirs[:active]:
                total = part.clone() if total is None else total.add_(part)
            self._sums[number] = total

    def _exchanged(self, bucket: list[Tensor], touched: list[bool], active: int) -> Tensor:
        """Everybody's gradient of the part that this process owns, ``[size, part]``."""
        mine = self._padded(bucket)
        at = 0
        for place, parameter in enumerate(bucket):
            end = at + parameter.numel()
            if parameter.grad is not None:
                if self._ranks.rank < active:
                    mine[at:end] = parameter.grad.reshape(-1)
                    touched[place] = True
                parameter.grad = None
            at = end
        return exchanged(self._ranks, mine, self)

    def _padded(self, bucket: list[Tensor]) -> Tensor:
        size = self._ranks.size
        count = sum(parameter.numel() for parameter in bucket)
        return bucket[0].new_zeros(-(-count // size) * size)

    @torch.no_grad()
    def finish(self) -> None:
        """Gives every parameter that any process had a gradient of its sum as gradient."""
        import torch.distributed as dist

        flags = self._ranks.any_of([flag for bucket in self._touched for flag in bucket])
        for number, bucket in enumerate(self._buckets):
            part = self._sums[number]
            assert part is not None
            flat = self._padded(bucket)
            with self._ranks.waiting():
                dist.all_gather(list(flat.view(self._ranks.size, -1).unbind()), part)
            self.moved += part.numel() * part.element_size() * (self._ranks.size - 1)
            at = 0
            for parameter in bucket:
                end = at + parameter.numel()
                if flags.pop(0):
                    parameter.grad = flat[at:end].view(parameter.shape).clone()
                at = end
        self.begin()


def exchanged(ranks: Ranks, flat: Tensor, count: OrderedSum | None = None) -> Tensor:
    """Everybody's values of the part of ``flat`` that is this process's, ``[size, part]``."""
    import torch.distributed as dist

    theirs = torch.empty_like(flat)
    with ranks.waiting():
        dist.all_to_all_single(theirs, flat)
    if count is not None:
        count.moved += flat.numel() * flat.element_size() * (ranks.size - 1) // ranks.size
    return theirs.view(ranks.size, -1)


def _buckets(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """Parameters of one dtype together, as many as fill a bucket."""
    buckets: list[list[Tensor]] = []
    room: dict[torch.dtype, tuple[list[Tensor], int]] = {}
    for parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        bucket, used = room.get(parameter.dtype, ([], _BUCKET_BYTES))
        if used + size > _BUCKET_BYTES:
            bucket, used = [], 0
            buckets.append(bucket)
        bucket.append(parameter)
        room[parameter.dtype] = bucket, used + size
    return buckets
