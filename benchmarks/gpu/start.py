"""Seconds from weights on the device to the first step done, nothing compiled before.

Triton's cache is a new, empty folder: what has to be compiled is compiled in this time.
"""

from __future__ import annotations

import argparse
import os
import tempfile

from gpu.section import Found, Spec, told
from harness import Case
from rows import Row
from sizes import SHAPES

COLUMNS = ("first_step_s", "second_step_s", "build_s")
CACHE = "TRITON_CACHE_DIR"
SIDES = {"fourbit": {"side": "fourbit"}, "bnb-expert": {"side": "bnb-expert"},
         "unsloth": {"side": "unsloth"}}  # fmt: skip


def cases(options: argparse.Namespace) -> list[Case]:
    tiny = options.shape == "tiny"
    common = told(options, rows=2 if tiny else 1, length=32 if tiny else 2048)
    return [Case(f"start {name}", {**common, **spec}) for name, spec in SIDES.items()]


def faults(rows: list[Row]) -> list[str]:
    return []


def measure(spec: Spec) -> Found:
    before = os.environ.get(CACHE)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[CACHE] = folder
        try:
            yield timed(spec)
        finally:
            os.environ.pop(CACHE)
            if before is not None:
                os.environ[CACHE] = before


def timed(spec: Spec) -> dict[str, float]:
    from gpu import sides
    from gpu.clock import Clock
    from inside import random_ids

    clock, made = Clock(spec["device"]), []
    built = clock.wall(lambda: made.append(sides.trainee(spec, clock.device)))
    ids = random_ids(SHAPES[spec["shape"]]["vocab_size"], spec["rows"], spec["length"])
    ids = ids.to(clock.device)
    first, second = (clock.wall(lambda: made[0].step(ids)) for _ in range(2))
    return {"first_step_s": first, "second_step_s": second, "build_s": built}
