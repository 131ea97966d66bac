"""The unfinished output: what survives an interruption, and how it becomes the final folder.

Beside the output folder ``DIR`` stands ``DIR.unfinished``: ``model/``, which becomes ``DIR`` in
one rename, and ``progress.json``, which says which files of it are finished and what for.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fourbit import files
from fourbit.errors import EnvironmentFault, InputError, LockHeld
from fourbit.rundir import check_path

try:
    import fcntl
except ImportError:  # Windows has no flock: two processes on one output are not noticed there
    fcntl = None

_PROGRESS = "progress.json"
_SPARE = 32 << 20
"""Bytes for headers, tokenizer, index and the file system's own needs."""


def require_target(output: Path, source: Path, *, overwrite: bool) -> Path:
    """The absolute output path, refused when it is taken or touches the source.

    Raises:
        InputError: a file, a folder that holds something, or the source itself.
    """
    check_path(output)
    target, source = output.resolve(), source.resolve()
    if target == source or target in source.parents or source in target.parents:
        raise InputError(
            "output-is-input",
            where=str(output),
            what=f"the output and the model to read ({source}) lie in one another",
            fix="choose another output folder",
        )
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return target
    if not target.is_dir() or not (target / "config.json").is_file():
        raise InputError(
            "output-exists",
            where=str(output),
            what="is there already and is no model folder",
            fix="choose another output folder",
        )
    if not overwrite:
        raise InputError(
            "output-exists",
            where=str(output),
            what="already holds a model",
            fix="choose another output folder, or --overwrite",
        )
    return target


class Staging:
    """Files on their way to ``output``, kept across interruptions.

    Args:
        output: the final folder.
        identity: everything the bytes depend on; another one starts over.

    Attributes:
        folder: where files are written.
        layers: where calibrated layers wait until they are written.
        finished: by file name, what `keep` was told.
        restarted: whether what another source or other settings had left was removed.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any]) -> None:
        self.output = output
        self.home = output.with_name(f"{output.name}.unfinished")
        self.folder = self.home / "model"
        self.layers = self.home / "calibrated"
        self.finished: dict[str, dict[str, Any]] = {}
        self.restarted = False
        self._identity = json.loads(json.dumps(identity))
        self._lock: int | None = None

    def open(self) -> None:
        """Creates the folder, or takes over what an interrupted process left.

        Raises:
            LockHeld: another process is writing there.
            EnvironmentFault: the disk refused.
        """
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self.finished = self._read()
            if self.restarted:
                shutil.rmtree(self.layers, ignore_errors=True)
            self.folder.mkdir(exist_ok=True)
            for path in self.folder.iterdir():
                if path.name not in self.finished:
                    path.unlink()
            self._write()
        except OSError as error:
            raise files.disk_fault(error, where=self.home) from error

    def require_space(self, needed: int) -> None:
        """Refuses to begin what the disk cannot hold.

        Args:
            needed: bytes of all files; those already finished are taken off.

        Raises:
            EnvironmentFault: naming what is needed and what is there.
        """
        have = shutil.disk_usage(self.home).free
        need = needed + _SPARE - sum(facts["bytes"] for facts in self.finished.values())
        if have < need:
            raise EnvironmentFault(
                "disk-too-small",
                where=str(self.output),
                what=f"needs {files.human_bytes(need)}, {files.human_bytes(have)} are free",
                fix="free disk space or choose another output folder",
            )

    def keep(self, name: str, facts: dict[str, Any]) -> None:
        """Notes that a file is complete and on the disk.

        Args:
            name: in `folder`.
            facts: ``bytes``, and what the caller needs when it continues.

        Raises:
            EnvironmentFault: the disk refused.
        """
        self.finished[name] = facts
        self._write()

    def publish(self) -> None:
        """Gives the folder its final name, in one step; what was there before is removed after.

        Raises:
            EnvironmentFault: the disk refused.
        """
        old = self.home / "replaced"
        try:
            for path in self.folder.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            files.sync_folder(self.folder)
            if self.output.is_dir() and any(self.output.iterdir()):
                os.rename(self.output, old)
            try:
                os.rename(self.folder, self.output)
            except OSError:
                if old.exists():
                    os.rename(old, self.output)
                raise
            files.sync_folder(self.output.parent)
        except OSError as error:
            raise files.disk_fault(error, where=self.output) from error
        self.discard()

    def discard(self) -> None:
        """Removes everything that is not published."""
        shutil.rmtree(self.home, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Gives the lock back and keeps what is finished; nothing finished leaves nothing."""
        if self._lock is None:
            return
        if not self.finished and not (self.layers.is_dir() and any(self.layers.iterdir())):
            shutil.rmtree(self.home, ignore_errors=True)
        os.close(self._lock)
        self._lock = None

    def _take_lock(self) -> None:
        self._lock = os.open(self.home, os.O_RDONLY | os.O_CLOEXEC)
        if fcntl is None:
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = None
            raise LockHeld(
                "output-locked",
                where=str(self.output),
                what="another process is writing to it",
                fix="wait for it, or choose another output folder",
            ) from None

    def _read(self) -> dict[str, dict[str, Any]]:
        path = self.home / _PROGRESS
        if not path.is_file():
            return {}
        try:
            progress = json.loads(path.read_text(encoding="utf-8"))
            finished = dict(progress["finished"])
            whole = {
                name: facts
                for name, facts in finished.items()
                if (self.folder / name).is_file()
                and (self.folder / name).stat().st_size == facts["bytes"]
            }
        except (ValueError, KeyError, TypeError, RecursionError):
            progress, finished, whole = {}, {}, {}
        if progress.get("identity") != self._identity:
            self.restarted = True
            return {}
        return whole

    def _write(self) -> None:
        progress = {"identity": self._identity, "finished": self.finished}
        files.replace_file(self.home / _PROGRESS, json.dumps(progress).encode())
