"""What is promised of a measured figure, and what became of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rows import Row, spread

Tables = dict[str, list[Row]]
"""Rows by the name of their file."""
Measure = Callable[[Tables], "float | None"]


@dataclass(frozen=True)
class Claim:
    """A promise.

    Attributes:
        text: what is promised, without the number.
        bound: the number; a lower bound, or an upper one where ``most`` is set.
        measured: the figure, from the rows of all files; None where a side is missing.
    """

    text: str
    bound: float
    measured: Measure
    most: bool = False

    def kept(self, value: float) -> bool:
        return value <= self.bound if self.most else value >= self.bound

    def verdict(self, value: float | None) -> str:
        return "not measured" if value is None else "kept" if self.kept(value) else "BROKEN"

    @property
    def sign(self) -> str:
        return "<=" if self.most else ">="

    def line(self, value: float | None) -> str:
        """For people."""
        shown = "" if value is None else f"{value:.3g}"
        return f"{self.verdict(value):12}  {shown:>8} {self.sign} {self.bound:<5g} {self.text}"


def value(file: str, column: str, case: str) -> Measure:
    """A median itself."""

    def measured(tables: Tables) -> float | None:
        found = spread(tables.get(file, ()), case, column)
        return None if found is None else found.median

    return measured


def quotient(top: Measure, bottom: Measure) -> Measure:
    """One figure divided by another."""

    def measured(tables: Tables) -> float | None:
        over, under = top(tables), bottom(tables)
        return None if over is None or not under else over / under

    return measured


def ratio(file: str, column: str, ours: str, theirs: str) -> Measure:
    """Median of ``ours`` divided by the median of ``theirs``."""
    return quotient(value(file, column, ours), value(file, column, theirs))


def smallest(measures: Iterable[Measure]) -> Measure:
    """The least of several; None while one is missing."""
    wanted = list(measures)

    def measured(tables: Tables) -> float | None:
        known = [each for each in (measure(tables) for measure in wanted) if each is not None]
        return min(known) if known and len(known) == len(wanted) else None

    return measured


def largest(measures: Iterable[Measure], *, all_of_them: bool = True) -> Measure:
    """The most of several; None while one, or with ``all_of_them`` false every one, is missing."""
    wanted = list(measures)

    def measured(tables: Tables) -> float | None:
        known = [each for each in (measure(tables) for measure in wanted) if each is not None]
        short = len(known) < len(wanted) if all_of_them else not known
        return None if short else max(known)

    return measured
