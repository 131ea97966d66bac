"""The tables, each derived a second way."""

from __future__ import annotations

import math
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest
import torch

import oracles
from fourbit import codebook, ops

CPU = torch.device("cpu")

CUDA_NF4_THRESHOLDS = (
    -0.8480964004993439,
    -0.6106329262256622,
    -0.4599952697753906,
    -0.33967943489551544,
    -0.23460740596055984,
    -0.13791173323988914,
    -0.045525018125772476,
    0.03979014977812767,
    0.1202552504837513,
    0.2035212516784668,
    0.2920137718319893,
    0.3893125355243683,
    0.5016634166240692,
    0.6427869200706482,
    0.8614784181118011,
)

QUANTILE_DRIFT = 2e-7
"""The published table was computed in narrower arithmetic: measured 1.8e-7, three float32 steps."""

MAP_ULPS = 1
"""The dynamic map is float32 arithmetic; the exact midpoints may round to a neighbour."""


def test_nf4_is_bit_equal_to_the_published_table(device: torch.device) -> None:
    ours = codebook.code("nf4", device).cpu().numpy()
    assert ours.tobytes() == oracles.table("nf4").tobytes()


def test_nf4_is_made_of_normal_quantiles() -> None:
    offset = 0.9677083
    inverse = NormalDist().inv_cdf
    positive = [inverse(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-inverse(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    derived = sorted([*positive, 0.0, *negative])
    derived = [value / max(map(abs, derived)) for value in derived]
    difference = np.abs(np.array(derived) - codebook.code("nf4", torch.device("cpu")).numpy())
    assert difference.max() < QUANTILE_DRIFT


def test_fp4_follows_its_bit_pattern(device: torch.device) -> None:
    ours = codebook.code("fp4", device).cpu().numpy()
    assert ours.tobytes() == oracles.table("fp4").tobytes()
    assert math.copysign(1, ours[8]) == -1  # minus zero


@pytest.mark.parametrize("quant_type", oracles.QUANT_TYPES)
def test_order_and_thresholds(device: torch.device, quant_type: str) -> None:
    order = codebook.ascending_codes(quant_type, device).cpu()
    assert order.tolist() == oracles.ascending(quant_type)
    values = oracles.table(quant_type)[order.numpy()]
    bounds = codebook.thresholds(quant_type, device).cpu().numpy()
    assert bounds.tobytes() == ((values[:-1] + values[1:]) / np.float32(2)).tobytes()


def test_nf4_thresholds_are_those_of_the_cuda_kernels() -> None:
    bounds = codebook.thresholds("nf4", torch.device("cpu"))
    assert torch.equal(bounds, torch.tensor(CUDA_NF4_THRESHOLDS, dtype=torch.float32))


@pytest.mark.parametrize("quant_type", oracles.QUANT_TYPES)
def test_byte_pairs_hold_the_high_nibble_first(device: torch.device, quant_type: str) -> None:
    pairs = codebook.byte_pairs(quant_type, device).cpu().numpy()
    values = oracles.table(quant_type)
    expected = np.array([(values[byte // 16], values[byte % 16]) for byte in range(256)])
    assert pairs.tobytes() == expected.tobytes()


def test_signed_dynamic_map_matches_its_definition(device: torch.device) -> None:
    ours = codebook.signed_dynamic_map(device).cpu().numpy()
    exact = [0.0, 1.0]
    for i in range(7):
        for step in range(2**i):
            middle = 0.1 + 0.9 * (step + 0.5) / 2**i
            exact += [middle * 10.0 ** (i - 6), -middle * 10.0 ** (i - 6)]
    expected = np.array(sorted(exact), np.float32)
    np.testing.assert_array_max_ulp(ours, expected, maxulp=MAP_ULPS)


def test_signed_dynamic_map_landmarks() -> None:
    values = codebook.signed_dynamic_map(torch.device("cpu"))
    assert values.shape == (256,)
    assert bool((values.diff() > 0).all())
    assert values[127] == 0
    assert values[-1] == 1
    assert -1 not in values
    first = torch.tensor([-0.992968738, -0.978906274, -0.96484375, -0.950781226])
    last = torch.tensor([0.96484375, 0.978906274, 0.992968738, 1.0])
    assert torch.equal(values[:4], first)
    assert torch.equal(values[-4:], last)
    assert torch.equal(values[:127], -values[128:255].flip(0))


def test_tables_are_real_under_a_meta_default_device() -> None:
    for table in (codebook.byte_pairs, codebook.thresholds):
        table.cache_clear()
    codebook.signed_dynamic_map.cache_clear()
    cpu = torch.device("cpu")
    with torch.device("meta"):
        tables = [
            codebook.byte_pairs("nf4", cpu),
            codebook.thresholds("nf4", cpu),
            codebook.signed_dynamic_map(cpu),
        ]
    assert not any(table.is_meta for table in tables)


def test_int4_is_a_grid_of_sevenths_that_keeps_both_ends() -> None:
    values = codebook.code("int4", CPU)
    assert values.numpy().tobytes() == oracles.table("int4").tobytes()
    assert values[8] == 0
    assert torch.equal(values[1:8], -values[9:].flip(0))
    assert values[15] == 1
    # Code 0 would be -8/7: beyond absmax, so nothing becomes it.
    packed, _ = ops.quantize_4bit(torch.randn(1 << 16), blocksize=64, quant_type="int4")
    codes = oracles.unpacked(packed, 1 << 16)
    assert sorted(set(codes.tolist())) == list(range(1, 16))


# NormalFloat of any width.


@pytest.mark.parametrize("bits", range(2, 9))
def test_normal_float_equals_statistics_quantiles(bits: int) -> None:
    tail = Fraction(1, 4) * (Fraction(1, 2**bits) + Fraction(1, 2**bits - 1))
    half = 2 ** (bits - 1)
    inverse = NormalDist().inv_cdf

    def side(count: int) -> list[float]:
        steps = [Fraction(1, 2) - (Fraction(1, 2) - tail) * i / count for i in range(1, count + 1)]
        return [inverse(float(p)) / inverse(float(tail)) for p in steps]

    expected = sorted([*side(half), 0.0, *(-value for value in side(half - 1))])
    ours = codebook.normal_float(bits)
    assert (ours.dtype, ours.shape) == (torch.float32, (2**bits,))
    assert torch.equal(ours, torch.tensor(expected))


@pytest.mark.parametrize("bits", range(2, 9))
def test_normal_float_has_both_ends_and_one_zero(bits: int) -> None:
    values = codebook.normal_float(bits)
    assert bool((values.diff() > 0).all())
    assert (values[0], values[2 ** (bits - 1) - 1], values[-1]) == (-1, 0, 1)
    assert int((values == 0).sum()) == 1
    assert math.copysign(1, values[2 ** (bits - 1) - 1]) == 1


def test_normal_float_of_4_bits_is_nf4_within_the_measured_drift() -> None:
    canonical = codebook.code("nf4", CPU)
    difference = (codebook.normal_float(4) - canonical).abs()
    # Not equal: a file written with derived values would not be bitsandbytes'.
    assert 0 < float(difference.max()) < QUANTILE_DRIFT


def test_the_offset_of_the_authors_is_the_mean_of_two_half_bins() -> None:
    assert round(1 - (1 / 32 + 1 / 30) / 2, 7) == 0.9677083


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, "4", True, None])
def test_normal_float_of_other_widths_is_refused(bits: object) -> None:
    with pytest.raises(ValueError, match=r"^bits .* is not one of 2, 3, 4, 5, 6, 7, 8$"):
        codebook.normal_float(bits)  # type: ignore[arg-type]


def test_sixteen_equal_bins_have_no_zero() -> None:
    """The mean of each of 16 equally likely bins: symmetric, so an even count has no middle."""
    normal = NormalDist()
    edges = [-math.inf, *(normal.inv_cdf(i / 16) for i in range(1, 16)), math.inf]
    density = [0.0, *(normal.pdf(edge) for edge in edges[1:-1]), 0.0]
    means = np.array([16 * (density[i] - density[i + 1]) for i in range(16)])
    np.testing.assert_allclose(means, -means[::-1], atol=1e-12)
    scaled = means / means.max()
    assert round(float(np.abs(scaled).min()), 4) == 0.0399
    assert 0 in codebook.normal_float(4)
    # The brute-force way to the same means.
    samples = np.sort(np.random.default_rng(0).standard_normal(1 << 20)).reshape(16, -1)
    np.testing.assert_allclose(samples.mean(axis=1), means, atol=5e-3)


def test_normal_float_is_real_under_a_meta_default_device() -> None:
    expected = codebook.normal_float(4)
    with torch.device("meta"):
        assert torch.equal(codebook.normal_float(4), expected)
