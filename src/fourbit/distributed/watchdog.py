"""Who is still there: every process shows signs of life, and notices when another's end.

One thread writes this process's sign into the store that the processes met at, and reads the
others'; a second judges, as the first may itself wait for a host that is gone. A process counts as

- *failed* when it says so itself, with the error it stopped for;
- *dead* when its signs end;
- *hanging* when they go on, but its main thread neither gets anything done nor computes nor waits
  for others.

What the main thread does in a collective operation cannot be broken off, so the thread ends the
process: every durable write of a run is whole or absent.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fourbit.errors import EnvironmentFault, FourbitError, one_line

BEAT_SECONDS = 1.0
_SHORTEST_SECONDS = 0.05
"""Between two signs, however quickly phases follow each other."""
DEAD_SECONDS = 20.0
"""Without a sign of life."""
BROKEN_SECONDS = 6.0
"""The same once a connection is known to be broken."""
HANGING_SECONDS = 40.0
"""Without progress, computation or waiting for others."""
_GRACE_SECONDS = 4.0
"""For a process to say by itself what another has already said."""
_LAST_WORD_SECONDS = 0.5
_COMPUTED_SECONDS = 0.2
"""Computation that counts as such."""


class Store(Protocol):
    """What is used of ``torch.distributed.Store``."""

    def set(self, key: str, value: str) -> None:
        """Writes."""

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Reads several."""
        ...


@dataclass
class Sign:
    """What one process says of itself.

    Attributes:
        beat: grows while the process lives.
        phase: what it is doing.
        ticks: grows whenever something is done.
        computed: seconds its main thread has computed.
        waits: whether it waits for others.
        failed: the error it stopped for: ``line``, ``what`` and ``exit_code``.
        left: whether it has ended as it should.
        heard: whether it knows how every other process ended, and asks for nothing any more.
    """

    beat: int = 0
    phase: str = "start"
    ticks: int = 0
    computed: float = 0.0
    waits: bool = False
    failed: dict[str, Any] | None = None
    left: bool = False
    heard: bool = False


@dataclass
class _Seen:
    """One other process, as seen from here."""

    sign: Sign = field(default_factory=Sign)
    alive_at: float = field(default_factory=time.monotonic)
    active_at: float = field(default_factory=time.monotonic)
    active: Sign = field(default_factory=Sign)

    def update(self, sign: Sign) -> None:
        now = time.monotonic()
        if sign.beat != self.sign.beat:
            self.alive_at = now
        before = self.active
        busy = sign.computed - before.computed >= _COMPUTED_SECONDS
        if sign.waits or busy or sign.ticks != before.ticks or sign.phase != before.phase:
            self.active_at, self.active = now, sign
        self.sign = sign


