"""What a run will need, before it runs: bytes by part, from shapes alone.

Weights, adapters, gradients and optimizer state are exact: they are counted on a model built
without data. Activations are measured on the same model: one forward pass on fake tensors, which
have shapes and no values, counts what autograd would keep. The rest of the peak (workspace of the
backward pass, allocator) is estimated and says so.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fourbit import device as devices
from fourbit.errors import InputError
from fourbit.integrations.fused import use_fast_paths
from fourbit.integrations.peft import add_adapter, base_model
from fourbit.integrations.prompts import add_prompt, prompted, with_prompt
from fourbit.integrations.transformers import (
    disable_checkpointing,
    enable_checkpointing,
    quantize_model,
)
from fourbit.linear import parameter_counts
from fourbit.lora import LoraSettings
from fourbit.loss import CHUNK_BYTES
from fourbit.methods import Method, quantized_base, trains_prompt
from fourbit.optim import OptimConfig, resident_bytes
from fourbit.prompts import PromptSettings
from fourbit.quantize import QuantConfig

_RESERVE = 0.9
"""Share of the free memory a plan may use; the rest is for what no plan sees."""


@dataclass(frozen=True)
class TrainingShape:
    """What decides a run's memory; ``length`` is that of the text, without virtual tokens."""

    method: Method
    quant: QuantConfig
    lora: LoraSettings
    dtype: torch.dtype
    batch_size: int
    length: int
    checkpointing: Literal["auto", "none", "all"] = "auto"
    prompt: PromptSettings = PromptSettings()
    optim: OptimConfig = OptimConfig()

    @property
    def positions(self) -> int:
        """Positions of a sequence, virtual tokens included."""
        extra = self.prompt.num_virtual_tokens if trains_prompt(self.method) else 0
        return self.length + extra


@dataclass(frozen=True)
class Plan:
    """Bytes by part, and their peak during training.

    Attributes:
        parts: bytes; exact for weights, adapters, gradients and optimizer.
        peak_bytes: highest sum during a step.
        available_bytes: memory of the device that is free now.
        checkpointing: whether activations are recomputed.
        paged: whether only some pages of the optimizer's state are in memory.
        trainable: trainable parameters.
        parameters: all parameters, unpacked.
    """

    parts: dict[str, int]
    peak_bytes: int
    available_bytes: int | None
    checkpointing: bool
    paged: bool
    trainable: int
    parameters: int

    @property
    def fits(self) -> bool | None:
        """Whether the peak stays below the free memory; None when that is not known."""
        if not self.available_bytes:
            return None
        return self.peak_bytes <= self.available_bytes

    def as_dict(self) -> dict[str, Any]:
        """For ``--json`` and the report."""
        return {**asdict(self), "fits": self.fits}

    def lines(self) -> list[str]:
        """For people."""
        parts = ", ".join(f"{name} {_megabytes(size)}" for name, size in self.parts.items())
        fits = {True: "fits", False: "does NOT fit", None: "free memory unknown"}[self.fits]
        free = f" of {_megabytes(self.available_bytes)} free" if self.available_bytes else ""
        how = ", activations recomputed" if self.checkpointing else ""
        how += ", optimizer state paged" if self.paged else ""
        return [
            f"plan: {parts}",
            f"plan: peak {_megabytes(self.peak_bytes)}{free}: {fits}{how}",
        ]


def _megabytes(size: int | None) -> str:
    return f"{(size or 0) / 1e6:,.0f} MB"


def plan_training(config: PretrainedConfig, shape: TrainingShape, *, device: torch.device) -> Plan:
    """Plans a run; no weight is read.

    What is ``auto`` gives way one after the other while the run would not fit: activations are
    recomputed (``gradient_checkpointing``), then the optimizer's state is paged (``optim.paged``).

    Args:
        config: the model's architecture.
        shape: the run.
        device: where it will run.
    """
    available = _available(device)
    recompute, paged = shape.checkpointing == "all", shape.optim.paged == "always"
    plan = _plan(config, shape, device, available, recompute=recompute, paged=paged)
    if shape.checkpointing == "auto" and plan.fits is False:
        recompute = True
        plan = _plan(config, shape, device, available, recompute=recompute, paged=paged)
    if shape.optim.paged == "auto" and plan.fits is False:
        plan = _plan(config, shape, device, available, recompute=recompute, paged=True)
    return plan


def _plan(
    config: PretrainedConfig,
    shape: TrainingShape,
    device: torch.device,
    available: int | None,
    *,
    recompute: bool,
    paged: bool,
) -> Plan:
    model = _skeleton(config, shape)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _pretend(model)
        use_fast_paths(base_model(model))
        trainable = [p for p in model.parameters() if p.requires_grad]
        adapters = sum(_bytes(p) for p in trainable)
        activations = _activations(model, shape, recompute=recompute)
        count, total = parameter_counts(model)
        parts = {
            "weights": sum(_bytes(p) for p in model.parameters()) - adapters,
            "adapters": adapters,
            "gradients": adapters,
            "optimizer": resident_bytes(
                (p.numel() for p in trainable), optim_bits=shape.optim.optim_bits, paged=paged
            ),
            "activations": activations,
            "logits": _logits(config, shape),
            "workspace": _workspace(model, shape),
            "baseline": _baseline(device),
        }
    if shape.method == "full":
        parts["weights"], parts["adapters"] = parts["weights"] + adapters, 0
    return Plan(
        parts=parts,
        peak_bytes=sum(parts.values()),
        available_bytes=available,
        checkpointing=recompute,
        paged=paged,
        trainable=count,
        parameters=total,
    )


