"""The loop: micro-batches, one update, evidence, checkpoints. Short, so that it can be read.

Everything a step does is a function of (seed, step): the order of samples, their packing, the
dropout masks. A resumed run therefore needs no random state, only the number of the step.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from fourbit import device as devices
from fourbit.data import Batch, BatchPlan, Dataset, collate
from fourbit.distributed import is_shard, local, shard_of, whole, whole_of
from fourbit.errors import EnvironmentFault, NumericStop
from fourbit.files import human_bytes
from fourbit.fused import paths
from fourbit.fused.scratch import SCRATCH
from fourbit.objective import Objective
from fourbit.ops import dropout_after
from fourbit.optim import AdamW, lr_factors
from fourbit.receipt import Watch
from fourbit.training.config import TrainConfig
from fourbit.training.exchange import Exchange

_MAX_NONFINITE = 3
_MIN_SCALE = 1.0
_PACK_MULTIPLE = 64
_Result = TypeVar("_Result")


@dataclass
class LoopState:
    """Where a run stands; JSON-ready, part of every checkpoint.

    Attributes:
        max_positions: most positions that go through the model at once, since memory ran out.
        recompute: whether activations are recomputed since then.
        offload: whether those between layers wait in host memory since then.
        memory_events: how often memory ran out.
    """

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    nonfinite: int = 0
    nonfinite_total: int = 0
    best_eval: float | None = None
    best_step: int | None = None
    worse_evals: int = 0
    max_positions: int | None = None
    recompute: bool = False
    offload: bool = False
    memory_events: int = 0
    pending_eval: bool = False
    eval_loss_before: float | None = None
    samples_before: list[dict[str, str]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoopState:
        """From the checkpoint; keys of other versions are left out."""
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})


@dataclass(frozen=True)
class StepPlan:
    """Which micro-batches make up each step: ``(epoch, first, last)`` by step number from 1.

    The last step of an epoch may have fewer micro-batches; nothing is dropped.
    """

    batches: BatchPlan
    grad_accum: int
    epochs: float
    max_steps: int | None
    _counts: dict[int, int] = field(default_factory=dict)

    def _steps_of(self, epoch: int) -> int:
        # An epoch's packing is only made again when its batches are needed.
        if epoch not in self._counts:
            micro_batches = self.batches.micro_batches_per_epoch(epoch)
            self._counts[epoch] = math.ceil(micro_batches / self.grad_accum)
        return self._counts[epoch]

    def total(self) -> int:
        """Steps of the whole run."""
        if self.max_steps is not None:
            return self.max_steps
        whole = math.floor(self.epochs)
        steps = sum(self._steps_of(epoch) for epoch in range(whole))
        rest = self.epochs - whole
        if rest > 0:
            steps += max(1, round(rest * self._steps_of(whole)))
        return steps

    def walk(self, done: int, total: int) -> Iterator[tuple[int, int, list[Any]]]:
        """``(step, epoch, micro-batches)`` for the steps after ``done``."""
        step = epoch = 0
        while step < total:
            count = self._steps_of(epoch)
            if step + count > done:
                for index in range(max(0, done - step), min(count, total - step)):
                    first = index * self.grad_accum
                    micro = self.batches.epoch(epoch)[first : first + self.grad_accum]
                    yield step + index + 1, epoch, micro
            step += count
            epoch += 1

    def epoch_at(self, step: int, epoch: int) -> float:
        """Epochs done after ``step``, for people."""
        before = sum(self._steps_of(e) for e in range(epoch))
        return epoch + (step - before) / self._steps_of(epoch)


@dataclass(frozen=True)
class StepResult:
    """One step as it is written to ``metrics.jsonl``.

    ``positions`` counts padding too; ``update_seconds`` are those of the optimizer;
    ``memory_bytes`` is the highest of the step; ``updated`` is False for a skipped update;
    ``paths`` counts the decoder layers by how their last forward was computed
    (`fourbit.fused.paths`).
    """

    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    positions: int
    tokens_per_second: float
    seconds: float
    update_seconds: float
    memory_bytes: int | None
    updated: bool
    paths: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """One line of metrics."""
        return asdict(self)


class TrainLoop:
    """Runs steps; knows nothing of files.

    Args:
        config: the run.
        objective: model and loss.
        dataset: training samples.
        batches: which samples go where.
        optimizer: over the trainable parameters.
        watch: gathers the receipt's evidence.
        pad_id: token id that fills sequences; it carries no loss.

    Attributes:
        exchange: deals micro-batches to the processes, where there are several.
        note: is told, in a line, what was done when memory ran out.
        peak: highest memory in bytes of all that was done between two steps; None where unknown.
    """

    note: Callable[[str], None] = staticmethod(lambda line: None)

    def __init__(
        self,
        config: TrainConfig,
        *,
        objective: Objective,
        dataset: Dataset,
        batches: BatchPlan,
        optimizer: AdamW,
        watch: Watch,
        pad_id: int,
    ) -> None:
        self.config, self.objective, self.dataset = config, objective, dataset
        self.optimizer, self.watch, self.pad_id = optimizer, watch, pad_id
        self._evicted_at = -1
        self.peak: int | None = None
        self.plan = StepPlan(batches, config.grad_accum, config.epochs, config.max_steps)
        self.total_steps = self.plan.total()
        self.state = LoopState()
        self.parameters = [p for g in optimizer.param_groups for p in g["params"]]
        self.exchange = Exchange(self.parameters)
        self._lr_factor = lr_factors(config.optim, total_steps=self.total_steps)
        fp16 = objective.base.dtype == torch.float16 or objective.autocast_dtype == torch.float16
        self.scaler = torch.amp.GradScaler(objective.device.type, enabled=fp16)
        self.last_rows: list[str] = []

    def steps(self) -> Iterator[StepResult]:
        """Trains; yields after every step, at a moment when a checkpoint may be taken."""
        self.objective.model.train()
        for step, epoch, micro in self.plan.walk(self.state.step, self.total_steps):
            yield self._step(step, epoch, micro)
            # An evaluation between two steps leaves the model in eval mode.
            self.objective.model.train()

    def rehearse(self) -> int | None:
        """Runs the longest batch once, as a step and as an evaluation would; nothing is changed.

        The optimizer's state takes its memory. Where memory runs out, room is made as in a step,
        and what was given up for it stays given up.

        Returns:
            The highest memory in bytes, as `peak_memory` says it; None where unknown.

        Raises:
            EnvironmentFault: nothing is left to give up.
        """
        batches = self.plan.batches.epoch(0)
        longest = max(batches, key=self._positions)
        batch = self._collate(self.dataset, longest)
        random = torch.get_rng_state()
        self.objective.model.train()
        devices.reset_peak_memory(self.objective.device)
        self._surviving("rehearsal", [batch], self.optimizer.reserve)
        # the second micro-batch of a step runs beside the gradients of the first
        count = min(2 * self.exchange.ranks.size, self.config.grad_accum)
        self._backward(0, [batch] * count, batch.num_supervised)
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.model.eval()
        with torch.no_grad():
            self._surviving("rehearsal", [batch], partial(self._loss_sum, batch))
        torch.set_rng_state(random)
        return devices.peak_memory(self.objective.device)

    def _positions(self, micro: Any) -> int:
        return len(micro) * max(sum(int(self.dataset.lengths[i]) for i in pack) for pack in micro)

    def _step(self, step: int, epoch: int, micro: list[Any]) -> StepResult:
        began = time.perf_counter()
        self.take_peak()
        batches = [self._collate(self.dataset, m) for m in micro]
        supervised = sum(batch.num_supervised for batch in batches)
        tokens = sum(int(self.dataset.lengths[i]) for m in micro for pack in m for i in pack)
        # The schedule counts from 0; its very first rate of a warm-up would be zero.
        lr = self.config.optim.lr * self._lr_factor(step if self._warming(step) else step - 1)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss, grad_norm = self._backward(step, batches, supervised)
        computed = time.perf_counter()
        updated = self._update(step, loss, grad_norm, batches)
        ended = time.perf_counter()
        seconds = ended - began
        self.state.step = step
        self.state.tokens += tokens
        self.state.supervised_tokens += supervised
        self.state.seconds += seconds
        return StepResult(
            step=step,
            epoch=round(self.plan.epoch_at(step, epoch), 4),
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens=tokens,
            supervised_tokens=supervised,
            positions=sum(batch.input_ids.numel() for batch in batches),
            tokens_per_second=round(tokens / seconds, 2),
            seconds=round(seconds, 4),
            update_seconds=round(ended - computed, 4),
            memory_bytes=devices.peak_memory(self.objective.device),
            updated=updated,
            paths=paths(self.objective.model),
        )

    def take_peak(self) -> None:
        """Adds what was reached since the last call to ``peak``, and measures anew."""
        reached = devices.peak_memory(self.objective.device)
        if reached is not None:
            self.peak = max(reached, self.peak or 0)
        devices.reset_peak_memory(self.objective.device)

    def _collate(self, dataset: Dataset, micro: Any) -> Batch:
        # Packs are nearly full: rounded up they all have one length, so the CPU's matrix library
        # prepares its products once, and freed blocks are used again.
        multiple = _PACK_MULTIPLE if self.config.data.packing else 1
        return collate(dataset, micro, pad_id=self.pad_id, pad_to_multiple=multiple)

    def _warming(self, step: int) -> bool:
        return step <= round(self.config.optim.warmup_ratio * self.total_steps)

    def _backward(self, step: int, batches: list[Batch], supervised: int) -> tuple[float, float]:
        """Clipped gradients of the mean loss over the step's supervised tokens.

        Divided by the tokens of the whole step, not of each micro-batch, so that accumulation
        equals one big batch.

        Returns:
            That mean, and the norm of the gradients before they were clipped.
        """

        def micro_batch(index: int) -> Tensor:
            # a tensor, so that a GPU's queue does not run dry between micro-batches
            found = torch.zeros((), dtype=torch.float64, device=self.objective.device)
            for before, part in self._parts(batches[index]):
                torch.manual_seed(_mix(self.config.seed, step, index))
                # in one thread: buffers for weights are a thread's own
                with dropout_after(before), torch.autograd.set_multithreading_enabled(False):
                    loss_sum = self.objective.loss_sum(part)
                    self.scaler.scale(loss_sum / max(supervised, 1)).backward()
                found += loss_sum.detach()
            return found

        where = f"step {step}" if step else "rehearsal"
        self.exchange.ranks.phase(where)

        def survived(index: int) -> Tensor:
            # of several processes only this one ran out of memory; the others wait for it
            return self._surviving(where, [batches[index]], partial(micro_batch, index))

        def gradients() -> tuple[float, float]:
            self.optimizer.zero_grad(set_to_none=True)
            alone = self.exchange.ranks.alone
            compute = micro_batch if alone else survived
            total = 0.0
            for loss in self.exchange.gradients(len(batches), compute):
                total += float(loss)
            return total / max(supervised, 1), self._clip()

        if not self.exchange.ranks.alone:
            return gradients()
        return self._surviving(where, batches, gradients)

    def _parts(self, batch: Batch) -> Iterator[tuple[int, Batch]]:
        """The batch in as few parts as memory allows, and the positions before each."""
        rows, length = batch.input_ids.shape
        limit = self.state.max_positions
        count = rows if limit is None else max(1, limit // length)
        for first in range(0, rows, count):
            yield first * length, batch.part(first, first + count)

    def _surviving(self, where: str, batches: list[Batch], work: Callable[[], _Result]) -> _Result:
        """Does ``work``, again from its beginning whenever memory runs out."""
        while True:
            try:
                return work()
            except (MemoryError, RuntimeError, OSError) as error:
                if not devices.is_out_of_memory(error):
                    raise
                if self.exchange.divided:
                    raise _unsplittable(where) from error
            # Here, and not in the handler: what it handles holds the activations.
            self._make_room(where, batches)

    def _make_room(self, where: str, batches: list[Batch]) -> None:
        """Evicts the optimizer's pages, halves what goes through the model, recomputes, offloads.

        Raises:
            EnvironmentFault: nothing is left to give up.
        """
        state = self.state
        state.memory_events += 1
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler.is_enabled():
            self.scaler.update(self.scaler.get_scale())  # forgets that it unscaled gradients
        SCRATCH.release()
        devices.release_memory()
        if self._evicted_at != state.step and (freed := self.optimizer.evict()):
            self._evicted_at = state.step
            self.note(f"{where}: out of memory; {human_bytes(freed)} of optimizer state paged out")
            return
        largest = max(part.input_ids.numel() for b in batches for _, part in self._parts(b))
        longest = max(batch.input_ids.shape[1] for batch in batches)
        if largest > longest:
            state.max_positions = max(longest, largest // 2)
            self.note(
                f"{where}: out of memory; from now on micro-batches go through the model in parts"
                f" of at most {state.max_positions:,} positions"
            )
        elif not state.recompute and self.objective.recompute_activations():
            state.recompute = True
            self.note(f"{where}: out of memory; from now on activations are recomputed")
        elif not state.offload and self.objective.offload_to_host():
            state.offload = True
            self.note(
                f"{where}: out of memory; from now on what lies between layers waits in host memory"
            )
        else:
            raise EnvironmentFault(
                "out-of-memory",
                where=where,
                what=f"one sequence of {longest:,} positions does not fit into memory",
                fix="lower data.max_length, lora.r or what else runs on this machine; checkpoints"
                " are intact: --resume auto goes on",
            )

    def _clip(self) -> float:
        self.scaler.unscale_(self.optimizer)
        limit = self.config.optim.max_grad_norm or math.inf
        if not self.exchange.divided:
            return float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        # one whole gradient after another, so that the norm is the same as in one process
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norms = [torch.linalg.vector_norm(whole(grad)) for grad in grads]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        parts = [_with_own_gradient(p) for p in self.parameters if p.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(parts, limit, norm)
        return float(norm)

    def _update(self, step: int, loss: float, grad_norm: float, batches: list[Batch]) -> bool:
        self.last_rows = [str(row) for batch in batches for row in batch.rows]
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        # With a scaler an infinite gradient is how it finds its scale, not an accident.
        scaler_skip = self.scaler.is_enabled() and math.isfinite(loss) and not finite
        if finite or scaler_skip:
            self._apply(step)
            self.scaler.update()
        elif self.scaler.is_enabled():
            self.scaler.update(self.scaler.get_scale() / 2)
        self.optimizer.zero_grad(set_to_none=True)
        if finite:
            self.watch.observe(loss=loss, supervised=sum(b.num_supervised for b in batches))
            self.state.nonfinite = 0
            return True
        self._count_nonfinite(step, loss, scaler_skip)
        return False

    def _apply(self, step: int) -> None:
        """The update. What memory runs out in is half of one, so nothing is tried again."""
        try:
            self.scaler.step(self.optimizer)
        except (MemoryError, RuntimeError, OSError) as error:
            if not devices.is_out_of_memory(error):
                raise
            raise EnvironmentFault(
                "out-of-memory",
                where=f"step {step}",
                what="memory ran out while the update was applied",
                fix="free memory, or set optim.paged: always; checkpoints are intact: --resume auto"
                " goes on from the last one",
            ) from error

    def _count_nonfinite(self, step: int, loss: float, scaler_skip: bool) -> None:
        self.state.nonfinite_total += 1
        if scaler_skip:
            if self.scaler.get_scale() < _MIN_SCALE:
                raise NumericStop(
                    "scale-collapsed",
                    where=f"step {step}",
                    what="fp16 gradients overflow at every loss scale",
                    fix="use precision: bf16 or fp32, or a smaller optim.lr",
                )
            return
        self.state.nonfinite += 1
        if self.state.nonfinite >= _MAX_NONFINITE:
            kind = "loss" if not math.isfinite(loss) else "gradient"
            raise NumericStop(
                "nonfinite",
                where=f"step {step}",
                what=f"the {kind} was NaN or Inf in {_MAX_NONFINITE} steps one after another,"
                f" last with {', '.join(self.last_rows[:4])}",
                fix="lower optim.lr, use precision: fp32, or look at those rows",
            )

    @torch.no_grad()
    def evaluate(
        self, dataset: Dataset, batches: BatchPlan, *, stop: Callable[[], bool] = lambda: False
    ) -> float | None:
        """Mean loss per supervised token; None when ``stop`` asked to break off."""
        model = self.objective.model
        model.eval()
        micro = batches.epoch(0)

        def compute(index: int) -> float:
            batch = self._collate(dataset, micro[index])
            return self._surviving("evaluation", [batch], partial(self._loss_sum, batch))

        losses = self.exchange.losses(len(micro), compute, stop=stop)
        if losses is None:
            return None
        total = 0.0
        for loss in losses:
            total += loss
        # a sample's first token is nobody's successor
        indices = (index for packs in micro for pack in packs for index in pack)
        supervised = sum(int(dataset[index].supervised[1:].sum()) for index in indices)
        return total / max(supervised, 1)

    def _loss_sum(self, batch: Batch) -> float:
        return sum(float(self.objective.loss_sum(part)) for _, part in self._parts(batch))

    def optimizer_state(self) -> Mapping[str, Tensor]:
        """Moments by parameter name, for a checkpoint; each is gathered when it is asked for."""
        return _Moments(self.optimizer, self.objective.model)

    def restore_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `optimizer_state` gave, one parameter at a time."""
        parts: dict[str, list[str]] = {}
        for key in tensors:
            name, _, part = key.rpartition(".")
            parts.setdefault(name, []).append(part)
        by_name = dict(self.objective.model.named_parameters())
        for name, found in parts.items():
            state = {part: tensors[f"{name}.{part}"] for part in found}
            parameter = by_name[name]
            if is_shard(parameter):
                state |= {
                    part: shard_of(parameter, value)
                    for part, value in state.items()
                    if value.shape == parameter.shape
                }
            self.optimizer.restore(parameter, state)


