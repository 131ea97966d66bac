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
from fourbit import codebook, ops
from fourbit.ops.reference import scales_float32
from fourbit.quantize import dequantize_4bit, quantize_4bit

pytestmark = pytest.mark.parity

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    bnb: Any = pytest.importorskip(
        "bitsandbytes.functional", reason="bitsandbytes is not installed"
    )

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
