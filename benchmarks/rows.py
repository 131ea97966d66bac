"""Rows of results: one CSV file for each benchmark, only ever appended to; and reading them."""

from __future__ import annotations

import csv
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
Row = dict[str, str]


def stamp() -> dict[str, object]:
    """What every row begins with: the day, and the commit that was measured."""
    commit = _git("describe", "--always")
    # results are what a measurement leaves, not what it measured
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    commit += "-dirty" if changed else ""
    return {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "commit": commit}


def _git(*words: str) -> str:
    return subprocess.check_output(["git", "-C", str(REPOSITORY), *words], text=True).strip()


def append(name: str, row: Mapping[str, Any], *, folder: Path = RESULTS) -> None:
    """Adds a row to ``results/NAME.csv``."""
    append_to(folder / f"{name}.csv", row)


def append_to(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a row; a column that is new is added to the file."""
    rows: list[Mapping[str, Any]] = [*read(path), row]
    columns = list(dict.fromkeys(key for each in rows for key in each))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def read(path: Path) -> list[Row]:
    """The rows of a CSV file; none when it does not exist."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@dataclass(frozen=True)
class Spread:
    """Median and range over the rounds."""

    median: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        if self.count == 1:
            return f"{self.median:.4g}"
        return f"{self.median:.4g} ({self.low:.4g} to {self.high:.4g}, {self.count}x)"


def spread(rows: Iterable[Row], case: str, column: str) -> Spread | None:
    """Median, minimum and maximum of ``column`` over the rows of ``case``."""
    values = [float(r[column]) for r in rows if r["case"] == case and r.get(column)]
    if not values:
        return None
    return Spread(statistics.median(values), min(values), max(values), len(values))


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Medians with their range, a case a line."""
    names = list(dict.fromkeys(row["case"] for row in rows))
    lines = [["case", *columns]]
    for name in names:
        found = [spread(rows, name, column) for column in columns]
        lines.append([name, *("" if each is None else str(each) for each in found)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
