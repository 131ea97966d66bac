"""PEFT hands our quantized linear to our fused layer; counting tells the truth.

Hooks used, each with a test in ``tests/integrations/test_peft.py``:

- ``peft.tuners.lora.model.dispatch_default`` is wrapped. It is looked up as a module global at
  call time, so one wrap covers ``get_peft_model``, ``PeftModel.from_pretrained``,
  ``model.add_adapter``, ``load_adapter`` and TRL. (``LoraConfig._register_custom_module`` is the
  documented way, but holds for one config object only and is not saved.)
- ``PeftModel.get_nb_trainable_parameters`` is wrapped: it would count packed bytes as parameters.
"""

from __future__ import annotations

import warnings
from typing import Any

import peft.tuners.lora.model as peft_lora_model
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fourbit.errors import InputError, ModelError
from fourbit.linear import Linear4bit, QuantizedLinear, parameter_counts
from fourbit.lora import LoraSettings, lora_forward, resolve_targets

_MARK = "_fourbit_hook"
_WEIGHT_INITS = (True, False, None, "gaussian")


class LoraLinear4bit(PeftLoraLinear):
    """PEFT's LoRA layer on a `Linear4bit`: same module tree and files, fused arithmetic.

    One active, unmerged, plain adapter takes the fused operation; everything else (several
    adapters, DoRA, mixed batches, disabled adapters) is PEFT's own code, unchanged.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any
    ) -> None:
        if config.init_lora_weights not in _WEIGHT_INITS:
            raise InputError(
                "init-needs-weights",
                where="lora.init_lora_weights",
                what=f"'{config.init_lora_weights}' reads 16-bit weights, the base has 4 bits",
                fix="use true or gaussian",
            )
        config.fan_in_fan_out = False  # the packed weight is [out, in] for GPT-2's Conv1D too
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def _fused_adapter(self) -> str | None:
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1:
            return None
        name = active[0]
        plain = name not in self.lora_variant and not self.lora_bias[name]
        return name if plain else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        name = None if args or kwargs else self._fused_adapter()
        base = self.get_base_layer()
        if name is None or not isinstance(base, Linear4bit):
            return super().forward(x, *args, **kwargs)
        dropout = self.lora_dropout[name]
        probability = dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0
        return lora_forward(
            base,
            x,
            (
                _weight(self.lora_A[name]),
                _weight(self.lora_B[name]),
                self.scaling[name],
                probability,
            ),
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: rounding ``W + sBA`` back to 4 bits would lose most of what was learned."""
        raise ModelError(
            "merge-into-4bit",
            where=type(self).__name__,
            what="an adapter cannot be merged into packed 4-bit weights without losing it",
            fix="keep the adapter beside the base, or merge it into the 16-bit base with PEFT",
        )

    def extra_repr(self) -> str:
        """Rank, alpha and dropout of each adapter, for ``print(model)``."""
        return ", ".join(
            f"{name}: r={self.r[name]}, lora_alpha={self.lora_alpha[name]},"
            f" scaling={self.scaling[name]:g}"
            for name in self.lora_A
        )


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module, nn.Linear)
    return module.weight


def install() -> None:
    """Wraps the two hooks once; called when the first quantized model is made, never at import."""
    # not exported by PEFT's types, but the global that its dispatch looks up
    dispatch = peft_lora_model.dispatch_default  # pyright: ignore[reportPrivateImportUsage]
    if not getattr(dispatch, _MARK, False):

        def dispatch_fourbit(
            target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any
        ) -> nn.Module | None:
            base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
            if isinstance(base, QuantizedLinear) and kwargs.get("parameter_name") is None:
                kwargs.pop("parameter_name", None)
                return LoraLinear4bit(target, adapter_name, config=config, **kwargs)
            return dispatch(target, adapter_name, config=config, **kwargs)

        setattr(dispatch_fourbit, _MARK, True)
        peft_lora_model.dispatch_default = dispatch_fourbit  # pyright: ignore[reportPrivateImportUsage]

    count = PeftModel.get_nb_trainable_parameters
    if not getattr(count, _MARK, False):

        def count_fourbit(self: PeftModel) -> tuple[int, int]:
            if any(isinstance(module, QuantizedLinear) for module in self.modules()):
                return parameter_counts(self)
            return count(self)

        setattr(count_fourbit, _MARK, True)
        PeftModel.get_nb_trainable_parameters = count_fourbit


