"""Durable file writes: what is under its final name is whole, whatever moment the power fails."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from fourbit.errors import EnvironmentFault

_CHUNK = 1 << 20
_ADVICE = {
    errno.ENOSPC: "free disk space or choose another output folder",
    errno.EDQUOT: "the disk quota is used up: free space or choose another output folder",
    errno.EFBIG: "the file size limit is reached (ulimit -f): raise it",
    errno.EROFS: "the file system is read-only: choose another output folder",
    errno.EACCES: "no permission: change it or choose another output folder",
    errno.EPERM: "no permission: change it or choose another output folder",
    errno.EIO: "the disk reports an error: check it, and copy what is there",
    errno.ENOLCK: "the file system has no locks: choose a local output folder",
}


def disk_fault(error: OSError, *, where: Path) -> EnvironmentFault:
    """An operating system error as the line a user reads.

    Args:
        error: what the system said.
        where: the file or folder that was being written.
    """
    what = error.strerror or str(error)
    fix = _ADVICE.get(error.errno or 0, "check the path and the disk")
    return EnvironmentFault("disk", where=str(where), what=what, fix=fix)


def write_new(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Creates a file that must not exist, and returns when its bytes are on the disk.

    Args:
        path: the file to create.
        write: puts the content into the open file.

    Raises:
        OSError: as the system reports it; the file may then exist in part.
    """
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Puts ``data`` under ``path``: afterwards it holds all of the old bytes or all of the new.

    Raises:
        EnvironmentFault: the disk refused; what was there before is untouched.
    """
    staged = path.with_name(f".{path.name[:200]}.tmp-{uuid.uuid4().hex}")
    try:
        write_new(staged, lambda file: _put(file, data))
        os.replace(staged, path)
        sync_folder(path.parent)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise disk_fault(error, where=path) from error
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def _put(file: BinaryIO, data: bytes) -> None:
    file.write(data)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable, as ``fsync`` on a file does for its bytes."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def valid_json(obj: Any, *, indent: int | None = None) -> str:
    """JSON that every reader accepts: NaN and infinity become null, and the top object says so."""
    clean, changed = _finite(obj)
    if changed and isinstance(clean, dict):
        clean["nonfinite"] = True
    return json.dumps(clean, indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(obj: Any) -> tuple[Any, bool]:
    if isinstance(obj, float):
        return (obj, False) if math.isfinite(obj) else (None, True)
    if isinstance(obj, dict):
        pairs = {str(key): _finite(value) for key, value in obj.items()}
        return {key: value for key, (value, _) in pairs.items()}, any(c for _, c in pairs.values())
    if isinstance(obj, (list, tuple)):
        entries = [_finite(entry) for entry in obj]
        return [entry for entry, _ in entries], any(c for _, c in entries)
    return obj, False


def human_bytes(count: float | None) -> str:
    """``1.23 GB`` (decimal, as memory is sold)."""
    if count is None:
        return "unknown"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"
