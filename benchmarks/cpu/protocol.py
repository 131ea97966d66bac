"""How everything here is measured: one fresh process a row, the sides in turn, rows in a CSV file.

A script lists its cases; `measure` runs them as A B C A B C ..., each in a child process of its
own that prints one JSON object, and appends a row to benchmarks/results/cpu_*.csv at once, so that
an interrupted run goes on with --resume. This side imports no torch: nothing but the child is in
memory while a side is timed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # what all benchmarks share

import harness  # noqa: E402
from harness import Case as Case  # noqa: E402
from harness import ChildError, chosen, commit_of, versions_of  # noqa: E402
from harness import Outcome as Outcome  # noqa: E402
from harness import say as say  # noqa: E402
from rows import REPOSITORY, RESULTS, Row, read  # noqa: E402
from rows import Spread as Spread  # noqa: E402
from rows import append_to as append  # noqa: E402
from rows import spread as spread  # noqa: E402
from rows import table as table  # noqa: E402

PEERS = ("torch", "transformers", "peft", "bitsandbytes", "trl", "llama-cpp-python", "torchao")


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


# The columns that say where, when and with what.


def commit() -> str:
    """The newest commit of the code that is measured; results and pages do not change it."""
    return commit_of("src", "csrc", "benchmarks/cpu")


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
    return versions_of(*PEERS)


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


def run_child(
    script: str, spec: Mapping[str, Any], options: argparse.Namespace, env: Mapping[str, str]
) -> dict[str, Any]:
    """One child process and the JSON object it printed last.

    Raises:
        ChildError: it failed; the message is the last line of its stderr.
    """
    told = json.dumps({"threads": options.threads, **spec})
    command = [*shlex.split(options.launcher), sys.executable, str(script), "--child", told]
    common = harness.environment(options.threads, (HERE,))
    try:
        return harness.run_child(command, {**common, **env})[-1]
    except ChildError as error:
        raise ChildError(str(error)) from None  # one object, or none


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
    constant = origin(options)
    same = ("machine", "threads", "commit", "quick", "versions")
    measured = [r for r in read(results) if all(r.get(key) == constant[key] for key in same)]

    def about() -> Row:
        return {"date": _now(), **constant, "busy": f"{busy():.2f}"}

    def known(case: str, turn: int) -> Row | None:
        found = [r for r in measured if (r["case"], r["round"]) == (case, str(turn))]
        return found[-1] if options.resume and found else None

    series = harness.Series(
        rounds=options.rounds,
        run=lambda case: [run_child(script, case.spec, options, case.env)],
        about=about,
        record=lambda row: append(results, row),
        known=known,
    )
    return harness.measure(chosen(cases, options.only), series)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
