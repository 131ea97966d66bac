"""Decoder layers of known architectures computed by `fourbit.fused`, wherever that is the same.

A loaded model's layers become instances of a subclass of their own class: names, files, hooks on
them and gradient checkpointing stay as they are, nothing in transformers is changed. At every call
the layer looks at what it holds; anything the blocks do not compute (a cache, dropout of the
architecture, several adapters, hooks inside) takes transformers' own forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from fourbit import native
from fourbit.fused import (
    AttentionBlock,
    MlpBlock,
    Norm,
    Projection,
    attention_block,
    mlp_block,
    record_path,
)
from fourbit.fused.parts import draw_seeds, only_observes
from fourbit.fused.projection import Group
from fourbit.fused.residual import Residual
from fourbit.integrations.anatomy import (
    CACHE_ARGUMENTS,
    FUSED_FROM,
    LayerNames,
    activation_of,
    cache_among,
    dropout_free,
    heads_of,
    known_layers,
    layer_names,
    norm_of,
    residual_scale,
)
from fourbit.integrations.attention import NAME as ATTENTION
from fourbit.integrations.attention import use_native_attention, visible_ranges
from fourbit.integrations.peft import LoraLinear4bit, plain_adapter
from fourbit.linear import Linear4bit
from fourbit.ops import fused_dtypes, has_kernels

_READ = frozenset(
    (
        *CACHE_ARGUMENTS,
        "adapter_names",
        "attention_mask",
        "cache_position",
        "encoder_attention_mask",
        "encoder_hidden_states",
        "hidden_states",
        "output_attentions",
        "position_embeddings",
        "position_ids",
        "use_cache",
    )
)
"""Arguments of a layer that are read here, or that change nothing beside the others."""
_TOO_SLOW = ("scalar",)
"""Instruction sets for which torch's own operations are faster than our kernels."""


class _Generic(Exception):
    """Why a layer is left to transformers."""


def use_fast_paths(model: PreTrainedModel) -> None:
    """Native attention wherever transformers' interface is used, fused layers where they are known.

    Only where there are kernels for the device, and only for an attention that nobody chose; what
    is computed stays the same.
    """
    if use_native_attention(model):
        use_fused_layers(model)


def use_fused_layers(model: nn.Module) -> int:
    """Turns the decoder layers of a loaded model into fused ones where there are kernels for it.

    Returns:
        How many layers were turned.
    """
    layers = known_layers(model)
    devices = {parameter.device for parameter in model.parameters()}
    if not layers or not all(map(_has_fast_kernels, devices)):
        return 0
    for layer in layers:
        if not isinstance(layer, _FusedLayer):
            layer.__class__ = fused_class(type(layer))
    return len(layers)


def _has_fast_kernels(device: torch.device) -> bool:
    slow = device.type == "cpu" and native.isa() in _TOO_SLOW
    return device.type in ("cpu", "cuda") and has_kernels(device) and not slow


def has_fused_layers(model: nn.Module) -> bool:
    """Whether decoder layers were turned into fused ones."""
    return any(isinstance(module, _FusedLayer) for module in model.modules())


class _FusedLayer:
    """Mixed in before transformers' decoder layer."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's own signature; ``[B, T, D]`` to ``[B, T, D]``."""
        assert isinstance(self, nn.Module)
        try:
            arguments = _bound(type(self), hidden_states, args, kwargs)
            _require_known(type(self), arguments)
            attention, mlp = _blocks(self, hidden_states, arguments)
        except _Generic as reason:
            record_path(self, f"generic: {reason}")
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        record_path(self, "fused")
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        return mlp_block(attention_block(flat, attention), mlp).view(hidden_states.shape)


@lru_cache(maxsize=64)
def fused_class(cls: type) -> type:
    """Our subclass of a decoder layer's class; found again by its name when unpickled."""
    name = f"{cls.__module__.rpartition('.')[2].removeprefix('modeling_')}__{cls.__name__}"
    attributes = {"__module__": __name__, "__qualname__": name, FUSED_FROM: cls}
    return type(cls.__name__, (_FusedLayer, cls), attributes)


