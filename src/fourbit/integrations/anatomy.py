"""Where the parts of known architectures are: what fused training and the decoder need to know.

A decoder layer is known by its exact class, never by its names or shapes; a subclass may compute
something else. Parts are looked up by name at every call, because PEFT replaces them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fourbit.fused.parts import Heads, Norm

CACHE_ARGUMENTS = ("cache", "past_key_values")
"""What a forward calls the keys and values it goes on from: transformers 5.24 changed the name."""


@dataclass(frozen=True)
class LayerNames:
    """Names inside one decoder layer: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``.

    Attributes:
        attention: the attention module of the layer.
        qkv: its input projections: three, or one that holds query, key and value in this order.
        out: its output projection.
        mlp: the feed-forward module of the layer.
        up: its input projections: gate and up, one that holds both in this order, or one alone.
        gated: whether the activation of the first half multiplies the second.
        down: its output projection.
        activation: the activation module of the feed-forward.
        norm_attention: norm before attention.
        norm_mlp: norm before the feed-forward.
        norm_after_attention: norm of attention's result before it is added.
        norm_after_mlp: likewise of the feed-forward's result.
        head_norms: norms of each head's query and key, in the attention module.
        residual_scale: attribute of the layer by which results are multiplied before being added.
        dropouts: dropout modules and probabilities that must be off, ``layer.path`` each.
        rotary: whether positions enter by rotation of query and key.
    """

    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    out: str = "o_proj"
    mlp: str = "mlp"
    up: tuple[str, ...] = ("gate_proj", "up_proj")
    gated: bool = True
    down: str = "down_proj"
    activation: str = "act_fn"
    norm_attention: str = "input_layernorm"
    norm_mlp: str = "post_attention_layernorm"
    norm_after_attention: str | None = None
    norm_after_mlp: str | None = None
    head_norms: tuple[str, str] | None = None
    residual_scale: str | None = None
    dropouts: tuple[str, ...] = ("self_attn.attention_dropout",)
    rotary: bool = True


_LLAMA = LayerNames()
_NORMED_HEADS = replace(_LLAMA, head_norms=("q_norm", "k_norm"))
_FOUR_NORMS = replace(
    _LLAMA,
    norm_after_attention="post_attention_layernorm",
    norm_mlp="pre_feedforward_layernorm",
    norm_after_mlp="post_feedforward_layernorm",
)

_LAYERS: dict[str, LayerNames] = {
    "llama.LlamaDecoderLayer": _LLAMA,
    "mistral.MistralDecoderLayer": _LLAMA,
    "qwen2.Qwen2DecoderLayer": _LLAMA,
    "qwen3.Qwen3DecoderLayer": _NORMED_HEADS,
    "gemma.GemmaDecoderLayer": _LLAMA,
    "gemma2.Gemma2DecoderLayer": _FOUR_NORMS,
    "gemma3.Gemma3DecoderLayer": replace(_FOUR_NORMS, head_norms=("q_norm", "k_norm")),
    "granite.GraniteDecoderLayer": replace(_LLAMA, residual_scale="residual_multiplier"),
    "phi3.Phi3DecoderLayer": replace(
        _LLAMA,
        qkv=("qkv_proj",),
        up=("gate_up_proj",),
        activation="activation_fn",
        dropouts=("self_attn.attention_dropout", "resid_attn_dropout", "resid_mlp_dropout"),
    ),
    "gpt2.GPT2Block": LayerNames(
        attention="attn",
        qkv=("c_attn",),
        out="c_proj",
        up=("c_fc",),
        gated=False,
        down="c_proj",
        activation="act",
        norm_attention="ln_1",
        norm_mlp="ln_2",
        dropouts=("attn.attn_dropout", "attn.resid_dropout", "mlp.dropout"),
        rotary=False,
    ),
}

# By class, as for layers: gemma's norm multiplies by 1 + weight.
_NORM_OFFSETS = {
    "llama.LlamaRMSNorm": 0.0,
    "mistral.MistralRMSNorm": 0.0,
    "qwen2.Qwen2RMSNorm": 0.0,
    "qwen3.Qwen3RMSNorm": 0.0,
    "granite.GraniteRMSNorm": 0.0,
    "phi3.Phi3RMSNorm": 0.0,
    "gemma.GemmaRMSNorm": 1.0,
    "gemma2.Gemma2RMSNorm": 1.0,
    "gemma3.Gemma3RMSNorm": 1.0,
}
FUSED_FROM = "_fourbit_fused_from"
"""Class attribute by which our subclass of a decoder layer names the class it stands for."""
_ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
}


def _known_as(cls: type) -> str:
    """``llama.LlamaDecoderLayer`` for transformers' own class of that name; imports nothing."""
    prefix, _, module = cls.__module__.rpartition(".")
    family = prefix.removeprefix("transformers.models.")
    return f"{family}.{cls.__qualname__}" if module == f"modeling_{family}" else ""


def layer_names(layer: nn.Module) -> LayerNames | None:
    """The names inside a decoder layer of a known class (or of our subclass of it), else None."""
    return _LAYERS.get(_known_as(vars(type(layer)).get(FUSED_FROM, type(layer))))


