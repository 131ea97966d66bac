"""How sides are compared: a process each, in turn, a row at once; what went wrong at the end."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rows import REPOSITORY, Row


@dataclass(frozen=True)
class Case:
    """One side of a comparison.

    Attributes:
        name: its name in the column ``case``.
        spec: what the child is told, as JSON.
        env: environment variables of the child, beside the common ones.
    """

    name: str
    spec: Mapping[str, Any]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """What was measured: the rows of this commit, and what went wrong."""

    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


class ChildError(RuntimeError):
    """A child failed; ``found`` is what it had printed by then."""

    def __init__(self, message: str, found: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(message)
        self.found = list(found)


@dataclass(frozen=True)
class Series:
    """How cases are run and where their rows go.

    Attributes:
        rounds: turns of every case.
        run: runs a case and gives the JSON objects that it printed; raises `ChildError`.
        about: the columns that every row begins with, asked before each turn of a case.
        record: takes a row.
        known: a row of this case and turn that is there already.
    """

    rounds: int
    run: Callable[[Case], list[dict[str, Any]]]
    about: Callable[[], Mapping[str, str]]
    record: Callable[[Row], None]
    known: Callable[[str, int], Row | None] = lambda _case, _turn: None


def measure(cases: Sequence[Case], series: Series) -> Outcome:
    """Every case in every round, in turn; one that failed or cannot run is left out from then on.

    A child's object is a row, whose case it may name itself, or says why it is ``skipped``.
    """
    outcome = Outcome()
    for turn in range(1, series.rounds + 1):
        for case in cases:
            if case.name in outcome.skipped or case.name in outcome.failed:
                continue
            before = series.known(case.name, turn)
            if before is not None:
                outcome.rows.append(before)
                say(f"{case.name} round {turn}: measured already")
                continue
            _one(case, turn, series, outcome)
    return outcome


def _one(case: Case, turn: int, series: Series, outcome: Outcome) -> None:
    about, began = series.about(), time.perf_counter()
    try:
        found = series.run(case)
    except ChildError as error:
        outcome.failed[case.name], found = str(error), error.found
        say(f"{case.name} round {turn}: FAILED, {error}")
    took = time.perf_counter() - began
    for values in found:
        if "skipped" in values:
            outcome.skipped[case.name] = values["skipped"]
            say(f"{case.name}: skipped, {values['skipped']}")
            continue
        name = str(values.pop("case", case.name))
        row = {**about, "case": name, "round": str(turn)}
        row |= {key: as_text(value) for key, value in values.items()}
        series.record(row)
        outcome.rows.append(row)
        shown = " ".join(f"{key}={as_text(value)}" for key, value in list(values.items())[:6])
        say(f"{name} round {turn} ({took:.0f} s): {shown}")


def as_text(value: Any) -> str:
    """A value as its cell of a CSV file."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def run_child(command: Sequence[str], env: Mapping[str, str]) -> list[dict[str, Any]]:
    """One child process and the JSON objects it printed, each on a line of its own.

    Raises:
        ChildError: it failed or printed none; the message is the last line of its stderr.
    """
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    found = list(_objects(done.stdout))
    if done.returncode != 0 or not found:
        errors = done.stderr.strip().splitlines() or ["no message"]
        raise ChildError(f"exit {done.returncode}: {errors[-1][:300]}", found)
    return found


def _objects(text: str) -> Iterable[dict[str, Any]]:
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                yield json.loads(line)
            except ValueError:  # a library's own words
                continue


def environment(threads: int | None, paths: Sequence[Path]) -> dict[str, str]:
    """A child's environment: the same thread counts for every side, no network.

    Args:
        threads: of a process; None leaves them as they are.
        paths: where its modules are, before what is there already.
    """
    found = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if threads is not None:
        found |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    parts = (*map(str, paths), os.environ.get("PYTHONPATH"))
    return {**found, "PYTHONPATH": os.pathsep.join(filter(None, parts))}


def chosen(cases: Sequence[Case], only: Iterable[str] | None) -> list[Case]:
    """The cases that ``only`` names; a * matches anything."""
    if only is None:
        return list(cases)
    wanted = list(only)
    found = [case for case in cases if any(fnmatch(case.name, pattern) for pattern in wanted)]
    if not found:
        raise SystemExit(f"--only: no such case; there are {', '.join(c.name for c in cases)}")
    return found


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def git(*arguments: str) -> str:
    """The answer of git in this repository; empty where there is none."""
    done = subprocess.run(
        ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def commit_of(*measured: str) -> str:
    """The newest commit of the code that is measured; results and pages do not change it."""
    spec = importlib.util.find_spec("fourbit")
    if spec is None or spec.origin is None or REPOSITORY not in Path(spec.origin).parents:
        # another checkout or a wheel: this repository's commits say nothing about it
        return "elsewhere"
    found = git("log", "-1", "--format=%h", "--", *measured) or "unknown"
    return found + ("-dirty" if git("status", "--porcelain", "--", *measured) else "")


def versions_of(*names: str) -> str:
    """Versions of libraries that take part; what is not installed is left out."""
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def end(outcome: Outcome, faults: Sequence[str]) -> None:
    """Exit 1 when a side failed or an answer was wrong."""
    for name, reason in outcome.skipped.items():
        print(f"skipped {name}: {reason}")
    for name, reason in outcome.failed.items():
        print(f"FAILED {name}: {reason}")
    for fault in faults:
        print(f"FAILED {fault}")
    if faults or outcome.failed:
        raise SystemExit(1)
