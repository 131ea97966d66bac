"""The demo's fine-tune on the GPU and on the CPU: receipts verified, one loss curve within a band.

Data order, initial adapters and dropout are functions of the seed, the same on every device; what
differs is rounding. Means over `WINDOW` steps may differ by `BAND` of the CPU's. On a CPU the
second run computes in float32: what rounding alone does, beside the band.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from gpu.section import Found, Spec, needs_gpu, told
from harness import Case
from rows import Row

COLUMNS = ("first_loss", "last_loss", "train_seconds", "verified")
BAND, LEAST = 0.05, 0.02
"""Share of the running mean, and nats below which a share means nothing."""
WINDOW = 10


def cases(options: argparse.Namespace) -> list[Case]:
    tiny = options.shape == "tiny"
    common = told(options, steps=6 if tiny else options.steps, window=2 if tiny else WINDOW)
    here = {**common, "precision": "auto"}
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    other = {**common, "precision": "auto" if needs_gpu(options) else "fp32"}
    name = "demo gpu" if needs_gpu(options) else "demo cpu fp32"
    return [Case("demo cpu", here, hidden), Case(name, other)]


def faults(rows: list[Row]) -> list[str]:
    found = [f"{row['case']}: not verified" for row in rows if row["verified"] != "1"]
    for row in rows:
        pairs = [r for r in rows if r["case"] == "demo cpu" and r["round"] == row["round"]]
        if row["case"] == "demo cpu" or not pairs:
            continue
        apart = difference(pairs[0], row)
        if not apart <= 1:
            found.append(
                f"{row['case']}: the loss curve leaves the band, {apart:.2f} times its width"
            )
    return found


def difference(reference: Row, row: Row) -> float:
    """The farthest distance of two curves of running means, in widths of the band."""
    ours, theirs = json.loads(row["curve"]), json.loads(reference["curve"])
    return max(abs(a - b) / max(BAND * b, LEAST) for a, b in zip(ours, theirs, strict=True))


def measure(spec: Spec) -> Found:
    import tempfile

    import fourbit
    import shapes
    from fourbit.demo.run import DemoShape, write_inputs
    from fourbit.settings import load_settings, replaced

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = (
            DemoShape(train_rows=24, test_rows=2, pattern_rows=2) if spec["tiny"] else DemoShape()
        )
        written = write_inputs(folder / "demo", rows, overwrite=False)
        changed = {
            "max_steps": spec["steps"],
            "eval_every": 0,
            "save_every": 0,
            "samples": 0,
            "precision": spec["precision"],
        }
        if spec["tiny"]:
            model = shapes.write_model(folder / "tiny", "tiny")
            changed |= {"model": str(model), "data.eval": 2, "data.max_length": 256}
        config = replaced(load_settings(fourbit.TrainConfig, path=written).value, changed)
        result = fourbit.train(config)
        fourbit.verify(config.output, base=False).require(where=config.output)
        lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    losses = [step["loss"] for step in steps if "loss" in step]
    window = spec["window"]
    curve = [
        round(sum(losses[i : i + window]) / window, 5)
        for i in range(0, len(losses) - window + 1, window)
    ]
    yield {
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "train_seconds": result.train_seconds or 0.0,
        "verified": int(result.verified),
        "steps": len(losses),
        "curve": curve,
    }
