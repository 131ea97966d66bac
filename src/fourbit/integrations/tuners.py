"""Every other PEFT method on a packed base: made to work, or refused before it computes nonsense.

Hooks used, each with a test in ``tests/integrations/test_tuners.py``:

- ``BaseTuner.inject_adapter``: all methods that put layers on a model pass here. A method that has
  not been shown to compute on a packed base what it computes on a float one is refused.
- ``BaseTuner._unload_and_optionally_merge``: a merged and unloaded model becomes a plain one.
- ``PeftModel.load_adapter``: an adapter that took its start out of a 16-bit base is refused on
  packed weights, where that start is unknown.
- ``LoraModel.add_weighted_adapter``: adapters with a start (PiSSA, OLoRA) are refused where their
  two halves would be mixed without it.
- ``prepare_model_for_kbit_training``: PEFT asks for flags that mean bitsandbytes, and would leave
  our models without gradient checkpointing.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import peft
import torch
from peft import PeftModel
from peft.tuners.ia3.layer import Linear as Ia3Linear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from fourbit.errors import InputError
from fourbit.integrations.merging import (
    ExactMerge,
    FloatLinear,
    FourbitBackend,
    float_model,
    merging_class,
    packed_base,
)
from fourbit.linear import QuantizedLinear

_MARK = "_fourbit_hook"

SUPPORTED = frozenset(
    {
        "ADALORA",
        "BOFT",
        "FOURIERFT",
        "GRALORA",
        "IA3",
        "LN_TUNING",
        "LORA",
        "OFT",
        "RANDLORA",
        "ROAD",
        "TRAINABLE_TOKENS",
        "VBLORA",
        "VERA",
        "WAVEFT",
    }
)
"""Methods whose outputs and gradients a test compares with those on the dequantized weights."""


class _Ia3Linear(Ia3Linear):
    """PEFT casts a feed-forward layer's input to the weight's dtype, which here means to bytes."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        active = [name for name in self.active_adapters if name in self.ia3_l]
        if self.disable_adapters or self.merged or not self.is_feedforward or not active:
            return super().forward(x, *args, **kwargs)
        scale: Any = 1
        for name in active:
            scale = scale * self.ia3_l[name]
        return self.base_layer(x * scale.to(x.dtype), *args, **kwargs)


_OWN_CLASS: dict[type, type] = {Ia3Linear: _Ia3Linear}


def is_packed(module: nn.Module) -> bool:
    """Whether a tuner would put its layer on packed weights here."""
    if isinstance(module, BaseTunerLayer):
        return packed_base(module) is not None
    return isinstance(module, QuantizedLinear)


def install() -> None:
    """Wraps the hooks once."""
    _wrap(BaseTuner, "inject_adapter", _inject)
    _wrap(BaseTuner, "_unload_and_optionally_merge", _unload)
    _wrap(PeftModel, "load_adapter", _load)
    _wrap(LoraModel, "add_weighted_adapter", _add_weighted)
    original = peft.prepare_model_for_kbit_training
    if getattr(original, _MARK, False):
        return
    wrapped = _marked(original, _prepare)
    # Imported by name in the user's script, the old function would still be called from there.
    for module in list(sys.modules.values()):
        if vars(module).get(original.__name__) is original:
            setattr(module, original.__name__, wrapped)


def _wrap(owner: Any, name: str, hook: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    if not getattr(original, _MARK, False):
        setattr(owner, name, _marked(original, hook))


def _marked(original: Callable[..., Any], hook: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    setattr(wrapper, _MARK, True)
    return wrapper


def _inject(
    original: Callable[..., Any],
    tuner: BaseTuner,
    model: nn.Module,
    adapter_name: str,
    *args: Any,
    **kwargs: Any,
) -> None:
    if not any(isinstance(module, (QuantizedLinear, FloatLinear)) for module in model.modules()):
        original(tuner, model, adapter_name, *args, **kwargs)
        return
    config: Any = tuner.peft_config[adapter_name]
    method = str(getattr(config.peft_type, "value", config.peft_type))
    if method not in SUPPORTED:
        create = tuner._create_and_replace

        def guarded(peft_config: Any, name: str, target: nn.Module, *rest: Any, **more: Any) -> Any:
            if is_packed(target):
                raise _unsupported(method)
            return create(peft_config, name, target, *rest, **more)

        tuner._create_and_replace = guarded  # type: ignore[method-assign]
    try:
        original(tuner, model, adapter_name, *args, **kwargs)
    finally:
        vars(tuner).pop("_create_and_replace", None)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and packed_base(module) is not None:
            _adopt(module)


def _unsupported(method: str) -> InputError:
    return InputError(
        "peft-method",
        where="peft_type",
        what=f"{method} has not been shown to compute right on packed weights",
        fix="use LORA, or one of " + ", ".join(sorted(SUPPORTED - {"LORA"})),
    )


def _adopt(module: Any) -> None:
    if isinstance(module, ExactMerge):
        return
    kind = _OWN_CLASS.get(type(module), type(module))
    # The object stays: an optimizer or a hook may already know it.
    module.__class__ = merging_class(kind)
    module.quantization_backend = FourbitBackend()


def _unload(original: Callable[..., Any], tuner: BaseTuner, *args: Any, **kwargs: Any) -> nn.Module:
    had_packed = any(
        isinstance(m, BaseTunerLayer) and packed_base(m) is not None for m in tuner.model.modules()
    )
    model = original(tuner, *args, **kwargs)
    if had_packed and any(isinstance(module, FloatLinear) for module in model.modules()):
        float_model(model)
    return model


def _load(
    original: Callable[..., Any],
    model: PeftModel,
    path: Any,
    adapter_name: str,
    *args: Any,
    **kw: Any,
) -> Any:
    result = original(model, path, adapter_name, *args, **kw)
    if any("lora_start_" in key for key in getattr(result, "missing_keys", ())):
        raise InputError(
            "start-not-saved",
            where=str(path),
            what="the adapter started from 16-bit weights, and the file does not say from where",
            fix="load it on the 16-bit base and call fourbit.quantize_model, or convert it to an"
            " ordinary LoRA (path_initial_model_for_weight_conversion)",
        )
    return result


def _add_weighted(
    original: Callable[..., Any], tuner: LoraModel, adapters: list[str], *args: Any, **kwargs: Any
) -> None:
    for module in tuner.model.modules():
        starts = getattr(module, "lora_start_A", {}) if isinstance(module, LoraLayer) else {}
        for name in adapters:
            if name in starts:
                raise InputError(
                    "start-not-mixable",
                    where="add_weighted_adapter",
                    what=f"adapter '{name}' starts from the weights (PiSSA, OLoRA)",
                    fix="save it with path_initial_model_for_weight_conversion, which makes it an"
                    " ordinary LoRA, and mix that",
                )
    original(tuner, adapters, *args, **kwargs)


def _prepare(
    original: Callable[..., Any],
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    options = gradient_checkpointing_kwargs
    if not any(isinstance(module, QuantizedLinear) for module in model.modules()):
        return original(model, use_gradient_checkpointing, options, **kwargs)
    # Freezes, and holds what is not packed (norms, embeddings, head, biases) in float32.
    model = original(model, False, options, **kwargs)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.original_dtype = torch.float32  # what a weight is expanded to, as the rest
    if use_gradient_checkpointing:
        options = {"use_reentrant": False, **(options or {})}
        if options["use_reentrant"]:
            model.enable_input_require_grads()
        # transformers 5.23 renamed the method; 5.17 has only the old name.
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model
