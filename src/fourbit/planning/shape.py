"""What decides a run's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fourbit.lora import LoraSettings
from fourbit.methods import Method, trains_prompt
from fourbit.ops import has_kernels
from fourbit.optim import OptimConfig
from fourbit.prompts import PromptSettings
from fourbit.quantize import QuantConfig

Kernels = Literal["cpu", "gpu", "none"]
ALL_LAYERS = 1 << 16
"""More than any model has."""


def kernels_of(device: torch.device) -> Kernels:
    """Whose kernels serve a device of this machine."""
    if device.type == "cpu":
        return "cpu"
    return "gpu" if has_kernels(device) else "none"


@dataclass(frozen=True)
class TrainingShape:
    """A run, as far as memory is concerned.

    Attributes:
        method: what is trained, on which base.
        quant: the base's storage, where it is quantized.
        lora: the adapters, where there are some.
        dtype: of activations and of unquantized weights.
        batch_size: sequences of a micro-batch.
        length: positions of the text of a sequence, without virtual tokens.
        recompute: decoder layers whose activations are computed again in backward, from the first
            on; None leaves it to the plan.
        packing: whether several documents share a sequence, or rows have different lengths.
        grad_accum: micro-batches of a step.
        offload: whether what lies between recomputed layers waits elsewhere.
        prompt: the trained prompt, where there is one.
        optim: the optimizer.
        kernels: whose serve: those of csrc/ where there are some, Triton's, or none of ours.
        processes: how many train together; what is planned is one of them.
        divided: whether each of them holds only a part of the decoder layers.
    """

    method: Method
    quant: QuantConfig
    lora: LoraSettings
    dtype: torch.dtype
    batch_size: int
    length: int
    recompute: int | None = None
    packing: bool = True
    grad_accum: int = 1
    offload: bool = False
    prompt: PromptSettings = PromptSettings()
    optim: OptimConfig = OptimConfig()
    kernels: Kernels = "cpu"
    processes: int = 1
    divided: bool = False

    @property
    def own_grad_accum(self) -> int:
        """Micro-batches of a step that one process computes at most."""
        return -(-self.grad_accum // self.processes)

    @property
    def positions(self) -> int:
        """Positions of a sequence, virtual tokens included."""
        extra = self.prompt.num_virtual_tokens if trains_prompt(self.method) else 0
        return self.length + extra
