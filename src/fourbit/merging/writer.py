"""The folder of a merged model on its way: only success gives it its name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fourbit import files
from fourbit.errors import EnvironmentFault, InputError, LockHeld
from fourbit.rundir import check_path

try:
    import fcntl
except ImportError:  # Windows has no flock: there two merges into one folder are not noticed
    fcntl = None

PROOF = "merge.json"
"""What the folder says about itself; also the sign that a merge wrote it."""

_SPARE = 64 << 20
"""Bytes for tokenizer, index and the file system's own needs."""


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
