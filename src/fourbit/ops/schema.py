"""Definitions, fakes and autograd of the ops; kernels are registered elsewhere, by device.

Legend: M rows of activations, N out_features, K in_features, r rank; n = N*K weights in
b = ceil(n / blocksize) blocks, m = ceil(b / 256) second-level scales.

Scales travel as tensors: without double quantization ``absmax`` is float32 ``[b]`` (or the same
bits as int32, the form in which modules hold them) and the two ``nested_*`` tensors are absent;
with it ``absmax`` is uint8 ``[b]``, ``nested_absmax`` is float32/int32 ``[m]`` and
``nested_offset`` float32/int32 ``[1]``. INT8 has one ``absmax`` per row, float32/int32 ``[N]``.

A faster kernel is added with ``LIBRARY.impl(name, fn, "CPU" | "CUDA")``; callers never change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

LIBRARY = torch.library.Library("fourbit", "DEF")

_SCALES = "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset"
_FORMAT = "int blocksize, str quant_type"

LIBRARY.define(f"quantize_4bit(Tensor weight, {_FORMAT}) -> (Tensor, Tensor)")
LIBRARY.define("quantize_absmax(Tensor absmax) -> (Tensor, Tensor, Tensor)")
LIBRARY.define(f"dequantize_4bit({_SCALES}, {_FORMAT}, SymInt[] shape, ScalarType dtype) -> Tensor")
LIBRARY.define(
    f"linear_4bit(Tensor x, {_SCALES}, Tensor? bias, {_FORMAT}, SymInt out_features) -> Tensor"
)
LIBRARY.define("quantize_int8(Tensor weight) -> (Tensor, Tensor)")
LIBRARY.define("dequantize_int8(Tensor codes, Tensor absmax, ScalarType dtype) -> Tensor")
LIBRARY.define(
    "linear_int8(Tensor x, Tensor weight, Tensor? absmax, Tensor? bias, float threshold) -> Tensor"
)
LIBRARY.define("dropout_mask(Tensor x, Tensor seed, float dropout) -> Tensor")
LIBRARY.define(
    f"lora_linear_4bit(Tensor x, {_SCALES}, Tensor? bias, Tensor lora_A, Tensor lora_B,"
    f" Tensor? seed, {_FORMAT}, float scaling, float dropout) -> (Tensor, Tensor)"
)

_Fn = TypeVar("_Fn", bound=Callable[..., Any])


CPU_KERNELS: dict[str, Callable[..., Any]] = {}
"""What serves each op on a CPU: a plan runs it to see what it allocates."""


def default_kernel(name: str) -> Callable[[_Fn], _Fn]:
    """Registers the plain PyTorch kernel of an op: it serves every device without a faster one."""

    def register(function: _Fn) -> _Fn:
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        CPU_KERNELS.setdefault(name, function)
        return function

    return register


def dropout_mask(x: Tensor, *, seed: Tensor, dropout: float) -> Tensor:
    """The keep-mask of LoRA dropout, already divided by ``1 - dropout``; same shape as ``x``.

    A function of ``seed`` alone, so that backward draws it again instead of saving it. An op of
    its own, because a compiler that traces backward cannot read the value of ``seed``.
    """
    return torch.ops.fourbit.dropout_mask(x, seed, dropout)


@torch.library.register_fake("fourbit::quantize_4bit", lib=LIBRARY)
def _(weight: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    numel = weight.numel()
    packed = weight.new_empty(((numel + 1) // 2,), dtype=torch.uint8)
    return packed, weight.new_empty((-(-numel // blocksize),), dtype=torch.float32)


@torch.library.register_fake("fourbit::quantize_absmax", lib=LIBRARY)
def _(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes = absmax.new_empty(absmax.shape, dtype=torch.uint8)
    nested = absmax.new_empty((-(-absmax.numel() // 256),), dtype=torch.float32)
    return codes, nested, absmax.new_empty((1,), dtype=torch.float32)


@torch.library.register_fake("fourbit::dequantize_4bit", lib=LIBRARY)
def _(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    torch._check(packed.dtype == torch.uint8, lambda: "packed weights are uint8")
    return packed.new_empty(tuple(shape), dtype=dtype)


@torch.library.register_fake("fourbit::quantize_int8", lib=LIBRARY)
def _(weight: Tensor) -> tuple[Tensor, Tensor]:
    codes = weight.new_empty(weight.shape, dtype=torch.int8)
    return codes, weight.new_empty((weight.shape[0],), dtype=torch.float32)


@torch.library.register_fake("fourbit::dequantize_int8", lib=LIBRARY)
def _(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    torch._check(codes.dtype == torch.int8, lambda: "INT8 weights are int8")
    return codes.new_empty(codes.shape, dtype=dtype)


@torch.library.register_fake("fourbit::linear_int8", lib=LIBRARY)
def _(
    x: Tensor, weight: Tensor, absmax: Tensor | None, bias: Tensor | None, threshold: float
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("fourbit::dropout_mask", lib=LIBRARY)
def _(x: Tensor, seed: Tensor, dropout: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("fourbit::linear_4bit", lib=LIBRARY)
def _(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    blocksize: int,
    quant_type: str,
    out_features: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("fourbit::lora_linear_4bit", lib=LIBRARY)
def _(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    blocksize: int,
    quant_type: str,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], lora_B.shape[0]))
    return y, x.new_empty((*x.shape[:-1], lora_A.shape[0]))


def _dequantize(
    saved: Sequence[Tensor | None], ctx: Any, shape: Sequence[int], like: Tensor
) -> Tensor:
    return torch.ops.fourbit.dequantize_4bit(
        *saved, ctx.blocksize, ctx.quant_type, list(shape), like.dtype
    )


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, absmax, nested_absmax, nested_offset, bias, blocksize, quant_type, n = inputs
    ctx.save_for_backward(packed, absmax, nested_absmax, nested_offset)
    ctx.blocksize, ctx.quant_type = blocksize, quant_type
    ctx.shape = (n, x.shape[-1])


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ _dequantize(ctx.saved_tensors, ctx, ctx.shape, grad)
    if ctx.needs_input_grad[5]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, None, None, None, grad_bias, None, None, None


torch.library.register_autograd(
    "fourbit::linear_4bit", _linear_backward, setup_context=_linear_setup, lib=LIBRARY
)


def _int8_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, absmax, _bias, _threshold = inputs
    ctx.save_for_backward(weight, absmax, x if weight.requires_grad else None)


def _int8_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, absmax, x = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    flat = grad.reshape(-1, grad.shape[-1])
    if ctx.needs_input_grad[0]:
        codes, scales = (weight, absmax) if absmax is not None else quantize_int8(weight)
        grad_x = grad @ torch.ops.fourbit.dequantize_int8(codes, scales, grad.dtype)
    if ctx.needs_input_grad[1]:
        grad_weight = (flat.t() @ x.reshape(-1, x.shape[-1]).to(flat.dtype)).to(weight.dtype)
    if ctx.needs_input_grad[3]:
        grad_bias = flat.sum(0)
    return grad_x, grad_weight, None, grad_bias, None


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Row-wise INT8: codes int8 ``[N, K]`` and float32 absmax ``[N]``."""
    return torch.ops.fourbit.quantize_int8(weight)


