"""The run directory: who owns it, what lies where, and writes that are whole or absent.

One process at a time holds the directory by ``flock`` on ``.lock``; the text inside only tells
people who it is. Nothing is ever deleted: ``overwrite`` moves an old run into a sibling folder,
and a directory that no run made is refused.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import stat
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from fourbit.errors import EnvironmentFault, FourbitError, InputError, LockHeld, one_line
from fourbit.files import disk_fault, replace_file, sync_folder, valid_json
from fourbit.settings.redaction import redact

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None

LOCK = ".lock"
CONFIG, METRICS, CHECKPOINTS = "config.yaml", "metrics.jsonl", "checkpoints"
ADAPTER, RECEIPT, REPORT, SUMMARY = "adapter", "receipt.json", "report.html", "summary.png"
PLAN, SAMPLES, SCORES = "plan.json", "samples.json", "scores.json"
EVALUATIONS = "evaluations.jsonl"
"""What `fourbit eval --adapter RUN` found, one object an evaluation."""
BASE, CALIBRATION = "base", "calibration.npy"
LOG = "log.txt"
PARTS = (
    CONFIG, BASE, f"{BASE}.unfinished", CALIBRATION, ADAPTER, CHECKPOINTS, METRICS, PLAN, SAMPLES,
    SCORES, EVALUATIONS, RECEIPT, REPORT, SUMMARY, LOG,
)  # fmt: skip
"""All that a run writes."""

_MAX_NAME = 255
_MAX_PATH = 4095


class RunDir:
    """The paths of a run and its durable writes.

    ``RunDir(path)`` looks at a run and owns nothing; :meth:`open` makes or takes over a run and
    holds its lock until :meth:`close`.
    """

    def __init__(self, path: Path) -> None:
        # Absolute: a file's own path and one "below the run" must not be joined twice.
        self.path = path.absolute()
        self._lock: int | None = None
        self._metrics_ready = False

    @classmethod
    def open(cls, path: Path, *, resume: bool, overwrite: bool) -> RunDir:
        """Creates a run directory, or takes over an existing one, and locks it.

        Args:
            path: the directory; missing parents are created.
            resume: go on with the run that is there.
            overwrite: move the run that is there into ``NAME.old-1`` beside it.

        Raises:
            InputError: the path is not usable, holds something that is not a run, or holds a run
                and neither ``resume`` nor ``overwrite`` was chosen.
            LockHeld: another process is writing to it.
            EnvironmentFault: the disk refused.
        """
        check_path(path)
        if resume and overwrite:
            raise InputError(
                "conflicting-flags",
                where=str(path),
                what="--resume and --overwrite contradict each other",
                fix="choose one",
            )
        run = cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            _refuse_foreign(path)
            run._take_lock()
            run._settle(resume=resume, overwrite=overwrite)
        except (FileExistsError, NotADirectoryError) as error:
            run.close()
            raise _in_the_way(path, error) from error
        except OSError as error:
            run.close()
            raise disk_fault(error, where=path) from error
        except BaseException:
            run.close()
            raise
        return run

    def close(self) -> None:
        """Gives the lock back; the lock file stays, because removing it would let two in."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunDir:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def config_path(self) -> Path:
        """The resolved settings, each with its origin."""
        return self.path / CONFIG

    @property
    def adapter_dir(self) -> Path:
        """The trained adapter in PEFT's files."""
        return self.path / ADAPTER

    @property
    def checkpoints_dir(self) -> Path:
        """One folder for each saved step."""
        return self.path / CHECKPOINTS

    @property
    def metrics_path(self) -> Path:
        """One JSON object a line, one line a step."""
        return self.path / METRICS

    @property
    def receipt_path(self) -> Path:
        """The checks of the finished run."""
        return self.path / RECEIPT

    @property
    def report_path(self) -> Path:
        """The report for people."""
        return self.path / REPORT

    @property
    def log_path(self) -> Path:
        """What happened, with times."""
        return self.path / LOG

    def write_text(self, path: Path | str, text: str) -> None:
        """Replaces a file of the run (a relative path is below the run) all or not at all.

        Raises:
            EnvironmentFault: the disk refused; the old file is untouched.
        """
        replace_file(self.path / path, text.encode())

    def write_json(self, path: Path | str, obj: Any) -> None:
        """Replaces a JSON file as :meth:`write_text` does; NaN and infinity become null."""
        self.write_text(path, valid_json(obj, indent=2) + "\n")

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        """Adds one line to the metrics; NaN and infinity become null beside ``nonfinite: true``.

        Raises:
            EnvironmentFault: the disk refused; a line that is cut short is mended next time.
        """
        line = valid_json(dict(values)) + "\n"
        try:
            if not self._metrics_ready:
                _mend_last_line(self.metrics_path)
            self._metrics_ready = False
            with self.metrics_path.open("ab") as file:
                file.write(line.encode())
            self._metrics_ready = True
        except OSError as error:
            raise disk_fault(error, where=self.metrics_path) from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every metrics line in file order; a last line that a crash cut short is left out.

        Raises:
            InputError: a line before the last is not a JSON object.
        """
        return [values for _, values in self._metric_lines()]

    def truncate_metrics(self, after_step: int) -> int:
        """Drops the lines of later steps than ``after_step``, all or not at all.

        Returns:
            How many lines were dropped. Lines without a step stay.

        Raises:
            EnvironmentFault: the disk refused; the old file is untouched.
        """
        lines = self._metric_lines()
        kept = [line for line, values in lines if values.get("step", after_step) <= after_step]
        if self.metrics_path.exists():
            replace_file(self.metrics_path, b"".join(line + b"\n" for line in kept))
        return len(lines) - len(kept)

    def log(self, text: str) -> bool:
        """Adds a text to the log with the time (UTC), secrets hidden.

        Returns:
            False when the disk refused: a full disk must not stop a run because of its log.
        """
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        first, *rest = redact(text).splitlines() or [""]
        lines = [f"{now} {one_line(first)}", *(f"    {one_line(line)}" for line in rest)]
        try:
            with self.log_path.open("a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
        except OSError:
            return False
        return True

    def _metric_lines(self) -> list[tuple[bytes, dict[str, Any]]]:
        try:
            lines = self.metrics_path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise disk_fault(error, where=self.metrics_path) from error
        parsed = []
        for number, line in enumerate(lines, start=1):
            values = _json_object(line)
            if values is not None:
                parsed.append((line, values))
            elif number < len(lines):
                raise InputError(
                    "bad-metrics",
                    where=f"{self.metrics_path}:{number}",
                    what="is not a JSON object",
                    fix="remove the line",
                )
        return parsed

    def _take_lock(self) -> None:
        if fcntl is None:
            raise EnvironmentFault(
                "no-file-locks",
                where=str(self.path),
                what="this system has no flock, so two runs could write to one directory",
                fix="run fourbit on Linux, macOS or WSL",
            )
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
        self._lock = os.open(self.path / LOCK, flags, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _held(self.path, os.pread(self._lock, 4096, 0)) from None

    def _settle(self, *, resume: bool, overwrite: bool) -> None:
        """Decides about what is there, then signs the lock; runs with the lock held."""
        old = _old_parts(self.path)
        if old and overwrite:
            _move_aside(self.path, old)
        elif not resume and old not in ([], [LOG]):  # a log alone is of inputs that were refused
            raise InputError(
                "output-exists",
                where=str(self.path),
                what=f"already holds a run ({', '.join(old)})",
                fix="--resume auto goes on with it, --overwrite moves it aside and starts anew",
            )
        # Also the first proof that the disk takes bytes, before a model is loaded.
        assert self._lock is not None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, json.dumps(_owner()).encode(), 0)
        os.fsync(self._lock)
        sync_folder(self.path)


class UnwrittenRunDir(RunDir):
    """The paths of a run that another process writes: nothing is locked, created or changed."""

    def write_text(self, path: Path | str, text: str) -> None:
        """Leaves it to the other process."""

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        """Leaves it to the other process."""

    def truncate_metrics(self, after_step: int) -> int:
        """Leaves it to the other process."""
        return 0

    def read_metrics(self) -> list[dict[str, Any]]:
        """None: they may be on another host."""
        return []

    def log(self, text: str) -> bool:
        """Leaves it to the other process."""
        return False


def check_path(path: Path) -> None:
    """Refuses a path that no file system takes, or that would disguise a line of output.

    Raises:
        InputError: control characters, not UTF-8, or too long.
    """
    text = str(path)
    what = ""
    if any(ord(char) < 32 or 0x7F <= ord(char) < 0xA0 or "\ud800" <= char <= "\udfff"
           for char in text):  # fmt: skip
        what = "the path holds a control character or is not UTF-8"
    elif len(text.encode()) > _MAX_PATH:
        what = f"the path is longer than {_MAX_PATH} bytes"
    elif any(len(part.encode()) > _MAX_NAME for part in path.parts):
        what = f"a name in the path is longer than {_MAX_NAME} bytes"
    if what:
        where = text if len(text) <= 120 else text[:119] + "…"
        raise InputError("bad-path", where=where, what=what, fix="choose another output folder")


def _in_the_way(path: Path, error: OSError) -> FourbitError:
    for place in (path, *path.parents):
        try:
            mode = place.lstat().st_mode
        except OSError:
            continue
        if not stat.S_ISDIR(mode) and not place.is_dir():
            return InputError(
                "file-in-the-way",
                where=str(place),
                what="is not a directory",
                fix="choose another output folder or move it away",
            )
    return disk_fault(error, where=path)


def _refuse_foreign(path: Path) -> None:
    """Refuses a directory that holds things and that no run made, before it is touched.

    A lone ``config.yaml`` proves nothing: people keep the settings they start runs from there.
    """
    names = {entry.name for entry in os.scandir(path)}
    signs = names & {CONFIG, METRICS, CHECKPOINTS}
    ours = LOCK in names and _is_our_lock(path / LOCK)
    if names and not ours and signs <= {CONFIG}:
        shown = ", ".join(sorted(names)[:5])
        raise InputError(
            "not-a-run-directory",
            where=str(path),
            what=f"holds files that are not of a run ({shown})",
            fix="choose an empty or new output folder",
        )


def _is_our_lock(path: Path) -> bool:
    # Empty is a run that was killed between taking the lock and signing it.
    if not stat.S_ISREG(path.lstat().st_mode):
        return False
    with path.open("rb") as file:
        text = file.read(4096)
    return not text or (_json_object(text) or {}).get("tool") == "fourbit"


def _old_parts(path: Path) -> list[str]:
    return [name for name in PARTS if os.path.lexists(path / name)]


def _move_aside(path: Path, parts: list[str]) -> None:
    # Only what a run writes is moved, so a note somebody put beside it stays where it is.
    path = path.resolve()
    number = 1
    while True:
        aside = path.with_name(f"{path.name}.old-{number}")
        try:
            aside.mkdir()
            break
        except FileExistsError:
            number += 1
    for name in parts:
        os.rename(path / name, aside / name)
    sync_folder(aside)
    sync_folder(path)
    sync_folder(path.parent)


def _owner() -> dict[str, Any]:
    return {
        "tool": "fourbit",
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": redact(shlex.join(sys.argv)),
    }


def _held(path: Path, text: bytes) -> LockHeld:
    owner = _json_object(text) or {}
    host, pid = owner.get("host", "unknown"), owner.get("pid", "unknown")
    what = f"in use by pid {pid} on {host} since {owner.get('started', 'unknown')}"
    what += f", command: {owner.get('command', 'unknown')}"
    fix = "wait for it, stop it, or choose another output folder"
    if host == socket.gethostname() and isinstance(pid, int) and not _alive(pid):
        what += "; that process is gone, yet the lock itself is held"
        fix = f"end the worker it left behind (fuser {shlex.quote(str(path / LOCK))} names it)"
    return LockHeld("run-locked", where=str(path), what=what, fix=fix)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _json_object(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _mend_last_line(path: Path) -> None:
    """Ends a whole last line that lacks its line feed, and cuts off a torn one."""
    try:
        with path.open("r+b") as file:
            data = file.read()
            tail = data[data.rfind(b"\n") + 1 :]
            if tail and _json_object(tail) is not None:
                file.write(b"\n")
            elif tail:
                file.truncate(len(data) - len(tail))
    except FileNotFoundError:
        return
