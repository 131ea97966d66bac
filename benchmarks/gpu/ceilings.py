"""What the card can do: products sustained over seconds, copies, the bus, the cost of a launch.

A CPU tries it at a small size.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from gpu.section import Found, Spec, told
from harness import Case
from rows import Row

if TYPE_CHECKING:
    from gpu.clock import Clock

COLUMNS = ("gemm_tflops", "gemm_burst_tflops", "copy_gb_s", "h2d_gb_s", "d2h_gb_s", "launch_us")


def cases(options: argparse.Namespace) -> list[Case]:
    return [Case("ceilings", told(options))]


def faults(rows: list[Row]) -> list[str]:
    return []


def measure(spec: Spec) -> Found:
    from gpu.clock import Clock

    clock = Clock(spec["device"])
    tiny = not clock.on_gpu
    found = products(clock, tiny=tiny) | copies(clock, tiny=tiny)
    yield {**found, "uncaptured": clock.uncaptured, "launch_us": launch_seconds(clock) * 1e6}


def products(clock: Clock, *, tiny: bool) -> dict[str, float]:
    """Large 16-bit products: ten at once, and one after another for seconds."""
    import torch

    from gpu.build import dtype_for

    size, seconds, at_once = (256, 0.2, 2) if tiny else (8192, 6.0, 50)
    dtype = dtype_for(clock.device)
    x, w = (torch.randn(size, size, device=clock.device, dtype=dtype) for _ in range(2))
    y, work = torch.empty_like(x), 2 * size**3

    def product() -> Any:
        return torch.mm(x, w, out=y)

    def several() -> None:
        for _ in range(at_once):
            product()

    burst = work / clock.device_only([product] * 10)
    # the clocks of a card fall when it is hot: what comes first is left out, then all is counted
    began, count, counted_from = time.perf_counter(), 0, 0.0
    while (now := time.perf_counter() - began) < seconds:
        clock.wall(several)
        count += at_once
        if now < seconds / 6:
            counted_from, count = time.perf_counter(), 0
    sustained = work * count / (time.perf_counter() - counted_from)
    return {"gemm_tflops": sustained / 1e12, "gemm_burst_tflops": burst / 1e12}


def copies(clock: Clock, *, tiny: bool) -> dict[str, float]:
    """Inside the device's memory, read and written counted; over the bus from pinned memory."""
    import torch

    from gpu.clock import room

    size = 16 << 20 if tiny else min(2 << 30, room(clock.device) // 8)
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    copy = 2 * size / clock.device_only([lambda: target.copy_(source)])
    if not clock.on_gpu:
        return {"copy_gb_s": copy / 1e9}
    size = min(512 << 20, size)
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    there, back = target[:size], source[:size]
    h2d = clock.eager([lambda: there.copy_(host, non_blocking=True)])
    d2h = clock.eager([lambda: host.copy_(back, non_blocking=True)])
    return {
        "copy_gb_s": copy / 1e9,
        "h2d_gb_s": size / h2d / 1e9,
        "d2h_gb_s": size / d2h / 1e9,
    }


def launch_seconds(clock: Clock) -> float:
    """Of an operation that does next to nothing, one after another."""
    import torch

    few, calls = torch.zeros(8, device=clock.device), 2000

    def many() -> None:
        for _ in range(calls):
            few.add_(1)

    many()
    return clock.wall(many) / calls
