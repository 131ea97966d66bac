"""The CPU kernels of the storage formats: bytes compared first, then times, beside bitsandbytes.

    python benchmarks/cpu/kernels.py
    python benchmarks/cpu/kernels.py --shape 2048x2048 --dtype float32 --threads 1

One process, the sides in turn, so that both see the same minutes of the machine. A row is written
only after the two sides gave the same bytes. Bandwidth counts what a kernel must read and write;
`copy` is what `Tensor.copy_` reaches on memory of the same size.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourbit import native, ops
from fourbit.device import machine
from fourbit.quantize import dequantize_4bit, quantize_4bit

RESULTS = Path(__file__).resolve().parents[1] / "results" / "cpu_kernels.csv"
SHAPES = ((2048, 2048), (5632, 2048), (16384, 4096))
BLOCKSIZE = 64
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PEERS = ("torch", "bitsandbytes")


@dataclass
class Side:
    """One of the two that are compared: how to run it, and its seconds."""

    run: Callable[[], Any]
    seconds: list[float]


@dataclass
class Case:
    """One row: ours, theirs where they have it, and the bytes that must move."""

    name: str
    moved: int
    ours: Callable[[], Any]
    theirs: Callable[[], Any] | None = None


def same(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Ends the script when two answers differ."""
    if not torch.equal(ours.reshape(-1), theirs.reshape(-1)):
        raise SystemExit(f"wrong result: {what} differs from bitsandbytes'")


def checked_cases(weight: Tensor, bnb: Any) -> list[Case]:
    """What is measured on one weight, after its bytes were compared."""
    count, size = weight.numel(), weight.numel() * weight.element_size()
    plain, state = quantize_4bit(weight, blocksize=BLOCKSIZE, double_quant=False)
    packed, nested = quantize_4bit(weight, blocksize=BLOCKSIZE)
    scales = (packed, nested.absmax, nested.nested_absmax, nested.nested_offset)
    out = torch.empty_like(weight)

    def into() -> Tensor:
        return ops.dequantize_into(scales, blocksize=BLOCKSIZE, quant_type="nf4", out=out)

    same(into(), dequantize_4bit(packed, nested), "dequantize_into")
    cases = [
        Case(
            "quantize+double",
            size + count // 2 + count // BLOCKSIZE,
            lambda: quantize_4bit(weight, blocksize=BLOCKSIZE),
        ),
        Case(
            "dequantize double",
            size + count // 2 + count // BLOCKSIZE,
            lambda: dequantize_4bit(packed, nested),
        ),
        Case("dequantize into", size + count // 2 + count // BLOCKSIZE, into),
        Case("check finite", size, lambda: ops.count_nonfinite(weight)),
        Case("quantize int8", size + count, lambda: ops.quantize_int8(weight)),
        Case("copy", 2 * size, lambda: out.copy_(weight)),
    ]
    if bnb is None:
        return cases
    arguments = {"blocksize": BLOCKSIZE, "quant_type": "nf4"}
    their_plain, their_state = bnb.quantize_4bit(weight, **arguments)
    same(plain, their_plain, "packed codes")
    same(state.absmax, their_state.absmax, "absmax")
    their_packed, their_nested = bnb.quantize_4bit(weight, compress_statistics=True, **arguments)
    theirs = (
        their_packed,
        their_nested.absmax,
        their_nested.state2.absmax,
        their_nested.offset.reshape(1),
    )
    restored = ops.dequantize_4bit(
        theirs, blocksize=BLOCKSIZE, quant_type="nf4", shape=weight.shape, dtype=weight.dtype
    )
    same(restored, bnb.dequantize_4bit(their_packed, their_nested), "the restored weight")
    cases[0].theirs = lambda: bnb.quantize_4bit(weight, compress_statistics=True, **arguments)
    cases[1].theirs = lambda: bnb.dequantize_4bit(their_packed, their_nested)
    cases[2].theirs = cases[1].theirs  # its CPU kernels take no memory of the caller
    return cases


def measured(case: Case, rounds: int, least: float) -> list[Side]:
    """Both sides in turn; a turn repeats its side until ``least`` seconds have passed."""
    sides = [Side(run, []) for run in (case.ours, case.theirs) if run is not None]
    for side in sides:
        side.run()
    for _ in range(rounds):
        for side in sides:
            repeats, began = 0, time.perf_counter()
            while (passed := time.perf_counter() - began) < least or repeats == 0:
                side.run()
                repeats += 1
            side.seconds.append(passed / repeats)
    return sides


def origin() -> dict[str, str]:
    """Where, when and with what."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PEERS]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{machine().cpu}; {' '.join(machine().instruction_sets)}",
        "isa": native.isa() or "none",
        "threads": str(torch.get_num_threads()),
        "commit": found.stdout.strip(),
        "python": platform.python_version(),
        "versions": ", ".join(versions),
    }


def row(case: Case, sides: list[Side], about: dict[str, str], what: str) -> dict[str, str]:
    """The CSV row of a case; times in ms."""

    def ms(side: Side, pick: Callable[[list[float]], float]) -> str:
        return f"{1e3 * pick(side.seconds):.4g}"

    ours, theirs = sides[0], sides[1] if len(sides) > 1 else None
    median = statistics.median(ours.seconds)
    return {
        **about,
        "case": case.name,
        "weight": what,
        "ms": ms(ours, statistics.median),
        "ms_low": ms(ours, min),
        "ms_high": ms(ours, max),
        "gb_per_second": f"{case.moved / median / 1e9:.4g}",
        "bitsandbytes_ms": "" if theirs is None else ms(theirs, statistics.median),
        "bitsandbytes_ms_low": "" if theirs is None else ms(theirs, min),
        "bitsandbytes_ms_high": "" if theirs is None else ms(theirs, max),
        "ratio": "" if theirs is None else f"{statistics.median(theirs.seconds) / median:.3g}",
    }


def peer() -> Any:
    """bitsandbytes.functional; None when it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from bitsandbytes import functional
        except ImportError:
            return None
    return functional


def append(path: Path, made: dict[str, str]) -> None:
    """Adds a row to the CSV file, with a header where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, made.keys())
        if new:
            writer.writeheader()
        writer.writerow(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", action="append", help="NxK; default: three shapes of models")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: bfloat16")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.05, help="least time of a turn")
    parser.add_argument("--case", action="append", help="only cases whose name starts so")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    shapes = [tuple(map(int, text.split("x"))) for text in arguments.shape or ()] or SHAPES
    about, bnb = origin(), peer()
    for dtype in arguments.dtype or ["bfloat16"]:
        for shape in shapes:
            torch.manual_seed(0)
            weight = (torch.randn(shape) * 0.02).to(DTYPES[dtype])
            for case in checked_cases(weight, bnb):
                wanted = arguments.case is None or case.name.startswith(tuple(arguments.case))
                if not wanted:
                    continue
                what = f"{'x'.join(map(str, shape))} {dtype}"
                sides = measured(case, arguments.rounds, arguments.seconds)
                made = row(case, sides, about, what)
                append(arguments.csv, made)
                shown = ("ms", "gb_per_second", "bitsandbytes_ms", "ratio")
                text = " ".join(f"{key}={made[key]}" for key in shown)
                print(f"{what} {case.name}: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
