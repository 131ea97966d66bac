"""One optimizer step, rank 16 on all linear layers, all sides in turn on the same random weights.

Every side takes the same ids, no padding, and tells its loss and the norm of its gradients before
the first update: the 4-bit sides must agree on both, and our layers must have taken the fused path.
A side goes through all lengths in one process, the shortest first; where memory runs out its row
says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from gpu.section import Found, Spec, told
from harness import Case
from rows import Row

COLUMNS = ("tokens_per_second", "step_s", "peak_gb", "loss", "norm", "oom")
SEQUENCE = 2048
TOKENS = (1024, 2048, 4096, 8192, 16384)
LOSS, NORM = 0.02, 0.10
"""Shares by which two 16-bit passes over the same 4-bit weights may differ."""
SIDES: dict[str, dict[str, Any]] = {
    "fourbit": {"side": "fourbit"},
    "fourbit-bf16": {"side": "fourbit", "quantized": False},
    "bnb": {"side": "bnb"},
    "bnb-expert": {"side": "bnb-expert"},
    "liger": {"side": "liger"},
    "unsloth": {"side": "unsloth"},
    "fourbit-recompute": {"side": "fourbit", "recompute": "all"},
    "bnb-recompute": {"side": "bnb", "recompute": "all"},
    "bnb-expert-recompute": {"side": "bnb-expert", "recompute": "all"},
    "liger-recompute": {"side": "liger", "recompute": "all"},
    "unsloth-recompute": {"side": "unsloth", "recompute": "all"},
}
PAGED = {"fourbit-paged": {"side": "fourbit", "paged": "always"}}
OTHER_WEIGHTS = ("fourbit-bf16", "unsloth", "unsloth-recompute")
PEERS = ("bnb", "bnb-expert", "bnb-recompute", "bnb-expert-recompute")


def cases(options: argparse.Namespace) -> list[Case]:
    tiny = options.shape == "tiny"
    tokens = options.tokens or ([64] if tiny else list(TOKENS))
    common = told(
        options, tokens=sorted(tokens), length=32 if tiny else SEQUENCE, steps=2 if tiny else 5
    )
    sides = SIDES | (PAGED if options.paged else {})
    return [Case(name, {**common, "name": name, **spec}) for name, spec in sides.items()]


def faults(rows: list[Row]) -> list[str]:
    found = []
    done = [row for row in rows if row.get("oom") != "1"]
    for row in done:
        side, _, tokens = row["case"].partition(" ")
        ours = side.startswith("fourbit") and row["kernels"] == "1"
        if ours and json.loads(row["paths"]) != {"fused": int(row["layers"])}:
            found.append(f"{row['case']}: of {row['layers']} layers {row['paths']}, not all fused")
        peers = [r for r in done if r["case"] == f"bnb-expert {tokens}"]
        if side in OTHER_WEIGHTS or not peers:
            continue
        for key, limit in (("loss", LOSS), ("norm", NORM)):
            theirs = statistics.median(float(peer[key]) for peer in peers)
            if not abs(float(row[key]) / theirs - 1) <= limit:
                found.append(f"{row['case']}: {key} {row[key]}, bnb-expert has {theirs:.6g}")
    return list(dict.fromkeys(found))


def measure(spec: Spec) -> Found:
    import torch
    from torch import Tensor

    from fourbit.device import peak_memory, reset_peak_memory
    from fourbit.ops import has_kernels
    from gpu import sides
    from gpu.clock import Clock
    from inside import paths, random_ids, seed_adapter

    clock = Clock(spec["device"])
    trainee = sides.trainee(spec, clock.device)
    config = trainee.model.config.get_text_config()  # type: ignore[union-attr, operator]
    for tokens in spec["tokens"]:
        length = min(tokens, spec["length"])
        ids = random_ids(config.vocab_size, tokens // length, length).to(clock.device)
        case = {"case": f"{spec['name']} T={tokens}", "tokens": tokens}
        seed_adapter(trainee.model, std_b=sides.B_STD)
        reset_peak_memory(clock.device)
        losses: list[float] = []
        norms: list[float] = []
        times: list[float] = []

        def step(ids: Tensor = ids, losses: list[float] = losses) -> None:
            losses.append(trainee.step(ids))

        try:
            for _ in range(2 + spec["steps"]):
                times.append(clock.wall(step))
                norms.append(float(trainee.norm))  # type: ignore[arg-type]
        except torch.OutOfMemoryError:
            trainee.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            yield {**case, "oom": 1}
            continue
        middle = statistics.median(times[2:])
        yield {
            **case,
            "tokens_per_second": tokens / middle,
            "step_s": middle,
            "slowest_s": max(times[2:]),
            "first_step_s": times[0],
            "loss": losses[0],
            "norm": norms[0],
            "last_loss": losses[-1],
            "last_norm": norms[-1],
            "peak_gb": (peak_memory(clock.device) or 0) / 1e9,
            "paths": paths(trainee.model) if spec["side"] == "fourbit" else {},
            "layers": config.num_hidden_layers,
            "kernels": int(has_kernels(clock.device)),
            "length": length,
        }
