"""The best settings that fit into a budget, and why each of them gave way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from fourbit.methods import READ_BY
from fourbit.planning.plan import Plan, Planner, Room
from fourbit.planning.shape import ALL_LAYERS, TrainingShape

_SHORTEST, _LOWEST_RANK = 128, 4


def recommend(config: PretrainedConfig, shape: TrainingShape, room: Room) -> Plan:
    """Gives up one setting after the other until the run fits.

    In this order: the micro-batch (accumulation rises, so that a step sees the same sequences),
    activations (recomputed in as few layers as will do; on a GPU what lies between them then waits
    in host memory), the optimizer's pages, the length of sequences, the rank. What is not left to
    the plan (`TrainingShape.recompute`, ``optim.paged``) stays.

    Args:
        config: the model's architecture.
        shape: what is wished for.
        room: what it has to fit into; what is not limited fits as it is.

    Returns:
        The plan of what is left, with ``recommended`` and ``reasons``.

    Raises:
        InputError: PEFT refuses the adapter.
    """
    search = _Search(config, shape, room)
    for give_up in (
        search.smaller_batches,
        search.recomputation,
        search.offload,
        search.pages,
        search.shorter_sequences,
        search.lower_rank,
    ):
        if search.plan.fits is False:
            give_up()
    return search.result()


class _Search:
    def __init__(self, config: PretrainedConfig, shape: TrainingShape, room: Room) -> None:
        self._config, self._room = config, room
        self._wished = shape
        self._settings: dict[str, Any] = {}
        self._reasons: list[str] = []
        self._shape = replace(shape, recompute=shape.recompute or 0)
        if shape.optim.paged == "auto":
            self._change_optim("off")
        self.plan = self._planned()

    def _planned(self) -> Plan:
        return Planner(self._config, self._shape).plan(self._room)

    def _change_optim(self, paged: str) -> None:
        optim = self._shape.optim.model_copy(update={"paged": paged})
        self._shape = replace(self._shape, optim=optim)

    def _note(self, what: str, **settings: Any) -> None:
        self.plan = self._planned()
        self._settings |= {key.replace("__", "."): value for key, value in settings.items()}
        peak, budget = self.plan.peak_bytes / 1e6, (self._room.available or 0) / 1e6
        self._reasons.append(f"{what}: peak {peak:,.0f} MB of {budget:,.0f} MB")

    def smaller_batches(self) -> None:
        sequences = self._wished.batch_size * self._wished.grad_accum
        while not self.plan.fits and self._shape.batch_size > 1:
            size = -(-self._shape.batch_size // 2)
            more = -(-sequences // size)
            self._shape = replace(self._shape, batch_size=size, grad_accum=more)
            self._note(f"batch_size {size}", batch_size=size, grad_accum=more)

    def recomputation(self) -> None:
        if self._wished.recompute is not None:
            return
        self._shape = replace(self._shape, recompute=None)
        found = self._planned()
        layers = found.recomputed_layers
        self._shape = replace(self._shape, recompute=layers)
        self._note(
            f"activations of {layers} of {found.layers} layers recomputed",
            gradient_checkpointing="all" if layers == found.layers else layers,
        )

    def offload(self) -> None:
        """On a GPU, where copies run beside the computation; a CPU's file is for who asks."""
        if self._wished.recompute is None and self._shape.kernels != "cpu":
            self._shape = replace(self._shape, recompute=ALL_LAYERS, offload=True)
            what = "what lies between recomputed layers waits in host memory"
            self._note(what, gradient_checkpointing="offload")

    def pages(self) -> None:
        if self._wished.optim.paged == "auto":
            self._change_optim("always")
            self._note("the optimizer's state paged", optim__paged="always")

    def shorter_sequences(self) -> None:
        while not self.plan.fits and self._shape.length > _SHORTEST:
            length = max(_SHORTEST, self._shape.length // 2)
            self._shape = replace(self._shape, length=length)
            self._note(f"sequences of {length}", data__max_length=length)

    def lower_rank(self) -> None:
        has_rank = self._shape.method in READ_BY["lora"]
        while not self.plan.fits and has_rank and self._shape.lora.r > _LOWEST_RANK:
            rank = max(_LOWEST_RANK, self._shape.lora.r // 2)
            lora = self._shape.lora.model_copy(update={"r": rank})
            self._shape = replace(self._shape, lora=lora)
            self._note(f"rank {rank}", lora__r=rank)

    def result(self) -> Plan:
        plan = replace(self.plan, recommended=self._settings)
        last = f"take {plan.flags}" if self._settings else "everything fits as asked"
        if plan.fits is False:
            last = f"nothing fits; the least is {plan.peak_bytes / 1e6:,.0f} MB"
        lines = tuple(f"budget: {reason}" for reason in (*self._reasons, last))
        return replace(plan, reasons=(*plan.reasons, *lines))
