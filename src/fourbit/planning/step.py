"""Two imagined training steps: the code of the real ones, on tensors that have no memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from fourbit import native
from fourbit.fused.scratch import SCRATCH
from fourbit.integrations.attention import whole_rows
from fourbit.integrations.peft import base_model
from fourbit.integrations.prompts import prompted, with_prompt
from fourbit.integrations.transformers import (
    decoder_layers,
    disable_checkpointing,
    enable_checkpointing,
)
from fourbit.objective import Objective, mixed_precision
from fourbit.ops import triton
from fourbit.planning.ledger import Block, Ledger
from fourbit.planning.shape import Kernels, TrainingShape
from fourbit.planning.skeleton import MOST_RUN, Skeleton, pretend, shortened

MOVING = ("activations", "gradients", "logits", "workspace")
"""The parts of memory that come and go during a step."""


@dataclass
class Moment:
    """Bytes by part at one moment; the names are those of `MOVING`."""

    parts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MOVING, 0))

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())

    def beyond(self, other: Moment, times: int) -> Moment:
        """This one, and ``times`` times what it has more than ``other``."""
        return Moment({k: max(0, v + times * (v - other.parts[k])) for k, v in self.parts.items()})


Moments = dict[str, Moment]
"""The highest moments of stretches of time, by name."""


class ImaginedSteps:
    """Training steps of a model that has no memory; nothing is computed.

    Args:
        skeleton: its tensors become fake ones.
        shape: the run.
    """

    def __init__(self, skeleton: Skeleton, shape: TrainingShape) -> None:
        self._model, self._shape = skeleton.model, shape
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode, self._kernels():
            pretend(skeleton.model)
        self.layers, self.alike = skeleton.layers, skeleton.alike
        self._seen: dict[tuple[int, int], Moments] = {}

    def _kernels(self) -> AbstractContextManager[None]:
        return _serving(self._shape.kernels)

    def moments(self, recompute: int) -> Moments:
        """The highest moments of a first and of a later training step, and of an evaluation.

        Where all decoder layers are alike, few of them are run and the others follow: what is in
        memory grows by the same amount with each.

        Args:
            recompute: layers whose activations are computed again.
        """
        recompute = min(recompute, self.layers)
        plain = self.layers - recompute
        if not self.alike or self.layers <= MOST_RUN:
            return self._run(plain, recompute)
        few = min(plain, recompute)
        if few < 3:
            # up to two of one kind are run as they are, the others follow
            most = (3 if plain else 4) if few == 0 else MOST_RUN - few
            ends = [(few, n) if plain == few else (n, few) for n in (most - 1, most)]
            less, more = (self._run(*kinds) for kinds in ends)
            times = max(plain, recompute) - most
            return {name: more[name].beyond(less[name], times) for name in more}
        base, wide, deep = (self._run(*n) for n in ((2, 2), (3, 2), (2, 3)))
        found: Moments = {}
        for name, moment in base.items():
            across = wide[name].beyond(moment, plain - 3).parts
            down = deep[name].beyond(moment, recompute - 3).parts
            found[name] = Moment({k: across[k] + down[k] - moment.parts[k] for k in MOVING})
        return found

    def _run(self, plain: int, recompute: int) -> Moments:
        """All phases, with this many layers."""
        if (plain, recompute) not in self._seen:
            with (
                self._mode,
                self._kernels(),
                native.imagined(),
                nullcontext() if self._shape.packing else whole_rows(),
                shortened(self._model, plain + recompute),
            ):
                self._seen[plain, recompute] = observed(self._model, self._shape, recompute)
        return self._seen[plain, recompute]


@contextmanager
def _serving(kernels: Kernels) -> Iterator[None]:
    with (
        nullcontext() if kernels == "cpu" else native.using(None),
        triton.imagined() if kernels == "gpu" else nullcontext(),
    ):
        yield


def observed(model: nn.Module, shape: TrainingShape, recompute: int) -> Moments:
    """The highest moments of two steps and an evaluation of ``model``, which are run here.

    Args:
        model: in training mode, without gradients.
        shape: the run.
        recompute: layers whose activations are computed again.
    """
    base = base_model(model)
    if recompute:
        enable_checkpointing(base, layers=recompute)
    ledger = Ledger(inside=shape.kernels == "cpu")
    ledger.ignore([*model.parameters(), *model.buffers()])
    objective = Objective(model, mixed_precision(model, shape.dtype, shape.method))
    if shape.offload:
        objective.offload_activations()
    inputs, labels = _inputs(model, shape)
    trained = [p for p in model.parameters() if p.requires_grad]
    found: Moments = {}

    # Which stretch is highest depends on the number of layers; inside of one the highest moment
    # is the same whatever that number is.
    def note(name: str, ends: tuple[int, ...], part: Callable[[Block], str]) -> None:
        for number, (start, stop) in enumerate(pairwise(ends)):
            found[f"{name}, {number}"] = _highest(ledger, start, stop, part)

    def step(name: str) -> None:
        start = ledger.now
        with ledger.phase("loss"):
            loss = objective.loss_of(inputs(), labels)
        middle = ledger.now
        with ledger.phase("backward"):
            (loss / labels.numel()).backward()
        half = (middle + ledger.now) // 2
        ends = (start, ledger.left["forward"], middle, half, ledger.now)
        note(name, ends, _parts(ledger, trained, middle))

    with SCRATCH.aside(), ledger, _marked(base, ledger):
        step("first step")
        if shape.own_grad_accum > 1:
            step("later step")
        else:
            _repeat(found, "first step", "later step")
        _forget(trained)
        model.eval()
        start = ledger.now
        with torch.no_grad(), ledger.phase("loss"):
            objective.loss_of(inputs(), labels)
        note(
            "evaluation",
            (start, ledger.left["forward"], ledger.now),
            _parts(ledger, [], start),
        )
        model.train()
    if recompute:
        disable_checkpointing(base)
    return found


def _repeat(moments: Moments, name: str, again: str) -> None:
    copies = {again + key.removeprefix(name): m for key, m in moments.items()}
    moments.update(copies)


def _forget(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _inputs(
    model: nn.Module, shape: TrainingShape
) -> tuple[Callable[[], Mapping[str, Tensor]], Tensor]:
    ids = torch.zeros((shape.batch_size, shape.length), dtype=torch.long)
    wrapper = prompted(model)
    if wrapper is not None:
        return lambda: {"inputs_embeds": with_prompt(wrapper, ids)}, ids
    given = {"input_ids": ids}
    if shape.packing and Objective(model).separates_documents:
        given["position_ids"] = torch.zeros_like(ids)
    return lambda: given, ids


@contextmanager
def _marked(base: PreTrainedModel, ledger: Ledger) -> Iterator[None]:
    """Inside, what the backbone makes is told from what the head makes.

    So is what a layer makes, also where it makes it again in backward.
    """
    hooks = []
    for module, name in (
        (base.base_model, "forward"),
        *((layer, "layer") for layer in decoder_layers(base)),
    ):
        opened: list[AbstractContextManager[None]] = []

        def enter(*_: object, phase: str = name, opened: list[Any] = opened) -> None:
            opened.append(ledger.phase(phase))
            opened[-1].__enter__()

        def leave(*_: object, opened: list[Any] = opened) -> None:
            opened.pop().__exit__(None, None, None)

        hooks.append(module.register_forward_pre_hook(enter))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _parts(ledger: Ledger, trained: list[nn.Parameter], middle: int) -> Callable[[Block], str]:
    """Which part of memory a block is."""
    gradients = [ledger.block_of(p.grad) for p in trained if p.grad is not None]
    scratch = [ledger.block_of(buffer) for buffer in SCRATCH.buffers()]
    known = {id(block): "gradients" for block in gradients}
    known |= {id(block): "workspace" for block in scratch}

    def part(block: Block) -> str:
        if id(block) in known:
            return known[id(block)]
        if block.phase == "loss":
            return "logits"
        kept = block.made < middle and (block.gone is None or block.gone > middle)
        return "activations" if kept or block.phase == "layer" else "workspace"

    return part


def _highest(ledger: Ledger, start: int, stop: int, part: Callable[[Block], str]) -> Moment:
    """The moment between two events at which most bytes were in memory."""
    live = best = at = 0
    for index, (block, made) in enumerate(ledger.events[:stop]):
        live += block.size if made else -block.size
        if index >= start and live > best:
            best, at = live, index
    moment = Moment()
    for block in ledger.blocks:
        if block.made <= at and (block.gone is None or block.gone > at) and best:
            moment.parts[part(block)] += block.size
    return moment
