"""Byte parity with an installed bitsandbytes (CPU), and each place where ours differs on purpose.

Its own results are the expected values. `docs/formats.md` lists the differences.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import oracles
from fourbit import codebook, native, ops
from fourbit.linear import Linear8bit, QuantizedLinear
from fourbit.ops.reference import scales_float32
from fourbit.quantize import (
    QuantConfig,
    dequantize_4bit,
    dequantize_int8,
    quantize_4bit,
    quantize_int8,
)

pytestmark = pytest.mark.parity

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    bnb: Any = pytest.importorskip(
        "bitsandbytes.functional", reason="bitsandbytes is not installed"
    )
    from bitsandbytes.nn import Int8Params, Linear8bitLt

SHAPES = [(1,), (2,), (63,), (64,), (65,), (129,), (33, 65), (7, 5, 3), (256, 64), (640, 129)]

OFFSET_ULPS = 2
"""bitsandbytes takes a float32 mean, whose order of summation depends on threads; ours is exact."""

WIDEST_HALF_GAP = 0.17
"""Of both tables (FP4: 1/6), relative to absmax: no rounding to the nearest errs by more."""

UNREACHABLE = set(range(124, 131))
"""Codes that the 65,536-entry lookup of bitsandbytes' CPU quantizer steps over."""

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """bitsandbytes compiles parts of its CPU code, for 20 seconds; the numbers are the same."""
    with torch.compiler.set_stance("force_eager"):
        yield


def weights(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * 0.02).to(dtype)


def theirs(weight: Tensor, quant_type: str, blocksize: int, *, nested: bool = False) -> Any:
    return bnb.quantize_4bit(
        weight, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
    )


def as_vector(packed: Tensor, state: Any) -> Tensor:
    """Their decoding of all bytes as one row, which every one of their kernels reads alike."""
    flat = copy.copy(state)
    flat.shape = torch.Size((state.shape.numel(),))
    return bnb.dequantize_4bit(packed, flat)


@pytest.mark.parametrize("quant_type", oracles.BITSANDBYTES_TYPES)
def test_tables(quant_type: str) -> None:
    assert torch.equal(bnb.get_4bit_type(quant_type, device="cpu"), codebook.code(quant_type, CPU))


def test_dynamic_map() -> None:
    assert torch.equal(bnb.create_dynamic_map(signed=True), codebook.signed_dynamic_map(CPU))
    assert torch.equal(bnb.create_dynamic_map(signed=False), codebook.unsigned_dynamic_map(CPU))


@pytest.mark.parametrize("blocksize", oracles.BLOCKSIZES)
@pytest.mark.parametrize("quant_type", oracles.BITSANDBYTES_TYPES)
@pytest.mark.parametrize("dtype", oracles.FLOATS, ids=str)
def test_bytes_scales_and_values(quant_type: Any, dtype: torch.dtype, blocksize: int) -> None:
    for shape in SHAPES:
        weight = weights(shape, dtype)
        packed, state = quantize_4bit(
            weight, quant_type=quant_type, blocksize=blocksize, double_quant=False
        )
        their_packed, their_state = theirs(weight, quant_type, blocksize)
        assert torch.equal(packed, their_packed), shape
        assert torch.equal(state.absmax, their_state.absmax), shape
        restored = as_vector(their_packed, their_state).reshape(shape)
        assert torch.equal(dequantize_4bit(packed, state), restored), shape
        if shape[-1] % 2 or shape[-1] % blocksize == 0:
            assert torch.equal(
                bnb.dequantize_4bit(their_packed, their_state).reshape(shape), restored
            )


@pytest.mark.parametrize("isa", native.supported())
@pytest.mark.parametrize("quant_type", oracles.BITSANDBYTES_TYPES)
@pytest.mark.parametrize("dtype", oracles.FLOATS, ids=str)
def test_bytes_by_every_instruction_set(quant_type: Any, dtype: torch.dtype, isa: str) -> None:
    with native.using(isa):
        test_bytes_scales_and_values(quant_type, dtype, 64)


