"""`Linear8bit`: the arithmetic by brute force, and everything modules go through."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fourbit import ops
from fourbit.errors import ModelError
from fourbit.integrations.transformers import quantize_model
from fourbit.linear import Linear8bit, QuantizedLinear, keep_dequantized, parameter_counts
from fourbit.lora import LoraSettings
from fourbit.quantize import QuantConfig, dequantize_int8, quantize_int8
from models import tiny_model

SIZES = [(12, 10), (7, 5), (1, 1), (65, 3), (2, 33)]

HALF_ULP_F32 = 2.0**-23
"""A few float32 roundings of the rescaled int32 sum, relative to its size."""


def layer(
    in_features: int = 12,
    out_features: int = 10,
    *,
    threshold: float = 6.0,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Linear8bit:
    linear = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
    quant = QuantConfig(quant_type="int8", llm_int8_threshold=threshold)
    made = QuantizedLinear.from_linear(
        linear.requires_grad_(False), quant, compute_dtype=compute_dtype
    )
    assert isinstance(made, Linear8bit)
    return made


def rows_of_int8(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales row by row, in float32 arithmetic on the float16 of ``values``.

    As in torch, 127 / absmax is 127 times the rounded reciprocal.
    """
    halves = values.astype(np.float16).astype(np.float32)
    codes = np.zeros(halves.shape, np.int64)
    scales = np.zeros(halves.shape[0], np.float32)
    for index, row in enumerate(halves):
        scales[index] = np.abs(row).max() if row.size else 0
        if scales[index]:
            codes[index] = np.rint(row * (np.float32(127) * (np.float32(1) / scales[index])))
    return codes, scales


def llm_int8(x: np.ndarray, weight: np.ndarray, threshold: float) -> np.ndarray:
    """arXiv 2208.07339, equations 3 and 8, in float64 after the codes."""
    codes, scales = rows_of_int8(weight)
    halves = x.astype(np.float16).astype(np.float32)
    large = np.abs(halves) >= threshold if threshold else np.zeros(halves.shape, bool)
    columns = large.any(axis=0)
    x_codes, x_scales = rows_of_int8(np.where(large, 0, halves))
    x_codes[:, columns] = 0
    y = (x_codes @ codes.T) * np.outer(x_scales.astype(np.float64), scales) / 127**2
    return y + x[:, columns].astype(np.float64) @ (codes * scales[:, None] / 127).T[columns]


@pytest.mark.parametrize("threshold", [0.0, 6.0, 1.5])
@pytest.mark.parametrize("sizes", [*SIZES, (2500, 9)], ids=str)
def test_forward_is_the_papers(device: torch.device, sizes: tuple[int, int], threshold) -> None:
    base = layer(*sizes, threshold=threshold, bias=False, device=device)
    weight = torch.randn(sizes[::-1])
    base.replace_(base.quantized(weight.to(device), name="w"))
    x = torch.randn(9, sizes[0])
    x[2, 0], x[5, -1], x[7] = 7.5, -6.0, 0.0
    wanted = torch.from_numpy(llm_int8(x.numpy(), weight.numpy(), threshold))
    y = base(x.to(device)).cpu().double()
    slack = HALF_ULP_F32 * 8 * (wanted.abs() + x.abs().sum(1, keepdim=True) * weight.abs().max())
    assert bool(((y - wanted).abs() <= slack).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (64, 130), (5, 1), (2, 3000)], ids=str)
def test_codes_and_scales_by_brute_force(device: torch.device, shape, dtype) -> None:
    weight = torch.randn(shape).mul(3).to(dtype)
    weight[-1] = 0
    codes, absmax = quantize_int8(weight.to(device))
    expected, scales = rows_of_int8(weight.float().numpy())
    assert (codes.dtype, absmax.dtype) == (torch.int8, torch.float32)
    assert np.array_equal(codes.cpu().numpy(), expected)
    assert np.array_equal(absmax.cpu().numpy(), scales)
    restored = dequantize_int8(codes, absmax, dtype=torch.float32).cpu().numpy()
    exact = expected * scales[:, None].astype(np.float64) / 127
    np.testing.assert_allclose(restored, exact, rtol=3e-7, atol=0)
    assert not restored[-1].any(), "a row of zeros stays zero"
    half_step = scales[:, None] / 254 + np.abs(exact) * 2**-10
    assert bool((np.abs(restored - weight.float().numpy()) <= half_step + 1e-6).all())


def test_halves_go_to_even() -> None:
    # absmax 127 makes the factor 1: codes are the values themselves
    row = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert quantize_int8(row)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2]]


