"""Public quantization: round trips, proved bounds, invariants and refusals."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch
from torch import Tensor

import oracles
from fourbit import codebook, ops
from fourbit.errors import ModelError
from fourbit.ops.reference import scales_float32
from fourbit.quantize import QuantConfig, QuantState, dequantize_4bit, quantize_4bit

ROUNDINGS = 8 * oracles.HALF_ULP
"""Reciprocal, product, midpoint and decoding each round once in float32, relative to absmax."""

MAP_HALF_GAP = 0.00704
"""Half the widest gap of the 8-bit map, -1 (which has no code) to -0.99297 included."""


def half_gap(quant_type: str) -> float:
    values = sorted(oracles.table(quant_type).tolist())
    return max(high - low for low, high in zip(values, values[1:], strict=False)) / 2


def per_weight(scales: Tensor, state: QuantState) -> Tensor:
    numel = state.shape.numel()
    return scales.repeat_interleave(state.blocksize)[:numel].reshape(state.shape).double()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", oracles.QUANT_TYPES)
@pytest.mark.parametrize("dtype", oracles.FLOATS, ids=str)
@pytest.mark.parametrize("name", oracles.edge_tensors(torch.float32))
def test_error_stays_within_the_proved_bound(
    device: torch.device, double_quant: bool, quant_type: codebook.QuantType, dtype, name: str
) -> None:
    weight = oracles.edge_tensors(dtype)[name].to(device)
    packed, state = quantize_4bit(weight, quant_type=quant_type, double_quant=double_quant)
    assert packed.shape == ((weight.numel() + 1) // 2, 1)
    assert (state.shape, state.dtype) == (weight.shape, dtype)
    restored = dequantize_4bit(packed, state, dtype=torch.float32)
    assert restored.shape == weight.shape
    if weight.numel() == 0:
        return
    _, absmax = ops.quantize_4bit(weight, blocksize=64, quant_type=quant_type)
    held = scales_float32(state.absmax, state.nested_absmax, state.nested_offset)
    bound = per_weight(absmax, state) * (half_gap(quant_type) + ROUNDINGS)
    # |x - code * held| <= |x - code * absmax| + |code| * |absmax - held|, and |code| <= 1.
    bound += per_weight((held.double() - absmax.double()).abs(), state)
    bound += float(oracles.SMALLEST_SCALE)  # below it a block counts as zero
    error = (weight.double() - restored.double()).abs()
    assert bool((error <= bound).all())


def test_nested_scale_error_stays_within_the_proved_bound(device: torch.device) -> None:
    weight = torch.randn(64 * 1000, device=device) * torch.rand(64 * 1000, device=device)
    _, exact = quantize_4bit(weight, double_quant=False)
    _, state = quantize_4bit(weight, double_quant=True)
    assert state.nested_absmax is not None
    held = scales_float32(state.absmax, state.nested_absmax, state.nested_offset)
    bound = state.nested_absmax.repeat_interleave(256)[:1000] * MAP_HALF_GAP
    bound += exact.absmax.max() * ROUNDINGS
    assert bool(((held - exact.absmax).abs() <= bound).all())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", oracles.FLOATS, ids=str)
def test_zero_blocks_decode_to_exactly_zero(
    device: torch.device, double_quant: bool, dtype
) -> None:
    weight = torch.randn(192, device=device).to(dtype)
    weight[64:128] = 0
    packed, state = quantize_4bit(weight, double_quant=double_quant)
    assert packed[32:64].unique().tolist() == [0x77]
    assert torch.equal(dequantize_4bit(packed, state)[64:128], weight[64:128])


def test_minus_zero_decodes_to_zero(device: torch.device) -> None:
    weight = torch.tensor([-0.0, 1.0, -0.0, -1.0] * 16, device=device)
    for quant_type in oracles.QUANT_TYPES:
        restored = dequantize_4bit(*quantize_4bit(weight, quant_type=quant_type))
        assert torch.equal(restored, weight)


def test_an_outlier_costs_only_its_own_block(device: torch.device) -> None:
    weight = oracles.edge_tensors(torch.float32)["outlier"].to(device)
    clean = weight.clone()
    clean[77] = 0.0
    with_outlier = dequantize_4bit(*quantize_4bit(weight, double_quant=False))
    without = dequantize_4bit(*quantize_4bit(clean, double_quant=False))
    others = torch.arange(256, device=device) // 64 != 1
    assert torch.equal(with_outlier[others], without[others])
    assert with_outlier[77] == 1e4


@pytest.mark.parametrize("quant_type", ["nf4", "int4"])
@pytest.mark.parametrize("dtype", oracles.FLOATS, ids=str)
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_codes_survive_a_second_quantization(
    device: torch.device, quant_type: codebook.QuantType, dtype, blocksize: int
) -> None:
    weight = torch.randn(101, 97, device=device).to(dtype)
    packed, state = quantize_4bit(
        weight, quant_type=quant_type, blocksize=blocksize, double_quant=False
    )
    again, state_again = quantize_4bit(
        dequantize_4bit(packed, state),
        quant_type=quant_type,
        blocksize=blocksize,
        double_quant=False,
    )
    assert torch.equal(again, packed)
    assert torch.equal(state_again.absmax, state.absmax)


def test_fp4_values_survive_a_second_quantization(device: torch.device) -> None:
    # Codes may change from 8 to 0: minus zero is not above the midpoint of the two zeros.
    packed, state = quantize_4bit(torch.randn(101, 97, device=device), quant_type="fp4")
    once = dequantize_4bit(packed, state)
    packed, state = quantize_4bit(once, quant_type="fp4", double_quant=False)
    assert torch.equal(
        dequantize_4bit(
            *quantize_4bit(dequantize_4bit(packed, state), quant_type="fp4", double_quant=False)
        ),
        dequantize_4bit(packed, state),
    )


@pytest.mark.parametrize("quant_type", oracles.QUANT_TYPES)
@pytest.mark.parametrize("exponent", [-20, -1, 3, 20])
def test_powers_of_two_change_only_the_scales(
    device: torch.device, quant_type: codebook.QuantType, exponent: int
) -> None:
    weight = torch.randn(1000, device=device)
    packed, state = quantize_4bit(weight, quant_type=quant_type, double_quant=False)
    scaled, scaled_state = quantize_4bit(
        weight * 2.0**exponent, quant_type=quant_type, double_quant=False
    )
    assert torch.equal(scaled, packed)
    assert torch.equal(scaled_state.absmax, state.absmax * 2.0**exponent)


@pytest.mark.parametrize("quant_type", ["fp4", "int4"])
def test_the_negative_quantizes_to_the_negative(
    device: torch.device, quant_type: codebook.QuantType
) -> None:
    weight = torch.randn(1000, device=device)
    plus = dequantize_4bit(*quantize_4bit(weight, quant_type=quant_type, double_quant=False))
    minus = dequantize_4bit(*quantize_4bit(-weight, quant_type=quant_type, double_quant=False))
    assert torch.equal(plus, -minus)


@pytest.mark.parametrize("quant_type", oracles.QUANT_TYPES)
def test_blocks_know_nothing_of_each_other(
    device: torch.device, quant_type: codebook.QuantType
) -> None:
    blocks = torch.randn(40, 64, device=device)
    packed, state = quantize_4bit(blocks, quant_type=quant_type, double_quant=False)
    order = torch.randperm(40, device=device)
    moved, moved_state = quantize_4bit(blocks[order], quant_type=quant_type, double_quant=False)
    assert torch.equal(moved.view(40, 32), packed.view(40, 32)[order])
    assert torch.equal(moved_state.absmax, state.absmax[order])
    parts = [
        quantize_4bit(part, quant_type=quant_type, double_quant=False)
        for part in blocks.split([7, 1, 32])
    ]
    assert torch.equal(torch.cat([part for part, _ in parts]), packed)
    assert torch.equal(torch.cat([part.absmax for _, part in parts]), state.absmax)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_inputs_equal_their_float32_values(device: torch.device, dtype) -> None:
    weight = torch.randn(33, 65, device=device).to(dtype)
    narrow, narrow_state = quantize_4bit(weight)
    wide, wide_state = quantize_4bit(weight.float())
    assert torch.equal(narrow, wide)
    for field in ("absmax", "nested_absmax", "nested_offset"):
        assert torch.equal(getattr(narrow_state, field), getattr(wide_state, field))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", oracles.FLOATS, ids=str)
def test_non_finite_weights_are_named(device: torch.device, dtype, bad: float) -> None:
    weight = torch.randn(20, 30, device=device).to(dtype).t()
    weight[3, 4] = bad
    weight[17, 5] = float("nan")
    with pytest.raises(ModelError) as caught:
        quantize_4bit(weight, name="model.layers.3.mlp.up_proj.weight")
    shown = weight[3, 4].item()
    assert caught.value.line() == (
        "error[nonfinite-weight] model.layers.3.mlp.up_proj.weight:"
        f" {shown} at flat index 64 (2 non-finite of 600 values);"
        " fix: use an undamaged copy of the checkpoint"
    )


def test_opposite_infinities_do_not_cancel(device: torch.device) -> None:
    weight = torch.zeros(100, device=device)
    weight[10], weight[20] = float("inf"), float("-inf")
    with pytest.raises(ModelError, match="flat index 10"):
        quantize_4bit(weight)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.int32, torch.uint8, torch.complex64], ids=str
)
def test_other_dtypes_are_refused(dtype) -> None:
    with pytest.raises(ValueError, match="use float32, float16 or bfloat16"):
        quantize_4bit(torch.zeros(64, dtype=dtype))


@pytest.mark.parametrize("blocksize", [0, -64, 1, 16, 63, 65, 96, 8192])
def test_other_blocksizes_are_refused(blocksize: int) -> None:
    with pytest.raises(ValueError, match=f"blocksize {blocksize} is not one of"):
        quantize_4bit(torch.zeros(64), blocksize=blocksize)
    with pytest.raises(ValueError, match=f"blocksize {blocksize} is not one of"):
        QuantConfig(blocksize=blocksize)


def test_other_data_types_are_refused() -> None:
    with pytest.raises(ValueError, match="quant_type 'int3' is not one of"):
        quantize_4bit(torch.zeros(64), quant_type="int3")  # type: ignore[arg-type]


def test_one_list_of_data_types() -> None:
    assert get_args(codebook.QuantType) == codebook.QUANT_TYPES


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", oracles.BLOCKSIZES)
def test_bits_per_weight_count_the_bytes(blocksize: int, double_quant: bool) -> None:
    config = QuantConfig(blocksize=blocksize, double_quant=double_quant)
    numel = blocksize * codebook.NESTED_BLOCKSIZE
    packed, state = quantize_4bit(
        torch.randn(numel), blocksize=blocksize, double_quant=double_quant
    )
    parts = [packed, state.absmax]
    if state.nested_absmax is not None:
        parts.append(state.nested_absmax)  # the one offset of a whole tensor is not counted
    bits = 8 * sum(part.nbytes for part in parts)
    assert bits == config.bits_per_weight * numel


def test_paper_default_costs_4_127_bits() -> None:
    assert round(QuantConfig().bits_per_weight, 3) == 4.127


def test_state_is_frozen() -> None:
    _, state = quantize_4bit(torch.randn(64))
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.blocksize = 32  # type: ignore[misc]


def test_real_weights_under_a_meta_default_device() -> None:
    weight = torch.randn(64, 3)
    expected = dequantize_4bit(*quantize_4bit(weight))
    with torch.device("meta"):
        assert torch.equal(dequantize_4bit(*quantize_4bit(weight)), expected)
