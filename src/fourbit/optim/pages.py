"""Where an optimizer's state lives: pages of bytes that can leave memory and come back.

A page is resident, or at home: in a mapped file for a CPU, in pinned host memory for a GPU. Whoever
works on one takes it, which brings it in, and gives it back, which lets it go. What is computed in
a page never depends on where it was before.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from abc import ABC, abstractmethod
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourbit.device import is_out_of_memory
from fourbit.files import disk_fault

PAGE_BYTES = 16 << 20
RING = 3
"""Pages that are resident at once: one in work, one coming, one going."""


@dataclass
class Stats:
    """What paging did, in bytes and counts since the optimizer was made.

    Attributes:
        state_bytes: of all pages.
        resident_bytes: of those in the memory of the parameters' device.
        peak_resident_bytes: the most that was resident.
        bytes_in: moved into that memory.
        bytes_out: moved out of it.
        evictions: pages that left it.
        stalls: pages that were asked for while they were not there.
    """

    state_bytes: int = 0
    resident_bytes: int = 0
    peak_resident_bytes: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    evictions: int = 0
    stalls: int = 0

    def arrived(self, count: int) -> None:
        """Counts bytes that became resident."""
        self.resident_bytes += count
        self.peak_resident_bytes = max(self.peak_resident_bytes, self.resident_bytes)

    def as_dict(self) -> dict[str, int]:
        """For metrics and ``--json``."""
        return asdict(self)


class Pages(ABC):
    """Pages by number, each a flat uint8 tensor whose bytes start as zeros."""

    paged = True

    def __init__(self, stats: Stats) -> None:
        self.stats = stats

    @abstractmethod
    def add(self, size: int) -> None:
        """One more page of ``size`` bytes."""

    @abstractmethod
    def take(self, page: int) -> Tensor:
        """The bytes of a page on the parameters' device, valid and resident until `give`."""

    def give(self, page: int) -> None:  # noqa: B027  # may be empty
        """The page is no longer in use and may leave."""

    def expect(self, page: int) -> None:  # noqa: B027  # may be empty
        """The page will be taken soon."""

    def evict(self) -> int:
        """Sends every page home that is not in use; returns the bytes that became free."""
        return 0


class Resident(Pages):
    """Pages that never leave."""

    paged = False

    def __init__(self, stats: Stats, device: torch.device) -> None:
        super().__init__(stats)
        self._device = device
        self._pages: list[Tensor | None] = []

    def add(self, size: int) -> None:
        """See `Pages`."""
        if self._device.type == "cpu":
            # not from the heap, which would keep the addresses when the page is gone
            page = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
        else:
            page = torch.zeros(size, dtype=torch.uint8, device=self._device)
        self._pages.append(page)
        self.stats.state_bytes += size
        self.stats.arrived(size)

    def take(self, page: int) -> Tensor:
        """See `Pages`."""
        found = self._pages[page]
        assert found is not None
        return found

    def move_to(self, home: Ring) -> int:
        """Moves all pages to ``home``, one at a time; returns the bytes that became free."""
        moved = 0
        for index, page in enumerate(self._pages):
            assert page is not None
            size = page.numel()
            home.add(size)
            home.put(index, page)
            self._pages[index] = None
            self.stats.state_bytes -= size  # `add` counted it again
            self.stats.resident_bytes -= size
            self.stats.bytes_out += size
            self.stats.evictions += 1
            moved += size
        return moved


class Ring(Pages):
    """Pages of which at most ``RING`` are resident; the one used longest ago leaves first."""

    def __init__(self, stats: Stats) -> None:
        super().__init__(stats)
        self._sizes: list[int] = []
        self._resident: OrderedDict[int, Any] = OrderedDict()
        self._taken: set[int] = set()

    def _note(self, size: int) -> None:
        self._sizes.append(size)
        self.stats.state_bytes += size

    def take(self, page: int) -> Tensor:
        """See `Pages`."""
        if page not in self._resident:
            self.stats.stalls += 1
            self._bring(page)
        self._resident.move_to_end(page)
        self._taken.add(page)
        return self._bytes(page)

    def give(self, page: int) -> None:
        """See `Pages`."""
        self._taken.discard(page)

    def evict(self) -> int:
        """See `Pages`."""
        return sum(self._send(page) for page in list(self._resident) if page not in self._taken)

    def _bring(self, page: int) -> None:
        while len(self._resident) >= RING:
            idle = next((p for p in self._resident if p not in self._taken), None)
            if idle is None:
                break
            self._send(idle)
        try:
            self._resident[page] = self._come(page)
        except (MemoryError, RuntimeError, OSError) as error:
            if not is_out_of_memory(error) or not self.evict():
                raise
            self._resident[page] = self._come(page)
        self.stats.bytes_in += self._sizes[page]
        self.stats.arrived(self._sizes[page])

    def _send(self, page: int) -> int:
        self._go(page, self._resident.pop(page))
        size = self._sizes[page]
        self.stats.resident_bytes -= size
        self.stats.bytes_out += size
        self.stats.evictions += 1
        return size

    @abstractmethod
    def put(self, page: int, data: Tensor) -> None:
        """Fills a page that is at home, where it stays."""

    @abstractmethod
    def _bytes(self, page: int) -> Tensor: ...

    @abstractmethod
    def _come(self, page: int) -> Any: ...

    @abstractmethod
    def _go(self, page: int, what: Any) -> None: ...


