"""Contracts of the ops: opcheck, shapes without memory, gradients, what is kept for backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fourbit import ops
from fourbit.linear import Linear4bit, QuantizedLinear
from fourbit.lora import lora_forward
from fourbit.ops import schema
from fourbit.quantize import QuantConfig

N, K, RANK = 6, 7, 2

FP32 = {"rtol": 1e-5, "atol": 1e-5}
"""Two float32 products of these sizes summed in different orders."""

BF16_RELATIVE_RMS = 2.0**-7
"""A few bf16 roundings (2^-9 each) of operands, x A^T and the result."""

FP16_RELATIVE_RMS = 2.0**-10
"""The same roundings with 3 more bits of mantissa."""

DROPOUT_SIGMAS = 6
"""A binomial count strays further with probability 2e-9; the seed is fixed anyway."""


def layer(
    device: torch.device, *, double_quant: bool = True, bias: bool = True, **sizes: int
) -> Linear4bit:
    linear = torch.nn.Linear(sizes.get("k", K), sizes.get("n", N), bias=bias, device=device)
    quant = QuantConfig(blocksize=32, double_quant=double_quant)
    return Linear4bit.from_linear(linear.requires_grad_(False), quant)


def adapter(
    device: torch.device, dtype: torch.dtype = torch.float32, **sizes: int
) -> tuple[Tensor, Tensor]:
    lora_A = torch.randn(RANK, sizes.get("k", K), device=device, dtype=dtype, requires_grad=True)
    lora_B = torch.randn(sizes.get("n", N), RANK, device=device, dtype=dtype, requires_grad=True)
    return lora_A, lora_B


def fused(
    x: Tensor, base: Linear4bit, pair: tuple[Tensor, Tensor], *, seed: Tensor | None, p: float
) -> Tensor:
    y, _ = torch.ops.fourbit.lora_linear_4bit(
        x, *base.scales, base.bias, *pair, seed, base.blocksize, base.quant_type, 2.0, p
    )
    return y


def relative_rms(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck_linear(device: torch.device, double_quant: bool, bias: bool) -> None:
    base = layer(device, double_quant=double_quant, bias=bias)
    for x in (
        torch.randn(3, 5, K, device=device, requires_grad=True),
        torch.randn(K, device=device, requires_grad=True),
        torch.randn(0, K, device=device, requires_grad=True),
        torch.randn(5, 3, K, device=device).transpose(0, 1).requires_grad_(),
        torch.randn(4, K, device=device, dtype=torch.bfloat16, requires_grad=True),
    ):
        torch.library.opcheck(
            torch.ops.fourbit.linear_4bit, (x, *base.scales, base.bias, 32, "nf4", N)
        )


@pytest.mark.filterwarnings("ignore:Error detected in")  # anomaly mode of opcheck itself
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_opcheck_lora(device: torch.device, double_quant: bool, bias: bool, dropout: float) -> None:
    base = layer(device, double_quant=double_quant, bias=bias)
    seed = torch.tensor([3]) if dropout else None
    for x in (
        torch.randn(3, 5, K, device=device, requires_grad=True),
        torch.randn(5, 3, K, device=device).transpose(0, 1).requires_grad_(),
    ):
        torch.library.opcheck(
            torch.ops.fourbit.lora_linear_4bit,
            (x, *base.scales, base.bias, *adapter(device), seed, 32, "nf4", 2.0, dropout),
        )


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("shape", [(5, 7), (0,), (1,), (64, 33)])
def test_opcheck_storage(device: torch.device, quant_type: str, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, device=device)
    torch.library.opcheck(torch.ops.fourbit.quantize_4bit, (weight, 32, quant_type))
    packed, absmax = ops.quantize_4bit(weight, blocksize=32, quant_type=quant_type)
    torch.library.opcheck(torch.ops.fourbit.quantize_absmax, (absmax,))
    for scales in ((absmax, None, None), ops.quantize_absmax(absmax)):
        arguments = (packed, *scales, 32, quant_type, list(shape), torch.bfloat16)
        torch.library.opcheck(torch.ops.fourbit.dequantize_4bit, arguments)


def test_opcheck_dropout_mask(device: torch.device) -> None:
    x = torch.randn(3, K, device=device)
    torch.library.opcheck(torch.ops.fourbit.dropout_mask, (x, torch.tensor([3]), 0.5))


@pytest.mark.parametrize("shape", [(N, K), (1, 1), (0, 3), (3, 0)])
def test_opcheck_int8_storage(device: torch.device, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, device=device)
    torch.library.opcheck(torch.ops.fourbit.quantize_int8, (weight,))
    codes, absmax = ops.quantize_int8(weight)
    for scales in (absmax, absmax.view(torch.int32)):
        arguments = (codes, scales, torch.bfloat16)
        torch.library.opcheck(torch.ops.fourbit.dequantize_int8, arguments)


@pytest.mark.parametrize("threshold", [0.0, 1.0])
@pytest.mark.parametrize("fp16_weight", [False, True])
def test_opcheck_int8_linear(device: torch.device, threshold: float, fp16_weight: bool) -> None:
    weight: Tensor = torch.randn(N, K, device=device)
    absmax = None
    if fp16_weight:
        weight.requires_grad_()
    else:
        weight, absmax = ops.quantize_int8(weight)
    bias = torch.randn(N, device=device, requires_grad=True)
    for x in (
        torch.randn(3, 5, K, device=device, requires_grad=True),
        torch.randn(K, device=device, requires_grad=True),
        torch.randn(0, K, device=device, requires_grad=True),
        torch.randn(5, 3, K, device=device).transpose(0, 1).requires_grad_(),
        torch.randn(4, K, device=device, dtype=torch.bfloat16, requires_grad=True),
    ):
        for given in (None, bias):
            arguments = (x, weight, absmax, given, threshold)
            torch.library.opcheck(torch.ops.fourbit.linear_int8, arguments)


def test_int8_compiles_whole_and_gives_the_same(device: torch.device) -> None:
    linear = torch.nn.Linear(K, N, device=device).requires_grad_(False)
    base = QuantizedLinear.from_linear(linear, QuantConfig(quant_type="int8"))
    x = torch.randn(3, K, device=device) * 4
    compiled = torch.compile(base, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), base(x))


def test_every_op_is_checked_here() -> None:
    names = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fourbit::")}
    checked = ("quantize_4bit", "quantize_absmax", "dequantize_4bit", "dropout_mask")
    int8 = ("quantize_int8", "dequantize_int8", "linear_int8")
    linears = ("linear_4bit", "lora_linear_4bit")
    # in test_attention.py and test_cross_entropy.py
    elsewhere = ("attention", "attention_backward", "cross_entropy_rows_")
    assert names == {f"fourbit::{n}" for n in (*checked, *int8, *linears, *elsewhere)}


def test_shapes_beyond_32_bit_indices_need_no_memory() -> None:
    weight = torch.empty(2**16, 2**15 + 1, dtype=torch.bfloat16, device="meta")
    numel = weight.numel()
    assert numel > 2**31
    packed, absmax = ops.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert (packed.shape, packed.dtype) == ((numel // 2,), torch.uint8)
    assert (absmax.shape, absmax.dtype) == ((numel // 64,), torch.float32)
    codes, nested, offset = ops.quantize_absmax(absmax)
    assert (codes.shape, codes.dtype) == (absmax.shape, torch.uint8)
    assert (nested.shape, offset.shape) == ((-(-absmax.numel() // 256),), (1,))
    restored = ops.dequantize_4bit(
        (packed, codes, nested, offset),
        blocksize=64,
        quant_type="nf4",
        shape=weight.shape,
        dtype=torch.float16,
    )
    assert (restored.shape, restored.dtype) == (weight.shape, torch.float16)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_compiles_whole_and_gives_the_same(device: torch.device, dropout: float) -> None:
    base, x = layer(device), torch.randn(3, K, device=device)
    compiled = torch.compile(base, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), base(x))
    pair = adapter(device)

    def forward(x: Tensor) -> Tensor:
        return lora_forward(base, x, (*pair, 2.0, dropout))

    answers = []
    for function in (forward, torch.compile(forward, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(5)
        inner = x.clone().requires_grad_()
        y = function(inner)
        answers.append((y, *torch.autograd.grad(y.square().sum(), (inner, *pair))))
    for eager, compiled_answer in zip(*answers, strict=True):
        torch.testing.assert_close(compiled_answer, eager, **FP32)


@pytest.mark.parametrize("shape", [(K,), (1, K), (0, K), (2, 3, K)])
def test_linear_gradient_is_that_of_the_dequantized_weight(
    device: torch.device, shape: tuple[int, ...]
) -> None:
    base = layer(device)
    assert base.bias is not None
    base.bias.requires_grad_()
    x = torch.randn(shape, device=device, requires_grad=True)
    weight = base.dequantize()
    y, expected = base(x), torch.nn.functional.linear(x, weight, base.bias)
    grad = torch.randn_like(y)
    ours = torch.autograd.grad(y, (x, base.bias), grad)
    truth = torch.autograd.grad(expected, (x, base.bias), grad)
    torch.testing.assert_close(y, expected, **FP32)
    torch.testing.assert_close(ours[0], (grad @ weight).reshape(shape), **FP32)
    torch.testing.assert_close(ours, truth, **FP32)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck_in_float64(device: torch.device, double_quant: bool, dropout: float) -> None:
    base = layer(device, double_quant=double_quant)
    bias = torch.randn(N, device=device, dtype=torch.float64, requires_grad=True)
    pair = adapter(device, torch.float64)
    x = torch.randn(2, 3, K, device=device, dtype=torch.float64, requires_grad=True)
    seed = torch.tensor([11]) if dropout else None

    def forward(x: Tensor, bias: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        y, _ = torch.ops.fourbit.lora_linear_4bit(
            x, *base.scales, bias, lora_A, lora_B, seed, 32, "nf4", 1.7, dropout
        )
        return y

    assert torch.autograd.gradcheck(forward, (x, bias, *pair))


@pytest.mark.parametrize(
    ("dtype", "budget"),
    [(torch.bfloat16, BF16_RELATIVE_RMS), (torch.float16, FP16_RELATIVE_RMS)],
    ids=str,
)
def test_narrow_arithmetic_stays_within_its_budget(
    device: torch.device, dtype: torch.dtype, budget: float
) -> None:
    base, pair = layer(device, n=96, k=129), adapter(device, n=96, k=129)
    x = torch.randn(50, 129, device=device).to(dtype)
    answers = []
    for kind in (dtype, torch.float64):
        inner = x.to(kind).requires_grad_()
        own = [p.detach().to(kind).requires_grad_() for p in pair]
        y = fused(inner, base, (own[0], own[1]), seed=None, p=0.0)
        grads = torch.autograd.grad(y.sum() / 50, (inner, *own))
        answers.append((y.detach(), *grads))
    for narrow, truth in zip(*answers, strict=True):
        assert narrow.dtype == dtype
        assert relative_rms(narrow, truth) < budget


def test_adapter_gradients_keep_the_adapter_dtype(device: torch.device) -> None:
    base, pair = layer(device), adapter(device)
    x = torch.randn(3, K, device=device, dtype=torch.bfloat16, requires_grad=True)
    y = fused(x, base, pair, seed=None, p=0.0)
    grads = torch.autograd.grad(y.sum(), (x, *pair))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]


def test_dropout_mask_is_a_function_of_its_seed(device: torch.device) -> None:
    x = torch.empty(200, 300, device=device)
    masks = [schema.dropout_mask(x, seed=torch.tensor([s]), dropout=0.3) for s in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    torch.testing.assert_close(masks[0].unique().cpu(), torch.tensor([0.0, 1 / 0.7]))
    kept = int((masks[0] > 0).sum())
    sigma = (x.numel() * 0.3 * 0.7) ** 0.5
    assert abs(kept - 0.7 * x.numel()) < DROPOUT_SIGMAS * sigma


def test_dropout_is_the_same_in_forward_and_backward(device: torch.device) -> None:
    base, pair, seed = layer(device), adapter(device), torch.tensor([9])
    x = torch.randn(4, K, device=device, requires_grad=True)
    mask = schema.dropout_mask(x.detach(), seed=seed, dropout=0.5)
    assert 0 < int((mask == 0).sum()) < mask.numel()
    expected = torch.nn.functional.linear(x, base.dequantize(), base.bias)
    expected = expected + 2.0 * ((x * mask) @ pair[0].t()) @ pair[1].t()
    y = fused(x, base, pair, seed=seed, p=0.5)
    torch.testing.assert_close(y, expected, **FP32)
    grad = torch.randn_like(y)
    ours = torch.autograd.grad(y, (x, *pair), grad)
    truth = torch.autograd.grad(expected, (x, *pair), grad)
    torch.testing.assert_close(ours, truth, **FP32)


def test_dropout_of_zero_is_no_dropout(device: torch.device) -> None:
    base, pair = layer(device), adapter(device)
    x = torch.randn(4, K, device=device)
    plain = fused(x, base, pair, seed=None, p=0.0)
    assert torch.equal(fused(x, base, pair, seed=torch.tensor([1]), p=0.0), plain)
    before = torch.get_rng_state()
    assert torch.equal(lora_forward(base, x, (*pair, 2.0, 0.0)), plain)
    assert torch.equal(torch.get_rng_state(), before)


def test_checkpointing_recomputes_with_the_same_mask(device: torch.device) -> None:
    base, pair = layer(device), adapter(device)
    x = torch.randn(4, K, device=device, requires_grad=True)

    def forward(x: Tensor) -> Tensor:
        return lora_forward(base, x, (*pair, 2.0, 0.5)).square()

    answers = []
    for checkpointed in (False, True):
        torch.manual_seed(21)
        y = (
            torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False)
            if checkpointed
            else forward(x)
        )
        answers.append(torch.autograd.grad(y.sum(), (x, *pair)))
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


def saved_floats(function: Any, *inputs: Tensor) -> list[Tensor]:
    """Floating tensors kept for backward, parameters (leaves that want gradients) left out."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*inputs)
    return [t for t in kept if t.is_floating_point() and not isinstance(t, torch.nn.Parameter)]


def test_the_frozen_linear_keeps_no_floating_tensor(device: torch.device) -> None:
    base = layer(device)
    x = torch.randn(4, K, device=device, requires_grad=True)
    assert saved_floats(base, x) == []


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_adapter_keeps_x_and_its_projection_only(device: torch.device, dropout: float) -> None:
    base = layer(device)
    pair = tuple(torch.nn.Parameter(p.detach()) for p in adapter(device))
    x = torch.randn(4, K, device=device, requires_grad=True)
    kept = saved_floats(lambda x: lora_forward(base, x, (*pair, 2.0, dropout)), x)
    assert sorted(tuple(t.shape) for t in kept) == [(4, RANK), (4, K)]
    assert any(t.data_ptr() == x.data_ptr() for t in kept)
