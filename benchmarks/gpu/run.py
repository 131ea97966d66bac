"""Every GPU claim beside its peers, in the same call as the ceilings it is judged by.

    python benchmarks/gpu/run.py SECTION... [--shape 8b] [--rounds 3]
    python benchmarks/gpu/run.py all --shape 8b --paged
    python benchmarks/gpu/run.py claims
    python benchmarks/gpu/run.py all --device cpu --shape tiny    # does it all run?

Each side is a process of its own, the sides in turn. Rows are appended to
benchmarks/results/gpu_SECTION.csv; those of a CPU only where --results names a folder. Ends with
exit code 1 when a side failed, an answer was wrong or a layer took another path than the fused one.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # what all benchmarks share, and this package
if sys.path[1:] and Path(sys.path[1]).resolve() == HERE:
    del sys.path[1]  # of a script; its modules would hide others of their names

import harness  # noqa: E402
import rows as results  # noqa: E402
from gpu import (  # noqa: E402
    attention,
    ceilings,
    claims,
    decode,
    demo,
    dequantize,
    few_rows,
    layer,
    memory,
    optimizer,
    quantize,
    start,
    train,
)
from gpu.section import SHAPES, Section  # noqa: E402
from harness import Case  # noqa: E402
from inside import Skipped, emit, quiet  # noqa: E402
from rows import Row  # noqa: E402

SECTIONS: dict[str, Section] = {
    "ceilings": ceilings,
    "dequantize": dequantize,
    "quantize": quantize,
    "few_rows": few_rows,
    "layer": layer,
    "attention": attention,
    "optimizer": optimizer,
    "train": train,
    "decode": decode,
    "start": start,
    "memory": memory,
    "demo": demo,
}
PEERS = ("torch", "triton", "transformers", "peft", "bitsandbytes", "liger_kernel", "unsloth")
ONLY_A_GPU = {
    "ceilings": "the bus is a GPU's: no transfers to be measured on a CPU",
    "dequantize": "launches are a GPU's: on a CPU this compares the compiled kernel",
    "optimizer": "on a CPU pages lie in a file, and bitsandbytes does not page",
    "memory": "caps are a GPU's: on a CPU the runs go through without one",
    "start": "on a CPU nothing is compiled",
}


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}, claims or all")
    add("--shape", choices=SHAPES, default="8b", help="of Llama; random weights")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--rounds", type=int, default=3, help="turns of every side")
    add("--only", action="append", help="a case (may be repeated; a * matches anything)")
    add("--tokens", type=int, nargs="*", help="train: tokens of a step")
    add("--paged", action="store_true", help="train: also with the optimizer's state in pages")
    add("--steps", type=int, default=100, help="demo: steps of each run")
    add("--seed", type=int, default=1, help="memory: which cells are drawn")
    add("--results", type=Path, help="folder of the CSV files")
    add("--work", type=Path, default=results.REPOSITORY / "build" / "bench-gpu")
    add("--inline", action="store_true", help=argparse.SUPPRESS)  # no processes: for tests
    add("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    known = {*SECTIONS, "claims", "all"}
    unknown = [name for name in options.sections if name not in known]
    if unknown:
        parser.error(f"no section {unknown[0]}; there are {', '.join(SECTIONS)}, claims and all")
    if not options.sections and not options.child:
        parser.error(f"name a section: {', '.join(SECTIONS)}, claims or all")
    options.work = options.work.resolve()
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    if options.child:
        child(json.loads(options.child))
        return
    wanted = list(SECTIONS) if "all" in options.sections else list(options.sections)
    measured = [name for name in dict.fromkeys(wanted) if name != "claims"]
    if measured:
        measured = list(dict.fromkeys(("ceilings", *measured)))
        require_device(options.device)
        go(measured, options)
    elif "claims" in options.sections:
        print_claims(options.results or results.RESULTS)


def require_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can use; --device cpu --shape tiny tries the commands")


def go(sections: list[str], options: argparse.Namespace) -> None:
    """Measures, prints tables and claims, and ends with 1 where something went wrong."""
    about, whole, faults = origin(options), harness.Outcome(), []
    with tempfile.TemporaryDirectory() as aside:
        # figures of a CPU are no evidence: they are kept out of the results
        trial = options.device == "cpu" and options.results is None
        folder = Path(aside) if trial else options.results or results.RESULTS
        for name in sections:
            section = SECTIONS[name]
            harness.say(f"== {name}")
            if options.device == "cpu" and name in ONLY_A_GPU:
                harness.say(f"{name}: {ONLY_A_GPU[name]}")
            cases = cases_of(name, options)
            if not cases:
                continue
            found = harness.measure(cases, series(name, options, about, folder))
            print(f"\n{name}\n{results.table(found.rows, numeric(section, found.rows))}")
            faults += section.faults([row for row in found.rows if row.get("oom") != "1"])
            whole.rows += found.rows
            whole.skipped |= found.skipped
            whole.failed |= found.failed
        print()
        print_claims(folder)
    harness.end(whole, faults)


def cases_of(name: str, options: argparse.Namespace) -> list[Case]:
    """A section's cases; --only leaves the ceilings alone."""
    found = SECTIONS[name].cases(options)
    found = [Case(c.name, {"section": name, **c.spec}, c.env) for c in found]
    if name == "ceilings" or options.only is None:
        return found
    return [c for c in found if any(fnmatch(c.name, pattern) for pattern in options.only)]


