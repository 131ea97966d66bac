"""What a run will need, before it runs: bytes by part and by phase, from shapes alone.

Weights, adapters and optimizer state are counted on a model built without data. What comes and
goes is seen on two imagined steps of that model (`fourbit.planning.step`): the layers' own code
runs, so what they allocate and what is planned cannot drift apart.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from fourbit import arena
from fourbit import device as devices
from fourbit.integrations.peft import base_model
from fourbit.integrations.transformers import decoder_layers
from fourbit.linear import packed_weights, parameter_counts
from fourbit.methods import quantized_base
from fourbit.optim import resident_bytes
from fourbit.planning.presets import Preset
from fourbit.planning.shape import TrainingShape
from fourbit.planning.skeleton import Skeleton, make_skeleton
from fourbit.planning.step import ImaginedSteps, Moment

PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "workspace")
_HOLES = {True: 0.02, False: 0.06}
"""Free room between blocks that no block fits into, as a share of what comes and goes: with
`fourbit.arena` and with glibc alone, whose share is larger still where layers are not fused."""
_RUNTIME = 70 << 20
"""Pages of the libraries, and small objects, that only a plan and a training touch; measured on
Linux."""
_CONTEXT = 500 << 20
"""What a graphics card's driver and libraries take before a model is there; an estimate."""
_GATHERED = 3
"""Whole layers at once where they are divided: in use, on its way, and the buffer it comes in."""
_RESERVE = 0.9
"""Share of the free memory a plan may use; the rest is for what no plan sees."""


@dataclass(frozen=True)
class Plan:
    """Bytes by part and phase.

    Attributes:
        parts: bytes at the highest moment of the run.
        phases: the same at the highest moment of each phase.
        available_bytes: memory of the device that is free now.
        recomputed_layers: decoder layers whose activations are computed again in backward.
        layers: decoder layers.
        paged: whether only some pages of the optimizer's state are in memory.
        trainable: trainable parameters.
        parameters: all parameters, unpacked.
        offload: whether what lies between recomputed layers waits elsewhere.
        recommended: settings, by their keys, that a budget asks to be others than was wished for.
        reasons: why, in lines.
        methods: the same run with full, LoRA and QLoRA, where they were compared.
        advice: which of them this memory suggests.
    """

    parts: dict[str, int]
    phases: dict[str, dict[str, int]]
    available_bytes: int | None
    recomputed_layers: int
    layers: int
    paged: bool
    trainable: int
    parameters: int
    offload: bool = False
    recommended: dict[str, Any] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    methods: dict[str, Plan] = field(default_factory=dict)
    advice: str = ""

    @property
    def peak_bytes(self) -> int:
        """The highest sum of all parts."""
        return sum(self.parts.values())

    @property
    def checkpointing(self) -> bool:
        """Whether activations are recomputed."""
        return self.recomputed_layers > 0

    @property
    def fits(self) -> bool | None:
        """Whether the peak stays below the free memory; None when that is not known."""
        if not self.available_bytes:
            return None
        return self.peak_bytes <= self.available_bytes

    @property
    def flags(self) -> str:
        """What is recommended, as the command line takes it."""
        return " ".join(f"--{key} {value}" for key, value in self.recommended.items())

    def as_dict(self) -> dict[str, Any]:
        """For ``--json`` and the report."""
        derived = {"peak_bytes": self.peak_bytes, "checkpointing": self.checkpointing}
        others = {
            name: {
                "parts": plan.parts,
                "peak_bytes": plan.peak_bytes,
                "fits": plan.fits,
                "recomputed_layers": plan.recomputed_layers,
                "paged": plan.paged,
            }
            for name, plan in self.methods.items()
        }
        return {**asdict(self), **derived, "fits": self.fits, "methods": others}

    def lines(self) -> list[str]:
        """For people."""
        parts = ", ".join(f"{name} {_megabytes(size)}" for name, size in self.parts.items())
        fits = {True: "fits", False: "does NOT fit", None: "free memory unknown"}[self.fits]
        free = f" of {_megabytes(self.available_bytes)} free" if self.available_bytes else ""
        how = ""
        if self.checkpointing:
            which = "all" if self.recomputed_layers == self.layers else str(self.recomputed_layers)
            how = f", activations of {which} layers recomputed"
        how += ", what lies between them elsewhere" if self.offload else ""
        how += ", optimizer state paged" if self.paged else ""
        phases = ", ".join(
            f"{name} {_megabytes(sum(parts.values()))}" for name, parts in self.phases.items()
        )
        return [
            f"plan: {parts}",
            f"plan: by phase: {phases}",
            *self.reasons,
            *self._compared(),
            f"plan: peak {_megabytes(self.peak_bytes)}{free}: {fits}{how}",
        ]

    def _compared(self) -> list[str]:
        lines = []
        for name, plan in self.methods.items():
            how = [f"{plan.recomputed_layers} of {plan.layers} layers recomputed"]
            how = how if plan.checkpointing else []
            how += ["paged"] if plan.paged else []
            fits = {True: "fits", False: "does not fit", None: ""}[plan.fits]
            words = ", ".join(filter(None, (fits, *how)))
            lines.append(f"plan: {name:>6} {_megabytes(plan.peak_bytes):>12}  {words}".rstrip())
        return [*lines, f"plan: advice: {self.advice}"] if lines else []