class _Moments(Mapping[str, Tensor]):
    """The optimizer's state by ``parameter.part``, one parameter in memory at a time."""

    def __init__(self, optimizer: AdamW, model: torch.nn.Module) -> None:
        names = {id(p): name for name, p in model.named_parameters()}
        self._optimizer = optimizer
        self._owners: dict[str, tuple[Tensor, str]] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                for part in optimizer.parts_of(parameter):
                    self._owners[f"{names[id(parameter)]}.{part}"] = (parameter, part)
        self._last: tuple[Tensor, dict[str, Tensor]] | None = None

    def __getitem__(self, name: str) -> Tensor:
        parameter, part = self._owners[name]
        if self._last is None or self._last[0] is not parameter:
            self._last = parameter, self._optimizer.state_of(parameter)
        value = self._last[1][part]
        if value.shape == local(parameter).shape:
            value = whole_of(parameter, value)
        return value.reshape(-1) if value.dim() == 0 else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)

    def __len__(self) -> int:
        return len(self._owners)


def _with_own_gradient(parameter: Tensor) -> Tensor:
    """The parameter, of a divided one this process's part with its part of the gradient."""
    if not is_shard(parameter):
        return parameter
    assert parameter.grad is not None
    part = local(parameter)
    part.grad = local(parameter.grad)
    return part


def _unsplittable(where: str) -> EnvironmentFault:
    return EnvironmentFault(
        "out-of-memory",
        where=where,
        what="memory ran out, and micro-batches of divided layers are not split",
        fix="lower batch_size or data.max_length, or set gradient_checkpointing: all; checkpoints"
        " are intact: --resume auto goes on",
    )


def _mix(seed: int, step: int, index: int) -> int:
    """A seed for one micro-batch: the same on every machine and after every resume."""
    digest = hashlib.sha256(f"{seed}/{step}/{index}".encode()).digest()
    return int.from_bytes(digest[:7], "little")
