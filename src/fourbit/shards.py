"""Safetensors files written tensor by tensor, and how a model is cut into several.

A header stands first but names the length of every quant_state, which the weights decide. So its
place is reserved, the quant_states come last, and the header is padded with spaces, as the format
allows. Every tensor lies as aligned as its own size allows, so that a mapped file needs no copy.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fourbit.errors import InputError
from fourbit.files import disk_fault, replace_file

_ALIGNMENT = 64
_MOST_AT_ONCE = 1 << 24
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_LEAST_SHARD = 1000
INDEX = "model.safetensors.index.json"
DTYPES = {
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
"""What safetensors calls torch's dtypes."""


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
    return dtype in DTYPES


class Sized(Protocol):
    """Something that takes bytes in a file."""

    @property
    def bytes(self) -> int:
        """Its size on disk."""
        ...


_Item = TypeVar("_Item", bound=Sized)


def parse_size(text: str, *, where: str = "--max-shard-size") -> int:
    """``5GB``, ``500 MiB`` or a number of bytes.

    Raises:
        InputError: not a size, or below 1 kB.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?)?B?", text.strip().upper())
    size = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if size < _LEAST_SHARD:
        raise InputError(
            "bad-value",
            where=where,
            what=f"{text!r} is no size of at least 1 kB",
            fix="write it as 5GB or 500MB",
        )
    return size


def cut(items: Sequence[_Item], limit: int) -> list[tuple[str, tuple[_Item, ...]]]:
    """Items in their order, as many to a file as ``limit`` bytes hold, with the files' names.

    An item is never split; one that exceeds the limit has a file of its own.
    """
    groups: list[list[_Item]] = [[]]
    size = 0
    for item in items:
        if groups[-1] and size + item.bytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item.bytes
    count = len(groups)
    if count == 1:
        return [("model.safetensors", tuple(groups[0]))]
    return [
        (f"model-{i:05}-of-{count:05}.safetensors", tuple(group))
        for i, group in enumerate(groups, start=1)
    ]


def index_text(files: Mapping[str, str], **metadata: int) -> str:
    """The index of several files; ``files`` is tensor name to file name."""
    index = {"metadata": metadata, "weight_map": dict(sorted(files.items()))}
    return json.dumps(index, indent=2) + "\n"


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
    return {"dtype": DTYPES[entry.dtype], "shape": shape, "data_offsets": [at, at + size]}


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


def write_shards(
    folder: Path, entries: Sequence[Entry], limit: int, tensor: Callable[[str], Tensor]
) -> None:
    """Writes tensors into files of at most ``limit`` bytes and, for several, their index.

    Args:
        folder: exists.
        entries: what is written, in this order.
        limit: bytes of a file.
        tensor: gives each tensor when its turn comes, in the entry's shape and dtype: only one is
            in memory at a time.

    Raises:
        EnvironmentFault: the disk refused.
    """
    groups = cut(entries, limit)
    for name, group in groups:
        try:
            writer = ShardWriter(folder / name, group)
            try:
                for entry in group:
                    value = tensor(entry.name)
                    assert tuple(value.shape) == entry.shape, entry.name
                    writer.put(entry.name, value)
                writer.finish()
            finally:
                writer.close()
        except OSError as error:
            raise disk_fault(error, where=folder / name) from error
    if len(groups) > 1:
        places = {entry.name: name for name, group in groups for entry in group}
        text = index_text(places, total_size=sum(entry.bytes for entry in entries))
        replace_file(folder / INDEX, text.encode())