def _megabytes(size: int | None) -> str:
    return f"{(size or 0) / 1e6:,.0f} MB"


@dataclass(frozen=True)
class Room:
    """Memory that a run may use.

    Attributes:
        available: bytes for the whole process, ``baseline`` included; None where not known.
        baseline: bytes of the process without the run.
        holes: what the allocator loses, as a share of what comes and goes.
    """

    available: int | None = None
    baseline: int = 0
    holes: float = 0.0

    @classmethod
    def here(cls, device: torch.device, *, budget: int | None = None, processes: int = 1) -> Room:
        """What this machine has free now.

        Args:
            device: where a run would be.
            budget: bytes that the process may take, whatever is free.
            processes: how many share this machine's memory; each has its own graphics card.
        """
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            return cls(int(free * _RESERVE) if budget is None else budget)
        # libraries, interpreter
        baseline = (devices.resident_memory() or 0) + _RUNTIME
        if budget is None:
            _, free = devices.host_memory()
            budget = int(free * _RESERVE) // processes + baseline if free else None
        return cls(budget, baseline, _HOLES[arena.active() or arena.available()])

    @classmethod
    def on(cls, preset: Preset, *, budget: int | None = None) -> Room:
        """What a graphics card has for one process.

        Args:
            preset: the card.
            budget: bytes that the process may take; None takes the card's.
        """
        size = int(preset.memory * _RESERVE) if budget is None else budget
        return cls(size, _CONTEXT)


def plan_training(config: PretrainedConfig, shape: TrainingShape, room: Room) -> Plan:
    """Plans a run; no weight is read.

    What is ``auto`` gives way one after the other while the run would not fit: activations are
    recomputed, in as few layers as will do, then the optimizer's state is paged (``optim.paged``).

    Args:
        config: the model's architecture.
        shape: the run.
        room: what it may use.

    Raises:
        InputError: PEFT refuses the adapter.
    """
    return Planner(config, shape).plan(room)


class Planner:
    """Plans of one model and shape, for any number of recomputed layers.

    Args:
        config: the model's architecture.
        shape: the run.
    """

    def __init__(self, config: PretrainedConfig, shape: TrainingShape) -> None:
        self.shape = shape
        skeleton = make_skeleton(config, shape)
        sizes = _Sizes.of(skeleton, shape)
        self._counts, self._trained, self._weights = sizes.counts, sizes.trained, sizes.weights
        self._sizes = sizes
        self._largest = _largest_source(skeleton.model, shape)
        self._numbers = _numbers(skeleton)
        self._steps = ImaginedSteps(skeleton, shape)

    def plan(self, room: Room) -> Plan:
        """The plan that keeps most activations and pages of all that fit."""
        paged = self.shape.optim.paged
        if self.shape.recompute is None:
            plan = self._least_recomputed(paged == "always", room)
        else:
            plan = self._plan(self._most_recomputed(), paged == "always", room)
        if paged == "auto" and plan.fits is False:
            plan = self._plan(plan.recomputed_layers, True, room)
        return plan

    def least(self, room: Room) -> Plan:
        """The plan that gives up all that is left to it."""
        return self._plan(self._most_recomputed(), self.shape.optim.paged != "off", room)

    def _most_recomputed(self) -> int:
        layers, wished = self._steps.layers, self.shape.recompute
        return layers if wished is None else min(wished, layers)

    def _least_recomputed(self, paged: bool, room: Room) -> Plan:
        """The plan with as few recomputed layers as fit; all of them where none does."""

        def at(recompute: int) -> Plan:
            return self._plan(recompute, paged, room)

        layers = self._steps.layers
        hopeless = room.available and room.baseline + self._weights > room.available
        plan = at(layers if hopeless else 0)
        if hopeless or plan.fits is not False or not layers:
            return plan
        found = at(layers)
        low, high = 0, layers
        if not self._steps.alike:  # each number would be run in full
            low = layers - 1
        while found.fits and high - low > 1:
            middle = (low + high) // 2
            plan = at(middle)
            if plan.fits:
                found, high = plan, middle
            else:
                low = middle
        return found

    def _plan(self, recompute: int, paged: bool, room: Room) -> Plan:
        shape = self.shape
        optimizer = resident_bytes(self._counts, optim_bits=shape.optim.optim_bits, paged=paged)

        def whole(moment: Moment, *, state: bool) -> dict[str, int]:
            fixed = {
                "weights": self._weights,
                "adapters": 0 if shape.method == "full" else self._trained,
                "optimizer": optimizer if state else 0,
                "baseline": room.baseline,
            }
            every = fixed | self._sizes.exchanged(moment.parts)
            every["workspace"] += round(room.holes * moment.total)
            return {name: every[name] for name in (*PARTS, "baseline")}

        loading = Moment()
        loading.parts["workspace"] = self._largest
        if shape.kernels == "cpu":  # where layers are divided only after they were loaded
            loading.parts["workspace"] += self._sizes.whole_weights - self._weights
        saving = Moment()
        saving.parts["workspace"] = max(self._counts, default=0) * 8
        moments = self._steps.moments(recompute)
        phases = {"load": whole(loading, state=False)}
        highest = {
            phase: max(
                (m for name, m in moments.items() if name.startswith(phase)),
                key=lambda moment: moment.total,
            )
            for phase in ("first step", "later step", "evaluation")
        }
        # Nothing is there in a first step that is not in a later one; told from few layers it may
        # seem so.
        first = min(highest["first step"], highest["later step"], key=lambda moment: moment.total)
        for phase, moment in {**highest, "first step": first}.items():
            phases[phase] = whole(moment, state=phase != "first step")
        phases["save"] = whole(saving, state=True)
        trainable, parameters = self._numbers
        return Plan(
            parts=max(phases.values(), key=lambda parts: sum(parts.values())),
            phases=phases,
            available_bytes=room.available,
            recomputed_layers=recompute,
            layers=self._steps.layers,
            paged=paged,
            trainable=trainable,
            parameters=parameters,
            offload=self.shape.offload,
            reasons=_one_of(shape),
        )


