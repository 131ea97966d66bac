"""Measures `fourbit quantize` and what loading its output costs, each in a fresh process.

    python benchmarks/shapes.py llama-7b /data/llama-7b
    python benchmarks/quantize.py --model /data/llama-7b --output /data/llama-7b-nf4

Memory is private memory (RssAnon): pages of mapped files, which the system can drop and processes
share, do not count. `above_import` takes off what the process had before the work began. The output
is checked to hold the error that NF4 has on normal weights before a line goes to the CSV file.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "quantize.csv"
WORST_ERROR = {"nf4": 0.12, "fp4": 0.16, "int8": 0.02}
LOAD = """
import json, sys, time
import fourbit
from fourbit import device
from fourbit.loading import load
device.release_memory()
with device.PeakMemory() as memory:
    began = time.perf_counter()
    model, _ = load(sys.argv[1])
    seconds = time.perf_counter() - began
now = device.private_memory()
private, peak = now - memory.start, memory.peak - memory.start
dtype = str(model.dtype)
print(json.dumps({"seconds": seconds, "private": private, "peak": peak, "dtype": dtype}))
"""


def quantize(model: Path, output: Path, kind: str) -> dict[str, Any]:
    """One run of the command, its JSON."""
    command = [sys.executable, "-m", "fourbit", "quantize", str(model), "-o", str(output)]
    done = subprocess.run(
        [*command, "--quant", kind, "--overwrite", "--json"],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(done.stdout)


def load(folder: Path, *, cold: bool) -> dict[str, Any]:
    """One load in a fresh process; cold after the files were dropped from the page cache."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if cold:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while os.read(descriptor, 1 << 24):
                    pass
        finally:
            os.close(descriptor)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder)], stdout=subprocess.PIPE, check=True, text=True
    )
    return json.loads(done.stdout)


def machine() -> dict[str, str]:
    """Where and with what."""
    import torch
    import transformers

    import fourbit

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    from fourbit.device import machine as facts

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": facts().cpu,
        "threads": str(facts().threads),
        "commit": commit.stdout.strip(),
        "fourbit": fourbit.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def measure(model: Path, output: Path, kind: str) -> dict[str, Any]:
    """Everything about one model, as one row."""
    made = quantize(model, output, kind)
    if made["relative_error"] > WORST_ERROR[kind]:
        raise SystemExit(f"wrong result: relative error {made['relative_error']}")
    cold, warm = load(output, cold=True), load(output, cold=False)
    return {
        **machine(),
        "model": model.name,
        "quant": kind,
        "bytes_in": made["bytes_in"],
        "bytes_out": made["bytes_out"],
        "bits_per_weight": round(made["bits_per_weight"], 4),
        "relative_error": round(made["relative_error"], 6),
        "seconds": round(made["seconds"], 2),
        "gb_per_second": round(made["bytes_in"] / 1e9 / made["seconds"], 4),
        "peak_private_bytes": made["peak_host_bytes"],
        "peak_above_import_bytes": made["peak_host_bytes"] - made["start_host_bytes"],
        "load_cold_seconds": round(cold["seconds"], 2),
        "load_warm_seconds": round(warm["seconds"], 2),
        "load_private_bytes": warm["private"],
        "load_peak_private_bytes": warm["peak"],
        "load_private_share": round(warm["private"] / made["bytes_out"], 4),
        "load_dtype": warm["dtype"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, help="kept; default: beside the model, removed")
    parser.add_argument("--quant", choices=sorted(WORST_ERROR), default="nf4")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    output = arguments.output or arguments.model.with_name(arguments.model.name + ".benchmark")
    try:
        row = measure(arguments.model, output, arguments.quant)
    finally:
        if arguments.output is None:
            shutil.rmtree(output, ignore_errors=True)
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    new = not arguments.csv.exists()
    with arguments.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, row.keys())
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(json.dumps(row, indent=2))


if __name__ == "__main__":
    main()
