"""The model as it will be trained, made of shapes alone."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fourbit.errors import InputError
from fourbit.integrations.fused import use_fast_paths
from fourbit.integrations.peft import add_adapter, base_model
from fourbit.integrations.prompts import add_prompt
from fourbit.integrations.transformers import decoder_layers, quantize_model
from fourbit.lora import LoraSettings
from fourbit.methods import quantized_base, trains_prompt
from fourbit.planning.shape import TrainingShape

MOST_RUN = 5
"""Decoder layers of a model whose layers are all alike that a plan runs at once."""


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device, in training mode.

    Attributes:
        model: where all decoder layers are alike, only the first few are in it.
        left_out: how many are not; each is as the last one that is.
        alike: whether some layers tell of the others.
    """

    model: nn.Module
    left_out: int
    alike: bool

    @property
    def layers(self) -> int:
        """Decoder layers of the whole model."""
        return len(decoder_layers(base_model(self.model))) + self.left_out

    def parameters(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Each parameter, and how many there are of it in the whole model."""
        last = decoder_layers(base_model(self.model))[-1:]
        repeated = {id(p) for layer in last for p in layer.parameters()}
        for parameter in self.model.parameters():
            yield parameter, 1 + (self.left_out if id(parameter) in repeated else 0)


def make_skeleton(config: PretrainedConfig, shape: TrainingShape) -> Skeleton:
    """The model as it will be trained.

    Raises:
        InputError: PEFT refuses the adapter.
    """
    full = shape.method == "full"
    with torch.device("meta"):
        base: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32 if full else shape.dtype
        )
    if not full:
        base.requires_grad_(False)
    if quantized_base(shape.method):
        quantize_model(base, shape.quant)
    left_out = 0
    if alike(base) and not _names_layers(shape):
        left_out = max(0, len(decoder_layers(base)) - MOST_RUN)
        _shorten(base, MOST_RUN)
    model: nn.Module = base
    if trains_prompt(shape.method):
        model = add_prompt(base, shape.prompt, method=shape.method)
    elif not full:
        model = _adapted(base, shape.lora)
    return Skeleton(model.train(), left_out, left_out > 0 or alike(model))


def _names_layers(shape: TrainingShape) -> bool:
    """Whether the adapter's settings may tell one layer from another: by a number."""
    lora = shape.lora
    targets = lora.target_modules
    named = [targets] if isinstance(targets, str) else list(targets)
    named += [*(lora.target_parameters or ()), *(lora.exclude_modules or ())]
    named += [*(lora.modules_to_save or ()), *lora.rank_pattern]
    return any(re.search(r"\d", name) for name in named)


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


def pretend(model: nn.Module) -> None:
    """Gives every tensor a fake one that claims to be on the CPU; what was tied stays tied.

    Trained parameters become float32, as they are trained. To be called in a fake mode.
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
    use_fast_paths(base_model(model))


def alike(model: nn.Module) -> bool:
    """Whether all decoder layers are of one kind, so that two of them tell of any number."""
    layers = decoder_layers(base_model(model))
    config = base_model(model).config.get_text_config()
    if len(layers) < 5 or len(set(getattr(config, "layer_types", None) or [None])) > 1:
        return False
    if getattr(config, "use_sliding_window", None) or getattr(config, "no_rope_layers", None):
        return False
    return len({_description(layer) for layer in layers}) == 1


def _description(layer: nn.Module) -> tuple[Any, ...]:
    modules = tuple((name, type(module)) for name, module in layer.named_modules())
    parameters = tuple(
        (name, parameter.shape, parameter.dtype, parameter.requires_grad)
        for name, parameter in layer.named_parameters()
    )
    return modules, parameters


@contextmanager
def shortened(model: nn.Module, count: int) -> Iterator[None]:
    """Inside, the model has only its first ``count`` decoder layers."""
    base = base_model(model)
    layers = decoder_layers(base)
    lists = _shorten(base, count)
    try:
        yield
    finally:
        for found in lists:
            found.extend(layers[count:])


def _shorten(base: PreTrainedModel, count: int) -> list[nn.ModuleList]:
    layers = decoder_layers(base)
    lists = [m for m in base.modules() if isinstance(m, nn.ModuleList) and list(m) == layers]
    for found in lists:
        del found[count:]
    return lists
