"""What happens inside a measured process: memory marks, times, its one JSON object."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import protocol as _protocol  # which makes what all benchmarks share importable
import torch
from torch import Tensor

from inside import Skipped, imported, quiet, random_ids
from inside import emit as emit
from inside import paths as paths
from inside import seed_adapter as seed_adapter

del _protocol


def begin(spec: dict[str, Any]) -> None:
    """Threads, a seed, and quiet."""
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    quiet()


def skip(reason: str) -> None:
    """Ends the child: this side cannot run here."""
    emit({"skipped": reason})
    sys.exit(0)


def peer(name: str) -> ModuleType:
    """An optional peer; the side is skipped where it cannot be imported."""
    try:
        return imported(name)
    except Skipped as reason:
        skip(str(reason))
        raise


def status_mb(key: str) -> float:
    """VmRSS or VmHWM of this process, in MB (10^6 bytes)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise LookupError(key)


def settle_memory() -> None:
    """Collects garbage and hands freed heap back, so that a peak is of what is in use."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class Memory:
    """Marks of one process: after its imports, ready to work, and the peak of the work."""

    def __init__(self) -> None:
        self.imports = status_mb("VmRSS")
        self.ready = 0.0

    def start(self) -> None:
        """Here the timed part begins: VmHWM restarts from what is resident now."""
        settle_memory()
        Path("/proc/self/clear_refs").write_text("5")
        self.ready = status_mb("VmRSS")

    def values(self) -> dict[str, float]:
        """``peak_mb`` covers everything since `start`."""
        return {
            "peak_mb": round(status_mb("VmHWM"), 1),
            "ready_mb": round(self.ready, 1),
            "imports_mb": round(self.imports, 1),
        }


def seconds(function: Callable[[], Any]) -> float:
    """Wall-clock time of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def median_seconds(function: Callable[[], Any], *, repeats: int, warmup: int = 1) -> float:
    """The median of several calls."""
    for _ in range(warmup):
        function()
    return statistics.median(seconds(function) for _ in range(repeats))


def tokens(spec: dict[str, Any], rows: int, length: int) -> Tensor:
    """``[rows, length]`` ids: the prepared text again and again, or random ids."""
    if spec.get("ids"):
        text = torch.load(spec["ids"])
        need = rows * length
        return text.repeat(-(-need // text.numel()))[:need].view(rows, length)
    return random_ids(spec["vocabulary"], rows, length)
