"""Fixtures shared by all tests: seed, devices, poisoned memory, tiny model folders."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if "PYTEST_XDIST_WORKER" in os.environ:
    # as many processes as cores: more threads would only wait for each other, in children too
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device at hand, so that the suite tests a GPU's kernels where there is one."""
    return torch.device(request.param)


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory from ``torch.empty`` starts as NaN or 0xAA, so an element left unwritten shows."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            out = allocate(*args, **kwargs)
            if type(out) is not Tensor or out.is_meta:
                return out
            if out.is_floating_point():
                return out.fill_(float("nan"))
            return out.fill_(0xAA) if out.dtype == torch.uint8 else out

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``model_folder("llama")``: a folder with config, float32 safetensors and tokenizer."""
    from models import write_model

    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = write_model(tmp_path_factory.mktemp("models") / name, name)
        return made[name]

    return folder
