"""Our attention as an implementation that transformers' models can be switched to.

Registered under the name "fourbit" through `AttentionInterface` and `AttentionMaskInterface`, so it
serves every architecture that asks for its attention there. The mask that a model would get anyway
is made and looked at: where each query sees one range of keys that ends at itself (causal, packed,
sliding, padded), the range goes to the kernel, else the mask goes to PyTorch's attention.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fourbit.errors import ModelError
from fourbit.ops import fused_dtypes, has_kernels
from fourbit.ops.attention import attention

NAME = "fourbit"

_RANGES = "_fourbit_ranges"
_DEVICES = ("cpu", "cuda")


def use_native_attention(model: PreTrainedModel) -> bool:
    """Switches a model to our attention where there are kernels and nothing else changes.

    On a CPU it is faster than PyTorch's with every instruction set, the plainest included; on a
    GPU it takes packed documents without a matrix of who sees whom. Left as they are: models that
    were given another implementation than the automatic one, and architectures whose code names
    "sdpa" (it then does something for it that we would not get).

    Args:
        model: loaded, with the implementation that transformers chose by itself.

    Returns:
        Whether the model now uses it.
    """
    if model.device.type not in _DEVICES or not has_kernels(model.device):
        return False
    if not _automatic(model) or not model._can_set_attn_implementation():
        return False
    if any(re.search(r"""["']sdpa["']""", code) for code in _sources(model)):
        return False
    register()
    model.set_attn_implementation(NAME)
    return model.config._attn_implementation == NAME


def register() -> None:
    """Makes ``attn_implementation="fourbit"`` known to transformers."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def _automatic(model: PreTrainedModel) -> bool:
    chosen = model.config._attn_implementation
    if chosen == "eager":
        # what transformers takes for capped scores, because PyTorch has no kernel for them
        text = model.config.get_text_config()
        capped = getattr(text, "attn_logit_softcapping", None) is not None
        return capped and not any("s_aux" in code for code in _sources(model))
    return chosen == "sdpa"


def _sources(model: PreTrainedModel) -> list[str]:
    names = {type(part).__module__ for part in model.modules() if isinstance(part, PreTrainedModel)}
    return [inspect.getsource(sys.modules[name]) for name in sorted(names) if name in sys.modules]


_whole_rows: list[bool] = []


@contextmanager
def whole_rows() -> Iterator[None]:
    """Inside, every row is one document without padding, as a plan's tensors cannot say."""
    _whole_rows.append(True)
    try:
        yield
    finally:
        _whole_rows.pop()


def attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask that PyTorch's attention would get, with the ranges that it amounts to beside it.

    A model that slices or changes the mask loses the ranges and gets PyTorch's attention.
    """
    window = kwargs.get("local_size")
    if _whole_rows and (window is None or window > kwargs.get("kv_length", 0)):
        return None
    mask = sdpa_mask(*args, **kwargs)
    if mask is None or not _may_be_ranges(mask, kwargs):
        return mask
    first = _ranges(mask[:, 0], kwargs.get("attention_mask"))
    if first is not None:
        _mark(mask, Ranges(first))
    return mask


def shared_beginning_mask(first: Tensor, shared: Tensor) -> Tensor:
    """A mask for rows that hold one text and several continuations of it, for any implementation.

    Args:
        first: int32 ``[B, T]``, as `fourbit.ops.attention` has it.
        shared: likewise.

    Returns:
        bool ``[B, 1, T, T]``, which transformers hands to the layers as it is.
    """
    at = torch.arange(first.shape[1], device=first.device)
    own = (at <= at[:, None]) & (at >= first[..., None])
    mask = (own | (at < shared[..., None]))[:, None]
    _mark(mask, Ranges(first, shared))
    return mask


class Ranges(NamedTuple):
    """Which keys queries see, as `fourbit.ops.attention` wants it told.

    Attributes:
        first: int32 ``[B, T]``, or None where that is key 0 for all.
        shared: int32 ``[B, T]`` or None.
    """

    first: Tensor | None = None
    shared: Tensor | None = None


def _mark(mask: Tensor, ranges: Ranges) -> None:
    setattr(mask, _RANGES, (ranges, mask._version))


def visible_ranges(mask: Tensor | None) -> Ranges | None:
    """What the mask that a layer is given says.

    Args:
        mask: of `attention_mask` or `shared_beginning_mask`, or whatever the model made of it;
            None: causal.

    Returns:
        None where it is a mask of another kind.
    """
    if mask is None:
        return Ranges()
    ranges, version = getattr(mask, _RANGES, (None, 0))
    return ranges if mask._version == version else None


def _may_be_ranges(mask: Tensor, kwargs: dict[str, Any]) -> bool:
    return (
        mask.device.type in _DEVICES
        and mask.dtype == torch.bool
        and mask.dim() == 4
        and mask.shape[1] == 1
        and mask.shape[2] == mask.shape[3]
        and isinstance(kwargs.get("q_offset", 0), int)
        and kwargs.get("q_offset", 0) == kwargs.get("kv_offset", 0) == 0
        and not mask.is_inference()
        and not torch.compiler.is_compiling()
    )


def _ranges(seen: Tensor, padding: Tensor | None) -> Tensor | None:
    """The first key that each query sees, int32 ``[B, T]``; None if some see no such range.

    Args:
        seen: bool ``[B, T, T]``.
        padding: bool ``[B, T]``, False for padding. What padding sees is left open: nobody sees it.
    """
    length = seen.shape[-1]
    known = not isinstance(seen, FakeTensor)  # a plan's has no values to look at
    at = torch.arange(length, dtype=torch.int32, device=seen.device)
    nothing = ~seen.any(-1)
    if padding is not None and padding.shape[-1] == length:
        hidden = ~padding.bool()
        forbidden = (seen & hidden[:, None]).any()
        if known and forbidden:
            return None
        nothing = nothing | hidden
    first = seen.to(torch.uint8).argmax(-1).to(torch.int32)
    first = torch.where(nothing, length, first)
    expected = (at >= first[..., None]) & (at <= at[:, None])
    found = seen & ~nothing[..., None]
    if known and not torch.equal(expected, found):
        return None
    return first


def attention_forward(  # noqa: PLR0913  # as transformers calls it
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as `AttentionInterface` calls it: ours where it can be, else PyTorch's.

    Args:
        module: the attention layer.
        query: ``[B, H, T, D]``.
        key: ``[B, KV, S, D]``.
        value: ``[B, KV, S, Dv]``.
        attention_mask: of `attention_mask`, or whatever the model made of it.
        dropout: of the weights.
        scaling: of the scores.
        is_causal: what a missing mask means; None: as the layer says.
        softcap: of the scores.
        kwargs: what else PyTorch's attention understands.

    Returns:
        ``[B, T, H, Dv]`` and None, for there are no weights to show.

    Raises:
        ModelError: the layer has attention sinks, which neither knows.
    """
    if kwargs.get("s_aux") is not None:
        raise ModelError(
            "attention-sinks",
            where=type(module).__name__,
            what=f'attn_implementation "{NAME}" has no attention sinks',
            fix="use attn_implementation: eager",
        )
    query, key, value = _autocast(query, key, value)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    ranges = visible_ranges(attention_mask)
    if ranges is not None and not (causal or ranges.first is not None):
        ranges = None
    if ranges is not None and ranges.shared is not None and torch.is_grad_enabled():
        ranges = None
    if ranges is not None and not dropout and _plain(kwargs) and _fits(query, key, value):
        out = attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            first=ranges.first,
            scale=scaling,
            softcap=softcap or 0.0,
            shared=ranges.shared,
        )
        return out, None
    if softcap:
        out = _capped(
            (query, key, value),
            attention_mask,
            causal=causal,
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap=softcap,
            dropout=dropout,
        )
        return out, None
    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **kwargs,
    )


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As PyTorch's attention would see them: mixed precision computes it in the lower one."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors)


def _plain(kwargs: dict[str, Any]) -> bool:
    return (
        kwargs.get("position_bias") is None
        and kwargs.get("cache") is None
        and not kwargs.get("output_attentions", False)
    )


def _fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return (
        (query.device.type == "cpu" or has_kernels(query.device))
        and query.dtype in fused_dtypes(query.device)
        and query.dtype == key.dtype == value.dtype
        and query.shape[2] == key.shape[2] == value.shape[2]
        and query.shape[0] == key.shape[0]
        and query.shape[1] % key.shape[1] == 0
        and query.shape[2] > 1
    )


def _capped(
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    *,
    causal: bool,
    scale: float,
    softcap: float,
    dropout: float,
) -> Tensor:
    """Capped scores in plain PyTorch, for what the kernel does not take: a cache, any mask."""
    query, key, value = tensors
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * (scale / softcap))
    if mask is None and causal and query.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        least = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (torch.dropout(weights, dropout, dropout > 0) @ value).transpose(1, 2).contiguous()