class Watchdog:
    """Shows this process's signs of life and watches the others'.

    Args:
        store: where signs are left; used by the thread alone.
        rank: of this process.
        size: how many there are.

    Attributes:
        on_end: is told the line for which the process is ended, before it is.
        together: whether all have agreed to end, so that no end of one is the cause of another's.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self.rank, self.size = store, rank, size
        self.on_end: Callable[[str], object] = lambda line: None
        self._mine = Sign()
        self._others = {other: _Seen() for other in range(size) if other != rank}
        self._lock = threading.Lock()
        self._main = threading.main_thread()
        self._task = Path(f"/proc/self/task/{self._main.native_id}/stat")
        self._clock = time.pthread_getcpuclockid(self._main.ident or 0)
        self._leaving = threading.Event()
        self._stopped = threading.Event()
        self._news = threading.Event()
        self._store_at = time.monotonic()
        self.together = False
        self._signs = threading.Thread(target=self._exchange, name="fourbit-signs", daemon=True)
        self._judge = threading.Thread(target=self._watch, name="fourbit-ranks", daemon=True)

    def publish(self) -> None:
        """Leaves the first sign; every process has to, before any starts to watch."""
        self._show()

    def start(self) -> None:
        """Begins to watch."""
        self._signs.start()
        self._judge.start()

    def enter(self, phase: str) -> None:
        """Notes what is being done, for all to see at once: it may be the last that is heard."""
        self._mine.phase = phase
        self.tick()
        with suppress(Exception):  # of a store that is gone, which the judge will tell
            self._show()

    def tick(self) -> None:
        """Notes that something was done."""
        self._mine.ticks += 1

    @property
    def phase(self) -> str:
        """What is being done."""
        return self._mine.phase

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, doing nothing is right."""
        self.tick()
        before, self._mine.waits = self._mine.waits, True
        try:
            yield
        finally:
            self._mine.waits = before
            self.tick()

    def explained(self, error: BaseException) -> FourbitError:
        """Why talking to the others failed: which of them is gone, and what it was doing."""
        until = time.monotonic() + DEAD_SECONDS + 2 * BEAT_SECONDS
        while time.monotonic() < until:
            found = self.missing(BROKEN_SECONDS)
            if found is not None:
                return found
            time.sleep(0.1)
        gist = (str(error).strip() or type(error).__name__).splitlines()[0]
        return EnvironmentFault(
            "ranks-disconnected",
            where=f"rank {self.rank}, {self.phase}",
            what=f"the connection between the processes broke, and all of them live: {gist}",
            fix="check the network; checkpoints are intact: --resume auto goes on",
        )

    def missing(self, dead_seconds: float = DEAD_SECONDS) -> FourbitError | None:
        """The error that says which process failed, died or hangs; None where none does."""
        now = time.monotonic()
        with self._lock:
            seen = {rank: one for rank, one in self._others.items() if not one.sign.left}
            if now - self._store_at > DEAD_SECONDS:
                return self._unreachable()
            for rank, one in seen.items():
                silent = now - one.alive_at
                if silent > dead_seconds and one.sign.failed is None:
                    return _gone(rank, one.sign, f"died: no sign of life for {silent:.0f} s")
            for rank, one in seen.items():
                if one.sign.failed is not None:
                    return _failed(rank, one.sign)
            idle = [rank for rank, one in seen.items() if now - one.active_at > HANGING_SECONDS]
            if idle:
                rank = min(idle, key=lambda rank: seen[rank].sign.ticks)
                still = now - seen[rank].active_at
                return _gone(rank, seen[rank].sign, f"hangs: it has done nothing for {still:.0f} s")
        return None

    def all_ended(self) -> bool:
        """Whether every other process has said that it stops, or has fallen silent."""
        silent = time.monotonic() - BROKEN_SECONDS
        with self._lock:
            return all(
                one.sign.left or one.sign.failed is not None or one.alive_at < silent
                for one in self._others.values()
            )

    def all_heard(self) -> bool:
        """Whether no other process needs the store any more, or will ever ask again."""
        silent = time.monotonic() - BROKEN_SECONDS
        with self._lock:
            return all(one.sign.heard or one.alive_at < silent for one in self._others.values())

    def first_failure(self, rank: int) -> dict[str, Any] | None:
        """What another process said it stopped for."""
        with self._lock:
            seen = self._others.get(rank)
        return None if seen is None else seen.sign.failed

    def leave(self, failed: dict[str, Any] | None) -> None:
        """Says how this process ends; from now on others do not end it."""
        self._leaving.set()
        self._mine.failed, self._mine.left = failed, failed is None
        self._news.set()

    def stop(self) -> None:
        """Ends the threads, after a last sign."""
        self._mine.heard = True
        self._stopped.set()
        self._news.set()
        self._signs.join(timeout=5 * BEAT_SECONDS)

    def _unreachable(self) -> FourbitError:
        return EnvironmentFault(
            "ranks-disconnected",
            where=f"rank {self.rank}, {self.phase}",
            what=f"the store at which the processes meet has not answered for {DEAD_SECONDS:.0f} s",
            fix="check the network and the process that keeps it (torchrun, or rank 0's host)",
        )

    def _show(self) -> None:
        sign = self._mine
        sign.beat += 1
        sign.computed = time.clock_gettime(self._clock)
        self._store.set(_key(self.rank), json.dumps(asdict(sign)))

    def _exchange(self) -> None:
        last = False
        while not last:
            last = self._stopped.is_set()
            self._news.clear()
            # torch's own kinds of errors; silence is what is acted on
            with suppress(Exception):
                if self._reads_disk():
                    self.tick()
                self._show()
                self._look()
            if not self._stopped.wait(_SHORTEST_SECONDS):
                self._news.wait(BEAT_SECONDS - _SHORTEST_SECONDS)

    def _watch(self) -> None:
        while not self._leaving.wait(BEAT_SECONDS):
            found = self.missing()
            if found is not None and not self._leaving.wait(_GRACE_SECONDS):
                self._end(found)

    def _look(self) -> None:
        ranks = list(self._others)
        values = self._store.multi_get([_key(rank) for rank in ranks])
        with self._lock:
            self._store_at = time.monotonic()
            for rank, value in zip(ranks, values, strict=True):
                self._others[rank].update(Sign(**json.loads(value)))

    def _reads_disk(self) -> bool:
        """Whether the main thread waits for a disk, which is work too."""
        try:
            return self._task.read_text().rpartition(")")[2].split()[0] == "D"
        except OSError:
            return False

    def _end(self, found: FourbitError) -> None:
        line = found.line()
        self._mine.failed = as_failure(found)
        self._news.set()
        try:
            self.on_end(line)
            time.sleep(_LAST_WORD_SECONDS)
        finally:
            sys.stderr.write(one_line(f"rank {self.rank} stops: {line}") + "\n")
            sys.stderr.flush()
            os._exit(found.exit_code)


def as_failure(error: BaseException) -> dict[str, Any]:
    """An error as other processes are told of it."""
    if isinstance(error, FourbitError):
        line, code = error.line(), error.exit_code
    else:
        line, code = f"{type(error).__name__}: {error}", 1
    return {"line": one_line(line), "exit_code": code}


def _failed(rank: int, sign: Sign) -> FourbitError:
    assert sign.failed is not None
    error = EnvironmentFault(
        "rank-failed",
        where=f"rank {rank}, {sign.phase}",
        what=f"stopped: {sign.failed['line']}",
        fix="see there; checkpoints are intact: --resume auto goes on",
    )
    # what the run ends with is what the first of its processes ended with
    error.exit_code = sign.failed["exit_code"]
    return error


def _gone(rank: int, sign: Sign, what: str) -> FourbitError:
    return EnvironmentFault(
        "rank-lost",
        where=f"rank {rank}, {sign.phase}",
        what=what,
        fix="checkpoints are intact: --resume auto goes on; torchrun --max-restarts does it by"
        " itself",
    )


def _key(rank: int) -> str:
    return f"fourbit/sign/{rank}"
