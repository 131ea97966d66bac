"""Safetensors shards written tensor by tensor, into a folder that only success gives its name."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fourbit import files
from fourbit.errors import EnvironmentFault, InputError, LockHeld
from fourbit.rundir import check_path

try:
    import fcntl
except ImportError:  # Windows has no flock: there two merges into one folder are not noticed
    fcntl = None

PROOF = "merge.json"
"""What the folder says about itself; also the sign that a merge wrote it."""

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
}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_SPARE = 64 << 20
"""Bytes for tokenizer, index and the file system's own needs."""


@dataclass(frozen=True)
class Entry:
    """One tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Its size on disk."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def parse_size(text: str) -> int:
    """``5GB``, ``500 MiB`` or a number of bytes.

    Raises:
        InputError: not a size, or below 1 MB.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?)?B?", text.strip().upper())
    size = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if size < 10**6:
        raise InputError(
            "bad-size",
            where="--max-shard-size",
            what=f"'{text}' is no size of at least 1 MB",
            fix="write it as 5GB or 500MB",
        )
    return size


def plan_shards(entries: Sequence[Entry], limit: int) -> list[list[Entry]]:
    """Entries in their order, as many to a file as ``limit`` bytes hold; never an empty file."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.bytes
    return shards


def shard_names(count: int) -> list[str]:
    """File names as transformers looks for them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def write_shards(
    folder: Path, shards: Sequence[Sequence[Entry]], tensor: Callable[[str], Tensor]
) -> None:
    """Writes the files and, for more than one, their index.

    Only one tensor is in memory at a time: a safetensors header needs shapes, not values.

    Args:
        folder: exists.
        shards: what goes into which file.
        tensor: gives each tensor when its turn comes, in the entry's shape and dtype.

    Raises:
        EnvironmentFault: the disk refused.
    """
    names = shard_names(len(shards))
    for name, entries in zip(names, shards, strict=True):
        # Wide elements first, so that every tensor lies aligned to its element.
        ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
        try:
            files.write_new(folder / name, lambda file, o=ordered: _write_shard(file, o, tensor))
        except OSError as error:
            raise files.disk_fault(error, where=folder / name) from error
    if len(shards) > 1:
        where = {entry.name: name for name, shard in zip(names, shards, strict=True)
                 for entry in shard}  # fmt: skip
        total = sum(entry.bytes for shard in shards for entry in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        text = json.dumps(index, indent=2) + "\n"
        files.replace_file(folder / "model.safetensors.index.json", text.encode())


def _write_shard(file: BinaryIO, entries: Sequence[Entry], tensor: Callable[[str], Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": _DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.bytes],
        }
        at += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for entry in entries:
        value = tensor(entry.name)
        assert value.dtype == entry.dtype
        assert tuple(value.shape) == entry.shape
        if value.numel():
            file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def require_free_target(output: Path, *, overwrite: bool) -> None:
    """Refuses an output path that holds something, before any work is done.

    Raises:
        InputError: a file, a folder that no merge wrote, or one that may not be overwritten.
    """
    check_path(output)
    if not os.path.lexists(output):
        return
    if not output.is_dir():
        raise InputError(
            "output-exists",
            where=str(output),
            what="is a file, a folder is wanted",
            fix="choose another output folder",
        )
    names = sorted(entry.name for entry in os.scandir(output))
    if not names:
        return
    if PROOF not in names:
        raise InputError(
            "output-exists",
            where=str(output),
            what=f"holds files that no merge wrote ({', '.join(names[:3])})",
            fix="choose an empty or new output folder",
        )
    if not overwrite:
        raise InputError(
            "output-exists",
            where=str(output),
            what="already holds a merged model",
            fix="choose another output folder, or --overwrite",
        )


def require_space(folder: Path, size: int) -> None:
    """Refuses to begin what the disk cannot hold.

    Raises:
        EnvironmentFault: less than ``size`` bytes are free.
    """
    place = next(p for p in (folder, *folder.parents) if p.is_dir())
    free = shutil.disk_usage(place).free
    if free < size + _SPARE:
        raise EnvironmentFault(
            "disk",
            where=str(folder),
            what=f"the output takes {files.human_bytes(size + _SPARE)},"
            f" {files.human_bytes(free)} are free",
            fix="free disk space or choose another output folder",
        )


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A folder beside ``output`` that takes its name when the block ends without an error.

    What a killed merge left there is cleared. An older output is replaced only at that moment.

    Raises:
        LockHeld: another process is writing there.
        EnvironmentFault: the disk refused.
    """
    output = output.absolute()
    staging = output.with_name(f".{output.name}.merging")
    lock: int | None = None
    published = False
    try:
        staging.mkdir(parents=True, exist_ok=True)
        lock = _lock(staging, output)
        _clear(staging)
        yield staging
        _publish(staging, output)
        published = True
    except OSError as error:
        raise files.disk_fault(error, where=output) from error
    finally:
        if lock is not None:
            if not published:
                shutil.rmtree(staging, ignore_errors=True)
            os.close(lock)


def _lock(staging: Path, output: Path) -> int:
    descriptor = os.open(staging, os.O_RDONLY | os.O_CLOEXEC)
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise LockHeld(
                "output-locked",
                where=str(output),
                what="another process is writing to it",
                fix="wait for it, or choose another output folder",
            ) from None
    return descriptor


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _publish(staging: Path, output: Path) -> None:
    for path in staging.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    files.sync_folder(staging)
    old = output.with_name(f".{output.name}.replaced")
    if output.is_dir() and any(output.iterdir()):
        shutil.rmtree(old, ignore_errors=True)
        os.replace(output, old)
    os.replace(staging, output)
    files.sync_folder(output.parent)
    shutil.rmtree(old, ignore_errors=True)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
