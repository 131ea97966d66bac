"""Full, LoRA or QLoRA: the same run planned with each, and which of them this memory suggests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from transformers import PretrainedConfig

from fourbit.methods import Method
from fourbit.planning.plan import Plan, Planner, Room
from fourbit.planning.shape import TrainingShape

METHODS: tuple[Method, ...] = ("full", "lora", "qlora")
_TIGHT, _EASY = 0.6, 0.3
"""Shares of the memory, with all activations recomputed. 16-bit LoRA above the first leaves no room
for longer sequences or larger batches, below the second it lacks none."""


def side_by_side(config: PretrainedConfig, shape: TrainingShape, room: Room, plan: Plan) -> Plan:
    """``plan`` with what each of `METHODS` would take, and which one to choose.

    Args:
        config: the model's architecture.
        shape: the run; its method is replaced.
        room: what each may use.
        plan: of ``shape`` itself.

    Raises:
        InputError: PEFT refuses the adapter.
    """
    plans, least = {}, {}
    for method in dict.fromkeys((*METHODS, shape.method)):
        planner = Planner(config, replace(shape, method=method))
        plans[method] = plan if method == shape.method else planner.plan(room)
        least[method] = plans[method] if plans[method].fits is False else planner.least(room)
    return replace(plan, methods=plans, advice=advice(least))


def advice(least: Mapping[str, Plan]) -> str:
    """Which method the memory suggests, and why, in a line.

    Args:
        least: plans of all `METHODS` with as little as each can do with.
    """
    full, lora, qlora = (least[method] for method in METHODS)
    if not lora.available_bytes:
        return "how much memory there is cannot be known here"
    share = lora.peak_bytes / lora.available_bytes
    if not qlora.fits:
        return "no method fits; see what --budget gives up"
    if not lora.fits:
        return "qlora: nothing else fits"
    if share > _TIGHT:
        return f"qlora: lora would take {share:.0%} of the memory"
    also = "; full fits too" if full.fits else ""
    if share > _EASY:
        return f"qlora or lora: lora takes {share:.0%} of the memory{also}"
    return f"lora is possible: it takes {share:.0%} of the memory, qlora less{also}"