def _skeleton(config: PretrainedConfig, shape: TrainingShape) -> nn.Module:
    """The model as it will be trained, on the meta device: shapes without memory."""
    full = shape.method == "full"
    with torch.device("meta"):
        base: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32 if full else shape.dtype
        )
    model: nn.Module = base
    if not full:
        base.requires_grad_(False)
        if quantized_base(shape.method):
            quantize_model(base, shape.quant)
        if trains_prompt(shape.method):
            model = add_prompt(base, shape.prompt, method=shape.method)
        else:
            model = _adapted(base, shape.lora)
    return model.train()


def _adapted(base: PreTrainedModel, lora: LoraSettings) -> nn.Module:
    try:
        return add_adapter(base, lora, low_cpu_mem_usage=True)
    except ValueError as error:
        raise InputError(
            "adapter-refused",
            where="lora.target_modules",
            what=f"PEFT refuses these layers: {error}",
            fix="name other layers in lora.target_modules, or leave some out with exclude_modules",
        ) from error


def _pretend(model: nn.Module) -> None:
    """Gives every tensor a fake one that claims to be on the CPU; what was tied stays tied.

    Trained parameters become float32, as they are trained.
    """
    fakes: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in fakes:
                trained = parameter.requires_grad
                dtype = torch.float32 if trained else parameter.dtype
                empty = torch.empty(parameter.shape, dtype=dtype, device="cpu")
                fakes[id(parameter)] = nn.Parameter(empty, requires_grad=trained)
            module._parameters[name] = fakes[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
        if isinstance(module, nn.LSTM):
            # it keeps its weights in a list of its own
            module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _activations(model: nn.Module, shape: TrainingShape, *, recompute: bool) -> int:
    """Bytes autograd keeps between forward and backward, up to the head's input."""
    inner = base_model(model)
    if recompute:
        enable_checkpointing(inner)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    autocast = shape.dtype != torch.float32 and not quantized_base(shape.method)
    with _counting(own) as kept, torch.autocast("cpu", shape.dtype, enabled=autocast):
        _forward(model, shape)
    saved = sum(kept.values())
    if recompute:
        # While one block is recomputed, everything it keeps is alive as well.
        layers = getattr(inner.config.get_text_config(), "num_hidden_layers", 1)
        disable_checkpointing(inner)
        with _counting(own) as whole, torch.autocast("cpu", shape.dtype, enabled=autocast):
            _forward(model, shape)
        saved += sum(whole.values()) // max(layers, 1)
    return saved


def _forward(model: nn.Module, shape: TrainingShape) -> None:
    ids = torch.zeros((shape.batch_size, shape.length), dtype=torch.long)
    wrapper = prompted(model)
    inputs = {"input_ids": ids} if wrapper is None else {"inputs_embeds": with_prompt(wrapper, ids)}
    base_model(model).base_model(**inputs, use_cache=False)


@contextmanager
def _counting(own: set[int]) -> Iterator[dict[int, int]]:
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in kept:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)  # keeps the address from being used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def _logits(config: PretrainedConfig, shape: TrainingShape) -> int:
    """The chunk of logits, and the gradient of the head's input at every supervised position."""
    text = config.get_text_config()
    rows = shape.batch_size * shape.positions
    chunk = min(CHUNK_BYTES, rows * text.vocab_size * 4)
    element = torch.finfo(shape.dtype).bits // 8
    return 2 * chunk + 2 * rows * text.hidden_size * element


def _workspace(model: nn.Module, shape: TrainingShape) -> int:
    """The largest weight dequantized, and the gradients passing through the widest layer."""
    element = torch.finfo(shape.dtype).bits // 8
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    largest = max((m.in_features * m.out_features for m in linears), default=0)
    # The head is multiplied in chunks and not dequantized; the widest block layer decides.
    widths = sorted((m.in_features + m.out_features for m in linears), reverse=True)
    inner = [w for w in widths if w < 8 * widths[-1]] or widths
    weight = largest * element if quantized_base(shape.method) else 0
    return weight + 4 * shape.batch_size * shape.positions * max(inner, default=0) * element


def _baseline(device: torch.device) -> int:
    """What the process holds before a model: libraries, interpreter."""
    return (devices.resident_memory() or 0) if device.type == "cpu" else 0


def _available(device: torch.device) -> int | None:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * _RESERVE)
    _, available = devices.host_memory()
    return int(available * _RESERVE) + _baseline(device) if available else None
