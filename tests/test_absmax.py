"""Integers by absmax: the worked example, brute force, proved bounds and refusals."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

import fourbit
import oracles
from fourbit.absmax import dequantize_absmax, quantize_absmax
from fourbit.errors import ModelError
from fourbit.quantize import dequantize_4bit, quantize_4bit

EXAMPLE = [1.2, -0.5, -4.3, 1.2, -3.1, 0.8, 2.4, 5.4]

ROUNDINGS = 4 * oracles.HALF_ULP
"""Scale, product and quotient each round once in float32, relative to absmax."""

TINIEST = 3.8e-37
"""Below it ``127 / absmax`` exceeds float32, and the block counts as zero."""

WIDTHS = range(2, 9)
SIZES = [None, 1, 7, 32, 64, 1000]


def restored(x: Tensor, *, bits: int = 8, blocksize: int | None = None) -> Tensor:
    codes, scale = quantize_absmax(x, bits=bits, blocksize=blocksize)
    return dequantize_absmax(codes, scale, blocksize=blocksize)


def blocks_of(x: Tensor, blocksize: int | None) -> list[Tensor]:
    flat = x.double().reshape(-1)
    return [flat] if blocksize is None else list(flat.split(blocksize)) if flat.numel() else []


def test_the_worked_example() -> None:
    codes, scale = fourbit.quantize_absmax(torch.tensor(EXAMPLE))
    assert codes.tolist() == [28, -12, -101, 28, -73, 19, 56, 127]
    assert (codes.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, ())
    assert float(scale) == pytest.approx(127 / 5.4, rel=1e-7)
    back = fourbit.dequantize_absmax(codes, scale)
    assert float((back - torch.tensor(EXAMPLE)).abs().max()) <= 5.4 / 254 * (1 + ROUNDINGS)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("blocksize", SIZES)
def test_codes_equal_exact_arithmetic(bits: int, blocksize: int | None) -> None:
    # Multiples of 1/8 below 16: float32 holds them exactly, fractions decide every rounding.
    x = torch.randint(-127, 128, (333,)) / 8
    levels = 2 ** (bits - 1) - 1
    expected, near = [], []
    for block in blocks_of(x, blocksize):
        largest = max(abs(Fraction(value)) for value in block.tolist())
        for value in block.tolist():
            exact = Fraction(value) * levels / largest if largest else Fraction(0)
            expected.append(round(exact))  # to even, as Python's round of a fraction
            near.append(exact.denominator == 2)
    codes, _ = quantize_absmax(x, bits=bits, blocksize=blocksize)
    wrong = [i for i, code in enumerate(codes.tolist()) if code != expected[i]]
    # Where the exact quotient is a half, the rounded scale may decide for the other side.
    assert all(near[i] and abs(int(codes[i]) - expected[i]) == 1 for i in wrong)


def test_halves_go_to_the_even_code(device: torch.device) -> None:
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 125.5], device=device)
    codes, scale = quantize_absmax(x)
    assert float(scale) == 1.0
    assert codes.tolist() == [127, 0, 2, 2, 0, -2, -2, 126]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("blocksize", SIZES)
@pytest.mark.parametrize("dtype", oracles.FLOATS, ids=str)
def test_error_is_at_most_half_a_step(
    device: torch.device, bits: int, blocksize: int | None, dtype: torch.dtype
) -> None:
    levels = 2 ** (bits - 1) - 1
    for name, x in oracles.edge_tensors(dtype).items():
        codes, scale = quantize_absmax(x.to(device), bits=bits, blocksize=blocksize)
        assert codes.shape == x.shape, name
        assert int(codes.abs().max() if codes.numel() else 0) <= levels, name
        assert bool(torch.isfinite(scale).all()), name
        back = dequantize_absmax(codes, scale, blocksize=blocksize).cpu()
        assert back.shape == x.shape, name
        for block, values in zip(blocks_of(x, blocksize), blocks_of(back, blocksize), strict=True):
            largest = float(block.abs().max()) if block.numel() else 0.0
            bound = max(largest * (0.5 / levels + ROUNDINGS), TINIEST if largest < TINIEST else 0)
            assert float((block - values).abs().max() if block.numel() else 0) <= bound, name


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_ends_and_zero_are_exact(bits: int) -> None:
    largest = torch.finfo(torch.float32).max
    for absmax in (largest, 1.0, 5.4, 1e-30):
        x = torch.tensor([absmax, -absmax, 0.0, -0.0])
        back = restored(x, bits=bits)
        assert bool(torch.isfinite(back).all())
        torch.testing.assert_close(back, x, rtol=2 * ROUNDINGS, atol=0)
        assert back[2] == 0
        assert back[3] == 0


@pytest.mark.parametrize("blocksize", [None, 4, 7])
def test_zeros_have_scale_one_and_stay_zero(blocksize: int | None) -> None:
    codes, scale = quantize_absmax(torch.zeros(3, 4), blocksize=blocksize)
    assert set(scale.reshape(-1).tolist()) == {1.0}
    assert torch.equal(dequantize_absmax(codes, scale, blocksize=blocksize), torch.zeros(3, 4))


def test_a_zero_block_among_others_disturbs_nobody() -> None:
    x = torch.cat((torch.ones(4), torch.zeros(4), torch.full((3,), 1e-40), -torch.ones(2)))
    codes, scale = quantize_absmax(x, blocksize=4)
    assert scale.tolist() == [127.0, 1.0, 127.0, 127.0]
    assert codes.tolist() == [127] * 4 + [0] * 7 + [-127] * 2


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 5), (3, 0), (7, 5), (2, 3, 5)])
@pytest.mark.parametrize("blocksize", SIZES)
def test_any_shape_comes_back(shape: tuple[int, ...], blocksize: int | None) -> None:
    x = torch.randn(shape)
    codes, scale = quantize_absmax(x, blocksize=blocksize)
    blocks = () if blocksize is None else (math.ceil(x.numel() / blocksize),)
    assert (codes.shape, scale.shape) == (x.shape, blocks)
    back = dequantize_absmax(codes, scale, blocksize=blocksize, dtype=torch.bfloat16)
    assert (back.shape, back.dtype) == (x.shape, torch.bfloat16)


def test_strides_are_read_row_by_row() -> None:
    wide = torch.randn(24, 40)
    for x in (wide.t(), wide[:, ::3], torch.randn(7, 1).expand(7, 19)):
        for blocksize in (None, 16):
            ours, plain = (
                quantize_absmax(values, blocksize=blocksize) for values in (x, x.contiguous())
            )
            assert torch.equal(ours[0], plain[0])
            assert torch.equal(ours[1], plain[1])


def test_a_block_larger_than_the_tensor_is_one_block() -> None:
    x = torch.randn(10)
    codes, scale = quantize_absmax(x, blocksize=1 << 50)
    whole, one = quantize_absmax(x)
    assert torch.equal(codes, whole)
    assert scale.tolist() == [float(one)]
    assert torch.equal(
        dequantize_absmax(codes, scale, blocksize=1 << 50), dequantize_absmax(whole, one)
    )


def test_an_outlier_ruins_a_tensor_but_only_its_block() -> None:
    x = torch.randn(256)
    x[77] = 100.0
    whole = (restored(x, bits=4) - x).abs()
    blocks = (restored(x, bits=4, blocksize=64) - x).abs()
    clean = torch.arange(256) // 64 != 1
    assert bool((restored(x, bits=4)[torch.arange(256) != 77] == 0).all())
    assert float(blocks[clean].max()) < 0.5 < float(whole[clean].max())


def test_4_bits_in_blocks_are_the_int4_format() -> None:
    weight = torch.randn(33, 65)
    codes, scale = quantize_absmax(weight, bits=4, blocksize=64)
    packed, state = quantize_4bit(weight, quant_type="int4", double_quant=False)
    nibbles = oracles.unpacked(packed, weight.numel()).view(33, 65)
    assert torch.equal(nibbles.int() - 8, codes.int())
    torch.testing.assert_close(scale, 7 / state.absmax)
    torch.testing.assert_close(
        dequantize_absmax(codes, scale, blocksize=64), dequantize_4bit(packed, state)
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("blocksize", [None, 16])
def test_non_finite_values_are_named(bad: float, blocksize: int | None) -> None:
    x = torch.zeros(4, 25)
    x[2, 3] = bad
    with pytest.raises(ModelError) as caught:
        quantize_absmax(x, blocksize=blocksize, name="activations")
    assert caught.value.line() == (
        f"error[nonfinite-weight] activations: {bad} at flat index 53"
        " (1 non-finite of 100 values); fix: use an undamaged copy of the checkpoint"
    )


@pytest.mark.parametrize("bits", [1, 9, 0, 4.0, "8", True])
def test_other_widths_are_refused(bits: object) -> None:
    with pytest.raises(ValueError, match=r"^bits .* is not one of 2, 3, 4, 5, 6, 7, 8$"):
        quantize_absmax(torch.ones(3), bits=bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("blocksize", [0, -64, 2.0, "64", True])
def test_other_blocksizes_are_refused(blocksize: object) -> None:
    with pytest.raises(ValueError, match="is not a positive whole number or None"):
        quantize_absmax(torch.ones(3), blocksize=blocksize)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is not a positive whole number or None"):
        dequantize_absmax(
            torch.ones(3, dtype=torch.int8),
            torch.ones(1),
            blocksize=blocksize,  # type: ignore[arg-type]
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64], ids=str)
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="use float32, float16 or bfloat16"):
        quantize_absmax(torch.zeros(64, dtype=dtype))
    with pytest.raises(ValueError, match="quantize_absmax returns int8"):
        dequantize_absmax(torch.zeros(64, dtype=dtype), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("made", "read"), [(None, 32), (32, None), (32, 64), (64, 32), (100, None), (None, 100)]
)
def test_scales_of_another_blocksize_are_refused(made: int | None, read: int | None) -> None:
    codes, scale = quantize_absmax(torch.randn(100), blocksize=made)
    with pytest.raises(ValueError, match="give the blocksize of quantize_absmax"):
        dequantize_absmax(codes, scale, blocksize=read)
