"""Buffers for what is needed only inside one block: made once, used by every layer and step."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Scratch(threading.local):
    """Uninitialized buffers by name; a name's buffer is valid until the name is taken again.

    Fresh tensors of these sizes would be mapped and faulted in anew for each layer, which costs
    more than what is computed in them.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A contiguous tensor of ``shape`` with the dtype and device of ``like``."""
        count = math.prod(shape)
        key = (name, like.dtype, like.device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < count:
            buffer = torch.empty(count, dtype=like.dtype, device=like.device)
            self._buffers[key] = buffer
        return buffer[:count].view(shape)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, there are no buffers yet, and those taken there are gone afterwards."""
        outside, self._buffers = self._buffers, {}
        try:
            yield
        finally:
            self._buffers = outside

    def buffers(self) -> list[Tensor]:
        """All that were made."""
        return list(self._buffers.values())

    def release(self) -> None:
        """Gives the memory back."""
        self._buffers.clear()


SCRATCH = Scratch()