def _one_of(shape: TrainingShape) -> tuple[str, ...]:
    if shape.processes == 1:
        return ()
    how = "layers divided (fsdp)" if shape.divided else "the base whole in each (ddp)"
    return (f"plan: one of {shape.processes} processes, {how}",)


@dataclass(frozen=True)
class _Sizes:
    """What one process holds of the model.

    Attributes:
        counts: elements of each trained tensor, as far as they are here.
        trained: bytes of them.
        weights: bytes of what is frozen, and of what is trained where all is.
        whole_weights: the same before layers are divided.
        layer: bytes of one whole decoder layer, frozen and trained; 0 where none is divided.
        layer_trained: bytes of what is trained in it.
        whole_trained: bytes of all that is trained, in all processes.
        processes: how many there are.
    """

    counts: list[int]
    trained: int
    weights: int
    whole_weights: int
    layer: int
    layer_trained: int
    whole_trained: int
    processes: int

    @classmethod
    def of(cls, skeleton: Skeleton, shape: TrainingShape) -> _Sizes:
        parts = shape.processes if shape.divided else 1
        layers = decoder_layers(base_model(skeleton.model))
        inside = {id(p) for layer in layers for p in layer.parameters()} if parts > 1 else set()
        counts: list[int] = []
        trained = frozen = whole_frozen = layer = layer_trained = whole_trained = 0
        for parameter, times in skeleton.parameters():
            share = parts if id(parameter) in inside else 1
            # on meta what is trained may still be in 16 bits; it becomes float32
            size = 4 * parameter.numel() if parameter.requires_grad else _bytes(parameter)
            if parameter.requires_grad:
                counts += [-(-parameter.numel() // share)] * times
                trained += times * -(-size // share)
                whole_trained += times * size
                layer_trained += times * size if share > 1 else 0
            else:
                frozen += times * -(-size // share)
                whole_frozen += times * size
            layer += times * size if share > 1 else 0
        full = shape.method == "full"
        return cls(
            counts=counts,
            trained=trained,
            weights=frozen + (trained if full else 0),
            whole_weights=whole_frozen + (whole_trained if full else 0),
            layer=layer // max(skeleton.layers, 1),
            layer_trained=layer_trained // max(skeleton.layers, 1),
            whole_trained=whole_trained,
            processes=shape.processes,
        )

    def exchanged(self, moving: dict[str, int]) -> dict[str, int]:
        """What comes and goes, with what processes need to exchange it."""
        found = dict(moving)
        if self.processes == 1 or not found["gradients"]:
            # an evaluation gathers layers too
            found["workspace"] += _GATHERED * self.layer if found["activations"] else 0
            return found
        if self.layer:
            # the part of the sum and what the optimizer is given; one layer's on their way
            found["gradients"] = 2 * self.trained + _GATHERED * self.layer_trained
            found["workspace"] += _GATHERED * self.layer
        else:
            found["gradients"] += self.whole_trained // self.processes
        return found


def _largest_source(model: nn.Module, shape: TrainingShape) -> int:
    """The largest weight as it is read, beside which its quantized form is made."""
    if not quantized_base(shape.method):
        return 0
    weights, _ = packed_weights(model)
    return 2 * max((count for count in weights.values()), default=0)


def _numbers(skeleton: Skeleton) -> tuple[int, int]:
    """Trainable and all parameters."""
    trainable, parameters = parameter_counts(skeleton.model)
    if skeleton.left_out:
        last = decoder_layers(base_model(skeleton.model))[-1]
        more = parameter_counts(last)
        trainable += skeleton.left_out * more[0]
        parameters += skeleton.left_out * more[1]
    return trainable, parameters


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
