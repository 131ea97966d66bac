"""Our quantizer as transformers knows quantizers: the one way a model is loaded in 4 bits.

Hooks used, each with a test: the public registries of quantization configs and quantizers, and
`PreTrainedModel.num_parameters`, wrapped because it would count packed bytes as parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from fourbit.codebook import BLOCKSIZES
from fourbit.errors import FourbitError, InputError, ModelError, nearest
from fourbit.integrations import peft as peft_hooks
from fourbit.linear import Linear4bit, parameter_counts
from fourbit.quantize import QuantConfig

_METHOD = "fourbit"
_MARK = "_fourbit_hook"
_PLAIN_LINEARS = ("Linear", "FalconLinear")
"""Classes whose forward is exactly ``x @ W.T + b``; other subclasses do more than that."""
_LATER: dict[str, tuple[Any, ...]] = {
    "load_in_8bit": (False, None),
    "llm_int8_threshold": (6.0, None),
    "llm_int8_has_fp16_weight": (False, None),
    "llm_int8_enable_fp32_cpu_offload": (False, None),
    "bnb_4bit_quant_storage": ("uint8", torch.uint8, None),
}
"""Names of ``BitsAndBytesConfig`` that are not built, with the values that ask for nothing."""


@dataclass(init=False)
class FourbitConfig(QuantizationConfigMixin):
    """For ``from_pretrained(..., quantization_config=FourbitConfig(...))``.

    Takes the 4-bit names of transformers' ``BitsAndBytesConfig`` with their meaning and defaults,
    so that swapping the class changes no bytes (fp4, block 64, no double quantization, fp32
    products), plus ``blocksize``.

    Raises:
        InputError: an unknown name, or a value that is not supported.
    """

    quant: QuantConfig = field(default_factory=QuantConfig)
    compute_dtype: torch.dtype | None = None
    modules_to_not_convert: list[str] | None = None

    def __init__(
        self,
        *,
        load_in_4bit: bool = True,
        bnb_4bit_quant_type: str = "fp4",
        bnb_4bit_compute_dtype: torch.dtype | str | None = None,
        bnb_4bit_use_double_quant: bool = False,
        blocksize: int = 64,
        llm_int8_skip_modules: list[str] | None = None,
        **unknown: Any,
    ) -> None:
        # transformers turns what goes wrong inside a conversion into a log entry; kept here.
        self.failure: FourbitError | None = None
        self.quant_method = _METHOD  # type: ignore[assignment]  # transformers' enum is closed
        unknown.pop("quant_method", None)
        _refuse_unknown(unknown)
        if not load_in_4bit:
            raise InputError(
                "not-4bit",
                where="FourbitConfig.load_in_4bit",
                what="only 4-bit loading is built",
                fix="leave load_in_4bit at True, or load without a quantization_config",
            )
        if bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise InputError(
                "bad-value",
                where="FourbitConfig.bnb_4bit_quant_type",
                what=f"'{bnb_4bit_quant_type}' is not nf4 or fp4",
            )
        self.quant = QuantConfig(
            quant_type=bnb_4bit_quant_type,  # type: ignore[arg-type]  # checked above
            blocksize=_blocksize(blocksize),
            double_quant=bnb_4bit_use_double_quant,
        )
        self.compute_dtype = _torch_dtype(bnb_4bit_compute_dtype or torch.float32)
        self.modules_to_not_convert = llm_int8_skip_modules

    @classmethod
    def from_quant(cls, quant: QuantConfig, *, compute_dtype: torch.dtype | None) -> FourbitConfig:
        """The same from our own configuration; None multiplies in the activations' dtype."""
        config = cls(
            bnb_4bit_quant_type=quant.quant_type,
            bnb_4bit_use_double_quant=quant.double_quant,
            blocksize=quant.blocksize,
        )
        config.compute_dtype = compute_dtype
        return config

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, in the names the constructor takes."""
        dtype = self.compute_dtype or torch.float32
        return {
            # Not load_in_4bit: by that key transformers takes a configuration for bitsandbytes'.
            "quant_method": _METHOD,
            "bnb_4bit_quant_type": self.quant.quant_type,
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
            "bnb_4bit_use_double_quant": self.quant.double_quant,
            "blocksize": self.quant.blocksize,
            "llm_int8_skip_modules": self.modules_to_not_convert,
        }


register_quantization_config(_METHOD)(FourbitConfig)


def _refuse_unknown(unknown: dict[str, Any]) -> None:
    known = (
        "load_in_4bit",
        "bnb_4bit_quant_type",
        "bnb_4bit_compute_dtype",
        "bnb_4bit_use_double_quant",
        "blocksize",
        "llm_int8_skip_modules",
    )
    for name, value in unknown.items():
        later = name in _LATER
        if later and value in _LATER[name]:
            continue
        raise InputError(
            "not-built" if later else "unknown-key",
            where=f"FourbitConfig.{name}",
            what="is not built yet" if later else "unknown name",
            fix="leave it out" if later else nearest(name, known),
        )


def _blocksize(value: int) -> int:
    if value not in BLOCKSIZES:
        raise InputError(
            "bad-value",
            where="FourbitConfig.blocksize",
            what=f"{value!r} is no block size",
            fix=f"use one of {', '.join(map(str, BLOCKSIZES))}",
        )
    return value


def _torch_dtype(value: torch.dtype | str) -> torch.dtype:
    if isinstance(value, torch.dtype):
        return value
    dtype = getattr(torch, value.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(
            "bad-value",
            where="FourbitConfig.bnb_4bit_compute_dtype",
            what=f"'{value}' is no dtype",
            fix="use bfloat16, float16 or float32",
        )
    return dtype


class _Quantize(ConversionOps):
    """One weight, as it arrives from disk, to its packed parameters."""

    def __init__(self, hf_quantizer: FourbitQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(  # type: ignore[override]  # transformers itself passes these by name
        self, input_dict: dict[str, Any], model: nn.Module | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Names and 16/32-bit tensors in, names and integer parameters out."""
        assert model is not None
        result: dict[str, Any] = {}
        for name, value in input_dict.items():
            weight: Tensor = value[0] if isinstance(value, list) else value
            layer, _ = get_module_from_name(model, name)
            assert isinstance(layer, Linear4bit)
            try:
                tensors = _packed(layer, weight, name)
            except FourbitError as error:
                config = self.hf_quantizer.quantization_config
                config.failure = config.failure or error
                raise
            prefix = name.removesuffix("weight")
            for key, tensor in tensors.items():
                result[prefix + key] = nn.Parameter(tensor, requires_grad=False)
            self.hf_quantizer.loaded.add(prefix)
        return result


