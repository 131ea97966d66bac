"""Quantizing for known inputs: the same format, a smaller error of the output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fourbit import codebook
from fourbit.calibrated import quantize_4bit_for, quantize_int8_for
from fourbit.errors import ModelError
from fourbit.quantize import dequantize_4bit, dequantize_int8, quantize_4bit, quantize_int8
from oracles import BLOCKSIZES, FLOATS, QUANT_TYPES


def inputs(count: int, width: int) -> Tensor:
    """Correlated, some columns much larger than others."""
    mixed = torch.randn(count, width) @ (torch.randn(width, width) / width**0.5)
    return mixed * torch.logspace(-1, 1, width)[torch.randperm(width)]


def output_error(weight: Tensor, restored: Tensor, x: Tensor) -> float:
    return ((weight.float() - restored.float()) @ x.t()).square().sum().item()


def restored_4bit(weight: Tensor, moments: Tensor | None, **how) -> Tensor:
    found = (
        quantize_4bit(weight, **how)
        if moments is None
        else quantize_4bit_for(weight, moments, **how)
    )
    return dequantize_4bit(*found, dtype=torch.float32)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("blocksize", BLOCKSIZES[:3])
def test_the_outputs_error_falls(quant_type, double_quant, blocksize):
    weight, x = torch.randn(40, 192), inputs(2000, 192)
    how = {"quant_type": quant_type, "double_quant": double_quant, "blocksize": blocksize}
    moments = x.t() @ x
    plain = output_error(weight, restored_4bit(weight, None, **how), x)
    ours = output_error(weight, restored_4bit(weight, moments, **how), x)
    assert ours < 0.6 * plain


def test_on_other_inputs_of_the_same_kind_too():
    weight, x = torch.randn(40, 192), inputs(4000, 192)
    seen, unseen = x[:2000], x[2000:]
    plain = output_error(weight, restored_4bit(weight, None), unseen)
    ours = output_error(weight, restored_4bit(weight, seen.t() @ seen), unseen)
    assert ours < 0.7 * plain


def test_the_order_of_columns_inside_a_block_does_not_matter():
    """The largest inputs are rounded first wherever they stand."""
    weight, x = torch.randn(40, 192), inputs(2000, 192)
    moved = torch.cat([start + torch.randperm(64) for start in (0, 64, 128)])
    moments = x.t() @ x
    straight = restored_4bit(weight, moments)[:, moved]
    shuffled = restored_4bit(weight[:, moved], moments[moved][:, moved])
    assert (straight == shuffled).float().mean() > 0.99
    left_to_right = restored_4bit(weight, torch.diag(moments.diagonal()))[:, moved]
    assert (straight == left_to_right).float().mean() < 0.9


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 63), (5, 65), (9, 129), (64, 64)], ids=str)
def test_every_shape_is_the_same_format(shape, dtype):
    weight, x = torch.randn(shape).to(dtype), inputs(50, shape[1])
    for double_quant in (True, False):
        plain, plain_state = quantize_4bit(weight, double_quant=double_quant)
        packed, state = quantize_4bit_for(weight, x.t() @ x, double_quant=double_quant)
        assert (packed.shape, packed.dtype) == (plain.shape, plain.dtype)
        for name in ("absmax", "nested_absmax", "nested_offset"):
            a, b = getattr(state, name), getattr(plain_state, name)
            assert (a is None) == (b is None)
            assert a is None or (a.shape, a.dtype) == (b.shape, b.dtype)
        assert (state.shape, state.dtype) == (plain_state.shape, plain_state.dtype)
        assert torch.isfinite(dequantize_4bit(packed, state)).all()


def test_independent_inputs_leave_nothing_to_make_up_for():
    weight = torch.randn(30, 128)
    packed, state = quantize_4bit_for(weight, torch.eye(128), double_quant=False)
    restored = dequantize_4bit(packed, state)
    nearest = weight.view(-1, 64) / state.absmax[:, None]
    values = codebook.code("nf4", weight.device)
    wanted = values[(nearest[..., None] - values).abs().argmin(-1)] * state.absmax[:, None]
    torch.testing.assert_close(restored.view(-1, 64), wanted)


def test_zeros_and_inputs_that_never_come():
    weight, x = torch.randn(8, 128), inputs(300, 128)
    weight[:, :64] = 0
    weight[3] = 0
    x[:, 70:90] = 0
    for double_quant in (True, False):
        restored = restored_4bit(weight, x.t() @ x, double_quant=double_quant)
        assert torch.isfinite(restored).all()
        plain = restored_4bit(weight, None, double_quant=double_quant)
        assert output_error(weight, restored, x) <= output_error(weight, plain, x)


def test_moments_of_rank_one_still_work():
    weight, x = torch.randn(8, 64), torch.randn(1, 64).expand(9, -1)
    assert torch.isfinite(restored_4bit(weight, x.t() @ x)).all()


def test_int8():
    weight, x = torch.randn(40, 192), inputs(2000, 192)
    codes, absmax = quantize_int8_for(weight, x.t() @ x)
    assert (codes.dtype, absmax.dtype, absmax.shape) == (torch.int8, torch.float32, (40,))
    ours = dequantize_int8(codes, absmax, dtype=torch.float32)
    plain = dequantize_int8(*quantize_int8(weight), dtype=torch.float32)
    assert output_error(weight, ours, x) < 0.7 * output_error(weight, plain, x)


def test_what_cannot_be_used_is_named():
    weight = torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"layer: moments are \[4, 4\], not \[8, 8\]"):
        quantize_4bit_for(weight, torch.eye(4), name="layer")
    with pytest.raises(ValueError, match="not finite"):
        quantize_4bit_for(weight, torch.full((8, 8), torch.nan))
    weight[1, 2] = torch.inf
    with pytest.raises(ModelError, match="index 10"):
        quantize_4bit_for(weight, torch.eye(8))


def test_the_same_again():
    weight, x = torch.randn(40, 192), inputs(500, 192)
    first, second = (quantize_4bit_for(weight, x.t() @ x) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1].absmax, second[1].absmax)
