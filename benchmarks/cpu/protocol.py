"""How everything here is measured: one fresh process a row, the sides in turn, rows in a CSV file.

A script lists its cases; `measure` runs them as A B C A B C ..., each in a child process of its
own that prints one JSON object, and appends a row to benchmarks/results/cpu_*.csv at once, so that
an interrupted run goes on with --resume. This side imports no torch: nothing but the child is in
memory while a side is timed.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
RESULTS = HERE.parent / "results"
PEERS = ("torch", "transformers", "peft", "bitsandbytes", "trl", "llama-cpp-python", "torchao")
Row = dict[str, str]


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
    """What a script measured: the rows of this commit, and what went wrong."""

    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def parser(description: str, *, rounds: int = 3) -> argparse.ArgumentParser:
    """The arguments that all scripts share."""
    made = argparse.ArgumentParser(description=description)
    add = made.add_argument
    add("--model", default="smollm2", help="alias, GGUF file or folder of the small model")
    add("--large", type=Path, help="folder of the 1.1B shape; default: made once in --work")
    add("--work", type=Path, default=REPOSITORY / "build" / "bench-cpu", help="made files")
    add(
        "--data-dir",
        type=Path,
        help="folder of real text (*.txt, *.txt.gz, *.md)",
    )
    add("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    add("--rounds", type=int, help=f"turns of every side; default {rounds}, --quick 2")
    add("--quick", action="store_true", help="two rounds of few steps: does everything run?")
    add("--only", action="append", help="a case (may be repeated; a * matches anything)")
    add("--resume", action="store_true", help="skip what this commit has measured already")
    add("--threads", type=int, help="default: the CPUs this process may use")
    add("--launcher", default="", help="put before each child's command, such as 'taskset -c 0,1'")
    add("--child", help=argparse.SUPPRESS)
    made.set_defaults(default_rounds=rounds)
    return made


def settle(options: argparse.Namespace) -> argparse.Namespace:
    """Fills in what depends on other arguments."""
    if options.rounds is None:
        options.rounds = 2 if options.quick else options.default_rounds
    if options.threads is None:
        options.threads = cpus()
    options.work = options.work.resolve()
    return options


def cpus() -> int:
    """CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


# The columns that say where, when and with what.


def git(*arguments: str) -> str:
    """The answer of git in this repository; empty where there is none."""
    done = subprocess.run(
        ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The newest commit of the code that is measured; results and pages do not change it."""
    spec = importlib.util.find_spec("fourbit")
    if spec is None or spec.origin is None or REPOSITORY not in Path(spec.origin).parents:
        # another checkout or a wheel: this repository's commits say nothing about it
        return "elsewhere"
    measured = ("src", "csrc", "benchmarks/cpu")
    found = git("log", "-1", "--format=%h", "--", *measured) or "unknown"
    return found + ("-dirty" if git("status", "--porcelain", "--", *measured) else "")


def machine() -> str:
    """The CPU's name and the instruction sets that decide speed."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    facts: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    sets = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16", "i8mm")
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    family = (
        f" family {facts['cpu family']} model {facts['model']}" if "cpu family" in facts else ""
    )
    name = facts.get("model name", platform.machine())
    return f"{name}{family}; {' '.join(s for s in sets if s in flags)}"


def versions() -> str:
    """Versions of every library that takes part; what is not installed is left out."""
    found = []
    for name in PEERS:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def origin(options: argparse.Namespace) -> Row:
    """The columns that every row begins with, but for the date."""
    return {
        "machine": machine(),
        "threads": str(options.threads),
        "commit": commit(),
        "python": platform.python_version(),
        "versions": versions(),
        "quick": str(int(options.quick)),
    }


# The CSV files.


def read(path: Path) -> list[Row]:
    """The rows of a CSV file; none when it does not exist."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: Mapping[str, Any]) -> None:
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


# Running.


def busy() -> float:
    """CPUs that are in use before a side begins; above a tenth or so its row is no evidence."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0

    def ticks() -> tuple[int, int]:
        fields = [int(field) for field in path.read_text().split("\n", 1)[0].split()[1:9]]
        return sum(fields) - fields[3] - fields[4], sum(fields)

    used, total = ticks()
    time.sleep(0.5)
    used_later, total_later = ticks()
    share = (used_later - used) / max(total_later - total, 1)
    return share * (os.cpu_count() or 1)


def environment(options: argparse.Namespace, extra: Mapping[str, str]) -> dict[str, str]:
    """The child's environment: the same thread counts for every side, no network."""
    count = str(options.threads)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), count)
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **threads, **offline, "PYTHONPATH": path, **extra}