def lora_config(settings: LoraSettings, *, task_type: str | None = "CAUSAL_LM") -> LoraConfig:
    """The PEFT configuration of ``settings``."""
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # PEFT takes floats in practice
        lora_dropout=settings.lora_dropout,
        target_modules=settings.target_modules,
        exclude_modules=settings.exclude_modules,
        modules_to_save=settings.modules_to_save,
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern=dict(settings.alpha_pattern),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=settings.init_lora_weights,
        task_type=task_type,
    )


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """``name -> (in_features, out_features)`` of every linear layer an adapter could sit on."""
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            shapes[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            shapes[name] = (module.weight.shape[0], module.weight.shape[1])
    return shapes


def head_name(model: PreTrainedModel) -> str | None:
    """The output projection's module name."""
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None)


def planned_targets(model: PreTrainedModel, settings: LoraSettings) -> dict[str, tuple[int, int]]:
    """Which layers will carry an adapter, with their shapes; see `resolve_targets`."""
    if settings.modules_to_save:
        names = [name for name, _ in model.named_modules()]
        for wanted in settings.modules_to_save:
            if not any(n == wanted or n.endswith("." + wanted) for n in names):
                raise InputError(
                    "no-such-module",
                    where="lora.modules_to_save",
                    what=f"'{wanted}' is no module of this model",
                    fix="known: " + ", ".join(sorted({n.rsplit(".", 1)[-1] for n in names})[:20]),
                )
    return resolve_targets(linear_shapes(model), settings, head=head_name(model))


def add_adapter(
    model: PreTrainedModel, settings: LoraSettings, *, low_cpu_mem_usage: bool = False
) -> PeftModel:
    """`peft.get_peft_model` with our settings; what is trained is float32.

    Args:
        model: the frozen base.
        settings: the adapter.
        low_cpu_mem_usage: make the adapter on meta (for planning).

    Raises:
        InputError: targets that match nothing or no linear layer, or ranks above a layer's
            dimensions.
    """
    planned_targets(model, settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on settings that we choose ourselves
        try:
            wrapped = get_peft_model(
                model, lora_config(settings), low_cpu_mem_usage=low_cpu_mem_usage
            )
        except ValueError as error:
            if not str(error).startswith("Target module "):
                raise
            raise InputError(
                "target-not-linear",
                where="lora.target_modules",
                what=f"'{settings.target_modules}' also matches modules that are no linear layers",
                fix="match whole layer names only, e.g. .*_proj",
            ) from error
    assert isinstance(wrapped, PeftModel)
    for parameter in wrapped.parameters():
        # modules_to_save are copied in the base's dtype
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return wrapped


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside PEFT's wrapper, or the model itself."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Every layer with an adapter, by its name without PEFT's prefix."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def saved_modules(model: nn.Module) -> dict[str, ModulesToSaveWrapper]:
    """Modules that are trained whole (`modules_to_save`), by name without PEFT's prefix."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }


def head_weight(head: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of an output projection; None when it is not a plain linear layer."""
    if isinstance(head, ModulesToSaveWrapper):
        names = [] if head.disable_adapters else head.active_adapters
        active = [name for name in names if name in head.modules_to_save]
        head = head.modules_to_save[active[0]] if active else head.original_module
    if type(head) is not nn.Linear or not torch.is_floating_point(head.weight):
        return None
    return head.weight, head.bias
