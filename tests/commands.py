"""Runs the command line as a user does: in a child process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

import fourbit as library
from fourbit.settings import load_settings
from fourbit.training.config import TrainConfig
from fourbit.training.progress import Reporter
from models import write_chats

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "fourbit", *map(str, arguments)]


def start(*arguments: str | Path, **keywords: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ENVIRONMENT},
        **keywords,
    )


def fourbit(*arguments: str | Path, **keywords: Any) -> subprocess.CompletedProcess[str]:
    process = start(*arguments, **keywords)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def train_quietly(folder: Path, model: Path, **changes: Any) -> Path:
    """Trains the run of `write_config` in this process; returns its directory."""
    config = write_config(folder, model, **changes)
    value = load_settings(TrainConfig, path=config).value
    library.train(value, reporter=Reporter(quiet=True))
    return folder / "run"


def write_config(folder: Path, model: Path, **changes: Any) -> Path:
    """A tiny run: 24 chats, several steps an epoch, accumulation, a partial last step."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model": str(model),
        "output": str(folder / "run"),
        "data": {
            "train": str(write_chats(folder / "chats.jsonl", 24)),
            "eval": 2,
            "max_length": 128,
        },
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
        "optim": {"lr": 1e-2},
        "precision": "fp32",
        "batch_size": 1,
        "grad_accum": 2,
        "epochs": 3,
        "eval_every": 4,
        "save_every": 2,
        "samples": 1,
        **changes,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
