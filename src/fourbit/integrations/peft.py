"""PEFT hands our quantized linear to our fused layer; counting tells the truth.

Hooks used, each with a test in ``tests/integrations/test_peft.py``:

- ``peft.tuners.lora.model.dispatch_default`` is wrapped. It is looked up as a module global at
  call time, so one wrap covers ``get_peft_model``, ``PeftModel.from_pretrained``,
  ``model.add_adapter``, ``load_adapter`` and TRL. (``LoraConfig._register_custom_module`` is the
  documented way, but holds for one config object only and is not saved.)
- ``PeftModel.get_nb_trainable_parameters`` is wrapped: it would count packed bytes as parameters.
- Those of `fourbit.integrations.tuners`: other methods, merging and unloading.
- ``convert_peft_config_for_transformers`` is wrapped: on some mixtures it reads ``gate_proj`` as
  the experts' and leaves the shared expert's layers without adapters. On packed experts, what is
  named is what is targeted; experts are named in ``target_parameters``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import peft.tuners.lora.model as peft_lora_model
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from peft.utils import transformers_weight_conversion as weight_conversion
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fourbit.errors import InputError
from fourbit.integrations import tuners
from fourbit.integrations.experts import LoraExperts
from fourbit.integrations.merging import ExactMerge, packed_base
from fourbit.integrations.starts import (
    Start,
    check_start,
    orthogonal_pair,
    principal,
    principal_part,
    reproducible,
)
from fourbit.linear import Linear4bit, QuantizedLinear, expert_stacks, parameter_counts
from fourbit.lora import LoraSettings, lora_forward, resolve_targets

_MARK = "_fourbit_hook"
_WRAPPING = ("base_layer", "original_module", "token_adapter")
"""What PEFT puts into the names of the base's own parameters."""
_UNSHOWN = {
    "kasa_config": "KaSA cuts directions out of the stored weight, which 4 bits cannot hold",
    "use_bdlora": "BD-LoRA makes its blocks in the dtype of the weight, which is packed",
    "arrow_config": "Arrow has not been shown to compute right on packed weights",
}
"""LoRA variants that are refused, with the reason."""


class LoraLinear4bit(ExactMerge, PeftLoraLinear):
    """PEFT's LoRA layer on a packed base: same module tree and files, fused arithmetic in 4 bits.

    One active, unmerged, plain adapter takes the fused operation, one that starts from the weights
    (`fourbit.integrations.starts`) too; everything else (several adapters, DoRA, mixed batches,
    disabled adapters) is PEFT's own code, unchanged.
    """

    other_param_names = (*PeftLoraLinear.other_param_names, "lora_start_A", "lora_start_B")

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Adds one adapter.

        Raises:
            InputError: a start or a variant that needs the 16-bit weight.
        """
        check_start(config.init_lora_weights)
        config.fan_in_fan_out = False  # the packed weight is [out, in] for GPT-2's Conv1D too
        for key, what in _UNSHOWN.items():
            if getattr(config, key, None):
                raise _needs_weights(key, what)
        if config.use_dora and principal(config.init_lora_weights):
            raise _needs_weights("use_dora", "DoRA and a start from the weights exclude each other")
        if "lora_start_A" not in self._modules:
            self.add_starts()
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def add_starts(self) -> None:
        """Room for the fixed half of adapters that start from the weight."""
        self.lora_start_A, self.lora_start_B = nn.ParameterDict(), nn.ParameterDict()

    def pissa_init(self, adapter_name: str, init_lora_weights: str) -> None:
        """The adapter starts at the principal part of the weight; the base stays as it is."""
        A, B = self.lora_A[adapter_name], self.lora_B[adapter_name]
        base, r = packed_base(self), self.r[adapter_name]
        assert base is not None
        if _weight(A).is_meta or base.weight.is_meta:  # a file's values will come
            start_A, start_B = _weight(A).detach(), _weight(B).detach()
        else:
            start_A, start_B = principal_part(
                base.dequantize(torch.float32),
                r=r,
                scaling=self.scaling[adapter_name],
                name=init_lora_weights,
            )
            _weight(A).data, _weight(B).data = start_A.clone(), start_B.clone()
        self.lora_start_A[adapter_name] = nn.Parameter(start_A, requires_grad=False)
        self.lora_start_B[adapter_name] = nn.Parameter(start_B, requires_grad=False)
        self.lora_variant[adapter_name] = Start()

    def olora_init(self, adapter_name: str) -> None:
        """The same with QR in place of the singular values."""
        self.pissa_init(adapter_name, "olora")

    def orthogonal_init(self, adapter_name: str) -> None:
        """Random A and B with B·A = 0."""
        assert self.in_features is not None
        assert self.out_features is not None
        A, B = orthogonal_pair(self.in_features, self.out_features, r=self.r[adapter_name])
        if not _weight(self.lora_A[adapter_name]).is_meta:
            _weight(self.lora_A[adapter_name]).data = A
            _weight(self.lora_B[adapter_name]).data = B

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the weight, ``[out, in]``."""
        delta = super().get_delta_weight(adapter)
        if adapter in self.lora_start_A:
            start = self.lora_start_B[adapter].float() @ self.lora_start_A[adapter].float()
            delta = delta - (start * self.scaling[adapter]).to(delta.dtype)
        return delta

    @contextmanager
    def _unmerged_base_weight(self, safe_merge: bool = False) -> Iterator[Tensor]:
        # PEFT would unmerge and merge again; the packed layer still knows its weight.
        base = packed_base(self)
        assert base is not None
        yield base.dequantize(torch.float32)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        adapter = None if args or kwargs else plain_adapter(self)
        base = self.get_base_layer()
        if adapter is None or not isinstance(base, Linear4bit):
            return super().forward(x, *args, **kwargs)
        return lora_forward(base, x, adapter)

    def extra_repr(self) -> str:
        """Rank, alpha and dropout of each adapter, for ``print(model)``."""
        return ", ".join(
            f"{name}: r={self.r[name]}, lora_alpha={self.lora_alpha[name]},"
            f" scaling={self.scaling[name]:g}"
            for name in self.lora_A
        )