def __getattr__(name: str) -> Any:
    family, separator, cls = name.partition("__")
    if not separator or not family or not cls:
        raise AttributeError(name)
    module = __import__(f"transformers.models.{family}.modeling_{family}", fromlist=[cls])
    return fused_class(getattr(module, cls))


@lru_cache(maxsize=64)
def _signature(cls: type) -> inspect.Signature:
    return inspect.signature(vars(cls)[FUSED_FROM].forward)


def _bound(cls: type, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return kwargs
    try:
        arguments = dict(_signature(cls).bind(None, x, *args, **kwargs).arguments)
    except TypeError:
        raise _Generic("unknown arguments") from None
    return {name: value for name, value in arguments.items() if name != "kwargs"} | kwargs


def _require_known(cls: type, arguments: Mapping[str, Any]) -> None:
    """A parameter that a later transformers adds, or names anew, is not passed over in silence."""
    for name in arguments.keys() - _READ:
        if name in _signature(cls).parameters and arguments[name] is not None:
            raise _Generic(f"an unknown argument: {name}")


def _blocks(
    layer: nn.Module, x: Tensor, arguments: Mapping[str, Any]
) -> tuple[AttentionBlock, MlpBlock]:
    """What this call computes.

    Raises:
        _Generic: the blocks do not compute it.
    """
    names = layer_names(layer)
    if names is None:
        raise _Generic("another class")
    _require_plain_call(layer, names, x, arguments)
    attention = layer.get_submodule(names.attention)
    mlp = layer.get_submodule(names.mlp)
    _require_untouched(attention, mlp)
    scale = residual_scale(layer, names)
    batch = x.shape[0]
    qkv = _projections(attention, names.qkv, x)
    out = _projections(attention, (names.out,), x)
    up = _projections(mlp, names.up, x)
    down = _projections(mlp, (names.down,), x)
    activation = activation_of(_child(mlp, names.activation))
    if activation is None:
        raise _Generic("another activation")
    # in the order in which transformers' forward calls the layers
    seeds = [draw_seeds(group) for group in (qkv, out, up, down)]
    first, shared = _visible(arguments.get("attention_mask"), x)
    groups = [Group(g, s) for g, s in zip((qkv, out, up, down), seeds, strict=True)]
    head_norms = names.head_norms and tuple(_norm(attention, name, x) for name in names.head_norms)
    return (
        AttentionBlock(
            norm=_norm(layer, names.norm_attention, x),
            qkv=groups[0],
            heads=heads_of(attention),
            head_norms=head_norms,  # type: ignore[arg-type]
            rotary=_rotary(names, arguments, x),
            first=first,
            batch=batch,
            out=groups[1],
            residual=Residual(_after(layer, names.norm_after_attention, x), scale),
            keep=_cache(cache_among(arguments), attention),
            shared=shared,
        ),
        MlpBlock(
            norm=_norm(layer, names.norm_mlp, x),
            up=groups[2],
            down=groups[3],
            activation=activation,
            gated=names.gated,
            residual=Residual(_after(layer, names.norm_after_mlp, x), scale),
        ),
    )


def _require_plain_call(
    layer: nn.Module, names: LayerNames, x: Tensor, arguments: Mapping[str, Any]
) -> None:
    if x.dtype not in fused_dtypes(x.device) or x.dim() != 3:
        raise _Generic("device or dtype")
    if torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling():
        raise _Generic("autocast or compilation")
    if arguments.get("output_attentions") or arguments.get("encoder_hidden_states") is not None:
        raise _Generic("unusual arguments")
    if not dropout_free(layer, names):
        raise _Generic("dropout of the architecture")
    if "adapter_names" in arguments:
        raise _Generic("several adapters")
    config: Any = layer.get_submodule(names.attention).config
    if config._attn_implementation != ATTENTION:
        raise _Generic(f"attention is {config._attn_implementation}")


def _require_untouched(*modules: nn.Module) -> None:
    """No hooks inside, no replaced forward: what is skipped must not have been asked for."""
    for module in modules:
        if (
            module._forward_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
            or not all(map(only_observes, module._forward_pre_hooks.values()))
        ):
            raise _Generic("hooks inside")


def _child(module: nn.Module, name: str) -> nn.Module:
    child = getattr(module, name)
    if not isinstance(child, nn.Module):
        raise _Generic(f"{name} is no module")
    _require_untouched(child)
    return child


def _norm(module: nn.Module, name: str, x: Tensor) -> Norm:
    norm = norm_of(_child(module, name))
    if norm is None:
        raise _Generic("another norm")
    for tensor in (norm.weight, norm.bias):
        if tensor is not None and (tensor.dtype != x.dtype or _trained(tensor)):
            raise _Generic("a norm in another dtype, or trained")
    return norm


def _trained(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


def _after(layer: nn.Module, name: str | None, x: Tensor) -> Norm | None:
    return None if name is None else _norm(layer, name, x)


def _rotary(
    names: LayerNames, arguments: Mapping[str, Any], x: Tensor
) -> tuple[Tensor, Tensor] | None:
    if not names.rotary:
        return None
    tables = arguments.get("position_embeddings")
    if tables is None:
        raise _Generic("no rotary tables")
    cos, sin = (table.to(x.dtype).reshape(-1, table.shape[-1]).contiguous() for table in tables)
    return cos, sin


def _cache(cache: Any, attention: nn.Module) -> Callable[[Tensor, Tensor], object] | None:
    """What puts keys and values into a cache that has none of this layer yet."""
    if cache is None:
        return None
    index: Any = attention.layer_idx
    if type(cache) is not DynamicCache or cache.get_seq_length(index) > 0:
        raise _Generic("a cache in use")

    def keep(key: Tensor, value: Tensor) -> None:
        cache.update(key.transpose(1, 2), value.transpose(1, 2), index)  # which copies

    return keep


def _visible(mask: Any, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    ranges = visible_ranges(mask)
    if ranges is None or (ranges.shared is not None and torch.is_grad_enabled()):
        raise _Generic("a mask of another kind")
    first, shared = (
        None if tensor is None else tensor.expand(x.shape[0], -1).contiguous() for tensor in ranges
    )
    return first, shared


def _projections(module: nn.Module, names: tuple[str, ...], x: Tensor) -> tuple[Projection, ...]:
    return tuple(_projection(_child(module, name), x) for name in names)


def _projection(module: nn.Module, x: Tensor) -> Projection:
    if isinstance(module, LoraLinear4bit) or type(module) is PeftLoraLinear:
        return _adapted(module, x)
    return Projection(_frozen_base(module, x))


def _frozen_base(module: nn.Module, x: Tensor) -> Linear4bit | nn.Linear:
    if isinstance(module, Linear4bit):
        if module.compute_dtype not in (None, x.dtype):
            raise _Generic("another compute dtype")
        if module.uses_other_weight:
            raise _Generic("a weight at hand")
    elif type(module) is not nn.Linear or module.weight.dtype != x.dtype:
        raise _Generic(f"a projection is {type(module).__name__}")
    if any(map(_trained, module.parameters(recurse=False))):
        raise _Generic("a trained projection")
    return module


def _adapted(module: PeftLoraLinear, x: Tensor) -> Projection:
    inside = module.get_base_layer()
    _require_untouched(inside)
    base = _frozen_base(inside, x)
    if module.merged:
        raise _Generic("a merged adapter")
    for hook in module._forward_pre_hooks.values():
        hook(module, (x,))
    if module.disable_adapters or not any(n in module.lora_A for n in module.active_adapters):
        return Projection(base)
    parts = plain_adapter(module)
    if parts is None:
        raise _Generic("adapters that are no single LoRA")
    A, B, scaling, dropout = parts
    return Projection(base, A, B, scaling, dropout)
