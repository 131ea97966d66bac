"""What a decoder needs of a loaded model, found by class and checked: no numbers are touched.

Both decoders read a model through here, so they know the same architectures, refuse the same
things with the same words, and look at adapters in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fourbit.fused.parts import Heads, Norm
from fourbit.integrations import anatomy
from fourbit.integrations.peft import LoraLinear4bit, plain_adapter
from fourbit.linear import Linear4bit, Linear8bit, QuantizedLinear

Base = Linear4bit | Linear8bit | nn.Linear | Conv1D
"""Layers that a decoder multiplies by; the plain ones exactly of these classes."""


class UnknownModel(Exception):
    """A decoder cannot run this model; the message says why."""


@dataclass(frozen=True)
class Linear:
    """One linear layer with at most one adapter on it.

    Attributes:
        name: of the layer, for messages.
        base: what it multiplies by.
        adapter: ``lora_A`` ``[r, K]``, ``lora_B`` ``[N, r]`` and the scaling of the active one.
    """

    name: str
    base: Base
    adapter: tuple[Tensor, Tensor, float] | None

    @property
    def bias(self) -> Tensor | None:
        """``[N]``, or None."""
        bias = getattr(self.base, "bias", None)
        return bias.detach() if isinstance(bias, Tensor) else None

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, K)``."""
        if isinstance(self.base, Conv1D):
            depth, width = self.base.weight.shape
            return width, depth
        return self.base.out_features, self.base.in_features


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    Attributes:
        module: the layer itself.
        qkv: its input projections, as `anatomy.LayerNames` has them.
        out: output projection of attention.
        up: input projections of the feed-forward.
        down: its output projection.
        before_attention: norm before attention.
        after_attention: norm of attention's result.
        before_mlp: norm before the feed-forward.
        after_mlp: norm of its result.
        head_norms: of each head's query and key.
        heads: shape and scores.
        residual: what results are multiplied by before being added.
        activation: ``silu`` or ``gelu_tanh``.
        gated: whether the activated first half multiplies the second.
        rotary: whether positions enter by rotation.
        kind: which of the model's rotations it is given; None where there is one.
    """

    module: nn.Module
    qkv: tuple[Linear, ...]
    out: tuple[Linear, ...]
    up: tuple[Linear, ...]
    down: tuple[Linear, ...]
    before_attention: Norm
    after_attention: Norm | None
    before_mlp: Norm
    after_mlp: Norm | None
    head_norms: tuple[Norm, Norm] | None
    heads: Heads
    residual: float
    activation: str
    gated: bool
    rotary: bool
    kind: str | None


@dataclass(frozen=True)
class Parts:
    """A whole model.

    Attributes:
        source: the transformers model.
        layers: its decoder layers, in order.
        table: the token table.
        positions: the table of learned positions, where there is one.
        last: the norm before the head.
        head: the head.
        ends: scales and softcap at both ends.
    """

    source: PreTrainedModel
    layers: tuple[Layer, ...]
    table: nn.Embedding
    positions: nn.Embedding | None
    last: Norm
    head: Linear
    ends: anatomy.Ends

    @property
    def dtype(self) -> torch.dtype:
        """Of activations: that of the token table."""
        return self.table.weight.dtype


def read_model(model: PreTrainedModel) -> Parts:
    """The parts of a loaded model, its one active adapter included.

    Raises:
        UnknownModel: the architecture, a layer or an adapter is none that a decoder computes.
    """
    ends, modules = anatomy.ends_of(model), anatomy.known_layers(model)
    if ends is None or not modules:
        raise UnknownModel(f"{type(model).__name__} is no architecture that the engine knows")
    if not anatomy.positions_fixed(model):
        raise UnknownModel("its rotation depends on the length of the text")
    table = _pick(ends.embedding)
    if not isinstance(table, nn.Embedding) or isinstance(table, BaseTunerLayer):
        raise UnknownModel(f"its token table is a {type(table).__name__}")
    layers = tuple(_layer(module) for module in modules)
    inner = model.base_model
    known = sum(1 for module in inner.modules() if anatomy.layer_names(module) is not None)
    if known != getattr(model.config, "num_hidden_layers", known):
        raise UnknownModel("some of its layers are of another class")
    head = model.get_output_embeddings()
    if head is None:
        raise UnknownModel("it has no head")
    places = ends.positions
    if places is not None and (
        type(places) is not nn.Embedding or places.weight.dtype != table.weight.dtype
    ):
        raise UnknownModel(f"its positions are a {type(places).__name__}")
    return Parts(
        source=model,
        layers=layers,
        table=table,
        positions=places,
        last=_norm(ends.last_norm),
        head=_linear(head, "the head"),
        ends=ends,
    )


def _pick(module: nn.Module) -> nn.Module:
    """What stands at a place: the trained copy of a module that is trained whole."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    if any(hooks) or "forward" in module.__dict__:
        raise UnknownModel(f"a hook sits on a {type(module).__name__}")
    if not isinstance(module, ModulesToSaveWrapper):
        return module
    names = [] if module.disable_adapters else module.active_adapters
    active = [name for name in names if name in module.modules_to_save]
    return _pick(module.modules_to_save[active[0]] if active else module.original_module)


