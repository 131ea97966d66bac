"""Times on a device: CUDA events on a GPU, the wall clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], Any]


class Clock:
    """Measures on one device.

    Args:
        device: ``cuda`` or ``cpu``.

    Attributes:
        uncaptured: how often `device_only` had to measure what it could not capture as it comes.
    """

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self.on_gpu = self.device.type == "cuda"
        self.uncaptured = 0

    def wait(self) -> None:
        """Until the device has done all it was given."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def wall(self, call: Call) -> float:
        """Seconds until the device is done with one call, the host's own time included."""
        self.wait()
        began = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - began

    def eager(self, calls: Sequence[Call], *, repeats: int = 7, warmup: int = 2) -> float:
        """Median seconds of one of several calls made one after another, as a program makes them.

        What the host takes to launch is in it wherever the device has to wait for that.
        """
        return self._median(lambda: [call() for call in calls], repeats, warmup) / len(calls)

    def device_only(self, calls: Sequence[Call], *, repeats: int = 7, warmup: int = 2) -> float:
        """The same without the host: on a GPU the calls are replayed as one CUDA graph.

        Where they cannot be captured this is `eager`, and ``uncaptured`` counts it.
        """
        if not self.on_gpu:
            return self.eager(calls, repeats=repeats, warmup=warmup)
        try:
            graph = _captured(calls)
        except RuntimeError:
            self.wait()
            self.uncaptured += 1
            return self.eager(calls, repeats=repeats, warmup=warmup)
        return self._median(graph.replay, repeats, warmup) / len(calls)

    def _median(self, call: Call, repeats: int, warmup: int) -> float:
        for _ in range(warmup):
            call()
        self.wait()
        return statistics.median(self._once(call) for _ in range(repeats))

    def _once(self, call: Call) -> float:
        if not self.on_gpu:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def launches(self, call: Call) -> int | None:
        """Kernels and copies that one call starts on a GPU; None elsewhere."""
        if not self.on_gpu:
            return None
        from torch.profiler import ProfilerActivity, profile

        call()
        self.wait()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            call()
            self.wait()
        events = seen.events() or ()
        return sum(event.device_type.name == "CUDA" for event in events)


def _captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """One graph of all calls, which ran once before on another stream as capturing asks for."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(aside)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def room(device: torch.device) -> int:
    """Bytes that are free on a GPU; on a CPU what a trial may take."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 256 << 20
