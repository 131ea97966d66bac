"""Buffers for what is needed only inside one block: made once, used by every layer and step."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class Scratch(threading.local):
    """Uninitialized buffers by name; a name's buffer is valid until the name is taken again.

    Fresh tensors of these sizes would be mapped and faulted in anew for each layer, which costs
    more than what is computed in them.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A contiguous tensor of ``shape`` with the dtype and device of ``like``."""
        if isinstance(like, FakeTensor):
            return like.new_empty(shape)  # a plan's tensors, which must not meet real ones
        count = math.prod(shape)
        key = (name, like.dtype, like.device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < count:
            buffer = torch.empty(count, dtype=like.dtype, device=like.device)
            self._buffers[key] = buffer
        return buffer[:count].view(shape)

    def release(self) -> None:
        """Gives the memory back."""
        self._buffers.clear()


SCRATCH = Scratch()
