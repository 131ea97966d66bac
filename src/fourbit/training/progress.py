"""What a person sees while a run works: rich bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_PLAIN_SECONDS = 10.0

Advance = Callable[[int, str], None]
"""``advance(done, note)``: how much of the task is done, and a short note beside it."""


class Reporter:
    """Lines and bars on stderr (stdout belongs to results).

    Args:
        quiet: print nothing but warnings.
        log: also receives every line, for the run's log.
    """

    def __init__(self, *, quiet: bool = False, log: Callable[[str], object] | None = None) -> None:
        self.quiet = quiet
        self.log = log
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)

    def line(self, text: str = "") -> None:
        """One line for people."""
        if self.log is not None:
            self.log(text)
        if not self.quiet:
            self.console.print(escape(text), markup=True)

    def warn(self, text: str) -> None:
        """One line that is printed even when quiet."""
        if self.log is not None:
            self.log("warning: " + text)
        self.console.print(f"[yellow]warning:[/yellow] {escape(text)}")

    def warn_alone(self, text: str) -> None:
        """A warning that concerns one of several processes only."""
        self.warn(text)

    @contextmanager
    def task(self, title: str, *, total: int, start: int = 0) -> Iterator[Advance]:
        """A bar with elapsed and remaining time; plain lines when stderr is no terminal."""
        if self.quiet or not self._live():
            yield self._plain(title, total, start)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, transient=False) as bar:
            task = bar.add_task(escape(title), total=total, completed=start, note="")
            yield lambda done, note: bar.update(task, completed=done, note=escape(note))

    def _live(self) -> bool:
        return self.console.is_terminal or self.console.is_jupyter

    def _plain(self, title: str, total: int, start: int) -> Advance:
        began = time.monotonic()
        last = [0.0]

        def advance(done: int, note: str) -> None:
            now = time.monotonic()
            if self.quiet or (done < total and now - last[0] < _PLAIN_SECONDS):
                return
            last[0] = now
            elapsed = now - began
            left = elapsed / max(done - start, 1) * (total - done)
            text = f"{title} {done}/{total}  {_clock(elapsed)} elapsed, {_clock(left)} left"
            self.line(f"{text}  {note}".rstrip())

        return advance


class Silent(Reporter):
    """Says nothing: another process of the same run speaks for all.

    Args:
        rank: number of this process, which what it alone has to tell begins with.
    """

    def __init__(self, rank: int) -> None:
        super().__init__(quiet=True)
        self._rank = rank

    def warn(self, text: str) -> None:
        """Nothing."""

    def warn_alone(self, text: str) -> None:
        """What concerns this process only."""
        super().warn(f"rank {self._rank}: {text}")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
