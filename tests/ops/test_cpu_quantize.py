"""The CPU's kernels of the storage formats give the bytes of the plain PyTorch ones.

Every instruction set that this CPU has, every block size, odd counts, odd addresses, strides, one
and two threads, on memory that starts poisoned.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import oracles
from fourbit import codebook, native, ops
from fourbit.ops import reference

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty", "_threads_restored"),
    pytest.mark.skipif(native.isa() is None, reason="no library for this CPU"),
]

ISAS = native.supported()
COUNTS = (*range(514), 1023, 1025, 4097, 9001)
LARGE = 3 * 65536 + 77
"""Enough for two threads, and no whole number of blocks."""


@pytest.fixture
def _threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.using(request.param):
        yield request.param


def bits(tensor: Tensor) -> Tensor:
    """As integers, so that -0 differs from 0 and NaN equals itself."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def assert_same(ours: Any, truth: Any, where: object) -> None:
    for one, other in zip(ours, truth, strict=True):
        assert one.dtype == other.dtype, where
        assert torch.equal(bits(one), bits(other)), where


def odd_address(tensor: Tensor) -> Tensor:
    """The same values one element further than an allocation begins."""
    return torch.cat((tensor.new_zeros(1), tensor.reshape(-1)))[1:].view(tensor.shape)


