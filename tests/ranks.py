"""Several processes on this machine, as torchrun would start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from commands import ENVIRONMENT

HERE = Path(__file__).parent
WORKER = HERE / "worker.py"
SABOTEUR = HERE / "saboteur.py"


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start_ranks(
    commands: Sequence[Sequence[str | Path]], **environment: str
) -> list[subprocess.Popen[str]]:
    """One process for each command (the arguments of Python), by rank."""
    common = {
        **os.environ,
        **ENVIRONMENT,
        **environment,
        "WORLD_SIZE": str(len(commands)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, command in enumerate(commands)
    ]


def ended(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and stderr of each, by rank."""
    found = [(process.communicate(timeout=300)[1], process.returncode) for process in processes]
    return [(code, errors) for errors, code in found]


def train_on(size: int, *configs: Path, **environment: str) -> None:
    """Trains these runs one after another on ``size`` processes."""
    for code, errors in ended(start_ranks([[WORKER, *configs]] * size, **environment)):
        assert code == 0, errors


def torchrun(
    size: int, *arguments: str | Path, restarts: int = 0, **environment: str
) -> subprocess.Popen[str]:
    """Starts ``torchrun`` with a Python script and its arguments."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nproc-per-node", str(size), "--max-restarts", str(restarts)),
            *("--master-port", str(free_port())),
            *map(str, arguments),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ENVIRONMENT, **environment},
    )


def error_lines(text: str) -> list[str]:
    """The lines of stderr that tell an error of ours."""
    return [line for line in text.splitlines() if "error[" in line]
