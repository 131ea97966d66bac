"""Signals that end a run: at once where nothing could be lost, after the step where it could."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fourbit.errors import FourbitError, Interrupted, Preempted

_ENDING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


class SignalGuard:
    """Turns SIGINT into exit 130 and SIGTERM, SIGHUP and SIGUSR1 into exit 75.

    Inside `deferred` the first signal only sets a flag, which the loop reads after the step it is
    in; a second one ends the process at once.
    """

    def __init__(self) -> None:
        self.caught: int | None = None
        self._deferring = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> SignalGuard:
        if threading.current_thread() is threading.main_thread():
            for name in _ENDING:
                number = getattr(signal, name, None)
                if number is not None:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() gave us
        self._previous.clear()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._deferring and self.caught is None:
            self.caught = number
            return
        raise self.ending(number, saved=None)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal waits until the loop asks for `caught`."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    @staticmethod
    def ending(number: int, *, saved: str | None) -> FourbitError:
        """The error that ends the run, saying what was saved."""
        name = signal.Signals(number).name
        kind = Interrupted if number == signal.SIGINT else Preempted
        what = f"stopped by {name}, " + (f"saved {saved}" if saved else "nothing new to save")
        return kind(
            "interrupted" if kind is Interrupted else "preempted",
            where="run",
            what=what,
            fix="continue with --resume auto",
        )
