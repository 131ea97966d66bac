"""Merging without loss: a merged layer holds a float weight until its packed bytes come back.

Rounding ``W + ΔW`` into 4 bits would lose most of a small ΔW. So while anything is merged, PEFT's
layer sits on a `FloatLinear`, on which PEFT's own arithmetic works as on any linear layer, and the
packed layer waits beside it untouched. `unmerge` puts it back: nothing is subtracted, so nothing is
rounded. ``merge_and_unload`` leaves ordinary linear layers, and a model that can be saved.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fourbit.integrations.experts import restore_experts
from fourbit.linear import QuantizedLinear, autocast_input

_COST = (
    "merged layers hold their weight in 16 or 32 bits, about four times the packed bytes or more,"
    " until unmerge_adapter()"
)


class FloatLinear(nn.Linear):
    """What a tuner's layer sits on while adapters are merged; ``packed`` is what it replaces."""

    packed: QuantizedLinear

    def __init__(self, packed: QuantizedLinear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = packed.in_features, packed.out_features
        # Not a submodule: the packed bytes are neither parameters nor state while merged.
        self.__dict__["packed"] = packed
        weight = packed.dequantize(torch.float32)
        self.weight = nn.Parameter(weight, requires_grad=False)
        bias = None if packed.bias is None else packed.bias.detach().clone()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """As the packed layer: in any dtype, under autocast too."""
        input = autocast_input(input)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return nn.functional.linear(input, self.weight.to(input.dtype), bias)


class FourbitBackend(QuantizationBackend):
    """What PEFT's newer tuners ask for a base weight."""

    supports_merge = True
    backend_name = "fourbit"
    layer_type = "linear"

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        """The float weight ``[out, in]``."""
        if isinstance(base_layer, QuantizedLinear):
            return base_layer.dequantize()
        assert isinstance(base_layer, nn.Linear)
        return base_layer.weight.data

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        """Merging happens on a `FloatLinear` only."""
        base = peft_layer.get_base_layer()
        assert isinstance(base, FloatLinear)
        base.weight.data = weight_data


class ExactMerge:
    """Mixed into PEFT's layers: `merge` and `unmerge` through a `FloatLinear`."""

    merged_adapters: list[str]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges the named (or the active) adapters; the packed bytes are kept aside.

        Raises:
            ValueError: ``safe_merge`` found NaN or Inf; the layer is as it was.
        """
        layer: Any = self
        if packed_base(layer) is None:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]
            return
        names = check_adapters_to_merge(layer, adapter_names)
        if not names:
            return
        warnings.warn(_COST, stacklevel=2)
        before = list(self.merged_adapters)
        try:
            self._merge_fresh(safe_merge, before + names)
        except BaseException:
            restore_packed(layer)
            if before:
                self._merge_fresh(False, before)
            raise

    def _merge_fresh(self, safe_merge: bool, names: list[str]) -> None:
        # All of them from the packed bytes in float32, so that only the last step rounds.
        layer: Any = self
        restore_packed(layer)
        packed = packed_base(layer)
        assert packed is not None
        merged = FloatLinear(packed)
        _holder(layer).base_layer = merged
        super().merge(safe_merge=safe_merge, adapter_names=names)  # type: ignore[misc]
        if not self.merged_adapters:
            restore_packed(layer)
            return
        merged.weight.data = merged.weight.data.to(packed.original_dtype)

    def unmerge(self) -> None:
        """Puts the packed layer back, byte for byte."""
        layer: Any = self
        if packed_base(layer) is None or not self.merged_adapters:
            super().unmerge()  # type: ignore[misc]
            return
        restore_packed(layer)


def packed_base(layer: BaseTunerLayer) -> QuantizedLinear | None:
    """The packed layer under a tuner's layer, merged or not."""
    base = layer.get_base_layer()
    base = base.packed if isinstance(base, FloatLinear) else base
    return base if isinstance(base, QuantizedLinear) else None


def _holder(layer: Any) -> Any:
    while isinstance(layer.base_layer, BaseTunerLayer):
        layer = layer.base_layer
    return layer


def restore_packed(layer: Any) -> None:
    """Ends the merged state of one layer."""
    base = layer.get_base_layer()
    layer.merged_adapters.clear()
    if isinstance(base, FloatLinear):
        # the model may have been moved while merged
        _holder(layer).base_layer = base.packed.to(base.weight.device)


@functools.cache
def merging_class(tuner_class: type) -> type:
    """``tuner_class`` with exact merging."""
    return type(tuner_class.__name__, (ExactMerge, tuner_class), {"__doc__": tuner_class.__doc__})


def float_model(model: nn.Module) -> None:
    """Ordinary linear layers for every `FloatLinear` and every packed layer, in place.

    What is left is a plain model: transformers saves and loads it without us.
    """
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    plain = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    dtype = plain[0].weight.dtype if plain else max(set(dtypes), key=dtypes.count, default=None)
    for name, module in list(model.named_modules()):
        if isinstance(module, FloatLinear):
            packed = module.packed
        elif isinstance(module, QuantizedLinear):
            packed, module = module, FloatLinear(module)
        else:
            continue
        model.set_submodule(name, _plain(module, packed, dtype or packed.original_dtype))
    restore_experts(model, dtype)
    if isinstance(model, PreTrainedModel):
        _forget_quantization(model)


def _plain(merged: FloatLinear, packed: QuantizedLinear, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        layer = (
            Conv1D(packed.out_features, packed.in_features)
            if packed.transposed_source
            else nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None)
        )
    weight = merged.weight.data.to(dtype)
    if packed.transposed_source:
        weight = weight.t().contiguous()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if merged.bias is not None:
        layer.bias = nn.Parameter(merged.bias.data.to(dtype), requires_grad=False)
    return layer.train(packed.training)


def _forget_quantization(model: PreTrainedModel) -> None:
    for owner, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if name in vars(owner):
            delattr(owner, name)
    if getattr(model, "is_quantized", False):
        model.is_quantized = False  # type: ignore[assignment]  # an attribute of loaded models
