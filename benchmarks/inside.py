"""What happens inside a measured process, whatever the device: its JSON objects, its adapters."""

from __future__ import annotations

import importlib
import json
import logging
import warnings
import zlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


class Skipped(Exception):
    """This side cannot run here."""


def quiet() -> None:
    """Libraries keep their advice to themselves."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def emit(values: dict[str, Any]) -> None:
    """A result, on a line of its own."""
    print("\n" + json.dumps(values), flush=True)


def imported(name: str) -> ModuleType:
    """An optional peer.

    Raises:
        Skipped: it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError, NotImplementedError) as error:
        gist = next(iter(str(error).splitlines()), type(error).__name__)
        raise Skipped(f"{name} cannot be imported ({gist})") from error


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
        parameter.data = values.to(parameter.device, parameter.dtype)


def random_ids(vocabulary: int, rows: int, length: int) -> Tensor:
    """``[rows, length]`` ids, the same every time."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, vocabulary, (rows, length), generator=generator)


def paths(model: nn.Module) -> dict[str, int]:
    """Layers by the path they take through our code; ``unknown`` where it does not say."""
    try:
        module = importlib.import_module("fourbit.fused")
    except ModuleNotFoundError:
        return {"unknown": 1}
    return dict(module.paths(model))