@pytest.mark.parametrize("quant_type", oracles.BITSANDBYTES_TYPES)
def test_differs_where_a_row_is_no_whole_number_of_blocks(quant_type: Any) -> None:
    # Their CPU kernel starts a new scale with each row of even length; the format's blocks are
    # flat, as in their quantizer, their plain PyTorch path and their GPU kernels.
    weight = weights((64, 96), torch.float32)
    packed, state = theirs(weight, quant_type, 64)
    ours = dequantize_4bit(*quantize_4bit(weight, quant_type=quant_type, double_quant=False))
    limit = WIDEST_HALF_GAP * state.absmax.repeat_interleave(64).view_as(weight)
    assert bool(((bnb.dequantize_4bit(packed, state) - weight).abs() > limit).any())
    assert bool(((ours - weight).abs() < limit).all())
    assert torch.equal(as_vector(packed, state).reshape(64, 96), ours)


@pytest.mark.parametrize("quant_type", oracles.BITSANDBYTES_TYPES)
@pytest.mark.parametrize("dtype", oracles.FLOATS, ids=str)
@pytest.mark.parametrize("name", oracles.edge_tensors(torch.float32))
def test_edge_tensors(quant_type: Any, dtype: torch.dtype, name: str) -> None:
    weight = oracles.edge_tensors(dtype)[name]
    if weight.numel() == 0:
        pytest.skip("bitsandbytes refuses empty tensors")
    packed, state = quantize_4bit(weight, quant_type=quant_type, double_quant=False)
    their_packed, their_state = theirs(weight.contiguous(), quant_type, 64)
    assert torch.equal(packed, their_packed)
    assert torch.equal(state.absmax, their_state.absmax)


@pytest.mark.parametrize("dtype", oracles.FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_double_quantized_values_of_one_file_are_equal(shape: Any, dtype: torch.dtype) -> None:
    weight = weights(shape, dtype)
    packed, state = theirs(weight, "nf4", 64, nested=True)
    restored = ops.dequantize_4bit(
        (packed, state.absmax, state.state2.absmax, state.offset.reshape(1)),
        blocksize=64,
        quant_type="nf4",
        shape=shape,
        dtype=dtype,
    )
    assert torch.equal(restored, as_vector(packed, state).reshape(shape))


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 5000])
def test_nested_scales_differ_only_by_the_lookup(count: int) -> None:
    weight = weights((count, 64), torch.float32)
    _, exact = quantize_4bit(weight, double_quant=False)
    codes, nested, offset = ops.quantize_absmax(exact.absmax)
    _, their_state = theirs(weight, "nf4", 64, nested=True)
    np.testing.assert_array_max_ulp(
        offset.numpy(), their_state.offset.reshape(1).numpy(), maxulp=OFFSET_ULPS
    )

    centred = exact.absmax - their_state.offset  # both from bitsandbytes' own offset
    scaled, expected_nested = oracles.scaled_blocks(centred.numpy(), 256)
    if centred.any():
        np.testing.assert_array_equal(their_state.state2.absmax.numpy(), expected_nested)
    values = codebook.signed_dynamic_map(CPU).numpy().astype(np.float64)
    nearest = oracles.nested_nearest(scaled, values)
    their_codes = their_state.absmax.numpy()
    ours, distance = np.abs(values[nearest] - scaled), np.abs(values[their_codes] - scaled)
    assert bool((ours <= distance).all())
    assert not UNREACHABLE & set(their_codes.tolist())
    if torch.equal(offset, their_state.offset.reshape(1)):
        assert np.array_equal(codes.numpy(), nearest)
        assert torch.equal(nested, their_state.state2.absmax) or not centred.any()


