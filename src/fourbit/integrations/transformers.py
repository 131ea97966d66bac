"""Our quantizer as transformers knows quantizers: the one way a quantized model is loaded.

Hooks used, each with a test: the public registries of quantization configs and quantizers;
`PreTrainedModel.num_parameters`, wrapped because it would count packed bytes as parameters; and
`AutoHfQuantizer.merge_quantization_configs`, wrapped because it refuses to read a checkpoint of
bitsandbytes with any other class of configuration.
"""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AutoHfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from fourbit import bnb_format
from fourbit.device import drop_file_pages
from fourbit.errors import FourbitError, InputError, ModelError, nearest
from fourbit.experts import pack_stack
from fourbit.integrations import peft as peft_hooks
from fourbit.integrations.config import METHOD, FourbitConfig
from fourbit.integrations.experts import replace_experts, restore_experts
from fourbit.integrations.fused import use_fast_paths
from fourbit.linear import (
    Linear4bit,
    Linear8bit,
    QuantizedLinear,
    expert_stacks,
    parameter_counts,
)
from fourbit.quantize import QuantConfig

_MARK = "_fourbit_hook"
_PLAIN_LINEARS = ("Linear", "FalconLinear")
"""Classes whose forward is exactly ``x @ W.T + b``; other subclasses do more than that."""
_LARGE_SHARE = 0.5
"""A model of which more than this share of its inner weights stays in 16 bits is refused."""