def known_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of known classes, in order; empty for an unknown architecture."""
    return [module for module in model.modules() if layer_names(module) is not None]


def norm_of(module: nn.Module) -> Norm | None:
    """What a norm computes; None for an unknown class."""
    if type(module) is nn.LayerNorm:
        if module.weight is None or module.bias is None:
            return None
        return Norm(module.weight, module.bias, module.eps, 0.0)
    offset = _NORM_OFFSETS.get(_known_as(type(module)))
    if offset is None:
        return None
    eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return None if eps is None else Norm(weight, None, float(eps), offset)


def activation_of(module: nn.Module) -> str | None:
    """``silu`` or ``gelu_tanh``; None for any other."""
    return _ACTIVATIONS.get(type(module).__name__)


def heads_of(attention: nn.Module) -> Heads:
    """Shape and scores of an attention module of a known layer."""
    config: Any = attention.config
    heads = config.num_attention_heads
    head_dim = attention.head_dim
    window = getattr(attention, "sliding_window", None)
    if not hasattr(attention, "sliding_window") and hasattr(config, "sliding_window"):
        window = config.sliding_window
    return Heads(
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=int(head_dim),  # type: ignore[arg-type]
        scale=float(attention.scaling),  # type: ignore[arg-type]
        softcap=float(getattr(attention, "attn_logit_softcapping", None) or 0.0),
        sliding_window=window,
    )


def dropout_free(layer: nn.Module, names: LayerNames) -> bool:
    """Whether none of the layer's own dropouts (not those of adapters) is at work."""
    if not layer.training:
        return True
    for path in names.dropouts:
        value: Any = layer
        for part in path.split("."):
            value = getattr(value, part, 0.0)
        if (value.p if isinstance(value, nn.Dropout) else float(value)) > 0:
            return False
    return True


def residual_scale(layer: nn.Module, names: LayerNames) -> float:
    """What results are multiplied by before they are added to the layer's input."""
    return 1.0 if names.residual_scale is None else float(getattr(layer, names.residual_scale))


@lru_cache(maxsize=64)
def cache_argument(cls: type[nn.Module]) -> str:
    """The name under which this class' forward takes a cache: one of `CACHE_ARGUMENTS`."""
    parameters = inspect.signature(cls.forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in parameters), CACHE_ARGUMENTS[-1])


def cache_among(arguments: Mapping[str, Any]) -> Any:
    """The cache that a forward was given, by whichever name; None without one."""
    given = (arguments.get(name) for name in CACHE_ARGUMENTS)
    return next((cache for cache in given if cache is not None), None)


def rotary_tables(
    model: PreTrainedModel, layer: nn.Module, positions: Tensor, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``cos`` and ``sin``, ``[B, T, rotary_dim]`` in ``dtype``, as ``layer`` is given them.

    Args:
        model: the transformers model the layer belongs to.
        layer: a layer of an architecture with rotation.
        positions: int64 ``[B, T]``.
        dtype: of the tables.
    """
    rotary: Any = getattr(model.base_model, "rotary_emb")  # noqa: B009
    like = torch.empty(0, dtype=dtype, device=positions.device)
    kinds = getattr(rotary, "layer_types", None)
    kind = getattr(layer.get_submodule("self_attn"), "layer_type", None)
    if kinds and kind is not None:
        return rotary(like, positions, kind)
    return rotary(like, positions)


@dataclass(frozen=True)
class Ends:
    """What a known model does before its first and after its last layer.

    Attributes:
        embedding: the token table.
        embedding_scale: what embeddings are multiplied by.
        positions: the table of learned positions, added to the embeddings; None for none.
        last_norm: the norm before the head.
        logit_scale: what logits are multiplied by.
        logit_softcap: of the logits, after scaling; 0 for none.
    """

    embedding: nn.Module
    embedding_scale: float
    positions: nn.Module | None
    last_norm: nn.Module
    logit_scale: float
    logit_softcap: float


_MODELS = {
    "llama.LlamaForCausalLM",
    "mistral.MistralForCausalLM",
    "qwen2.Qwen2ForCausalLM",
    "qwen3.Qwen3ForCausalLM",
    "gemma.GemmaForCausalLM",
    "gemma2.Gemma2ForCausalLM",
    "gemma3.Gemma3ForCausalLM",
    "granite.GraniteForCausalLM",
    "phi3.Phi3ForCausalLM",
    "gpt2.GPT2LMHeadModel",
}


def ends_of(model: PreTrainedModel) -> Ends | None:
    """The two ends of a causal LM of a known class; None for any other."""
    if _known_as(type(model)) not in _MODELS:
        return None
    inner: Any = model.base_model
    config: Any = model.config
    embedding = model.get_input_embeddings()
    scale = getattr(embedding, "embed_scale", None)
    if isinstance(scale, Tensor):  # gemma's, rounded as its table is
        weight: Any = getattr(embedding, "weight")  # noqa: B009
        multiplier = float(scale.to(weight.dtype))
    else:
        multiplier = float(getattr(config, "embedding_multiplier", None) or 1.0)
    gpt2 = hasattr(inner, "ln_f")
    return Ends(
        embedding=embedding,
        embedding_scale=multiplier,
        positions=inner.wpe if gpt2 else None,
        last_norm=inner.ln_f if gpt2 else inner.norm,
        logit_scale=1.0 / float(getattr(config, "logits_scaling", None) or 1.0),
        logit_softcap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
    )


def positions_fixed(model: PreTrainedModel) -> bool:
    """Whether the rotation of a position is the same however long the sequence becomes."""
    rotary: Any = getattr(model.base_model, "rotary_emb", None)
    kinds = getattr(rotary, "rope_type", "default")
    names = kinds.values() if isinstance(kinds, dict) else (kinds,)
    return not any("dynamic" in name or name == "longrope" for name in names)
