"""A safetensors file written tensor by tensor, before all of its contents are known.

The header stands first but names the length of every quant_state, which the weights decide. So its
place is reserved, the quant_states come last, and the header is padded with spaces, as the format
allows. Every tensor lies as aligned as its own size allows, so that a mapped file needs no copy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 64
_MOST_AT_ONCE = 1 << 24
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        bytes: its size, or the most it can be.
        open_ended: it may be shorter: a text (uint8) whose length is not known yet.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    open_ended: bool = False

    @property
    def bytes(self) -> int:
        """Size on disk; of an open-ended one the most it can be."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def storable(dtype: torch.dtype) -> bool:
    """Whether safetensors has a name for it."""
    return dtype in _DTYPES


class ShardWriter:
    """Writes one file; its tensors come in any order.

    Args:
        path: the file, replaced if it exists.
        entries: everything that will be written.
    """

    def __init__(self, path: Path, entries: Sequence[Entry]) -> None:
        fixed = sorted((e for e in entries if not e.open_ended), key=lambda e: -_alignment(e.bytes))
        self._entries = {entry.name: entry for entry in fixed}
        self._last = {entry.name: entry for entry in entries if entry.open_ended}
        self._texts: dict[str, bytes] = {}
        self._offsets: dict[str, int] = {}
        self._waiting = {entry.name for entry in entries}
        at = 0
        for entry in fixed:
            self._offsets[entry.name] = at
            at += entry.bytes
        self._fixed_bytes = at
        longest = self._header({name: entry.bytes for name, entry in self._last.items()})
        self._data = -(-(8 + len(longest)) // _ALIGNMENT) * _ALIGNMENT
        self._file = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_RDWR | os.O_CLOEXEC, 0o666)

    def put(self, name: str, tensor: Tensor) -> None:
        """Writes a whole tensor.

        Raises:
            OSError: as the system reports it.
        """
        if name in self._last:
            self._texts[name] = tensor.numpy().tobytes()
            self._waiting.remove(name)
            return
        entry = self._entries[name]
        assert tensor.dtype == entry.dtype, name
        self.put_pieces(name, [tensor.reshape(-1)])

    def put_pieces(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Writes a tensor from flat pieces in order, each cast on its way.

        Raises:
            OSError: as the system reports it.
        """
        entry = self._entries[name]
        start = at = self._data + self._offsets[name]
        step = _MOST_AT_ONCE // entry.dtype.itemsize
        for piece in pieces:
            for first in range(0, piece.numel(), step):
                part = piece[first : first + step].to(entry.dtype).contiguous()
                at = _write_at(self._file, part.view(torch.uint8).numpy().data, at)
        assert at - start == entry.bytes, name
        self._waiting.remove(name)

    @property
    def data_bytes(self) -> int:
        """Of all tensors, without the header."""
        return self._fixed_bytes + sum(map(len, self._texts.values()))

    def finish(self) -> int:
        """Writes the header; the file's bytes are then on the disk.

        Returns:
            The size of the file.

        Raises:
            OSError: as the system reports it.
        """
        assert not self._waiting, sorted(self._waiting)[0]
        at = self._data + self._fixed_bytes
        for name in self._last:
            at = _write_at(self._file, memoryview(self._texts[name]), at)
        header = self._header({name: len(text) for name, text in self._texts.items()})
        header += b" " * (self._data - 8 - len(header))
        _write_at(self._file, memoryview(len(header).to_bytes(8, "little") + header), 0)
        os.fsync(self._file)
        self.close()
        return at

    def close(self) -> None:
        """Gives the file back, finished or not."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _header(self, lengths: dict[str, int]) -> bytes:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name, entry in self._entries.items():
            at = self._offsets[name]
            header[name] = _described(entry, list(entry.shape), at, entry.bytes)
        at = self._fixed_bytes
        for name, entry in self._last.items():
            header[name] = _described(entry, [lengths[name]], at, lengths[name])
            at += lengths[name]
        return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()


def _described(entry: Entry, shape: list[int], at: int, size: int) -> dict[str, Any]:
    return {"dtype": _DTYPES[entry.dtype], "shape": shape, "data_offsets": [at, at + size]}


def _alignment(size: int) -> int:
    """The largest power of two, up to 64, that divides ``size``.

    Tensors in falling order of it each begin at a multiple of their own.
    """
    return min(_ALIGNMENT, size & -size) if size else _ALIGNMENT


def _write_at(file: int, data: memoryview, at: int) -> int:
    while len(data):
        written = os.pwrite(file, data, at)
        data, at = data[written:], at + written
    return at