class Mapped(Ring):
    """Pages in a file without a name, mapped while they are resident: for parameters on a CPU.

    A page at home holds neither memory nor addresses of the process; what the system keeps of it
    in its own cache, it gives up when someone needs the room.

    Args:
        stats: counts what moves.
        folder: where the file lies; the space for it is taken at once.

    Raises:
        EnvironmentFault: the disk refused.
    """

    def __init__(self, stats: Stats, folder: Path | None = None) -> None:
        super().__init__(stats)
        self._folder = folder or Path(tempfile.gettempdir())
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  # lives as long
        except OSError as error:
            raise disk_fault(error, where=self._folder) from error
        self._starts = [0]

    def add(self, size: int) -> None:
        """See `Pages`."""
        grain = mmap.ALLOCATIONGRANULARITY
        start, length = self._starts[-1], -(-size // grain) * grain
        try:
            # a sparse file would end the process when the disk is full
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), start, length)
            else:
                os.ftruncate(self._file.fileno(), start + length)
        except OSError as error:
            raise disk_fault(error, where=self._folder) from error
        self._starts.append(start + length)
        self._note(size)

    def put(self, page: int, data: Tensor) -> None:
        """See `Ring`."""
        assert page not in self._resident
        left, at = data.numpy().data, self._starts[page]
        while left:
            written = os.pwrite(self._file.fileno(), left, at)
            left, at = left[written:], at + written

    def expect(self, page: int) -> None:
        """See `Pages`."""
        if page not in self._resident and hasattr(os, "posix_fadvise"):
            place = (self._starts[page], self._sizes[page])
            os.posix_fadvise(self._file.fileno(), *place, os.POSIX_FADV_WILLNEED)

    def _bytes(self, page: int) -> Tensor:
        return self._resident[page]

    def _come(self, page: int) -> Tensor:
        size = self._sizes[page]
        mapped = mmap.mmap(self._file.fileno(), size, offset=self._starts[page])
        return torch.frombuffer(mapped, dtype=torch.uint8)

    def _go(self, page: int, what: Tensor) -> None:
        """The mapping ends with the last reference to it."""


class Hosted(Ring):
    """Pages in host memory, pinned where that can be had, with copies on the device.

    Copies run beside the computation: a page is fetched while the one before it is updated, and
    goes home as soon as it is given back.

    Args:
        stats: counts what moves.
        device: of the parameters. Any device will do: on a CPU the copies are plain ones.
    """

    def __init__(self, stats: Stats, device: torch.device) -> None:
        super().__init__(stats)
        self._device = device
        self._homes: list[Tensor] = []
        self._spare: list[Tensor] = []
        self._cuda = device.type == "cuda"
        self._copying: Any = torch.cuda.Stream(device) if self._cuda else None
        self.pinned = self._cuda

    def add(self, size: int) -> None:
        """See `Pages`."""
        self._homes.append(self._host(size))
        self._note(size)

    def _host(self, size: int) -> Tensor:
        if self.pinned:
            try:
                return torch.zeros(size, dtype=torch.uint8).pin_memory()
            except RuntimeError:
                self.pinned = False  # containers often allow little locked memory
        return torch.zeros(size, dtype=torch.uint8)

    def put(self, page: int, data: Tensor) -> None:
        """See `Ring`."""
        assert page not in self._resident
        self._homes[page].copy_(data)

    def take(self, page: int) -> Tensor:
        """See `Pages`."""
        found = super().take(page)
        if self._cuda:
            torch.cuda.current_stream(self._device).wait_stream(self._copying)
        return found

    def give(self, page: int) -> None:
        """See `Pages`."""
        super().give(page)
        self._copy(self._homes[page], self._bytes(page))

    def expect(self, page: int) -> None:
        """See `Pages`."""
        if page not in self._resident:
            self._bring(page)

    def _bytes(self, page: int) -> Tensor:
        return self._resident[page][: self._sizes[page]]

    def _come(self, page: int) -> Tensor:
        size = self._sizes[page]
        slot = next((s for s in self._spare if s.numel() >= size), None)
        if slot is None:
            slot = torch.empty(size, dtype=torch.uint8, device=self._device)
        else:
            self._spare = [s for s in self._spare if s is not slot]
        self._copy(slot[:size], self._homes[page])
        return slot

    def _go(self, page: int, what: Tensor) -> None:
        # its bytes went home when it was given back
        self._spare = [*self._spare, what][-1:]

    def evict(self) -> int:
        """See `Pages`."""
        freed = super().evict()
        self._spare = []
        return freed

    def _copy(self, to: Tensor, source: Tensor) -> None:
        if not self._cuda:
            to.copy_(source)
            return
        self._copying.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copying):
            to.copy_(source, non_blocking=True)
        for tensor in (to, source):
            if tensor.is_cuda:
                tensor.record_stream(self._copying)
