"""A mixture's experts in few bits: one 3-D weight ``[E, out, in]``, each expert quantized alone.

transformers 5 keeps the experts of a layer in one parameter, which no linear layer covers:
bitsandbytes leaves them in 16 bits. Here the parameter ``name`` becomes uint8 (or int8) of shape
``[E, *packed]`` with ``name_absmax [E, b]`` and, with double quantization,
``name_nested_absmax [E, m]`` and ``name_nested_offset [E, 1]``, float32 scales as their bits in
int32. bitsandbytes has no format for this; ours on disk is the one in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fourbit import ops
from fourbit.errors import ModelError
from fourbit.linear import (
    STACK_SCALES,
    ExpertStack,
    QuantizedLinear,
    autocast_input,
    declare_stack,
    expert_stacks,
)

ExpertAdapter = Callable[[int], tuple[Tensor, Tensor, float]]
"""Expert index to ``(lora_A [r, in], lora_B [out, r], scaling)``."""
_ADAPTERS = "_fourbit_expert_adapters"


@contextmanager
def attach_adapter(module: nn.Module, name: str, adapter: ExpertAdapter) -> Iterator[None]:
    """Inside, products with stack ``name`` of ``module`` include the adapter."""
    attached = module.__dict__.setdefault(_ADAPTERS, {})
    attached[name] = adapter
    try:
        yield
    finally:
        del attached[name]


def empty_stack_(module: nn.Module, name: str, stack: ExpertStack) -> None:
    """Replaces parameter ``name`` by empty packed parameters on the meta device."""
    experts = stack.shape[0]
    layer = _one_expert(stack)
    for key in ("weight", *layer.scale_names):
        own: Tensor | None = getattr(layer, key)
        if own is not None:
            empty = torch.empty((experts, *own.shape), dtype=own.dtype, device="meta")
            module.register_parameter(
                _stack_name(name, key), nn.Parameter(empty, requires_grad=False)
            )
    declare_stack(module, name, stack)


def pack_stack(stack: ExpertStack, weight: Tensor, *, name: str) -> dict[str, Tensor]:
    """The parameters of a stack, by what is appended to its name.

    Args:
        stack: the format.
        weight: floating ``[E, out, in]``.
        name: of the weight, for errors.

    Raises:
        ModelError: another shape, or NaN or Inf in an expert.
    """
    if tuple(weight.shape) != stack.shape:
        raise ModelError(
            "mismatched-weights",
            where=name,
            what=f"{name} has shape {list(weight.shape)}, config.json says {list(stack.shape)}",
            fix="use the config.json that belongs to the weights",
        )
    layer = _one_expert(stack)
    packed: dict[str, Tensor] = {}
    for index in range(stack.shape[0]):
        tensors = layer.quantized(weight[index], name=f"{name}[{index}]")
        for key, tensor in tensors.items():
            ending = _stack_name("", key)
            if ending not in packed:
                packed[ending] = tensor.new_empty((stack.shape[0], *tensor.shape))
            packed[ending][index] = tensor
    return packed


def expert_linear(module: nn.Module, name: str, index: int, x: Tensor) -> Tensor:
    """``x · dequant(W[index])ᵀ``: ``[..., in]`` to ``[..., out]``; saves no floating weight.

    With an adapter attached (`attach_adapter`), plus ``scaling · (x · Aᵀ) · Bᵀ`` of that expert.
    """
    stack = expert_stacks(module)[name]
    adapter = module.__dict__.get(_ADAPTERS, {}).get(name)
    x = autocast_input(x)
    inner = x if stack.compute_dtype is None else x.to(stack.compute_dtype)
    weight, absmax, nested, offset = _slices(module, name, index)
    if stack.quant.is_int8:
        y = ops.linear_int8(inner, weight, absmax, None, threshold=stack.quant.llm_int8_threshold)
        if adapter is not None:
            lora_A, lora_B, scaling = adapter(index)
            xa = torch.nn.functional.linear(inner, lora_A.to(inner.dtype))
            y = y + torch.nn.functional.linear(xa, lora_B.to(inner.dtype)) * scaling
        return y.to(x.dtype)
    assert absmax is not None
    form = {"blocksize": stack.quant.blocksize, "quant_type": stack.quant.quant_type}
    scales = (weight, absmax, nested, offset)
    if adapter is None:
        y = ops.linear_4bit(inner, scales, None, out_features=stack.shape[1], **form)
    else:
        y = ops.lora_linear_4bit(inner, scales, None, (*adapter(index), 0.0), **form)
    return y.to(x.dtype)


def dequantize_stack(module: nn.Module, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """The weight ``[E, out, in]`` in ``dtype`` (default: what it was before)."""
    stack = expert_stacks(module)[name]
    dtype = dtype or stack.original_dtype
    experts = []
    for index in range(stack.shape[0]):
        weight, absmax, nested, offset = _slices(module, name, index)
        assert absmax is not None
        if stack.quant.is_int8:
            experts.append(ops.dequantize_int8(weight, absmax, dtype=dtype))
            continue
        experts.append(
            ops.dequantize_4bit(
                (weight, absmax, nested, offset),
                blocksize=stack.quant.blocksize,
                quant_type=stack.quant.quant_type,
                shape=stack.shape[1:],
                dtype=dtype,
            )
        )
    return torch.stack(experts)


def restore_stack_(module: nn.Module, name: str, dtype: torch.dtype | None = None) -> None:
    """Makes parameter ``name`` a floating one again, dequantized."""
    weight = dequantize_stack(module, name, dtype)
    for ending in STACK_SCALES:
        module._parameters.pop(name + ending, None)
    setattr(module, name, nn.Parameter(weight, requires_grad=False))
    del expert_stacks(module)[name]


def routes(top_k_index: Tensor, experts: int) -> list[tuple[int, Tensor, Tensor]]:
    """``(expert, rows, slots)`` of every expert that some token chose.

    Args:
        top_k_index: int ``[T, k]``; an index of ``experts`` or above means none.
        experts: E.
    """
    if isinstance(top_k_index, FakeTensor):
        # planning: without values every expert is taken to get an equal share
        share = -(-top_k_index.numel() // experts)
        rows = torch.zeros(share, dtype=torch.int64, device=top_k_index.device)
        return [(expert, rows, rows) for expert in range(experts)]
    hit = [expert for expert in top_k_index.unique().tolist() if expert < experts]
    found = []
    for expert in hit:
        rows, slots = torch.where(top_k_index == expert)
        found.append((expert, rows, slots))
    return found


def _one_expert(stack: ExpertStack) -> QuantizedLinear:
    _, out_features, in_features = stack.shape
    return QuantizedLinear.make(
        in_features, out_features, bias=False, quant=stack.quant, device="meta"
    )


def _stack_name(name: str, key: str) -> str:
    return name + key.removeprefix("weight")


def _slices(
    module: nn.Module, name: str, index: int
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    scales = (getattr(module, name + end, None) for end in STACK_SCALES)
    absmax, nested, offset = (None if s is None else s[index] for s in scales)
    return getattr(module, name)[index], absmax, nested, offset
