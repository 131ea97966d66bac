"""Trackers: the run's figures copied to TensorBoard or Weights & Biases; never in the way."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from fourbit.errors import EnvironmentFault

TrackerName = Literal["none", "tensorboard", "wandb"]
_MODULES = {"tensorboard": "tensorboard", "wandb": "wandb"}


def require_tracker(name: TrackerName) -> None:
    """Checks, before anything is loaded, that the tracker is installed.

    Raises:
        EnvironmentFault: it is not.
    """
    module = _MODULES.get(name)
    if module is not None and importlib.util.find_spec(module) is None:
        raise EnvironmentFault(
            "tracker-missing",
            where="report_to",
            what=f"{name} is not installed",
            fix=f"pip install 'fourbit[{name}]', or report_to: none",
        )


class Tracker:
    """Sends figures to one tracker; its first failure is told once, then it is left alone.

    Args:
        name: which one.
        folder: the run directory.
        config: the resolved configuration, secrets removed.
        warn: receives the one failure line.
    """

    def __init__(
        self,
        name: TrackerName,
        *,
        folder: Path,
        config: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self._name, self._warn = name, warn
        self._send: Callable[[dict[str, float], int], None] | None = None
        self._end: Callable[[], object] | None = None
        self._guarded(lambda: self._open(folder, config))

    def _open(self, folder: Path, config: Mapping[str, Any]) -> None:
        if self._name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder / "tensorboard"))

            def send(values: dict[str, float], step: int) -> None:
                for key, value in values.items():
                    writer.add_scalar(key, value, step)

            self._send, self._end = send, writer.close
        elif self._name == "wandb":
            import wandb  # type: ignore[import-not-found]

            run = wandb.init(name=folder.name, dir=str(folder), config=dict(config))
            self._send, self._end = (lambda values, step: run.log(values, step=step)), run.finish

    def log(self, values: Mapping[str, Any]) -> None:
        """Sends the numbers of one line of metrics."""
        if self._send is None:
            return
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, (int, float))}
        send, step = self._send, int(numbers.pop("step", 0))
        self._guarded(lambda: send(numbers, step))

    def close(self) -> None:
        """Flushes."""
        if self._end is not None:
            self._guarded(self._end)

    def _guarded(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001  # a tracker may fail in any way; training goes on
            self._send = self._end = None
            self._warn(f"{self._name} stopped taking figures ({error}); training goes on")
