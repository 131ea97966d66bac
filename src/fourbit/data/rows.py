"""Where a row came from, and the account of rows that cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fourbit.errors import InputError

_LISTED = 10


@dataclass(frozen=True, slots=True)
class Origin:
    """The place of a row: its file as the user named it, and its 1-based line or row number."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a data file, as it stands there."""

    data: Mapping[str, Any]
    origin: Origin


class RowError(ValueError):
    """A row that cannot be used; turned into a bad line with its place by whoever reads rows."""


@dataclass
class BadLines:
    """Counts unusable rows against the budget that the user allowed.

    Args:
        budget: how many may be left out before the run is refused.
    """

    budget: int
    count: int = 0
    first: list[tuple[str, str]] = field(default_factory=list)

    def add(self, origin: Origin, what: str, *, column: int | None = None) -> None:
        """Counts one bad row; the first few are kept to be shown.

        Args:
            origin: where the row is.
            what: what is wrong with it.
            column: 1-based column of the fault inside the line, when known.
        """
        self.count += 1
        if len(self.first) < _LISTED:
            where = f"{origin}" if column is None else f"{origin}:{column}"
            self.first.append((where, what))

    def check(self) -> None:
        """Refuses the data when the budget is exceeded.

        Raises:
            InputError: names the first bad rows and their number.
        """
        if self.count <= self.budget:
            return
        where, what = self.first[0]
        if self.count > 1:
            others = " | ".join(f"{place} {fault}" for place, fault in self.first[1:])
            what += f" ({self.count} bad rows in all; next: {others})"
        raise InputError(
            "bad-rows",
            where=where,
            what=what,
            fix=f"correct the file, or leave such rows out with data.skip_bad_lines: {self.count}",
        )