def test_their_zero_is_not_zero_and_ours_is() -> None:
    scaled = torch.tensor([-1.0, 0.0, 1.0, 0.0])
    their_codes, their_state = bnb.quantize_blockwise(scaled, blocksize=256)
    assert their_codes.tolist()[1] == 131
    assert bnb.dequantize_blockwise(their_codes, their_state)[1] > 0
    codes, nested, offset = ops.quantize_absmax(scaled)
    assert codes.tolist()[1] == 127
    assert scales_float32(codes, nested, offset)[1] == 0


def test_their_quantizer_reaches_249_codes_and_ours_all() -> None:
    grid = torch.linspace(-1, 1, 255 * 2048).view(2048, 255)
    blocks = torch.cat((torch.ones(2048, 1), grid), dim=1)  # the 1 makes every scale 1
    their_codes, _ = bnb.quantize_blockwise(blocks, blocksize=256)
    assert set(range(256)) - set(their_codes.unique().tolist()) == UNREACHABLE
    near_zero = torch.linspace(-2e-5, 2e-5, 254)
    codes, _, offset = ops.quantize_absmax(torch.cat((torch.tensor([1.0, -1.0]), near_zero)))
    assert offset == 0
    assert set(codes.tolist()) >= UNREACHABLE


def test_a_float32_mean_depends_on_threads_and_ours_does_not() -> None:
    before = torch.get_num_threads()
    means, offsets = [], []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            many = [torch.rand(100_000 + 7 * i) for i in range(20)]
            means.append(torch.stack([absmax.mean() for absmax in many]))
            offsets.append(torch.cat([ops.quantize_absmax(absmax)[2] for absmax in many]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(offsets[0], offsets[1])
    assert not torch.equal(means[0], means[1])
    for mean in means:
        np.testing.assert_array_max_ulp(mean.numpy(), offsets[0].numpy(), maxulp=OFFSET_ULPS)


def test_int4_is_ours_alone() -> None:
    packed, state = theirs(torch.randn(64), "nf4", 64)
    state.quant_type = "int4"
    with pytest.raises(ValueError, match="got 'int4'"):
        bnb.dequantize_4bit(packed, state)


# INT8.

MATRICES = [(1, 1), (3, 7), (64, 64), (33, 65), (9, 2500), (5, 1), (1, 300)]


@pytest.mark.parametrize("dtype", oracles.FLOATS, ids=str)
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_int8_codes_scales_and_values(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = weights(shape, dtype)
    weight[shape[0] // 2] = 0 if shape[0] > 2 else 1
    codes, absmax = quantize_int8(weight)
    their_codes, their_absmax, _ = bnb.int8_vectorwise_quant(weight.half())
    assert torch.equal(codes, their_codes)
    assert torch.equal(absmax, their_absmax)
    restored = bnb.int8_vectorwise_dequant(their_codes, their_absmax)
    assert torch.equal(dequantize_int8(codes, absmax, dtype=torch.float32), restored)


def both_int8(shape: tuple[int, int], threshold: float) -> tuple[Linear8bit, Any]:
    weight, bias = weights((shape[1], shape[0]), torch.float32), weights((shape[1],), torch.float32)
    linear = torch.nn.Linear(*shape)
    linear.weight.data, linear.bias.data = weight, bias
    quant = QuantConfig(quant_type="int8", llm_int8_threshold=threshold)
    ours = QuantizedLinear.from_linear(linear.requires_grad_(False), quant)
    assert isinstance(ours, Linear8bit)
    theirs = Linear8bitLt(*shape, has_fp16_weights=False, threshold=threshold)
    theirs.weight = Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    theirs.bias.data = bias.clone()
    return ours, theirs.to("cpu").requires_grad_(False).eval()


INT8_FLOAT32 = 3e-5
"""Of the largest output: their plain kernel's 6.200124e-05 is 1.8e-5 more than 1 / 127²."""

INT8_FLOAT16 = 2e-3
"""Of the largest output: theirs rounds to float16 before the outliers are added, and after."""


def assert_near(ours: Tensor, wanted: Tensor, share: float) -> None:
    assert ours.dtype == wanted.dtype
    assert bool(((ours - wanted).abs() <= share * wanted.abs().max()).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("shape", [(64, 64), (65, 33), (4, 5), (900, 3)], ids=str)
def test_int8_forward(shape: tuple[int, int], threshold: float, dtype: torch.dtype) -> None:
    ours, their_layer = both_int8(shape, threshold)
    ours.to(dtype)
    for rows in ((1,), (7,), (2, 5)):
        x = torch.randn(*rows, shape[0])
        x[..., 0] = 8.5
        x.view(-1, shape[0])[0, -1] = -6.0  # on the threshold: an outlier
        x = x.to(dtype)
        share = INT8_FLOAT32 if dtype is torch.float32 else INT8_FLOAT16
        assert_near(ours(x), their_layer(x.clone()), share)


def test_int8_training_on_cpu_quantizes_activations_unlike_theirs() -> None:
    ours, their_layer = both_int8((64, 33), 0.0)
    x = torch.randn(7, 64)
    plain = torch.nn.functional.linear(x, ours.dequantize(), ours.bias)
    assert_near(their_layer.train()(x.clone()), plain, 1e-5)
    assert_near(ours.train()(x), their_layer.eval()(x.clone()), INT8_FLOAT32)
    assert not torch.allclose(ours(x), plain, rtol=1e-4)


def test_int8_constant_of_their_plain_kernel_is_not_one_over_127_squared() -> None:
    one = torch.ones(1, 1)
    product = torch.tensor([[16129]], dtype=torch.int32)
    theirs = torch.ops.bitsandbytes.int8_mm_dequant(product, one[0], one[0], dtype=torch.float32)
    ours = ops.linear_int8(one, torch.tensor([[127]], dtype=torch.int8), one[0], None, threshold=0)
    assert ours.item() == pytest.approx(1, abs=2e-7)
    assert theirs.item() - 1 == pytest.approx(1.8e-5, abs=1e-6)


def test_int8_float32_product_is_exact_where_theirs_may_round() -> None:
    # their plain CPU path sums in float32, which holds 1,040 products of 127 * 127
    ours, _ = both_int8((4099, 2), 0.0)
    codes = torch.full((2, 4099), 127, dtype=torch.int8)
    codes[1, -1] = 126
    ones = torch.full((2,), 127.0)
    ours.bias = None
    ours.replace_({"weight": codes, "weight_absmax": ones.view(torch.int32)})
    sums = ours(torch.full((1, 4099), 127.0)) / 127
    assert [round(v) for v in sums[0].tolist()] == [127 * 4099, 127 * 4099 - 1]


def test_int8_gradient() -> None:
    ours, their_layer = both_int8((64, 33), 6.0)
    grads = []
    grad = torch.randn(7, 33)
    for module in (ours, their_layer):
        x = weights((7, 64), torch.float32).mul(100).requires_grad_()
        grads.append(torch.autograd.grad(module(x), x, grad)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_int8_with_fp16_weights(threshold: float) -> None:
    weight = weights((33, 64), torch.float32)
    their_layer = Linear8bitLt(64, 33, bias=False, has_fp16_weights=True, threshold=threshold)
    their_layer.requires_grad_(False).weight.data = weight.clone()
    with torch.device("meta"):
        empty = torch.nn.Linear(64, 33, bias=False)
    quant = QuantConfig(quant_type="int8", llm_int8_threshold=threshold)
    ours = QuantizedLinear.from_linear(empty, quant)
    assert isinstance(ours, Linear8bit)
    ours.keep_fp16_weight_()
    ours.replace_(ours.quantized(weight, name="w"))
    x = torch.randn(7, 64)
    x[3, 5] = 9
    assert_near(ours(x), their_layer.eval()(x.clone()), INT8_FLOAT32)