class _Operation(ConversionOps):
    """What our quantizer does with tensors as they arrive from disk."""

    def __init__(self, hf_quantizer: FourbitQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Operation:
        # transformers copies the conversions; what was loaded is noted on the one quantizer
        return self

    def _kept(self, error: FourbitError) -> FourbitError:
        self.hf_quantizer.quantization_config.failures.append(error)
        return error

    def _parameters(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
        prefix = name.removesuffix("weight")
        self.hf_quantizer.loaded.add(prefix)
        return {prefix + key: _frozen(tensor) for key, tensor in tensors.items()}


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class _Quantize(_Operation):
    """One floating weight to its packed parameters."""

    def convert(  # type: ignore[override]  # transformers itself passes these by name
        self, input_dict: dict[str, Any], model: nn.Module | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Names and 16/32-bit tensors in, names and integer parameters out."""
        assert model is not None
        result: dict[str, Any] = {}
        for name, value in input_dict.items():
            weight: Tensor = value[0] if isinstance(value, list) else value
            module, own = get_module_from_name(model, name)
            try:
                if isinstance(module, QuantizedLinear):
                    result |= self._parameters(name, packed(module, weight, name=name))
                else:
                    stack = expert_stacks(module)[own]
                    parts = pack_stack(stack, weight, name=name)
                    result |= {name + ending: _frozen(part) for ending, part in parts.items()}
                    self.hf_quantizer.loaded.add(name)
            except FourbitError as error:
                raise self._kept(error) from None
            drop_file_pages(weight)
        return result


class _Deserialize(_Operation):
    """The stored tensors of one layer to its parameters; transformers brings every weight here."""

    def convert(  # type: ignore[override]  # transformers itself passes these by name
        self,
        input_dict: dict[str, Any],
        model: nn.Module | None = None,
        full_layer_name: str | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Names without prefix and stored tensors in, full names and parameters out."""
        assert model is not None
        assert full_layer_name is not None
        stored = {k: v[0] if isinstance(v, list) else v for k, v in input_dict.items()}
        module, name = get_module_from_name(model, full_layer_name)
        try:
            if isinstance(module, QuantizedLinear):
                tensors = bnb_format.from_disk(module, stored, name=full_layer_name)
                return self._parameters(full_layer_name, tensors)
            return {full_layer_name: _plain(stored, module, name, full_layer_name)}
        except FourbitError as error:
            raise self._kept(error) from None


def _plain(stored: Mapping[str, Tensor], module: nn.Module, name: str, full: str) -> Tensor:
    waiting = getattr(module, name)
    if stored.keys() != {"weight"} or not stored["weight"].is_floating_point():
        raise ModelError(
            "bad-quantized-tensor",
            where=full,
            what="is quantized in the files, but the configuration leaves its layer plain",
            fix="use the config.json that belongs to the weights (llm_int8_skip_modules)",
        )
    return stored["weight"].to(waiting.dtype)


def packed(layer: QuantizedLinear, weight: Tensor, *, name: str) -> dict[str, Tensor]:
    """The parameters that represent a weight as it lies in a checkpoint, in this layer's format.

    Raises:
        ModelError: another shape than the layer's, or NaN or Inf.
    """
    shape = (layer.out_features, layer.in_features)
    wanted = shape[::-1] if layer.transposed_source else shape
    if tuple(weight.shape) != wanted:
        # transformers checks no shape of a weight that it hands to a quantizer.
        raise ModelError(
            "mismatched-weights",
            where=name,
            what=f"{name} has shape {list(weight.shape)}, config.json says {list(wanted)}",
            fix="use the config.json that belongs to the weights",
        )
    layer.original_dtype = weight.dtype
    return layer.quantized(weight.t() if layer.transposed_source else weight, name=name)


class FourbitQuantizer(HfQuantizer):
    """Streams weights into `QuantizedLinear` layers while transformers loads them, and saves them.

    A checkpoint in bitsandbytes' format is read without a copy; any other is quantized tensor by
    tensor.
    """

    quantization_config: FourbitConfig  # type: ignore[assignment]
    requires_calibration = False

    def __init__(self, quantization_config: FourbitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.loaded: set[str] = set()
        self.experts: list[str] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        quantization_config.failures.clear()

    @property
    def quantized_element_size(self) -> float:
        """Bytes per quantized weight, for transformers' device placement."""
        return self.quantization_config.quant.bits_per_weight / 8

    @property
    def is_trainable(self) -> bool:  # type: ignore[override]  # a property there too
        """Adapters can be trained on the model."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The ops have fakes and registered autograd."""
        return True

    def is_serializable(self) -> bool:  # type: ignore[override]  # a property in the base class
        """``save_pretrained`` writes bitsandbytes' format."""
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuses to spread a model over devices when there are several processes."""
        devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        spread = len(devices) > 1 or bool(devices & {"auto", "balanced", "sequential"})
        processes = int(os.environ.get("WORLD_SIZE", "1") or 1)
        if spread and processes > 1:
            raise InputError(
                "device-map-in-processes",
                where="device_map",
                what=f"{processes} processes, and a device_map that spreads the model: each process"
                " would take every device",
                fix="one process, one device: device_map={'': local_rank}",
            )

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether the tensor of this name is the weight of a quantized layer or of experts."""
        module, name = get_module_from_name(model, param_name)
        if isinstance(module, QuantizedLinear):
            return name == "weight"
        return name in expert_stacks(module)

    def get_quantize_ops(self) -> _Quantize:
        """The operation transformers applies to each such tensor."""
        return _Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """How the stored tensors of a layer are gathered when the checkpoint is quantized."""
        if not self.pre_quantized:
            return []
        int8 = self.quantization_config.quant.is_int8
        names = bnb_format.NAMES_8BIT if int8 else bnb_format.NAMES_4BIT
        # "weight" last: it is the beginning of the others
        return [WeightConverter([*names[1:], names[0]], "weight", [_Deserialize(self)])]

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, device_map: Any = None, **kwargs: Any
    ) -> PreTrainedModel:
        config = self.quantization_config
        skip = _skipped(model, config, device_map)
        replaced = replace_linears(
            model, config.quant, compute_dtype=config.compute_dtype, skip=skip
        )
        for name in replaced:
            layer = model.get_submodule(name)
            assert isinstance(layer, QuantizedLinear)
            # Otherwise transformers would draw random numbers into integer parameters.
            layer._is_hf_initialized = True  # type: ignore[assignment]
            _apply(config, layer)
            # transformers before 5.23 casts what arrives to the waiting parameter's dtype
            shape, dtype = (layer.out_features, layer.in_features), layer.original_dtype
            if self.pre_quantized:
                shape, dtype = tuple(layer.weight.shape), layer.weight.dtype
                if isinstance(layer, Linear4bit):
                    dtype = layer.quant_storage
            layer.weight = _frozen(torch.empty(shape, dtype=dtype, device="meta"))
        self.shapes = {
            name: tuple(parameter.shape)
            for name, parameter in model.named_parameters()
            if not isinstance(get_module_from_name(model, name)[0], QuantizedLinear)
        }
        if config.quantize_experts:
            self._declare_experts(model, skip)
        if not (config.allow_unquantized or self.pre_quantized):
            _refuse_mostly_plain(model)
        install()
        return model

    def _declare_experts(self, model: PreTrainedModel, skip: list[str]) -> None:
        config = self.quantization_config
        self.experts = replace_experts(
            model, config.quant, compute_dtype=config.compute_dtype, skip=skip
        )
        config.quantize_experts = bool(self.experts)
        if self.pre_quantized:
            return
        for full in self.experts:
            module, name = get_module_from_name(model, full)
            stack = expert_stacks(module)[name]
            waiting = torch.empty(stack.shape, dtype=stack.original_dtype, device="meta")
            setattr(module, name, _frozen(waiting))

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        if self.quantization_config.failures:
            raise self.quantization_config.failures[0]
        layers = [name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)]
        missing = [f"{name}.weight" for name in layers if f"{name}." not in self.loaded]
        if not self.pre_quantized:
            missing += [name for name in self.experts if name not in self.loaded]
        if missing:
            raise ModelError(
                "missing-weights",
                where=str(model.config.name_or_path or type(model).__name__),
                what=f"{len(missing)} tensors are missing, first: {missing[0]}",
                fix="download the checkpoint again, or check that config.json belongs to it",
            )
        self._require_shapes(model)
        self._keep_conversions(model)
        if self.quantization_config.fused_layers:
            use_fast_paths(model)
        return model

    def _require_shapes(self, model: PreTrainedModel) -> None:
        """The loader before transformers 5.23 checks no shape when there is a quantizer."""
        for name, parameter in model.named_parameters():
            module, own = get_module_from_name(model, name)
            wanted = self.shapes.get(name)
            if wanted is None or own in expert_stacks(module) or wanted == tuple(parameter.shape):
                continue
            raise ModelError(
                "mismatched-weights",
                where=str(model.config.name_or_path or type(model).__name__),
                what=f"{name} has shape {list(parameter.shape)}, config.json says {list(wanted)}",
                fix="use the config.json that belongs to the weights",
            )

    def _keep_conversions(self, model: PreTrainedModel) -> None:
        """Drops what saving must not revert: our reading, and the merging of packed experts."""
        conversions = getattr(model, "_weight_conversions", None)
        if not conversions:
            return

        def ours(entry: Any) -> bool:
            if any(isinstance(op, _Operation) for op in getattr(entry, "operations", ())):
                return True
            merges = isinstance(entry, WeightConverter)
            return merges and any(
                name.endswith(target) for target in entry.target_patterns for name in self.experts
            )

        kept = [entry for entry in conversions if not ours(entry)]
        model._weight_conversions = kept  # type: ignore[assignment]

    def get_state_dict_and_metadata(  # type: ignore[override]  # the base returns nothing
        self, model: nn.Module
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What ``save_pretrained`` writes: quantized layers under bitsandbytes' names.

        Of a model in which PEFT has put adapters it writes the base; transformers' own
        ``add_adapter`` picks the adapter out of this instead.
        """
        state = stored_state_dict(model)
        own = getattr(model, "_hf_peft_config_loaded", False)
        return state if own else peft_hooks.base_state(model, state), {}

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype.removeprefix("torch."))
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantizedLinear):
                model.set_submodule(name, _plain_layer(module, dtype or module.original_dtype))
        restore_experts(model, dtype)
        return model


def _register() -> None:
    register_quantization_config(METHOD)(FourbitConfig)
    register_quantizer(METHOD)(FourbitQuantizer)
    merge = AutoHfQuantizer.merge_quantization_configs

    def merge_fourbit(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        stored, ours = quantization_config, quantization_config_from_args
        if isinstance(ours, FourbitConfig) and isinstance(stored, dict):
            return ours.of_checkpoint(stored)
        return merge(stored, ours)

    AutoHfQuantizer.merge_quantization_configs = staticmethod(merge_fourbit)  # type: ignore[method-assign]


_register()


def stored_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with quantized layers under bitsandbytes' names."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            for key in ("weight", *module.scale_names):
                state.pop(f"{name}.{key}", None)
            tensors = bnb_format.to_disk(module)
            state |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
    return state


def _plain_layer(layer: QuantizedLinear, dtype: torch.dtype) -> nn.Module:
    weight = layer.dequantize(dtype)
    with torch.device("meta"):
        plain: nn.Module = (
            Conv1D(layer.out_features, layer.in_features)
            if layer.transposed_source
            else nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        )
    weight = weight.t().contiguous() if layer.transposed_source else weight
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.register_parameter("bias", layer.bias)
    return plain.train(layer.training)


def _skipped(model: PreTrainedModel, config: FourbitConfig, device_map: Any) -> list[str]:
    """Modules that stay plain: those asked for, and heads whose weight is an embedding's."""
    listed = config.modules_to_not_convert
    skip = HfQuantizer.get_modules_to_not_convert(
        model,
        None if listed is None else [_as_regex(name) for name in listed],
        list(model._keep_in_fp32_modules or []),
    )
    tied = {**(getattr(model, "all_tied_weights_keys", None) or {})}
    skip += [name.removesuffix(".weight") for name in (*tied.keys(), *tied.values())]
    if config.llm_int8_enable_fp32_cpu_offload and isinstance(device_map, dict):
        skip += [name for name, place in device_map.items() if name and place in ("cpu", "disk")]
    return skip


def _as_regex(name: str) -> str:
    """A module name in which ``*`` stands for anything, as the regex transformers matches."""
    return re.sub(r"(?<![.)\]])\*", ".*", name)


def _apply(config: FourbitConfig, layer: QuantizedLinear) -> None:
    if isinstance(layer, Linear4bit):
        layer.quant_storage = config.bnb_4bit_quant_storage
    elif isinstance(layer, Linear8bit) and config.llm_int8_has_fp16_weight:
        layer.keep_fp16_weight_()


def _refuse_mostly_plain(model: PreTrainedModel, *, adapters: list[str] | None = None) -> None:
    """Counts matrices outside embeddings and head: they are what a user expects to shrink."""
    apart = {id(model.get_output_embeddings())}
    for name in adapters or []:
        apart |= {id(module) for module in model.get_submodule(name).modules()}
    plain: dict[str, int] = {}
    packed = 0
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            packed += module.in_features * module.out_features
        elif stacks := expert_stacks(module):
            packed += sum(math.prod(stack.shape) for stack in stacks.values())
        elif not isinstance(module, nn.Embedding) and id(module) not in apart:
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.dim() >= 2:
                    plain[f"{name}.{key}"] = parameter.numel()
    total = packed + sum(plain.values())
    if sum(plain.values()) > _LARGE_SHARE * total:
        largest = max(plain, key=lambda name: plain[name])
        raise ModelError(
            "mostly-unquantized",
            where=type(model).__name__,
            what=f"{sum(plain.values()) / total:.0%} of its inner weights would stay in 16 bits,"
            f" largest: {largest}",
            fix="set allow_unquantized: true to load it all the same",
        )


def replace_linears(
    model: nn.Module,
    quant: QuantConfig,
    *,
    compute_dtype: torch.dtype | None,
    skip: list[str],
) -> list[str]:
    """Swaps every linear layer (GPT-2's Conv1D too) for a `QuantizedLinear`, in place.

    On the meta device, where transformers builds models, only shapes are made.

    Returns:
        The names of the replaced layers.

    Raises:
        ModelError: there is none, so the model would be called quantized and be nothing of it.
    """
    replaced = []
    kernel_weights = _kernel_weights(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            source = _as_linear(module)
        elif isinstance(module, nn.Linear) and type(module).__name__ in _PLAIN_LINEARS:
            source = module
        else:
            continue
        if name in kernel_weights or not should_convert_module(name, skip):
            continue
        layer = QuantizedLinear.from_linear(source, quant, compute_dtype=compute_dtype, name=name)
        layer.transposed_source = isinstance(module, Conv1D)
        model.set_submodule(name, layer)
        replaced.append(name)
    if not replaced:
        raise ModelError(
            "nothing-to-quantize",
            where=type(model).__name__,
            what="the architecture has no linear layer that can be held in few bits",
            fix="load it without quantization (method: lora)",
        )
    return replaced


def quantized_layout(
    config: PretrainedConfig, quantization: FourbitConfig, *, dtype: torch.dtype
) -> PreTrainedModel:
    """The model on meta as ``from_pretrained`` lays it out before weights arrive.

    Args:
        config: of a causal language model.
        quantization: which layers are quantized, and how.
        dtype: of the weights before they are quantized, and of those that are not.

    Raises:
        ModelError: nothing, or too little, would be quantized.
    """
    model = plain_layout(config, dtype=dtype)
    skip = _skipped(model, quantization, None)
    for name in replace_linears(
        model, quantization.quant, compute_dtype=quantization.compute_dtype, skip=skip
    ):
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        _apply(quantization, layer)
    if not quantization.allow_unquantized:
        _refuse_mostly_plain(model)
    return model


def plain_layout(config: PretrainedConfig, *, dtype: torch.dtype) -> PreTrainedModel:
    """The model on meta: modules and shapes, no weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)


def resolve_skips(model: PreTrainedModel, names: Sequence[str]) -> list[str] | None:
    """``llm_int8_skip_modules`` that leaves ``names`` plain *besides* what is by default.

    Raises:
        InputError: a name that leaves no layer plain.
    """
    if not names:
        return None
    layers = [
        name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))
    ]
    for name in names:
        if all(should_convert_module(layer, [_as_regex(name)]) for layer in layers):
            known = {layer.rsplit(".", 1)[-1] for layer in layers} | set(layers)
            raise InputError(
                "no-such-module",
                where=f"--skip {name}",
                what="names no linear layer of the model",
                fix=nearest(name, known if len(known) < 40 else known - set(layers)),
            )
    default = HfQuantizer.get_modules_to_not_convert(model)
    return list(dict.fromkeys([*sorted(default), *names]))


def _kernel_weights(model: nn.Module) -> set[str]:
    """Layers whose weight is read past their forward: state-space mixers feed it to kernels."""
    return {
        f"{prefix}.{child}"
        for prefix, module in model.named_modules()
        if hasattr(module, "A_log")
        for child in ("dt_proj", "x_proj", "out_proj")
    }


def _as_linear(conv: Conv1D) -> nn.Linear:
    in_features, out_features = conv.weight.shape
    with torch.device("meta"):
        linear = nn.Linear(in_features, out_features)
    linear.weight = nn.Parameter(conv.weight.detach().t(), requires_grad=False)
    linear.bias = conv.bias
    return linear.train(conv.training)


def quantize_model(
    model: PreTrainedModel | PeftModel,
    quant: QuantConfig,
    *,
    compute_dtype: torch.dtype | None = None,
) -> list[str]:
    """Quantizes a model that is already in memory (or on meta), in place.

    The output head, tied weights and embeddings stay as they are. On a model with LoRA adapters
    only the base is quantized; an adapter made on the 16-bit weights with PiSSA, OLoRA or a start
    that looks at data keeps its values, and what it left of the base is rounded with less error.

    Returns:
        The names of the quantized layers.

    Raises:
        InputError: the model carries adapters of another kind than LoRA, or merged ones.
    """
    base = peft_hooks.base_model(model)
    peft_hooks.check_quantizable(model)
    config = FourbitConfig.from_quant(quant, compute_dtype=compute_dtype)
    adapters = peft_hooks.adapter_modules(base)
    skip = _skipped(base, config, None) + adapters
    replaced = replace_linears(base, quant, compute_dtype=compute_dtype, skip=skip)
    experts = replace_experts(base, quant, compute_dtype=compute_dtype, skip=skip)
    if not quant.allow_unquantized:
        _refuse_mostly_plain(base, adapters=adapters)
    install()
    peft_hooks.fuse(base)
    # so that save_pretrained writes packed layers in a format that others read
    quantizer = FourbitQuantizer(config)
    quantizer.experts = experts
    quantizer._keep_conversions(base)
    config.quantize_experts = bool(experts)
    base.hf_quantizer = quantizer  # type: ignore[assignment]
    base.config.quantization_config = config
    base.is_quantized = True  # type: ignore[assignment]
    base.quantization_method = METHOD  # type: ignore[assignment]
    use_fast_paths(base)
    return replaced


def install() -> None:
    """Makes PEFT and parameter counts aware of our layers; called when a model is made."""
    peft_hooks.install()
    count = PreTrainedModel.num_parameters
    if getattr(count, _MARK, False):
        return

    def num_parameters(
        self: PreTrainedModel, only_trainable: bool = False, exclude_embeddings: bool = False
    ) -> int:
        if not any(isinstance(module, QuantizedLinear) for module in self.modules()):
            return count(self, only_trainable, exclude_embeddings)
        trainable, total = parameter_counts(self)
        embeddings = 0
        if exclude_embeddings:
            weights = {m.weight for m in self.modules() if isinstance(m, nn.Embedding)}
            kept = [w for w in weights if w.requires_grad or not only_trainable]
            embeddings = sum(weight.numel() for weight in kept)
        return (trainable if only_trainable else total) - embeddings

    setattr(num_parameters, _MARK, True)
    PreTrainedModel.num_parameters = num_parameters


def converts_weights(model: PreTrainedModel) -> bool:
    """Whether transformers computes the model's weights from other tensors of the checkpoint.

    It stacks the experts of most mixture-of-experts models, for one; names that only change
    do not count.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # transformers before this mapping loads every tensor as it is
        return False
    found = get_model_conversion_mapping(model, add_legacy=False)
    return any(isinstance(step, WeightConverter) for step in found)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers whose activations can be computed again one by one, in order."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module):
            layers = list(module)
            if all(isinstance(layer, GradientCheckpointingLayer) for layer in layers):
                return layers
    return []


def enable_checkpointing(model: PreTrainedModel, layers: int | None = None) -> None:
    """Recompute activations in backward (non-reentrant: frozen inputs need no special hook).

    Args:
        model: whose layers are recomputed.
        layers: how many, from the first on, whose turn in backward comes when the others' memory
            is free again; None: all.
    """
    settings = {"use_reentrant": False}
    # transformers 5.23 renamed the method; 5.17 has only the old name.
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    else:
        enable(activation_checkpointing_kwargs=settings)
    for layer in decoder_layers(model)[layers:] if layers is not None else ():
        layer.gradient_checkpointing = False  # type: ignore[assignment]


def disable_checkpointing(model: PreTrainedModel) -> None:
    """Keep activations again."""
    disable = getattr(model, "activation_checkpointing_disable", None)
    (disable or model.gradient_checkpointing_disable)()
