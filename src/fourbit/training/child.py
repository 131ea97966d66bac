"""A command of ours in a process of its own: its memory is its own, and all of it goes with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from fourbit.errors import FourbitError, Interrupted, Preempted
from fourbit.training.config import TrainConfig

_TORCHRUN = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK"}
_STOPPED = (75, 130, -signal.SIGTERM, -signal.SIGINT)


class ChildFailed(FourbitError):
    """What the command said of itself, with its exit code."""


def run_command(*words: object, where: str) -> dict[str, Any]:
    """What a command prints as JSON; its progress goes to our stderr.

    Args:
        words: of the command, ``--json`` among them.
        where: is named when it was stopped.

    Raises:
        ChildFailed: it ended with an error.
        Interrupted, Preempted: it was stopped, or we were, which stops it.
    """
    command = [sys.executable, "-m", "fourbit", *map(str, words)]
    # it is none of the processes that torchrun started
    alone = {name: value for name, value in os.environ.items() if name not in _TORCHRUN}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=alone) as child:
        try:
            out, _ = child.communicate()
        except BaseException:
            child.send_signal(signal.SIGTERM)
            child.wait()
            raise
    if child.returncode in _STOPPED:
        kind = Interrupted if child.returncode in (130, -signal.SIGINT) else Preempted
        raise kind(
            "interrupted",
            where=where,
            what="stopped; what is finished stays",
            fix="the same command goes on",
        )
    try:
        told = json.loads(out.strip().splitlines()[-1])
    except (ValueError, IndexError):
        told = {}
    if child.returncode or "error" in told:
        raise _failed(child.returncode, told.get("error") or {})
    return told


def quantize_words(config: TrainConfig, output: Path, revision: str | None) -> list[object]:
    """The command that writes a run's base as the run would hold it.

    Args:
        config: of the run.
        output: folder to be made.
        revision: of a hub model.
    """
    quant = config.quant
    words: list[object] = ["quantize", config.model, "-o", output, "--quant", quant.quant_type]
    words += [] if revision is None else ["--revision", revision]
    if not quant.is_int8:
        words += ["--blocksize", quant.blocksize]
        words += [] if quant.double_quant else ["--no-double-quant"]
    words += ["--allow-unquantized"] if quant.allow_unquantized else []
    return words


def _failed(code: int, error: dict[str, Any]) -> ChildFailed:
    failed = ChildFailed(
        str(error.get("code", "ended")),
        where=str(error.get("where", "the command")),
        what=str(error.get("what", f"ended with exit code {code}")),
        fix=str(error.get("fix", "")),
    )
    failed.exit_code = code or 1
    failed.told = bool(error)
    return failed