def run_child(
    script: str, spec: Mapping[str, Any], options: argparse.Namespace, env: Mapping[str, str]
) -> dict[str, Any]:
    """One child process and the JSON object it printed last.

    Raises:
        RuntimeError: it failed; the message is the last line of its stderr.
    """
    told = json.dumps({"threads": options.threads, **spec})
    command = [*shlex.split(options.launcher), sys.executable, str(script), "--child", told]
    done = subprocess.run(
        command, env=environment(options, env), capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not lines:
        errors = done.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"exit {done.returncode}: {errors[-1][:300]}")
    return json.loads(lines[-1])


def chosen(cases: Sequence[Case], only: Iterable[str] | None) -> list[Case]:
    """The cases that --only names."""
    if only is None:
        return list(cases)
    from fnmatch import fnmatch

    found = [case for case in cases if any(fnmatch(case.name, pattern) for pattern in only)]
    if not found:
        raise SystemExit(f"--only: no such case; there are {', '.join(c.name for c in cases)}")
    return found


def measure(
    script: str, results: Path, cases: Sequence[Case], options: argparse.Namespace
) -> Outcome:
    """Every chosen case in every round, in turn.

    Args:
        script: the file whose ``--child`` runs a case.
        results: the CSV file.
        cases: the sides.
        options: of `parser`.
    """
    outcome, about = Outcome(), origin(options)
    wanted = chosen(cases, options.only)
    same = ("machine", "threads", "commit", "quick", "versions")
    known = [r for r in read(results) if all(r.get(key) == about[key] for key in same)]
    for turn in range(1, options.rounds + 1):
        for case in wanted:
            if case.name in outcome.skipped or case.name in outcome.failed:
                continue
            before = [r for r in known if (r["case"], r["round"]) == (case.name, str(turn))]
            if options.resume and before:
                outcome.rows.append(before[-1])
                say(f"{case.name} round {turn}: measured already")
                continue
            _one(script, results, case, (turn, about, options), outcome)
    return outcome


def _one(
    script: str,
    results: Path,
    case: Case,
    place: tuple[int, Row, argparse.Namespace],
    outcome: Outcome,
) -> None:
    turn, about, options = place
    load, began = busy(), time.perf_counter()
    try:
        found = run_child(script, case.spec, options, case.env)
    except RuntimeError as error:
        outcome.failed[case.name] = str(error)
        say(f"{case.name} round {turn}: FAILED, {error}")
        return
    if "skipped" in found:
        outcome.skipped[case.name] = found["skipped"]
        say(f"{case.name}: skipped, {found['skipped']}")
        return
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    row = {"date": now, **about, "case": case.name, "round": str(turn), "busy": f"{load:.2f}"}
    row |= {key: _text(value) for key, value in found.items()}
    append(results, row)
    outcome.rows.append(row)
    shown = " ".join(f"{key}={value}" for key, value in list(found.items())[:6])
    say(f"{case.name} round {turn} ({time.perf_counter() - began:.0f} s): {shown}")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


# Reading what was measured.


@dataclass(frozen=True)
class Spread:
    """Median and range over the rounds."""

    median: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
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


def finish(outcome: Outcome, faults: Sequence[str]) -> None:
    """Ends the script: exit 1 when a side failed or an answer was wrong."""
    for name, reason in outcome.skipped.items():
        print(f"skipped {name}: {reason}")
    for name, reason in outcome.failed.items():
        print(f"FAILED {name}: {reason}")
    for fault in faults:
        print(f"FAILED {fault}")
    if faults or outcome.failed:
        raise SystemExit(1)
