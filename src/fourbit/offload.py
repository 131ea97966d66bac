"""Activations that wait outside of a device's memory for their turn in backward.

With every decoder layer recomputed, what is left of a forward pass is one ``[B, T, D]`` tensor a
layer. They are needed one after the other, the last first, and long before that they can be
elsewhere: in pinned host memory for a GPU, copied beside the computation, in a file without a name
for a CPU. What comes back has the same bits.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fourbit.files import disk_fault


@dataclass(eq=False)
class _Waiting:
    """A tensor that is elsewhere.

    Attributes:
        shape: of it.
        dtype: of it.
        device: where it is wanted.
        place: what its home calls it; None for a plan's tensor.
        before: the one that left before it and is asked for after it.
        fetched: its copy on the device, when that is under way.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    place: Any
    before: weakref.ref[_Waiting] | None
    fetched: Tensor | None = None


class Offload:
    """Sends away what autograd saves of the model's width.

    Args:
        width: D; only floating tensors ``[B, T, D]`` leave.
        device: of the model.
        folder: where the file for a CPU lies.

    Attributes:
        moved_bytes: that left since this was made.
    """

    def __init__(self, width: int, device: torch.device, *, folder: Path | None = None) -> None:
        self._width, self._device, self._folder = width, device, folder
        self._made: _Home | None = None
        self._last: weakref.ref[_Waiting] | None = None
        self.moved_bytes = 0

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Inside, a forward pass saves elsewhere; its backward pass may come outside.

        Raises:
            EnvironmentFault: the disk refused.
        """
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    @property
    def _home(self) -> _Home:
        if self._made is None:
            cuda = self._device.type == "cuda"
            self._made = _Host(self._device) if cuda else _File(self._folder)
        return self._made

    def _pack(self, tensor: Tensor) -> Tensor | _Waiting:
        if not self._leaves(tensor):
            return tensor
        place = None
        if not isinstance(tensor, FakeTensor):
            data = tensor.detach().contiguous()
            place = self._home.put(data)
            self.moved_bytes += data.nbytes
        waiting = _Waiting(tensor.shape, tensor.dtype, tensor.device, place, self._last)
        if place is not None:
            weakref.finalize(waiting, self._home.forget, place)
        self._last = weakref.ref(waiting)
        return waiting

    def _leaves(self, tensor: Tensor) -> bool:
        like_a_layers = tensor.dim() == 3 and tensor.shape[-1] == self._width
        parameter = tensor.is_leaf and tensor.requires_grad
        return like_a_layers and tensor.is_floating_point() and not parameter

    def _unpack(self, saved: Tensor | _Waiting) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        if saved.place is None:
            return torch.empty(saved.shape, dtype=saved.dtype, device=saved.device)
        found = self._home.fetch(saved)
        saved.fetched = None
        following = saved.before() if saved.before is not None else None
        if following is not None and following.place is not None:
            self._home.expect(following)
        return found


class _Home(ABC):
    """Where tensors wait."""

    @abstractmethod
    def put(self, data: Tensor) -> Any:
        """Takes a copy of a contiguous tensor; returns its place."""

    @abstractmethod
    def fetch(self, waiting: _Waiting) -> Tensor:
        """The tensor, on its device."""

    def expect(self, waiting: _Waiting) -> None:  # noqa: B027  # may be empty
        """It will be fetched soon."""

    @abstractmethod
    def forget(self, place: Any) -> None:
        """Nobody will ask for it again."""


class _File(_Home):
    """A file without a name, cut in places that are used again.

    What the system keeps of it in its own cache, it gives up when someone needs the room.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder or Path(tempfile.gettempdir())
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  # lives as long
        except OSError as error:
            raise disk_fault(error, where=self._folder) from error
        self._end = 0
        self._free: list[tuple[int, int]] = []

    def put(self, data: Tensor) -> tuple[int, int]:
        """See `_Home`; the place is where it starts, and its bytes."""
        place = next((p for p in self._free if p[1] == data.nbytes), None)
        if place is None:
            place = self._end, data.nbytes
            self._end += data.nbytes
        else:
            self._free.remove(place)
        left, at = data.view(-1).view(torch.uint8).numpy().data, place[0]
        try:
            while left:
                written = os.pwrite(self._file.fileno(), left, at)
                left, at = left[written:], at + written
        except OSError as error:
            raise disk_fault(error, where=self._folder) from error
        return place

    def fetch(self, waiting: _Waiting) -> Tensor:
        """See `_Home`."""
        found = torch.empty(waiting.shape, dtype=waiting.dtype)
        left, at = found.view(-1).view(torch.uint8).numpy().data, waiting.place[0]
        while left:
            read = os.preadv(self._file.fileno(), [left], at)
            left, at = left[read:], at + read
        return found

    def forget(self, place: Any) -> None:
        """See `_Home`."""
        self._free.append(place)


class _Host(_Home):
    """Host memory, pinned where that can be had; copies run on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copying = torch.cuda.Stream(device)
        self._pinned = True
        self._free: list[Tensor] = []

    def put(self, data: Tensor) -> Tensor:
        """See `_Home`; the place is flat bytes on the host."""
        place = next((b for b in self._free if b.numel() == data.nbytes), None)
        if place is None:
            place = self._bytes(data.nbytes)
        else:
            # by what it is: tensors have no order
            self._free = [buffer for buffer in self._free if buffer is not place]
        self._copying.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copying):
            place.copy_(data.view(-1).view(torch.uint8), non_blocking=True)
        data.record_stream(self._copying)
        return place

    def _bytes(self, count: int) -> Tensor:
        if self._pinned:
            try:
                return torch.empty(count, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:
                self._pinned = False  # containers often allow little locked memory
        return torch.empty(count, dtype=torch.uint8)

    def expect(self, waiting: _Waiting) -> None:
        """See `_Home`."""
        if waiting.fetched is None:
            with torch.cuda.stream(self._copying):
                found = torch.empty(waiting.shape, dtype=waiting.dtype, device=self._device)
                found.view(-1).view(torch.uint8).copy_(waiting.place, non_blocking=True)
            waiting.fetched = found

    def fetch(self, waiting: _Waiting) -> Tensor:
        """See `_Home`."""
        self.expect(waiting)
        found, current = waiting.fetched, torch.cuda.current_stream(self._device)
        assert found is not None
        current.wait_stream(self._copying)
        found.record_stream(current)
        return found

    def forget(self, place: Any) -> None:
        """See `_Home`; what the copying stream still does with it comes before its next use."""
        self._free.append(place)
