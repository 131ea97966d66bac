"""Buffers for what is needed only inside one block: made once, used by every layer and step."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_Key = tuple[str, torch.dtype, torch.device]
_MOST_VIEWS = 32


class Scratch(threading.local):
    """Uninitialized buffers by name; a name's buffer is valid until the name is taken again.

    Fresh tensors of these sizes would be mapped and faulted in anew for each layer, which costs
    more than what is computed in them.
    """

    def __init__(self) -> None:
        self._buffers: dict[_Key, Tensor] = {}
        self._views: dict[_Key, dict[tuple[int, ...], Tensor]] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A contiguous tensor of ``shape`` with the dtype and device of ``like``."""
        key = (name, like.dtype, like.device)
        views = self._views.setdefault(key, {})
        found = views.get(shape)
        if found is None:
            count = math.prod(shape)
            buffer = self._buffers.get(key)
            if buffer is None or buffer.numel() < count:
                views.clear()
                buffer = torch.empty(count, dtype=like.dtype, device=like.device)
                self._buffers[key] = buffer
            elif len(views) >= _MOST_VIEWS:
                views.clear()
            found = views[shape] = buffer[:count].view(shape)
        return found

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, there are no buffers yet, and those taken there are gone afterwards."""
        outside = self._buffers, self._views
        self._buffers, self._views = {}, {}
        try:
            yield
        finally:
            self._buffers, self._views = outside

    def buffers(self) -> list[Tensor]:
        """All that were made."""
        return list(self._buffers.values())

    def release(self) -> None:
        """Gives the memory back."""
        self._buffers.clear()
        self._views.clear()


SCRATCH = Scratch()
