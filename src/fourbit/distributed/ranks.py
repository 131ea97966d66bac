"""The processes of a run and what they tell each other: small things, without pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fourbit.distributed.watchdog import Watchdog
from fourbit.errors import InputError

_VOTE, _END = "\nvote", "\nend"
"""What no tensor is called."""


class Ranks:
    """All processes of a run, seen from one of them; `ALONE` where there is only one.

    Every method that exchanges something has to be called by all of them in the same order.

    Args:
        rank: number of this process.
        size: how many there are.
        watchdog: knows what the others are doing.
    """

    def __init__(self, rank: int = 0, size: int = 1, watchdog: Watchdog | None = None) -> None:
        self.rank, self.size, self._watchdog = rank, size, watchdog

    @property
    def here(self) -> int:
        """How many of them share this host, as far as what started them says."""
        return 1 if self.alone else int(os.environ.get("LOCAL_WORLD_SIZE", self.size))

    @property
    def alone(self) -> bool:
        """Whether there is one process."""
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether this process writes the run directory and speaks to people."""
        return self.rank == 0

    def phase(self, name: str) -> None:
        """Notes what this process is about to do, for the others' error lines."""
        if self._watchdog is not None:
            self._watchdog.enter(name)

    def tick(self) -> None:
        """Notes that something was got done."""
        if self._watchdog is not None:
            self._watchdog.tick()

    def end_together(self) -> None:
        """Notes that all processes have agreed to end."""
        if self._watchdog is not None:
            self._watchdog.together = True

    def tell(self, log: Callable[[str], object]) -> None:
        """Has ``log`` told for what this process is ended when others are gone."""
        if self._watchdog is not None:
            self._watchdog.on_end = log

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, this process may wait for others.

        Raises:
            FourbitError: another process is gone; it is named.
        """
        if self._watchdog is None:
            yield
            return
        try:
            with self._watchdog.waiting():
                yield
        except (RuntimeError, ValueError) as error:  # torch's for a broken connection
            raise self._watchdog.explained(error) from error

    def gather(self, value: Any) -> list[Any]:
        """Everybody's JSON value, by rank; floats come back exactly."""
        if self.alone:
            return [value]
        import torch.distributed as dist

        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        with self.waiting():
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(sizes, torch.tensor([data.numel()]))
            widest = max(int(size) for size in sizes)
            mine = torch.zeros(widest, dtype=torch.uint8)
            mine[: data.numel()] = data
            found = [torch.zeros_like(mine) for _ in range(self.size)]
            dist.all_gather(found, mine)
        return [
            json.loads(bytes(part[: int(size)].tolist()))
            for part, size in zip(found, sizes, strict=True)
        ]

    def shared(self, value: Any) -> Any:
        """The JSON value of the first process."""
        if self.alone:
            return value
        import torch.distributed as dist

        data = json.dumps(value if self.first else None).encode()
        with self.waiting():
            size = torch.tensor([len(data)])
            dist.broadcast(size, 0)
            part = torch.zeros(int(size), dtype=torch.uint8)
            if self.first:
                part = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            dist.broadcast(part, 0)
        return value if self.first else json.loads(bytes(part.tolist()))

    def shared_tensors(self, tensors: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
        """The tensors of the first process, on the CPU; the others give None.

        Elsewhere each is fetched when it is asked for, so all have to ask in one order.
        """
        if self.alone:
            assert tensors is not None
            return tensors
        kinds = None
        if tensors is not None:
            kinds = [
                [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
                for name, tensor in tensors.items()
            ]
        return _Shared(self, self.shared(kinds), tensors)

    def highest(self, value: int) -> int:
        """The largest of everybody's numbers."""
        return max(self.gather(value))

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """For each place, whether the flag is set in any process."""
        if self.alone:
            return list(flags)
        import torch.distributed as dist

        found = torch.tensor([int(flag) for flag in flags], dtype=torch.uint8)
        with self.waiting():
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in found.tolist()]

    def require_same(self, facts: Mapping[str, Any], *, fix: str) -> None:
        """Refuses to go on when processes differ in one of the facts.

        Args:
            facts: JSON values by name.
            fix: what to do about a difference.

        Raises:
            InputError: naming the rank and the first difference.
        """
        everybody = self.gather(dict(facts))
        for rank, theirs in enumerate(everybody):
            for name, value in everybody[0].items():
                if theirs.get(name) != value:
                    raise InputError(
                        "ranks-differ",
                        where=f"rank {rank}",
                        what=f"{name} is {_shown(theirs.get(name))}, rank 0 has {_shown(value)}",
                        fix=fix,
                    )

    def require_all_there(self) -> None:
        """Goes on only when every process has come here; `asking` brings the others.

        Raises:
            FourbitError: one of them is gone; it is named.
        """
        self.shared(_VOTE)
        self.gather(None)

    @contextmanager
    def asking(
        self, tensors: Mapping[str, Tensor], *, divided: bool
    ) -> Iterator[Mapping[str, Tensor]]:
        """Inside, the first process works with ``tensors``, and the others serve it.

        Args:
            tensors: the same names everywhere.
            divided: whether to get one of them needs all processes.
        """
        if self.alone:
            yield tensors
        elif self.first:
            try:
                yield _Asked(self, tensors) if divided else tensors
            finally:
                self.shared(_END)
        else:
            yield tensors
            while (asked := self.shared(None)) != _END:
                if asked == _VOTE:
                    self.gather(None)
                else:
                    tensors[asked]


class _Asked(Mapping[str, Tensor]):
    """Tensors that the other processes help to put together when they are asked for."""

    def __init__(self, ranks: Ranks, tensors: Mapping[str, Tensor]) -> None:
        self._ranks, self._tensors = ranks, tensors

    def __getitem__(self, name: str) -> Tensor:
        self._ranks.shared(name)
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class _Shared(Mapping[str, Tensor]):
    """The first process's tensors, sent one by one."""

    def __init__(
        self, ranks: Ranks, kinds: list[list[Any]], tensors: Mapping[str, Tensor] | None
    ) -> None:
        self._ranks, self._tensors = ranks, tensors
        self._kinds = {name: (dtype, shape) for name, dtype, shape in kinds}

    def __getitem__(self, name: str) -> Tensor:
        import torch.distributed as dist

        dtype, shape = self._kinds[name]
        if self._tensors is not None:
            tensor = self._tensors[name].detach().cpu().contiguous()
        else:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        with self._ranks.waiting():
            dist.broadcast(tensor.view(-1).view(torch.uint8), 0)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


ALONE = Ranks()
"""One process."""
