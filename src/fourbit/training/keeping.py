"""The checkpoints of a run: what is in one, who writes it, and going on from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fourbit import __version__, checkpoint
from fourbit.distributed import whole
from fourbit.errors import EnvironmentFault, VerificationFailed
from fourbit.methods import trains_prompt
from fourbit.receipt import Watch, combined_digest, tensor_digest
from fourbit.rundir import RunDir
from fourbit.training.adapter import (
    ADAPTER_FILE,
    OPTIMIZER_FILE,
    restore_trainable,
    trainable_state,
)
from fourbit.training.loop import LoopState, TrainLoop
from fourbit.training.preparation import Preparation

_SAVE_FAILURES = 3
_WARN_ONLY = {"versions", "settings.optim.paged"}
_FREE_TO_CHANGE = {
    "output",
    "eval_every",
    "save_every",
    "save_total_limit",
    "samples",
    "report_to",
    "resume",
    "gradient_checkpointing",
    "budget",
    "rehearsal",
    "save_dtype",
    "keep_best",
    "early_stopping",
    "model",
    "revision",
    "parallel",
    "deterministic",
}
"""Settings that may differ on resume: they decide no bit of the adapter (the base is hashed)."""


class Keeper:
    """Saves and restores a loaded run.

    Args:
        ready: what was found before the model was loaded.
        folder: the run directory.
        model: with its trained parameters.
        loop: around it.
        watch: its evidence.
    """

    def __init__(
        self, ready: Preparation, folder: RunDir, model: nn.Module, loop: TrainLoop, watch: Watch
    ) -> None:
        self.config, self.ranks, self.say = ready.config, ready.ranks, ready.say
        self.ready, self.folder, self.model = ready, folder, model
        self.loop, self.watch = loop, watch
        self._failures = 0

    def _identity(self) -> dict[str, Any]:
        """What must be equal between a checkpoint and the run that resumes it."""
        settings = self.config.model_dump(mode="json")
        settings = {k: v for k, v in settings.items() if k not in _FREE_TO_CHANGE}
        settings.pop("data")  # its fingerprint covers contents and settings
        if not trains_prompt(self.config.method):
            settings.pop("prompt")  # runs of versions that had none can be resumed
        return {
            "settings": settings,
            "data": self.ready.data.fingerprint,
            "base": self.watch.state()["base_before"],
            "precision": str(self.ready.dtype),
            "versions": {"fourbit": __version__, "torch": torch.__version__},
        }

    def resume(self) -> bool:
        """Continues from a checkpoint; False when there is none to continue from."""
        if self.config.resume == "never":
            return False
        self.ranks.phase("resuming")
        saved = self._newest() if self.ranks.first else None
        step = self.ranks.shared(None if saved is None else saved.step)
        if step is None:
            return False
        self._restore(saved)
        dropped = self.folder.truncate_metrics(step)
        self.say.line(f"resumed at step {step} ({dropped} later lines of metrics dropped)")
        return True

    def _newest(self) -> checkpoint.Checkpoint | None:
        folder = self.folder.checkpoints_dir
        checkpoint.clean_staging(folder)
        if self.config.resume == "auto":
            path, skipped = checkpoint.newest(folder)
            for reason in skipped:
                self.say.warn(f"skipped a damaged checkpoint: {reason}")
        else:
            path = checkpoint.at_step(folder, step=int(self.config.resume))
        if path is None:
            self.say.line("no checkpoint to resume from: starting at step 0")
            return None
        saved = checkpoint.load(path, lazily={OPTIMIZER_FILE})
        warnings = checkpoint.require_same_identity(
            saved.identity, self._identity(), warn_only=_WARN_ONLY, where=str(path)
        )
        for text in warnings:
            self.say.warn(text)
        checkpoint.set_aside_after(folder, step=saved.step)
        return saved

    def _restore(self, saved: checkpoint.Checkpoint | None) -> None:
        """Takes over what the first process has read; the others may not see its disk."""
        documents = self.ranks.shared(None if saved is None else saved.documents)
        self._restore_adapter(saved)
        moments = None if saved is None else saved.tensors[OPTIMIZER_FILE]
        self.loop.restore_optimizer(self.ranks.shared_tensors(moments))
        self.loop.state = LoopState.from_dict(documents["state.json"])
        if self.loop.state.recompute:
            self.loop.objective.recompute_activations()
        if self.loop.state.offload:
            self.loop.objective.offload_to_host()
        self.loop.scaler.load_state_dict(documents["scaler.json"])
        self.watch.restore(documents["evidence.json"])

    def _restore_adapter(self, saved: checkpoint.Checkpoint | None) -> None:
        adapter = self.ranks.shared_tensors(None if saved is None else saved.tensors[ADAPTER_FILE])
        restore_trainable(self.model, dict(adapter.items()))

    def adapter(self) -> dict[str, Tensor]:
        """The trained parameters, whole in every process."""
        return {name: whole(tensor) for name, tensor in trainable_state(self.model).items()}

    def take_best(self, step: int) -> None:
        """Puts the adapter of the checkpoint of that step into the model."""
        saved = None
        if self.ranks.first:
            path = checkpoint.at_step(self.folder.checkpoints_dir, step=step)
            saved = checkpoint.load(path, lazily={OPTIMIZER_FILE})
        self._restore_adapter(saved)
        self.say.line(f"keeping the adapter of step {step}, the best evaluation")

    def save(self) -> bool:
        """A checkpoint of this moment; a full disk does not end the run."""
        state = self.loop.state
        self.ranks.phase(f"saving step {state.step}")
        adapter = self.adapter()
        self.require_same_adapter(adapter)
        failure: EnvironmentFault | None = None
        with self.ranks.asking(self.loop.optimizer_state(), divided=self.ready.divides) as moments:
            if self.ranks.first:
                failure = self._write_checkpoint(adapter, moments)
        told = self.ranks.shared(None if failure is None else failure.as_dict())
        if told is not None:
            self._failures += 1
            self.say.warn(f"checkpoint at step {state.step} not saved: {told['what']}")
            if self._failures >= _SAVE_FAILURES:
                raise failure or EnvironmentFault(**told)
            return False
        self._failures = 0
        if self.ranks.first:
            protect = {state.best_step} if self.config.keep_best and state.best_step else set()
            checkpoint.retain(
                self.folder.checkpoints_dir, limit=self.config.save_total_limit, protect=protect
            )
        return True

    def _write_checkpoint(
        self, adapter: Mapping[str, Tensor], moments: Mapping[str, Tensor]
    ) -> EnvironmentFault | None:
        """Writes and gives its name to what was written; the fault of the disk, if any."""
        try:
            checkpoint.save(
                self.folder.checkpoints_dir,
                step=self.loop.state.step,
                tensors={ADAPTER_FILE: adapter, OPTIMIZER_FILE: moments},
                documents={
                    "state.json": self.loop.state.as_dict(),
                    "scaler.json": self.loop.scaler.state_dict(),
                    "evidence.json": self.watch.state(),
                },
                identity=self._identity(),
                agree=self.ranks.require_all_there,
            )
        except EnvironmentFault as error:
            return error
        return None

    def require_same_adapter(self, adapter: Mapping[str, Tensor]) -> None:
        """What every process has trained is the same, or one of them computes wrongly."""
        if self.ranks.alone:
            return
        digests = {name: tensor_digest(tensor) for name, tensor in adapter.items()}
        everybody = self.ranks.gather(combined_digest(digests))
        for rank, theirs in enumerate(everybody):
            if theirs != everybody[0]:
                raise VerificationFailed(
                    "ranks-diverged",
                    where=f"rank {rank}, step {self.loop.state.step}",
                    what="its adapter is not that of rank 0",
                    fix="check that host's memory and processor; --resume auto goes on from the"
                    " last checkpoint",
                )
