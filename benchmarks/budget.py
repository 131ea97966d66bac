"""A large model inside a budget: the whole process's memory and speed, beside a run without one.

    python benchmarks/shapes.py llama-7b DIR && fourbit quantize DIR -o DIR-nf4
    python benchmarks/budget.py --model DIR-nf4 --budget 6GB [--without] [--steps 5] [--r 64]

One run of `fourbit train`: batch 1, generated text that fills every sequence, adapters on all
linear layers, everything else left to the budget. With `--without` a second run has no budget and
recomputes all layers. Rows go to results/budget.csv; `peak_mb` is VmHWM; `anonymous_mb` and
`file_mb` are the largest seen twenty times a second (they need not fall together).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from memory import text, training
from rows import append, stamp

FIELDS = {"VmHWM": "peak_mb", "RssAnon": "anonymous_mb", "RssFile": "file_mb"}


def watched(command: list[str]) -> tuple[str, dict[str, float]]:
    """What a command printed, and the most it held, in 10⁶ bytes."""
    most = dict.fromkeys(FIELDS.values(), 0.0)
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out)
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            fields = dict(line.split(":", 1) for line in status.read_text().split("\n") if line)
            for field, column in FIELDS.items():
                kib = int(fields.get(field, "0").split()[0])
                most[column] = max(most[column], kib * 1024 / 1e6)
            time.sleep(0.05)
        out.seek(0)
        return out.read(), most


def measured(options: argparse.Namespace, budget: str) -> dict[str, object]:
    """One run's row."""
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        data = Path(folder) / "text.jsonl"
        text(data, options.length, rows=8)
        settings = {
            "model": options.model,
            "data.train": data,
            "data.eval": 0,
            "data.max_length": options.length,
            "data.packing": "false",
            "data.train_on": "all",
            "batch_size": 1,
            "grad_accum": 1,
            "max_steps": options.steps,
            "samples": 0,
            "lora.r": options.r,
            "output": Path(folder) / "run",
            **({"budget": budget} if budget else {"gradient_checkpointing": "all"}),
        }
        out, most = watched(training(settings))
    if "run_dir" not in (told := json.loads(out)):
        sys.exit(f"the run ended: {told['error']['what']}")
    return {
        **stamp(),
        "model": Path(options.model).name,
        "r": options.r,
        "length": options.length,
        "steps": options.steps,
        "budget": budget or "none",
        "planned_mb": round(told["predicted_peak_bytes"] / 1e6, 1),
        **{key: round(value, 1) for key, value in most.items()},
        "tokens_per_second": told["tokens_per_second"],
        "first_loss": round(told["train_loss_first"], 4),
        "last_loss": round(told["train_loss_last"], 4),
        "verified": told["verified"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder of a quantized model")
    parser.add_argument("--budget", required=True, help="6GB")
    parser.add_argument("--without", action="store_true", help="a second run without the budget")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--work", type=Path, default=None, help="where runs are written meanwhile")
    options = parser.parse_args()
    for budget in [options.budget, *([""] if options.without else [])]:
        row = measured(options, budget)
        append("budget", row)
        print(*row.values(), flush=True)


if __name__ == "__main__":
    main()
