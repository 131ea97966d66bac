"""The tables, each derived a second way."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

import oracles
from fourbit import codebook

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
"""The published table was computed with another inverse normal; formulas agree to this much."""

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