def _packed(layer: Linear4bit, weight: Tensor, name: str) -> dict[str, Tensor]:
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
    """Streams weights into `Linear4bit` layers while transformers loads them."""

    quantization_config: FourbitConfig  # type: ignore[assignment]
    requires_calibration = False

    def __init__(self, quantization_config: FourbitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.loaded: set[str] = set()
        quantization_config.failure = None

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
        """Whether ``save_pretrained`` may write the packed model."""
        return False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuses a checkpoint that is already quantized."""
        if self.pre_quantized:
            raise ModelError(
                "already-quantized",
                where="config.json",
                what="the checkpoint is already quantized",
                fix="start from the 16-bit checkpoint",
            )

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether the tensor of this name is the weight of a 4-bit layer."""
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, Linear4bit) and name == "weight"

    def get_quantize_ops(self) -> _Quantize:
        """The operation transformers applies to each such tensor."""
        return _Quantize(self)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        config = self.quantization_config
        replaced = replace_linears(
            model,
            config.quant,
            compute_dtype=config.compute_dtype,
            skip=self.get_modules_to_not_convert(
                model,
                config.modules_to_not_convert,
                list(model._keep_in_fp32_modules or []),
                add_default_skips=True,
            ),
        )
        for name in replaced:
            # Otherwise transformers would draw random numbers into integer parameters.
            model.get_submodule(name)._is_hf_initialized = True  # type: ignore[assignment]
        for layer in model.modules():
            if isinstance(layer, Linear4bit):
                # transformers before 5.23 casts what arrives to the waiting parameter's dtype
                dtype = layer.original_dtype
                shape = (layer.out_features, layer.in_features)
                waiting = torch.empty(shape, dtype=dtype, device="meta")
                layer.weight = nn.Parameter(waiting, requires_grad=False)
        install()
        return model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        layers = [name for name, m in model.named_modules() if isinstance(m, Linear4bit)]
        missing = [name for name in layers if f"{name}." not in self.loaded]
        if missing:
            raise ModelError(
                "missing-weights",
                where=str(model.config.name_or_path or type(model).__name__),
                what=f"{len(missing)} tensors are missing, first: {missing[0]}.weight",
                fix="download the checkpoint again, or check that config.json belongs to it",
            )
        return model


register_quantizer(_METHOD)(FourbitQuantizer)


def replace_linears(
    model: nn.Module,
    quant: QuantConfig,
    *,
    compute_dtype: torch.dtype | None,
    skip: list[str],
) -> list[str]:
    """Swaps every linear layer (GPT-2's Conv1D too) for a `Linear4bit`, in place.

    On the meta device, where transformers builds models, only shapes are made.

    Returns:
        The names of the replaced layers.

    Raises:
        ModelError: there is none, so the model would be called 4-bit and be nothing of it.
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
        layer = Linear4bit.from_linear(source, quant, compute_dtype=compute_dtype, name=name)
        layer.transposed_source = isinstance(module, Conv1D)
        model.set_submodule(name, layer)
        replaced.append(name)
    if not replaced:
        raise ModelError(
            "nothing-to-quantize",
            where=type(model).__name__,
            what="the architecture has no linear layer that can be held in 4 bits",
            fix="load it without quantization (method: lora)",
        )
    return replaced


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
    model: PreTrainedModel, quant: QuantConfig, *, compute_dtype: torch.dtype | None = None
) -> list[str]:
    """Quantizes a model that is already in memory (or on meta), in place.

    The output head, tied weights and embeddings stay as they are.

    Returns:
        The names of the quantized layers.
    """
    skip = HfQuantizer.get_modules_to_not_convert(
        model, keep_in_fp32_modules=list(model._keep_in_fp32_modules or [])
    )
    replaced = replace_linears(model, quant, compute_dtype=compute_dtype, skip=skip)
    install()
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
        if not any(isinstance(module, Linear4bit) for module in self.modules()):
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


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in backward (non-reentrant: frozen inputs need no special hook)."""
    settings = {"use_reentrant": False}
    # transformers 5.23 renamed the method; 5.17 has only the old name.
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    else:
        enable(activation_checkpointing_kwargs=settings)


def disable_checkpointing(model: PreTrainedModel) -> None:
    """Keep activations again."""
    disable = getattr(model, "activation_checkpointing_disable", None)
    (disable or model.gradient_checkpointing_disable)()