torch.library.register_autograd(
    "fourbit::linear_int8", _int8_backward, setup_context=_int8_setup, lib=LIBRARY
)


def _lora_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, packed, absmax, nested_absmax, nested_offset, _bias, lora_A, lora_B, seed = inputs[:9]
    ctx.blocksize, ctx.quant_type, ctx.scaling, ctx.dropout = inputs[9:]
    # Floating tensors kept for backward: x and x·Aᵀ. The weight is dequantized again, the
    # dropout mask drawn again.
    ctx.save_for_backward(
        packed, absmax, nested_absmax, nested_offset, x, output[1], lora_A, lora_B, seed
    )
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _lora_backward(
    ctx: Any, grad_MN: Tensor | None, _grad_xa: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_MN is None:
        return (None,) * 13
    *weight, x, xa, lora_A, lora_B, seed = ctx.saved_tensors
    dtype = grad_MN.dtype
    grad = grad_MN.reshape(-1, grad_MN.shape[-1])
    flat_x = x.reshape(-1, x.shape[-1])
    mask = None
    if seed is not None and ctx.dropout > 0:
        mask = dropout_mask(flat_x, seed=seed, dropout=ctx.dropout)

    grad_xa = (grad @ lora_B.to(dtype)).mul_(ctx.scaling)
    grad_B = (grad.t() @ xa.reshape(-1, xa.shape[-1])).mul_(ctx.scaling).to(lora_B.dtype)
    grad_A = (grad_xa.t() @ (flat_x if mask is None else flat_x * mask)).to(lora_A.dtype)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        shape = (lora_B.shape[0], x.shape[-1])
        grad_x = grad @ _dequantize(weight, ctx, shape, grad)
        if mask is None:
            grad_x.addmm_(grad_xa, lora_A.to(dtype))
        else:
            grad_x.add_((grad_xa @ lora_A.to(dtype)).mul_(mask))
        grad_x = grad_x.view(x.shape)
    if ctx.needs_input_grad[5]:
        grad_bias = grad.sum(0)
    none = (None,) * 5
    return (grad_x, None, None, None, None, grad_bias, grad_A, grad_B, *none)


torch.library.register_autograd(
    "fourbit::lora_linear_4bit", _lora_backward, setup_context=_lora_setup, lib=LIBRARY
)
