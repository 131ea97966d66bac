"""A run's own base: the model in 4 bits, its scales and codes chosen for the run's inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fourbit.errors import InputError
from fourbit.files import human_bytes
from fourbit.rundir import BASE, CALIBRATION
from fourbit.training.child import quantize_words, run_command
from fourbit.training.config import TrainConfig
from fourbit.training.progress import Reporter

TRAINING_DATA = "data"
"""What `quant.calibrate` calls the run's own texts."""
_LEAST = 1024


def calibrated_base(
    config: TrainConfig, ids: NDArray[np.int32], run: Path, say: Reporter, *, revision: str | None
) -> None:
    """Makes the folder of the calibrated model unless it is there.

    In a process of its own: the memory of quantizing is not the run's, and an interrupted one goes
    on where it stopped.

    Args:
        config: the run; ``quant.calibrate`` says on what.
        ids: token ids of the training data.
        run: its directory.
        say: is told what happens.
        revision: of a hub model.

    Raises:
        InputError: too little text.
        FourbitError: as `fourbit.quantizing.quantize_checkpoint`.
    """
    base, quant = run / BASE, config.quant
    if (base / "config.json").is_file():
        say.line(f"the base is {base}, calibrated before")
        return
    text = Path(str(quant.calibrate))
    own = quant.calibrate == TRAINING_DATA
    if own:
        if len(ids) < _LEAST:
            raise InputError(
                "too-little-text",
                where="quant.calibrate",
                what=f"the training data holds {len(ids)} tokens, calibration needs {_LEAST}",
                fix="name a larger file of text, or leave it out",
            )
        text = run / CALIBRATION
        np.save(text, ids)
    say.line(f"calibrating the base on {'the training data' if own else text}")
    words = quantize_words(config, base, revision)
    told = run_command(*words, "--calibrate", text, "--json", where=str(run))
    if own:
        text.unlink()
    found = told["calibration"]
    say.line(
        f"calibrated on {found['tokens']:,} tokens: loss on text held out of it"
        f" {found['loss_held_out_before']:.4f} -> {found['loss_held_out_after']:.4f};"
        f" {human_bytes(told['bytes_out'])} in {base}"
    )
