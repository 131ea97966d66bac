"""Where the adapters' part is cheapest: inside the weight's product, or added to its result.

Added (what the fused layers do): the product, then ``out += u · B`` for each adapter, which reads
and writes the result again. Inside: the product is as much deeper as the ranks, ``[x | u]`` with
``[W | s·B]`` forward and ``[g | g·B]`` with ``[W; A]`` backward, if the library multiplies such odd
depths as fast. What makes ``u`` is the same in both and not timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gpu.floors import Model
from gpu.section import Found, Spec, told
from harness import Case
from rows import Row

if TYPE_CHECKING:
    from gpu.clock import Clock

COLUMNS = ("bare_us", "added_us", "inside_us", "saved_percent")
RANK = 16


def cases(options: argparse.Namespace) -> list[Case]:
    return [Case("layer", told(options, tokens=64 if options.shape == "tiny" else 8192))]


def faults(rows: list[Row]) -> list[str]:
    return []


def groups(shape: str) -> dict[str, tuple[list[int], int]]:
    """Columns of the joint results, and depth, of the products of a decoder layer."""
    m = Model.of(shape)
    return {
        "qkv": ([m.queries, m.keys, m.keys], m.hidden),
        "out": ([m.hidden], m.queries),
        "gate, up": ([m.inner, m.inner], m.hidden),
        "down": ([m.hidden], m.inner),
    }


def measure(spec: Spec) -> Found:
    from gpu.clock import Clock

    clock = Clock(spec["device"])
    total: dict[str, float] = dict.fromkeys(COLUMNS[:3], 0.0)
    for name, (widths, depth) in groups(spec["shape"]).items():
        for way in ("forward", "backward"):
            found = product(clock, spec["tokens"], widths, depth, forward=way == "forward")
            total = {key: total[key] + value for key, value in found.items()}
            yield {"case": f"layer {name} {way}", **found, "saved_percent": saved(found)}
    yield {
        "case": "layer all",
        **total,
        "saved_percent": saved(total),
        "uncaptured": clock.uncaptured,
    }


def product(
    clock: Clock, tokens: int, widths: list[int], depth: int, *, forward: bool
) -> dict[str, float]:
    """Microseconds of one joint product and its adapters, in the three forms."""
    import torch
    from torch import Tensor

    from gpu.build import dtype_for

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=clock.device).to(dtype_for(clock.device))

    def seconds(call: Callable[[], Any]) -> float:
        return clock.device_only([call] * 4)

    n, r = sum(widths), RANK * len(widths)
    inner, outer = (depth, n) if forward else (n, depth)
    x, wide_x, out = random(tokens, inner), random(tokens, inner + r), random(tokens, outer)
    if forward:  # as it lies in memory: rows of the weight are outputs
        w, wide_w = random(outer, inner).t(), random(outer, inner + r).t()
        thin = list(random(tokens, r).split(RANK, dim=1))
        parts = list(zip(out.split(widths, dim=1), thin, strict=True))
        factors = [random(RANK, width) for width in widths]
    else:
        w, wide_w = random(inner, outer), random(inner + r, outer)
        parts, factors = [(out, random(tokens, r))], [random(r, outer)]

    def added() -> None:
        torch.mm(x, w, out=out)
        for (part, u), factor in zip(parts, factors, strict=True):
            part.addmm_(u, factor)

    return {
        "bare_us": seconds(lambda: torch.mm(x, w, out=out)) * 1e6,
        "added_us": seconds(added) * 1e6,
        "inside_us": seconds(lambda: torch.mm(wide_x, wide_w, out=out)) * 1e6,
    }


def saved(times: dict[str, float]) -> float:
    """By having it inside, in per cent of the time with it added."""
    return 100 * (1 - times["inside_us"] / times["added_us"])
