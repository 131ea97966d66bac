"""What happens inside a measured process: memory marks, times, its one JSON object."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import logging
import statistics
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


def begin(spec: dict[str, Any]) -> None:
    """Threads, a seed, and quiet."""
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def emit(values: dict[str, Any]) -> None:
    """The result; the last line of stdout that begins with a brace."""
    print("\n" + json.dumps(values), flush=True)


def skip(reason: str) -> None:
    """Ends the child: this side cannot run here."""
    emit({"skipped": reason})
    sys.exit(0)


def peer(name: str) -> ModuleType:
    """An optional peer; the side is skipped where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        gist = next(iter(str(error).splitlines()), type(error).__name__)
        skip(f"{name} cannot be imported ({gist})")
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


def seed_adapter(model: nn.Module, *, std_b: float = 0.0) -> None:
    """The same adapter on every side: A as PEFT draws it, B zero or normal, by layer name."""
    for name, parameter in model.named_parameters():
        if "lora_A" not in name and "lora_B" not in name:
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        values = torch.empty(parameter.shape)
        if "lora_A" in name:
            bound = parameter.shape[1] ** -0.5
            values.uniform_(-bound, bound, generator=generator)
        else:
            values.normal_(0, 1, generator=generator).mul_(std_b)
        parameter.data = values.to(parameter.dtype)


def tokens(spec: dict[str, Any], rows: int, length: int) -> Tensor:
    """``[rows, length]`` ids: the prepared text again and again, or random ids."""
    if spec.get("ids"):
        text = torch.load(spec["ids"])
        need = rows * length
        return text.repeat(-(-need // text.numel()))[:need].view(rows, length)
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, spec["vocabulary"], (rows, length), generator=generator)


def paths(model: nn.Module) -> dict[str, int]:
    """Layers by the path they take through our code; ``unknown`` where it does not say."""
    try:
        module = importlib.import_module("fourbit.fused")
    except ModuleNotFoundError:
        return {"unknown": 1}
    return dict(module.paths(model))