def test_the_int32_product_is_exact_beyond_what_float32_sums_hold(device: torch.device) -> None:
    for k in (1024, 1025, 1041, 4099):
        base = layer(k, 3, threshold=0.0, bias=False, device=device)
        codes = torch.full((3, k), 127, dtype=torch.int8, device=device)
        codes[1, ::2], codes[2, -1] = -127, 126
        ones = torch.full((3,), 127.0, device=device).view(torch.int32)
        base.replace_({"weight": codes, "weight_absmax": ones})
        y = base(torch.full((1, k), 127.0, device=device)).double().cpu()
        # the int32 sum fits float32 only up to 2^24, one rounding each of three factors
        wanted = codes.double().cpu().sum(1) * 127
        assert bool(((y[0] - wanted).abs() <= wanted.abs() * 2e-7 + 1e-3).all()), k


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_gradient_is_that_of_the_dequantized_weight(device: torch.device, threshold) -> None:
    base = layer(33, 9, threshold=threshold, device=device)
    x = torch.randn(2, 4, 33, device=device)
    x[0, 0, 3] = 9
    x.requires_grad_()
    grad = torch.randn(2, 4, 9, device=device)
    (got,) = torch.autograd.grad(base(x), x, grad)
    assert torch.equal(got, grad @ base.dequantize(torch.float32))
    assert not any(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_a_broken_activation_breaks_its_row(device: torch.device, threshold, bad) -> None:
    base = layer(threshold=threshold, device=device)
    x = torch.randn(3, 12, device=device)
    good = base(x)
    x[1, 4] = bad
    y = base(x)
    assert not y[1].isfinite().any()
    assert y[0].isfinite().all()
    assert y[2].isfinite().all()
    if threshold == 0:
        assert torch.equal(y[0], good[0])


def test_large_activations_do_not_overflow_float16(device: torch.device) -> None:
    base = layer(device=device)
    x = torch.randn(2, 12, device=device)
    x[0, 0] = 1e6
    wanted = nn.functional.linear(x, base.dequantize(), base.bias)
    torch.testing.assert_close(base(x), wanted, rtol=1e-2, atol=0.2)
    none = layer(threshold=0.0, device=device)
    assert none(x).isfinite().all()


@pytest.mark.parametrize("value", [65520.0, 1e6, -1e6])
def test_weights_beyond_float16_are_refused(value: float) -> None:
    weight = torch.zeros(3, 4)
    weight[2, 1] = value
    with pytest.raises(ModelError) as caught:
        quantize_int8(weight, name="model.fc")
    assert caught.value.line() == (
        "error[beyond-float16] model.fc: row 2 holds a value above 65504, which INT8's float16"
        " step cannot hold; fix: use quant_type nf4"
    )
    weight[2, 1] = 65504.0
    assert quantize_int8(weight)[1].tolist() == [0, 0, 65504]


def test_broken_weights_are_named() -> None:
    weight = torch.zeros(3, 4)
    weight[1, 2] = float("nan")
    with pytest.raises(ModelError, match=r"model\.fc: nan at flat index 6"):
        quantize_int8(weight, name="model.fc")
    with pytest.raises(ValueError, match="3-D"):
        quantize_int8(torch.zeros(2, 2, 2))
    with pytest.raises(ValueError, match="int32"):
        quantize_int8(torch.zeros(2, 2, dtype=torch.int32))


ROUND_TRIPS: dict[str, Callable[[Linear8bit], Linear8bit]] = {
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "train and eval": lambda m: m.train().eval(),
}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("change", ROUND_TRIPS)
def test_weight_survives(device: torch.device, change: str, sizes: tuple[int, int]) -> None:
    before = layer(*sizes, device=device)
    codes, weight = before.weight.clone(), before.dequantize()
    after = ROUND_TRIPS[change](before)
    assert torch.equal(after.weight, codes)
    assert torch.equal(after.dequantize(torch.float32), weight)
    assert (after.weight.dtype, after.weight_absmax.dtype) == (torch.int8, torch.int32)
    x = torch.randn(3, sizes[0], device=device).to(after.bias.dtype)  # type: ignore[union-attr]
    assert after(x).dtype == x.dtype


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_state_dict_round_trip(sizes: tuple[int, int], assign: bool) -> None:
    source, target = layer(*sizes), layer(*sizes)
    target.load_state_dict(source.state_dict(), strict=True, assign=assign)
    assert torch.equal(target.dequantize(), source.dequantize())
    assert set(source.state_dict()) == {"weight", "weight_absmax", "bias"}


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("compute_dtype", [None, torch.float16, torch.bfloat16], ids=str)
def test_compute_dtype_is_used_inside_and_hidden_outside(compute_dtype, threshold) -> None:
    base = layer(40, 8, threshold=threshold, compute_dtype=compute_dtype)
    x = torch.randn(4, 40)
    x[1, 3] = 20.0
    y = base(x)
    assert y.dtype == torch.float32
    if compute_dtype is not None:
        assert torch.equal(y, y.to(compute_dtype).float())
        again = layer(40, 8, threshold=threshold)
        again.load_state_dict(base.state_dict())
        assert torch.equal(y, again(x.to(compute_dtype)).float())


def test_autocast(device: torch.device) -> None:
    base = layer(40, 8, device=device)
    x = torch.randn(4, 40, device=device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        y = base(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, base(x.bfloat16()))
    (grad,) = torch.autograd.grad(y.float().sum(), x)
    assert grad.dtype == torch.float32
    assert grad.isfinite().all()


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_shapes(device: torch.device, threshold: float) -> None:
    base = layer(6, 4, threshold=threshold, device=device)
    assert base(torch.empty(0, 6, device=device)).shape == (0, 4)
    assert base(torch.empty(2, 0, 6, device=device)).shape == (2, 0, 4)
    row = torch.randn(6, device=device)
    assert torch.equal(base(row), base(row[None])[0])
    wide = torch.randn(5, 3, 6, device=device)
    swapped = wide.transpose(0, 1)
    assert torch.equal(base(swapped), base(swapped.contiguous()))
    assert torch.equal(base(wide[:, :, :]), base(wide.reshape(15, 6)).view(5, 3, 4))
    strided = torch.randn(5, 12, device=device)[:, ::2]
    assert torch.equal(base(strided), base(strided.contiguous()))


def test_inputs_are_not_written_to() -> None:
    base = layer(40, 8)
    x = torch.randn(4, 40)
    x[1, 3] = 20.0
    before = x.clone()
    base(x)
    base(x.half())
    assert torch.equal(x, before)


def test_outliers_are_multiplied_in_16_bits() -> None:
    base = layer(64, 16, bias=False)
    base.replace_(base.quantized(torch.randn(16, 64), name="w"))
    x = torch.randn(8, 64).clamp(-2, 2)
    x[:, 5] *= 100
    exact = x @ base.dequantize().t()
    split = (base(x) - exact).abs().mean()
    plain = layer(64, 16, bias=False, threshold=0.0)
    plain.load_state_dict(base.state_dict())
    assert split < (plain(x) - exact).abs().mean() / 10


def fp16_layer(dtype: torch.dtype = torch.float32) -> tuple[Linear8bit, nn.Linear]:
    linear = nn.Linear(20, 6, dtype=dtype).requires_grad_(False)
    with torch.device("meta"):
        empty = nn.Linear(20, 6, dtype=dtype)
    base = QuantizedLinear.from_linear(empty, QuantConfig(quant_type="int8"))
    assert isinstance(base, Linear8bit)
    base.keep_fp16_weight_()
    base.replace_(base.quantized(linear.weight, name="w"))
    base.bias = linear.bias
    return base, linear


def test_fp16_weights_multiply_as_int8_and_stay_as_they_are() -> None:
    base, linear = fp16_layer()
    assert base.has_fp16_weight
    assert torch.equal(base.dequantize(), linear.weight)
    x = torch.randn(3, 20)
    quantized = QuantizedLinear.from_linear(linear, QuantConfig(quant_type="int8"))
    assert torch.equal(base(x), quantized(x))
    assert not torch.equal(base(x), linear(x))
    assert "has_fp16_weight=True" in repr(base)


def test_fp16_weights_can_be_trained() -> None:
    base, linear = fp16_layer()
    base.weight.requires_grad_(True)
    x = torch.randn(3, 20, requires_grad=True)
    grad = torch.randn(3, 6)
    got_x, got_w = torch.autograd.grad(base(x), (x, base.weight), grad)
    torch.testing.assert_close(got_w, grad.t() @ x)
    codes, scales = quantize_int8(linear.weight)
    torch.testing.assert_close(got_x, grad @ dequantize_int8(codes, scales, dtype=torch.float32))


def test_repr_shows_the_format() -> None:
    assert repr(layer()) == (
        "Linear8bit(in_features=12, out_features=10, bias=True, quant_type=int8, threshold=6,"
        " has_fp16_weight=False)"
    )


def test_on_meta_only_shapes_are_made() -> None:
    with torch.device("meta"):
        linear = nn.Linear(65, 12, dtype=torch.bfloat16)
    base = QuantizedLinear.from_linear(linear, QuantConfig(quant_type="int8"))
    assert all(p.is_meta for p in base.parameters())
    assert base(torch.empty(2, 65, device="meta", dtype=torch.bfloat16)).shape == (2, 12)
    assert base.original_dtype == torch.bfloat16


def test_counts_are_of_weights_not_of_scales() -> None:
    model = nn.Sequential(layer(12, 10), nn.Linear(10, 4))
    assert parameter_counts(model) == (44, 12 * 10 + 10 + 44)


def test_generation_keeps_no_expanded_weight() -> None:
    model = nn.Sequential(layer())
    with keep_dequantized(model, torch.float32, budget=10**9) as kept:
        assert not kept
        assert model[0]._kept is None


def test_half_a_byte_less_than_8_bits_is_not_promised() -> None:
    assert QuantConfig(quant_type="int8").bits_per_weight == 8
    for name, value in (("blocksize", 128), ("double_quant", False)):
        with pytest.raises(ValueError, match=f"{name} means nothing for quant_type int8"):
            QuantConfig(quant_type="int8", **{name: value})
    with pytest.raises(ValueError, match="llm_int8_threshold means nothing for quant_type nf4"):
        QuantConfig(llm_int8_threshold=5.0)


# LoRA on an INT8 base.


@pytest.fixture
def adapted() -> nn.Module:
    from fourbit.integrations.peft import add_adapter

    base = tiny_model("llama")
    base.requires_grad_(False)
    quantize_model(base, QuantConfig(quant_type="int8"))
    model = add_adapter(base, LoraSettings(r=4, lora_dropout=0.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


def first_lora(model: nn.Module) -> nn.Module:
    return model.get_base_model().model.layers[0].mlp.up_proj  # type: ignore[operator]


def test_lora_adds_its_product(adapted: nn.Module) -> None:
    lora = first_lora(adapted)
    base = lora.get_base_layer()  # type: ignore[operator]
    assert isinstance(base, Linear8bit)
    x = torch.randn(2, 3, 48, requires_grad=True)
    a, b = lora.lora_A["default"].weight, lora.lora_B["default"].weight  # type: ignore[index]
    scaling = lora.scaling["default"]  # type: ignore[index]
    y = lora(x)
    torch.testing.assert_close(y, base(x) + scaling * (x @ a.t() @ b.t()), rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, a, b), grad)
    flat, flat_x = grad.reshape(-1, 80), x.detach().reshape(-1, 48)
    wanted = (
        grad @ base.dequantize(torch.float32) + scaling * (grad @ b @ a),
        scaling * (flat @ b).t() @ flat_x,
        scaling * flat.t() @ (flat_x @ a.t()),
    )
    for ours, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)


def test_merging_loses_nothing(adapted: nn.Module) -> None:
    lora = first_lora(adapted)
    base = lora.get_base_layer()  # type: ignore[operator]
    codes = base.weight.clone()
    delta = lora.get_delta_weight("default")  # type: ignore[operator]
    wanted = base.dequantize(torch.float32) + delta
    adapted.merge_adapter()  # type: ignore[operator]
    torch.testing.assert_close(lora.get_base_layer().weight, wanted)  # type: ignore[operator]
    adapted.unmerge_adapter()  # type: ignore[operator]
    assert torch.equal(lora.get_base_layer().weight, codes)  # type: ignore[operator]


def test_disabled_adapters_leave_the_base(adapted: nn.Module) -> None:
    ids = torch.arange(12)[None]
    with torch.no_grad():
        with_adapter = adapted(input_ids=ids).logits
        with adapted.disable_adapter():  # type: ignore[operator]
            without = adapted(input_ids=ids).logits
    assert not torch.equal(with_adapter, without)


def test_ops_take_float_bits_and_floats_alike(device: torch.device) -> None:
    codes, absmax = ops.quantize_int8(torch.randn(5, 7, device=device))
    x = torch.randn(3, 7, device=device)
    answers: list[Tensor] = []
    for scales in (absmax, absmax.view(torch.int32)):
        answers.append(ops.linear_int8(x, codes, scales, None, threshold=6.0))
        answers.append(ops.dequantize_int8(codes, scales, dtype=torch.float16))
    assert torch.equal(answers[0], answers[2])
    assert torch.equal(answers[1], answers[3])