def _norm(module: nn.Module) -> Norm:
    found = anatomy.norm_of(_pick(module))
    if found is None:
        raise UnknownModel(f"a norm is a {type(module).__name__}")
    return found


def _layer(module: nn.Module) -> Layer:
    names = anatomy.layer_names(module)
    assert names is not None
    _pick(module)
    attention, mlp = module.get_submodule(names.attention), module.get_submodule(names.mlp)
    _pick(attention)
    _pick(mlp)
    activation = anatomy.activation_of(mlp.get_submodule(names.activation))
    if activation is None:
        raise UnknownModel(f"its activation is {mlp.get_submodule(names.activation)}")

    def after(name: str | None) -> Norm | None:
        return None if name is None else _norm(module.get_submodule(name))

    def head_norms() -> tuple[Norm, Norm] | None:
        if names.head_norms is None:
            return None
        query, key = names.head_norms
        return _norm(attention.get_submodule(query)), _norm(attention.get_submodule(key))

    def group(parent: nn.Module, members: tuple[str, ...]) -> tuple[Linear, ...]:
        return tuple(_linear(parent.get_submodule(name), name) for name in members)

    return Layer(
        module=module,
        qkv=group(attention, names.qkv),
        out=group(attention, (names.out,)),
        up=group(mlp, names.up),
        down=group(mlp, (names.down,)),
        before_attention=_norm(module.get_submodule(names.norm_attention)),
        after_attention=after(names.norm_after_attention),
        before_mlp=_norm(module.get_submodule(names.norm_mlp)),
        after_mlp=after(names.norm_after_mlp),
        head_norms=head_norms(),
        heads=anatomy.heads_of(attention),
        residual=anatomy.residual_scale(module, names),
        activation=activation,
        gated=names.gated,
        rotary=names.rotary,
        kind=getattr(attention, "layer_type", None),
    )


def _linear(module: nn.Module, name: str) -> Linear:
    module = _pick(module)
    adapter = None
    if isinstance(module, BaseTunerLayer):
        module, adapter = _adapter(module, name)
        module = _pick(module)
    known = isinstance(module, (Linear4bit, Linear8bit)) or type(module) in (nn.Linear, Conv1D)
    if not known:
        raise UnknownModel(f"{name} is a {type(module).__name__}")
    assert isinstance(module, Base)
    return Linear(name, module, adapter)


def _adapter(
    layer: BaseTunerLayer, name: str
) -> tuple[nn.Module, tuple[Tensor, Tensor, float] | None]:
    """The base of a layer with adapters, and A, B and scaling of the active one."""
    if type(layer) not in (PeftLoraLinear, LoraLinear4bit):
        raise UnknownModel(f"{name} carries a {type(layer).__name__}")
    assert isinstance(layer, PeftLoraLinear)
    base = layer.get_base_layer()
    active = [found for found in layer.active_adapters if found in layer.lora_A]
    if layer.merged and isinstance(base, QuantizedLinear):
        raise UnknownModel("adapters are merged into packed weights")
    if layer.merged or layer.disable_adapters or not active:
        return base, None
    if len(active) > 1:
        raise UnknownModel("more than one adapter is active")
    parts = plain_adapter(layer)
    if parts is None:
        raise UnknownModel(f"{name} carries another kind of LoRA")
    A, B, scaling, _ = parts
    return base, (A.detach(), B.detach(), float(scaling))
