"""What a computation would have in memory at each moment, seen on tensors that have none."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fourbit.ops.schema import CPU_KERNELS


@dataclass
class Block:
    """One storage.

    Attributes:
        size: bytes.
        phase: during which it was made.
        made: index of the event that made it.
        gone: index of the event that freed it; None while it lives.
    """

    size: int
    phase: str
    made: int
    gone: int | None = None


class Ledger(TorchDispatchMode):
    """Writes down every storage that is made inside, and when it goes; enter it in a fake mode.

    Our own ops run as the code that serves them on a CPU, so that what they allocate inside is
    seen; kernels of torch are seen from outside only.

    Args:
        inside: False: our own ops are seen from outside too, as on a graphics card, whose kernels
            need no room beside their results.

    Attributes:
        blocks: in the order in which they were made.
        events: each `Block` at the moments when it was made and freed, in order of time.
        left: index of the event at which a phase was left last.
    """

    def __init__(self, *, inside: bool = True) -> None:
        super().__init__()
        self._inside = inside
        self.blocks: list[Block] = []
        self.events: list[tuple[Block, bool]] = []
        self.left: dict[str, int] = {}
        self._phase = ""
        self._known: dict[int, Block | None] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside, what is made belongs to ``name``."""
        outside, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = outside
            self.left[name] = self.now

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """These are there already, and somebody else's."""
        for tensor in tensors:
            self._known.setdefault(tensor.untyped_storage()._cdata, None)

    def block_of(self, tensor: Tensor) -> Block | None:
        """The block that ``tensor`` lies in; None when it was not made here."""
        return self._known.get(tensor.untyped_storage()._cdata)

    @property
    def now(self) -> int:
        """Index of the next event."""
        return len(self.events)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kernel = _own_kernel(func, args) if self._inside else None
        if kernel is None:
            result = func(*args, **(kwargs or {}))
        else:
            with self:
                result = kernel(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._note(value)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        block = Block(storage.nbytes(), self._phase, len(self.events))
        self._known[key] = block
        self.blocks.append(block)
        self.events.append((block, True))
        weakref.finalize(storage, self._freed, key, block)

    def _freed(self, key: int, block: Block) -> None:
        if self._known.get(key) is block:
            del self._known[key]
        block.gone = len(self.events)
        self.events.append((block, False))


def _own_kernel(func: Any, args: tuple[Any, ...]) -> Callable[..., Any] | None:
    if func.namespace != "fourbit":
        return None
    on_cpu = all(value.device.type == "cpu" for value in args if isinstance(value, Tensor))
    return CPU_KERNELS.get(func._schema.name.partition("::")[2]) if on_cpu else None
