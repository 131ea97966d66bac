"""Older CPUs: training under capped instruction sets, beside plain PyTorch in fp32.

    python benchmarks/cpu/caps.py

The caps are torch's and oneDNN's own environment variables, so this imitates an older CPU and is
not one. Passed when our training is correct and not slower than transformers and PEFT in fp32
under the same cap.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import protocol
import train
from protocol import Case, Outcome

import models

FILE = "cpu_caps.csv"
TOLERANCE = 2e-3
NOISE = 0.95
"""Two runs of one thing differ by more than 5% on a shared machine: slower than this is slower."""
CAPS = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "scalar": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}
SIDES: dict[str, dict[str, Any]] = {
    "fourbit": {"side": "fourbit"},
    "lora-fp32": {"side": "plain", "dtype": "float32", "nf4": True},
}


def cases(options: argparse.Namespace) -> list[Case]:
    """Both sides under each cap."""
    told = {**models.small(options), "rows": 2, "length": 512, "steps": 1 if options.quick else 3}
    return [
        Case(f"{side} {cap}", {**told, **spec}, env)
        for cap, env in CAPS.items()
        for side, spec in SIDES.items()
    ]


def faults(outcome: Outcome) -> list[str]:
    """Equal losses, and no loss of speed."""
    found = []
    for cap in CAPS:
        for column, wrong in (("first_loss", "differs from"), ("tokens_per_second", "is below")):
            ours = protocol.spread(outcome.rows, f"fourbit {cap}", column)
            plain = protocol.spread(outcome.rows, f"lora-fp32 {cap}", column)
            if ours is None or plain is None:
                continue
            ratio = ours.median / plain.median
            bad = abs(ratio - 1) > TOLERANCE if column == "first_loss" else ratio < NOISE
            if bad:
                found.append(f"{cap}: {column} {ours} {wrong} plain PyTorch's {plain}")
    return found


def main() -> None:
    options = protocol.parser((__doc__ or "").splitlines()[0]).parse_args()
    if options.child:
        train.child_main(json.loads(options.child))
        return
    options = protocol.settle(options)
    outcome = protocol.measure(__file__, options.results / FILE, cases(options), options)
    print(protocol.table(outcome.rows, ("tokens_per_second", "peak_mb", "first_loss")))
    protocol.finish(outcome, faults(outcome))


if __name__ == "__main__":
    main()