def plain_adapter(layer: PeftLoraLinear) -> tuple[Tensor, Tensor, float, float] | None:
    """A, B, scaling and dropout of a layer's adapter when one plain one is active and unmerged."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(active) != 1:
        return None
    name = active[0]
    starts = getattr(layer, "lora_start_A", {})
    if layer.lora_bias[name] or (name in layer.lora_variant and name not in starts):
        return None
    dropout = layer.lora_dropout[name]
    probability = dropout.p if layer.training and isinstance(dropout, nn.Dropout) else 0.0
    A, B = _weight(layer.lora_A[name]), _weight(layer.lora_B[name])
    if name in starts:
        A = torch.cat([A, starts[name].to(A.dtype)])
        ends = getattr(layer, "lora_start_B")  # noqa: B009  # there whenever the other is
        B = torch.cat([B, -ends[name].to(B.dtype)], dim=1)
    return A, B, layer.scaling[name], probability


def _needs_weights(key: str, what: str) -> InputError:
    return InputError(
        "init-needs-weights",
        where=key,
        what=what,
        fix="leave it out",
    )


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module, nn.Linear)
    return module.weight


def install() -> None:
    """Wraps the hooks once; called when the first quantized model is made, never at import."""
    tuners.install()
    # not exported by PEFT's types, but the global that its dispatch looks up
    dispatch = peft_lora_model.dispatch_default  # pyright: ignore[reportPrivateImportUsage]
    if not getattr(dispatch, _MARK, False):

        def dispatch_fourbit(
            target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any
        ) -> nn.Module | None:
            base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
            if kwargs.get("parameter_name") in expert_stacks(base):
                return LoraExperts(target, adapter_name, config=config, **kwargs)
            if isinstance(base, QuantizedLinear):
                if kwargs.get("parameter_name") is not None:
                    raise _needs_weights(
                        "target_parameters", "the parameter of this layer is packed"
                    )
                kwargs.pop("parameter_name", None)
                return LoraLinear4bit(target, adapter_name, config=config, **kwargs)
            return dispatch(target, adapter_name, config=config, **kwargs)

        setattr(dispatch_fourbit, _MARK, True)
        peft_lora_model.dispatch_default = dispatch_fourbit  # pyright: ignore[reportPrivateImportUsage]

    _install_literal_targets()
    count = PeftModel.get_nb_trainable_parameters
    if not getattr(count, _MARK, False):

        def count_fourbit(self: PeftModel) -> tuple[int, int]:
            if any(isinstance(module, QuantizedLinear) for module in self.modules()):
                return parameter_counts(self)
            return count(self)

        setattr(count_fourbit, _MARK, True)
        PeftModel.get_nb_trainable_parameters = count_fourbit


def check_quantizable(model: nn.Module) -> None:
    """Refuses adapters that could not go on working on a base quantized under them.

    Raises:
        InputError: naming the first layer, or a start that no reload would find again.
    """
    for config in (getattr(model, "peft_config", None) or {}).values():
        start = getattr(config, "init_lora_weights", True)
        if not reproducible(start):
            raise InputError(
                "start-not-reproducible",
                where="init_lora_weights",
                what=f"'{start}' changed the base in a way that reloading does not repeat",
                fix="use pissa or olora, or quantize first and start from the packed weights",
            )
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        plain = type(module) is PeftLoraLinear and not module.merged
        on_experts = isinstance(module, ParamWrapper)
        if plain or not on_experts and not isinstance(module.get_base_layer(), (nn.Linear, Conv1D)):
            continue
        raise InputError(
            "adapter-before-quantization",
            where=plain_name(name),
            what=f"a {type(module).__name__} layer that is merged or of another method sits here",
            fix="quantize first, then add the adapter; or unmerge it",
        )


def adapter_modules(model: nn.Module) -> list[str]:
    """Names of everything that adapters consist of."""
    return [
        f"{name}.{child}"
        for name, module in model.named_modules()
        if isinstance(module, nn.Module) and isinstance(module, BaseTunerLayer)
        for child in module._modules
        if child != "base_layer"
    ]


def base_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What remains of a state dict without PEFT: the base's own tensors under their own names.

    Raises:
        InputError: adapters are merged, so that the packed bytes are not in the state dict.
    """
    parts = [(name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    merged = next((name for name, layer in parts if layer.merged), None)
    if merged is not None:
        raise InputError(
            "merged-base",
            where=plain_name(merged),
            what="the base cannot be saved while adapters are merged into it",
            fix="call unmerge_adapter() first, or save what merge_and_unload() returns",
        )
    added = [f"{name}." for name in adapter_modules(model)]
    added += [
        f"{name}.{child}."
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for child in module._modules
        if child not in _WRAPPING
    ]
    return {
        plain_name(name): tensor
        for name, tensor in state.items()
        if not name.startswith(tuple(added))
    }


def fuse(model: nn.Module) -> None:
    """Gives PEFT's LoRA layers whose base has just been quantized our arithmetic."""
    for module in model.modules():
        if type(module) is PeftLoraLinear and isinstance(module.get_base_layer(), QuantizedLinear):
            # The object stays: an optimizer or a hook may already know it.
            module.__class__ = LoraLinear4bit
            module.fan_in_fan_out = module.is_target_conv_1d_layer = False
            assert isinstance(module, LoraLinear4bit)
            module.add_starts()


def plain_name(name: str) -> str:
    """A module's or parameter's name in the model before PEFT wrapped it."""
    parts = name.removeprefix("base_model.model.").split(".")
    return ".".join(part for part in parts if part not in _WRAPPING)


def _install_literal_targets() -> None:
    convert = weight_conversion.convert_peft_config_for_transformers
    if getattr(convert, _MARK, False):
        return

    def convert_fourbit(peft_config: Any, model: nn.Module, conversions: Any) -> None:
        if not any(expert_stacks(module) for module in model.modules()):
            convert(peft_config, model, conversions)

    setattr(convert_fourbit, _MARK, True)
    weight_conversion.convert_peft_config_for_transformers = convert_fourbit


def lora_config(settings: LoraSettings, *, task_type: str | None = "CAUSAL_LM") -> LoraConfig:
    """The PEFT configuration of ``settings``."""
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # PEFT takes floats in practice
        lora_dropout=settings.lora_dropout,
        target_modules=settings.target_modules,
        target_parameters=settings.target_parameters,
        exclude_modules=settings.exclude_modules,
        modules_to_save=settings.modules_to_save,
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern=dict(settings.alpha_pattern),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=settings.init_lora_weights,  # type: ignore[arg-type]  # checked there
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


def _check_start_on(
    model: PreTrainedModel, targets: Mapping[str, object], settings: LoraSettings
) -> None:
    if not principal(settings.init_lora_weights):
        return
    plain = [n for n in targets if not isinstance(model.get_submodule(n), QuantizedLinear)]
    if plain:
        # PEFT would change the base's weights, and the run could be neither verified nor reloaded.
        raise InputError(
            "init-changes-base",
            where="lora.init_lora_weights",
            what=f"'{settings.init_lora_weights}' changes the weights of {plain[0]}, which is not"
            " quantized",
            fix="use method: qlora and quantized targets only, or true",
        )


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
    _check_start_on(model, planned_targets(model, settings), settings)
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


def trained_token_count(model: nn.Module) -> int:
    """Values of single tokens that are trained (`trainable_token_indices`)."""
    count = 0
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer) and module.tied_adapter is None:
            base = module.get_base_layer()
            wide = base.embedding_dim if isinstance(base, nn.Embedding) else base.in_features
            assert isinstance(wide, int)
            count += sum(len(indices) for indices in module.token_indices.values()) * wide
    return count


def head_weight(head: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of an output projection; None when it is not a plain linear layer."""
    if isinstance(head, ModulesToSaveWrapper):
        names = [] if head.disable_adapters else head.active_adapters
        active = [name for name in names if name in head.modules_to_save]
        head = head.modules_to_save[active[0]] if active else head.original_module
    if type(head) is not nn.Linear or not torch.is_floating_point(head.weight):
        return None
    return head.weight, head.bias
