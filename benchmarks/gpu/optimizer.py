"""One update of a shape's adapters (rank 16, all linear layers): time, and state on the device.

Ours in 32 and 8 bits, resident and paged, beside bitsandbytes' paged AdamW and torch's in one
launch. All sides make the same updates: the parameters of the 32-bit ones must agree, and pages may
not change a bit.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import statistics
from typing import Any

from gpu.floors import Model
from gpu.section import Found, Spec, told
from harness import Case
from rows import Row

COLUMNS = ("step_ms", "first_ms", "state_mb", "parameters", "checksum")
TOLERANCE = 1e-5
SIDES: dict[str, dict[str, Any]] = {
    "fourbit 32": {"optim_bits": 32, "paged": "off"},
    "fourbit 32 paged": {"optim_bits": 32, "paged": "always"},
    "fourbit 8": {"optim_bits": 8, "paged": "off"},
    "fourbit 8 paged": {"optim_bits": 8, "paged": "always"},
    "torch fused": {},
    "bnb 32 paged": {},
    "bnb 8 paged": {},
}


def cases(options: argparse.Namespace) -> list[Case]:
    return [Case(f"optimizer {side}", told(options, side=side)) for side in SIDES]


def faults(rows: list[Row]) -> list[str]:
    sums = {row["case"].removeprefix("optimizer "): float(row["checksum"]) for row in rows}
    wide = {side: value for side, value in sums.items() if "8" not in side}
    found = []
    if wide and not all(
        math.isclose(value, next(iter(wide.values())), rel_tol=TOLERANCE) for value in wide.values()
    ):
        found.append(f"optimizer: the 32-bit sides do not compute the same: {wide}")
    digests = {row["case"].removeprefix("optimizer "): row["digest"] for row in rows}
    for bits in ("32", "8"):
        pair = [digests.get(f"fourbit {bits}"), digests.get(f"fourbit {bits} paged")]
        if None not in pair and pair[0] != pair[1]:
            found.append(f"optimizer: paging changed the numbers in {bits} bits")
    return found


def measure(spec: Spec) -> Found:
    import torch

    from gpu.clock import Clock

    clock = Clock(spec["device"])
    generator = torch.Generator(clock.device).manual_seed(0)

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, device=clock.device).normal_(0, 0.02, generator=generator)

    trained = [torch.nn.Parameter(random(s)) for s in Model.of(spec["shape"]).adapter_shapes()]
    for parameter in trained:
        parameter.grad = random(tuple(parameter.shape))
    optimizer = made(spec["side"], trained)
    before = torch.cuda.memory_allocated() if clock.on_gpu else 0
    if clock.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = [clock.wall(optimizer.step) for _ in range(8)]
    found = {
        "step_ms": statistics.median(times[2:]) * 1e3,
        "first_ms": times[0] * 1e3,
        "parameters": sum(p.numel() for p in trained),
        "checksum": sum(float(p.detach().double().abs().sum()) for p in trained),
        "digest": digest(trained),
    }
    if clock.on_gpu:
        found["state_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
    yield found


def digest(trained: list[Any]) -> str:
    """Of the parameters' bits."""
    whole = hashlib.sha256()
    for parameter in trained:
        whole.update(parameter.detach().cpu().numpy().tobytes())
    return whole.hexdigest()[:16]


def made(side: str, trained: list[Any]) -> Any:
    """An optimizer over the parameters, no weight decay, the same betas."""
    import torch

    import fourbit
    from inside import Skipped, imported

    rule: dict[str, Any] = {"lr": 2e-4, "weight_decay": 0.0}
    if side == "torch fused":
        return torch.optim.AdamW(trained, fused=True, **rule)
    if side.startswith("bnb"):
        if not trained[0].is_cuda:
            raise Skipped("bitsandbytes pages on a GPU only")
        optim = imported("bitsandbytes").optim
        return (optim.PagedAdamW32bit if "32" in side else optim.PagedAdamW8bit)(trained, **rule)
    return fourbit.AdamW(trained, **rule, **SIDES[side])
