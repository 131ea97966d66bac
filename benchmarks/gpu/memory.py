"""What trainings take of a card's memory, under a cap where one is promised, and what was planned.

The caps are PyTorch's (`set_per_process_memory_fraction`): above them an allocation fails.
``reserved_gb`` is what PyTorch took from the driver, fragments included. The cells are runs of
`fourbit train`, three steps each, planned before and measured by its own record.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import memory as cells  # benchmarks/memory.py
from gpu.section import Found, Spec, told
from harness import Case
from rows import Row
from sizes import SHAPES

COLUMNS = ("reserved_gb", "allocated_gb", "tokens_per_second", "planned_mb", "measured_mb")
RUNS: dict[str, dict[str, Any]] = {
    "7b": {"shape": "llama-7b", "rank": 64, "length": 512, "recompute": "all"},
    "8b 2k": {"shape": "llama-8b", "rank": 16, "length": 2048, "recompute": "offload"},
    "65b": {"shape": "llama-65b", "rank": 64, "length": 512, "recompute": "all", "cap_gb": 48},
    "8b 60k": {"shape": "llama-8b", "rank": 16, "length": 61440, "recompute": "offload",
               "cap_gb": 16},
}  # fmt: skip
"""Rank 64, length 512: the QLoRA paper's. All on every linear layer, batch 1, state paged."""
CELLS = 8
PLAN_ERROR = 5.0


def cases(options: argparse.Namespace) -> list[Case]:
    tiny = options.shape == "tiny"
    common = told(options, side="fourbit", paged="always", steps=3)
    found = [
        Case(f"memory {name}", {**common, **run, **(_tiny(run) if tiny else {})})
        for name, run in RUNS.items()
    ]
    chosen = [cells.FIXED[3]] if tiny else cells.drawn(CELLS, options.seed)
    plans = {
        cells.name_of(c): Case(f"plan {cells.name_of(c)}", told(options, cell=c)) for c in chosen
    }
    return [*found, *plans.values()]


def _tiny(run: dict[str, Any]) -> dict[str, Any]:
    return {"shape": "tiny", "rank": 4, "length": min(64, run["length"])}


def faults(rows: list[Row]) -> list[str]:
    return [f"{row['case']}: the loss is {row['loss']}" for row in rows if row.get("loss") == "nan"]


def measure(spec: Spec) -> Found:
    yield from (planned(spec) if "cell" in spec else trained(spec))


def trained(spec: Spec) -> Found:
    """Some steps of one shape."""
    import statistics

    import torch

    from gpu import sides
    from gpu.clock import Clock
    from inside import random_ids

    clock = Clock(spec["device"])
    if clock.on_gpu and "cap_gb" in spec:
        total = torch.cuda.get_device_properties(clock.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, spec["cap_gb"] * 1e9 / total))
    trainee = sides.trainee(spec, clock.device)
    ids = random_ids(SHAPES[spec["shape"]]["vocab_size"], 1, spec["length"]).to(clock.device)
    losses: list[float] = []
    times = [clock.wall(lambda: losses.append(trainee.step(ids))) for _ in range(spec["steps"])]
    found = {
        "tokens_per_second": spec["length"] / statistics.median(times[1:]),
        "loss": losses[-1],
        "length": spec["length"],
    }
    if clock.on_gpu:
        found["reserved_gb"] = torch.cuda.max_memory_reserved(clock.device) / 1e9
        found["allocated_gb"] = torch.cuda.max_memory_allocated(clock.device) / 1e9
    yield found


def planned(spec: Spec) -> Found:
    """One cell; a GPU's figures begin at nothing, a CPU's with what the imports take."""
    import shapes

    with tempfile.TemporaryDirectory() as folder:
        model = "smollm2"
        if spec["tiny"]:
            model = str(shapes.write_model(Path(folder) / "tiny", "tiny"))
        base = 0 if spec["device"] == "cuda" else cells.baseline()
        told_bytes, took = (size - base for size in cells.run(tuple(spec["cell"]), model))
    yield {
        "planned_mb": told_bytes / 1e6,
        "measured_mb": took / 1e6,
        "error_percent": 100 * (told_bytes / took - 1),
    }
