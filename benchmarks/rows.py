"""Rows of results: one CSV file for each benchmark, only ever appended to."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def stamp() -> dict[str, object]:
    """What every row begins with: the day, and the commit that was measured."""
    commit = subprocess.check_output(
        ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"], text=True
    ).strip()
    return {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "commit": commit}


def append(name: str, row: Mapping[str, object]) -> None:
    """Adds a row to ``results/NAME.csv``."""
    path = REPOSITORY / "benchmarks" / "results" / f"{name}.csv"
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
