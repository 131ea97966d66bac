"""Loading: how long quantizing takes, alone and as part of loading the 1.1B shape.

    python benchmarks/cpu/load.py

Quantizing counts double quantization on both sides and compares the bytes first. Loading is timed
in a fresh process with the files in the page cache, imports not counted.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import protocol
from protocol import Case, Outcome

import models

FILE = "cpu_load.csv"
SHAPES = ((576, 576), (1536, 576), (2048, 2048), (5632, 2048))
"""Weights of SmolLM2 and of the 1.1B shape."""
QUANTIZED = (
    "fourbit_gelem_s",
    "bnb_gelem_s",
    "ratio",
    "fourbit_dequantize_gb_s",
    "bnb_dequantize_gb_s",
)


def cases(options: argparse.Namespace) -> list[Case]:
    """A process for each weight shape, then the loaders in turn."""
    repeats = 3 if options.quick else 7
    made = [
        Case(f"quantize {rows}x{columns}", {"shape": (rows, columns), "repeats": repeats})
        for rows, columns in SHAPES
    ]
    large = models.large(options)
    return made + [
        Case(f"load {side}", {**large, "side": side}) for side in ("fourbit", "bnb", "bf16")
    ]


def faults(outcome: Outcome) -> list[str]:
    """Bytes must be equal before a ratio means anything."""
    return [
        f"{row['case']}: the packed bytes differ from bitsandbytes'"
        for row in outcome.rows
        if row["case"].startswith("quantize") and row["equal_bytes"] != "True"
    ]


def main() -> None:
    options = protocol.parser((__doc__ or "").splitlines()[0]).parse_args()
    if options.child:
        child_main(json.loads(options.child))
        return
    options = protocol.settle(options)
    outcome = protocol.measure(__file__, options.results / FILE, cases(options), options)
    quantized = [r for r in outcome.rows if r["case"].startswith("quantize")]
    print(protocol.table(quantized, QUANTIZED))
    loaded = [r for r in outcome.rows if r["case"].startswith("load")]
    print(protocol.table(loaded, ("load_s", "peak_mb", "ready_mb")))
    protocol.finish(outcome, faults(outcome))


# The child.


def child_main(spec: dict[str, Any]) -> None:
    import child

    child.begin(spec)
    child.emit(quantize(spec) if "shape" in spec else load(spec))


def quantize(spec: dict[str, Any]) -> dict[str, Any]:
    """Both sides alternately in one process, on the same bf16 weight."""
    import statistics

    import child
    import torch

    import fourbit

    functional = child.peer("bitsandbytes.functional")
    weight = torch.randn(spec["shape"]).mul_(0.02).bfloat16()
    count = weight.numel()

    def ours() -> Any:
        return fourbit.quantize_4bit(weight)

    def theirs() -> Any:
        return functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)

    packed, state = ours()
    packed_bnb, state_bnb = theirs()
    restore = {
        "fourbit_dequantize_gb_s": lambda: fourbit.dequantize_4bit(packed, state),
        "bnb_dequantize_gb_s": lambda: functional.dequantize_4bit(packed_bnb, state_bnb),
    }
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(spec["repeats"]):
        times["ours"].append(child.seconds(ours))
        times["theirs"].append(child.seconds(theirs))
    rates = {name: count / statistics.median(found) / 1e9 for name, found in times.items()}
    found = {
        "fourbit_gelem_s": rates["ours"],
        "bnb_gelem_s": rates["theirs"],
        "ratio": rates["ours"] / rates["theirs"],
        "equal_bytes": bool(torch.equal(packed.flatten(), packed_bnb.flatten())),
    }
    for name, function in restore.items():
        found[name] = 2 * count / child.median_seconds(function, repeats=spec["repeats"]) / 1e9
    return found


def load(spec: dict[str, Any]) -> dict[str, Any]:
    """A model from its folder to ready weights."""
    import time
    from pathlib import Path

    import child
    import peft as _peft
    import torch
    import transformers as _transformers

    del _peft, _transformers
    import sides

    import fourbit

    if spec["side"] == "bnb":
        child.peer("bitsandbytes")
    from fourbit.loading import load as load_fourbit

    for path in Path(spec["model"]).glob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    sides_of = {
        "fourbit": lambda: load_fourbit(spec["model"], quant=fourbit.QuantConfig()),
        "bnb": lambda: sides.bnb_base(spec),
        "bf16": lambda: sides.from_pretrained(spec["model"], dtype=torch.bfloat16),
    }
    memory = child.Memory()
    memory.start()
    began = time.perf_counter()
    model = sides_of[spec["side"]]()
    took = time.perf_counter() - began
    del model
    return {"load_s": took, **memory.values()}


if __name__ == "__main__":
    main()
