"""The receipt inside transformers' Trainer (and TRL's, which is one)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fourbit.files import replace_file, valid_json
from fourbit.receipt import Receipt, Watch


class ReceiptCallback(TrainerCallback):
    """Watches a Trainer's run; afterwards `receipt` holds the checks.

    >>> callback = fourbit.ReceiptCallback()
    >>> Trainer(..., callbacks=[callback]).train()
    >>> callback.receipt.ok

    ``receipt.json`` is written to the trainer's ``output_dir``. A run that fails a check raises
    at its end, one whose gradients do not flow at its second step.
    """

    def __init__(self) -> None:
        self.receipt: Receipt | None = None
        self._watch: Watch | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hashes the frozen base and starts to observe."""
        model, optimizer = kwargs.get("model"), kwargs.get("optimizer")
        assert isinstance(model, nn.Module)
        # accelerate wraps the optimizer; the hooks belong on torch's own.
        inner = getattr(optimizer, "optimizer", optimizer)
        assert isinstance(inner, torch.optim.Optimizer)
        self._watch = Watch(model, inner, where=str(args.output_dir))
        self._watch.start()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes the receipt.

        Raises:
            VerificationFailed: a check does not hold.
        """
        assert self._watch is not None
        logged = [float(entry["loss"]) for entry in state.log_history if "loss" in entry]
        if logged:
            # With accumulated gradients the model's own loss is only a share of the step's.
            self._watch.losses = [logged[0], *logged[1:][-1:]]
        self.receipt = self._watch.finish(save_dtype=torch.float32)
        folder = Path(str(args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        text = valid_json(self.receipt.as_dict(), indent=2)
        replace_file(folder / "receipt.json", text.encode())
        self.receipt.require(where=str(args.output_dir))