def numeric(section: Section, rows: list[Row]) -> list[str]:
    """The section's columns that are there and hold numbers."""

    def number(text: str) -> bool:
        try:
            float(text)
        except ValueError:
            return False
        return True

    return [c for c in section.COLUMNS if any(number(row.get(c, "")) for row in rows)]


def series(name: str, options: argparse.Namespace, about: Row, folder: Path) -> harness.Series:
    return harness.Series(
        rounds=options.rounds,
        run=inline if options.inline else in_process,
        about=lambda: {"date": now(), **about},
        record=partial(results.append, f"gpu_{name}", folder=folder),
    )


def in_process(case: Case) -> list[dict[str, Any]]:
    """A case in a process of its own."""
    command = [sys.executable, str(HERE / "run.py"), "--child", json.dumps(case.spec)]
    return harness.run_child(command, {**harness.environment(None, ()), **case.env})


def inline(case: Case) -> list[dict[str, Any]]:
    """The same in this process."""
    try:
        return list(SECTIONS[case.spec["section"]].measure(dict(case.spec)))
    except Skipped as reason:
        return [{"skipped": str(reason)}]
    except Exception as error:
        raise harness.ChildError(f"{type(error).__name__}: {error}") from error


def child(spec: dict[str, Any]) -> None:
    """What a process of a case does: rows, or one that says that memory ran out."""
    import torch

    quiet()
    try:
        for row in SECTIONS[spec["section"]].measure(spec):
            emit(row)
    except Skipped as reason:
        emit({"skipped": str(reason)})
    except torch.OutOfMemoryError:
        emit({"oom": 1})


def origin(options: argparse.Namespace) -> Row:
    """The columns that every row begins with; ``call`` joins the rows of one command."""
    import torch

    machine = platform.machine()
    if options.device == "cuda":
        facts = torch.cuda.get_device_properties(0)
        machine = f"{facts.name} sm_{facts.major}{facts.minor} CUDA {torch.version.cuda}"
    return {
        "call": now(),
        "machine": machine,
        "device": options.device,
        "shape": options.shape,
        "commit": harness.commit_of("src", "csrc", "benchmarks/gpu"),
        "python": platform.python_version(),
        "versions": harness.versions_of(*PEERS),
    }


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def print_claims(folder: Path) -> None:
    tables = {f"gpu_{name}": results.read(folder / f"gpu_{name}.csv") for name in SECTIONS}
    print("claims, for an H200-class GPU")
    print("\n".join(claims.lines(tables)))


if __name__ == "__main__":
    main()