def wild(count: int) -> Tensor:
    """Numbers of all sizes, float32's subnormals among them, whole blocks of zeros, ties."""
    x = torch.randn(count) * torch.exp2(torch.randint(-150, 100, (count,)).float())
    x[: count // 3] = torch.randn(count // 3)
    x[count // 2 : count // 2 + 130] = 0.0
    bounds = codebook.thresholds("nf4", torch.device("cpu"))
    x[: min(count, 15)] = bounds[: min(count, 15)]
    return x


@pytest.mark.parametrize("quant_type", oracles.QUANT_TYPES)
def test_every_count_and_blocksize(isa: str, quant_type: str) -> None:
    torch.set_num_threads(1)
    pool = wild(9001)
    for count in COUNTS:
        for dtype in oracles.FLOATS:
            blocksize = codebook.BLOCKSIZES[(count + dtype.itemsize) % 8]
            weight = odd_address(pool[:count].to(dtype).nan_to_num_(0.0, 1.0, -1.0))
            ours = ops.quantize_4bit(weight, blocksize=blocksize, quant_type=quant_type)
            truth = reference.quantize_4bit(weight, blocksize, quant_type)
            assert_same(ours, truth, (count, dtype, blocksize))


@pytest.mark.parametrize("quant_type", oracles.QUANT_TYPES)
def test_threads_and_strides(isa: str, quant_type: str) -> None:
    matrix = torch.randn(300, 701)
    for dtype in oracles.FLOATS:
        inputs = (
            torch.randn(LARGE).to(dtype),
            matrix.to(dtype).t(),
            matrix.to(dtype)[::2, 1::3],
            matrix.to(dtype)[5:, 3:],
        )
        for weight in inputs:
            truth = reference.quantize_4bit(weight, 64, quant_type)
            for count in (1, 2):
                torch.set_num_threads(count)
                ours = ops.quantize_4bit(weight, blocksize=64, quant_type=quant_type)
                assert_same(ours, truth, (dtype, count))


@pytest.mark.parametrize("quant_type", oracles.QUANT_TYPES)
@pytest.mark.parametrize("dtype", oracles.FLOATS, ids=str)
def test_edges_and_ties(isa: str, quant_type: str, dtype: torch.dtype) -> None:
    for name, weight in oracles.edge_tensors(dtype).items():
        ours = ops.quantize_4bit(weight, blocksize=64, quant_type=quant_type)
        assert_same(ours, reference.quantize_4bit(weight, 64, quant_type), name)
    bounds = codebook.thresholds(quant_type, torch.device("cpu"))
    for toward in (-torch.inf, torch.inf):
        near = torch.cat((bounds, torch.nextafter(bounds, torch.tensor(toward)), torch.ones(2)))
        weight = (near * 3.0).to(dtype)
        ours = ops.quantize_4bit(weight, blocksize=32, quant_type=quant_type)
        assert_same(ours, reference.quantize_4bit(weight, 32, quant_type), toward)


def test_all_numbers_of_16_bits(isa: str) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = every.view(dtype)
        values = values[torch.isfinite(values)]
        for weight in (values, values[torch.randperm(values.numel())]):
            ours = ops.quantize_4bit(weight, blocksize=32, quant_type="nf4")
            assert_same(ours, reference.quantize_4bit(weight, 32, "nf4"), dtype)


def test_scales_in_8_bits(isa: str) -> None:
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for count in (0, 1, 2, 255, 256, 257, 511, 512, 513, 700, 40_000):
            for absmax in (torch.rand(count), odd_address(wild(count).abs()), torch.ones(count)):
                ours, truth = ops.quantize_absmax(absmax), reference.quantize_absmax(absmax)
                assert_same(ours, truth, count)
    values = codebook.signed_dynamic_map(torch.device("cpu"))
    bounds = codebook.signed_thresholds(torch.device("cpu"))
    for shift in (0, 1):
        edges = torch.cat((bounds, bounds.nextafter(torch.tensor(shift * 2.0)), values))
        absmax = torch.cat((edges, -edges, torch.tensor([1.0, -1.0])))
        assert_same(ops.quantize_absmax(absmax), reference.quantize_absmax(absmax), shift)


def packed_weight(
    count: int, blocksize: int, double_quant: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    packed = odd_address(torch.randint(256, ((count + 1) // 2,), dtype=torch.uint8))
    absmax = odd_address(torch.rand(-(-count // blocksize)))
    if not double_quant:
        return packed, absmax, None, None
    return packed, *ops.quantize_absmax(absmax)


@pytest.mark.parametrize("quant_type", oracles.QUANT_TYPES)
def test_dequantizes_every_count(isa: str, quant_type: str) -> None:
    torch.set_num_threads(1)
    for count in COUNTS:
        for dtype in oracles.FLOATS:
            blocksize = codebook.BLOCKSIZES[(count + dtype.itemsize) % 8]
            scales = packed_weight(count, blocksize, count % 3 > 0)
            truth = reference.dequantize_4bit(*scales, blocksize, quant_type, [count], dtype)
            ours = ops.dequantize_4bit(
                scales, blocksize=blocksize, quant_type=quant_type, shape=(count,), dtype=dtype
            )
            assert_same((ours,), (truth,), (count, dtype, blocksize))


@pytest.mark.parametrize("dtype", oracles.FLOATS, ids=str)
def test_dequantizes_into_any_place_from_any_index(isa: str, dtype: torch.dtype) -> None:
    whole, blocksize = 2000, 64
    for double_quant in (False, True):
        scales = packed_weight(whole, blocksize, double_quant)
        truth = reference.dequantize_4bit(*scales, blocksize, "nf4", [whole], dtype)
        for first in (0, 1, 63, 64, 65, 96, 127, 640, 1999):
            for count in (0, 1, 2, 31, 32, 33, 64, 65, 129, 700):
                if first + count > whole:
                    continue
                memory = torch.full((count + 3,), -7.0, dtype=dtype)
                out = memory[1 : 1 + count]
                back = ops.dequantize_into(
                    scales, blocksize=blocksize, quant_type="nf4", out=out, first=first
                )
                assert back is out
                assert_same((out,), (truth[first : first + count],), (first, count))
                assert [memory[0], *memory[-2:]] == [-7.0] * 3


@pytest.mark.parametrize("double_quant", [False, True])
def test_dequantizes_with_threads_and_wild_scales(isa: str, double_quant: bool) -> None:
    packed = torch.randint(256, (LARGE // 2 + 1,), dtype=torch.uint8)
    absmax = wild(-(-LARGE // 64))
    scales: ops.Scales = (packed, absmax, None, None)
    held: ops.Scales = (packed, absmax.view(torch.int32), None, None)
    if double_quant:
        codes, nested, offset = ops.quantize_absmax(absmax.abs().clamp(max=1e30))
        scales = (packed, codes, nested, offset)
        held = (packed, codes, nested.view(torch.int32), offset.view(torch.int32))
    for dtype in oracles.FLOATS:
        truth = reference.dequantize_4bit(*scales, 64, "fp4", [LARGE], dtype)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for form in (scales, held):
                ours = ops.dequantize_4bit(
                    form, blocksize=64, quant_type="fp4", shape=(LARGE,), dtype=dtype
                )
                assert_same((ours,), (truth,), (dtype, threads))


def test_tensors_that_are_too_short_are_not_read_past_their_end(isa: str) -> None:
    packed, absmax, nested, offset = packed_weight(4096, 64, True)
    assert nested is not None
    for scales in (
        (packed[:-1], absmax, nested, offset),
        (packed, absmax[:-1], nested, offset),
        (packed, absmax, nested[:0], offset),
    ):
        with pytest.raises((RuntimeError, IndexError)):
            ops.dequantize_4bit(
                scales, blocksize=64, quant_type="nf4", shape=(4096,), dtype=torch.float32
            )


def test_int8_both_ways(isa: str) -> None:
    for threads, shapes in (
        (1, [(3, k) for k in (*range(40), 255, 256, 257, 513)]),
        (2, [(70, 700), (1, 1), (0, 3), (3, 0), (500, 33)]),
    ):
        torch.set_num_threads(threads)
        for rows, width in shapes:
            for dtype in oracles.FLOATS:
                weight = torch.randn(rows, width) * torch.exp2(-2.0 * torch.arange(rows))[:, None]
                weight = odd_address(weight.to(dtype))
                weight[:1] = 0
                codes, absmax = ops.quantize_int8(weight)
                assert_same((codes, absmax), reference.quantize_int8(weight), weight.shape)
                for target in oracles.FLOATS:
                    for scales in (absmax, absmax.view(torch.int32)):
                        ours = ops.dequantize_int8(codes, scales, dtype=target)
                        truth = reference.dequantize_int8(codes, absmax, target)
                        assert_same((ours,), (truth,), weight.shape)


def test_int8_ties_and_strides(isa: str) -> None:
    steps = torch.arange(-254, 255) / 2.0
    weight = torch.stack((steps, steps.flip(0), steps * 2.0**-10))
    for view in (weight, weight.t(), weight[:, ::2], weight[1:, 7:]):
        for dtype in oracles.FLOATS:
            ours, truth = ops.quantize_int8(view.to(dtype)), reference.quantize_int8(view.to(dtype))
            assert_same(ours, truth, dtype)


@pytest.mark.parametrize("threshold", [0.0, 2.5, 6.0])
@pytest.mark.parametrize("dtype", oracles.FLOATS, ids=str)
def test_int8_product(isa: str, dtype: torch.dtype, threshold: float) -> None:
    for rows, width, features in ((1, 1, 1), (3, 7, 6), (33, 300, 65), (5, 1025, 3), (2, 64, 31)):
        weight = torch.randn(features, width)
        codes, absmax = ops.quantize_int8(weight)
        x = odd_address((torch.randn(rows, width) * 2).to(dtype))
        x[0, 0] = 70000.0 if dtype == torch.float32 else 9.0
        for bias in (None, torch.randn(features), torch.randn(features).to(dtype)):
            for parts in ((codes, absmax), (codes, absmax.view(torch.int32)), (weight, None)):
                ours = ops.linear_int8(x, *parts, bias, threshold=threshold)
                truth = reference.linear_int8(x, *parts, bias, threshold)
                assert_same((ours,), (truth,), (rows, width, features))


def test_int8_product_of_other_layouts_and_of_infinity(isa: str) -> None:
    codes, absmax = ops.quantize_int8(torch.randn(33, 40))
    x = torch.randn(4, 5, 40)
    x[1, 2, 3], x[0, 0, 0], x[3, 3, 3] = torch.inf, torch.nan, -torch.inf
    for view in (x, x.transpose(0, 1), x[:, ::2], x[0, 1], x[:0]):
        for threshold in (0.0, 6.0):
            ours = ops.linear_int8(view, codes, absmax, None, threshold=threshold)
            truth = reference.linear_int8(view, codes, absmax, None, threshold)
            assert torch.equal(ours.isnan(), truth.isnan())
            assert_same((ours.nan_to_num(),), (truth.nan_to_num(),), view.shape)


def test_damage_is_counted(isa: str) -> None:
    for dtype in oracles.FLOATS:
        for count in (0, 1, 33, 16384, 16385, LARGE):
            clean = torch.randn(count).to(dtype)
            assert ops.count_nonfinite(clean) == (count, 0)
            for places in ((0,), (count // 2, count - 1), tuple(range(3, count, 5000))):
                if count == 0 or not places:
                    continue
                for bad in (torch.nan, torch.inf, -torch.inf):
                    broken = odd_address(clean)
                    broken[list(places)] = bad
                    for threads in (1, 2):
                        torch.set_num_threads(threads)
                        expected = (min(places), len(set(places)))
                        assert ops.count_nonfinite(broken) == expected
                        assert reference.count_nonfinite(broken) == expected
                    absmax = ops.quantize_4bit(broken, blocksize=64, quant_type="nf4")[1]
                    blocks = {place // 64 for place in places}
                    assert set((~absmax.isfinite()).nonzero()[:, 0].tolist()) == blocks


def test_other_dtypes_are_left_to_the_reference(isa: str) -> None:
    weight = torch.randn(100, dtype=torch.float64)
    ours = ops.quantize_4bit(weight, blocksize=32, quant_type="nf4")
    assert_same(ours, reference.quantize_4bit(weight, 32, "nf4"), "float64")
    scales = (*ours, None, None)
    ours = ops.dequantize_4bit(
        scales, blocksize=32, quant_type="nf4", shape=(100,), dtype=torch.float64
    )
    truth = reference.dequantize_4bit(*scales, 32, "nf4", [100], torch.float64)
    assert torch.equal(ours, truth)


def test_under_a_meta_default_device() -> None:
    weight = torch.randn(64, 96)
    truth = reference.quantize_4bit(weight, 64, "nf4")
    rows = reference.quantize_int8(weight)
    with torch.device("meta"):
        ours = ops.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        scales = (ours[0], *ops.quantize_absmax(ours[1]))
        back = ops.dequantize_4bit(
            scales, blocksize=64, quant_type="nf4", shape=weight.shape, dtype=torch.bfloat16
        )
        codes = ops.quantize_int8(weight)
        product = ops.linear_int8(weight, *codes, None, threshold=6.0)
        assert ops.count_nonfinite(weight) == (weight.numel(), 0)
    assert_same(ours, truth, "4 bit")
    assert_same(codes, rows, "int8")
    assert not back.is_meta
    assert_same((product,), (reference.linear_int8(weight, *rows, None, 6.0),), "product")
