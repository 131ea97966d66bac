"""The plain kernels against brute force, on memory that starts poisoned."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import oracles
from fourbit import codebook, ops
from fourbit.ops import reference

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DISTANCE_SLACK = 2.0**-23
"""A float32 midpoint may be one rounding off the exact one, so may the nearest code."""


@pytest.mark.parametrize("quant_type", oracles.QUANT_TYPES)
@pytest.mark.parametrize("dtype", oracles.FLOATS, ids=str)
@pytest.mark.parametrize("name", oracles.edge_tensors(torch.float32))
def test_edge_tensors_equal_brute_force(
    device: torch.device, quant_type: str, dtype: torch.dtype, name: str
) -> None:
    weight = oracles.edge_tensors(dtype)[name]
    packed, absmax = ops.quantize_4bit(weight.to(device), blocksize=64, quant_type=quant_type)
    expected = oracles.quantized(weight, quant_type, 64)
    assert torch.equal(packed.cpu(), expected[0])
    assert torch.equal(absmax.cpu(), expected[1])


@pytest.mark.parametrize("quant_type", oracles.QUANT_TYPES)
@pytest.mark.parametrize("blocksize", oracles.BLOCKSIZES)
def test_every_blocksize_equals_brute_force(
    device: torch.device, quant_type: str, blocksize: int
) -> None:
    for numel in (1, blocksize - 1, blocksize, 2 * blocksize, 2 * blocksize + 1):
        weight = torch.randn(numel)
        packed, absmax = ops.quantize_4bit(
            weight.to(device), blocksize=blocksize, quant_type=quant_type
        )
        expected = oracles.quantized(weight, quant_type, blocksize)
        assert torch.equal(packed.cpu(), expected[0]), numel
        assert torch.equal(absmax.cpu(), expected[1]), numel


@pytest.mark.parametrize("quant_type", oracles.QUANT_TYPES)
def test_no_code_is_nearer_than_the_chosen_one(device: torch.device, quant_type: str) -> None:
    weight = torch.randn(4096)
    packed, _ = ops.quantize_4bit(weight.to(device), blocksize=64, quant_type=quant_type)
    codes = oracles.unpacked(packed.cpu(), 4096).numpy()
    scaled, _ = oracles.scaled_blocks(weight.numpy(), 64)
    values = oracles.table(quant_type).astype(np.float64)
    distance = np.abs(scaled.astype(np.float64)[:, None] - values[None, :])
    chosen = distance[np.arange(4096), codes]
    assert bool((chosen <= distance.min(axis=1) + DISTANCE_SLACK).all())


@pytest.mark.parametrize("quant_type", oracles.QUANT_TYPES)
def test_ties_go_down(device: torch.device, quant_type: str) -> None:
    bounds = codebook.thresholds(quant_type, torch.device("cpu"))
    order = oracles.ascending(quant_type)
    within = [i for i in range(15) if bounds[i].abs() < 1]  # no scaled value lies beyond
    for direction, step in ((None, 0), (torch.inf, 1)):
        values = bounds if direction is None else torch.nextafter(bounds, torch.tensor(direction))
        block = torch.zeros(32)
        block[: 1 + len(within)] = torch.cat((torch.ones(1), values[within]))
        packed, _ = ops.quantize_4bit(block.to(device), blocksize=32, quant_type=quant_type)
        codes = oracles.unpacked(packed.cpu(), 1 + len(within)).tolist()[1:]
        assert codes == [order[i + step] for i in within]


@pytest.mark.parametrize("chunk", [64, 128, 4096])
@pytest.mark.parametrize("numel", [4096, 4097, 64 * 9 + 31])
def test_chunks_leave_no_seam(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, chunk: int, numel: int
) -> None:
    weight = torch.randn(numel, device=device)
    whole = reference.quantize_4bit(weight, 64, "nf4")
    restore = (None, None, 64, "nf4", [numel], torch.float32)
    restored = reference.dequantize_4bit(*whole, *restore)
    monkeypatch.setattr(reference, "_CHUNK", chunk)
    parts = reference.quantize_4bit(weight, 64, "nf4")
    assert torch.equal(parts[0], whole[0])
    assert torch.equal(parts[1], whole[1])
    assert torch.equal(reference.dequantize_4bit(*whole, *restore), restored)


@pytest.mark.parametrize("numel", [0, 1, 2, 255, 256, 257, 700])
def test_nested_codes_are_the_nearest_of_all_256(device: torch.device, numel: int) -> None:
    absmax = torch.rand(numel) + 0.01
    codes, nested, offset = ops.quantize_absmax(absmax.to(device))
    assert codes.dtype == torch.uint8
    assert nested.shape == (-(-numel // 256),)
    if numel == 0:
        assert offset.tolist() == [0.0]
        return
    assert offset.item() == np.float32(math.fsum(absmax.tolist()) / numel)
    centred = (absmax - offset.cpu()).numpy()
    scaled, expected_nested = oracles.scaled_blocks(centred, 256)
    assert nested.cpu().numpy().tobytes() == expected_nested.tobytes()
    values = codebook.signed_dynamic_map(torch.device("cpu")).numpy().astype(np.float64)
    chosen = np.abs(values[codes.cpu().numpy()] - scaled)
    best = np.abs(values[oracles.nested_nearest(scaled, values)] - scaled)
    assert bool((chosen <= best + DISTANCE_SLACK).all())


def test_nested_codes_reach_all_256(device: torch.device) -> None:
    values = codebook.signed_dynamic_map(device)
    codes = torch.cat([_codes_of(values[i : i + 1]) for i in range(256)])
    assert codes.tolist() == list(range(256))


def _codes_of(value: Tensor) -> Tensor:
    """The code of one value in a block that spans [-1, 1] around a mean of zero."""
    balance = torch.tensor([1.0, -1.0], device=value.device)
    block = torch.cat((value, -value, balance, torch.zeros(252, device=value.device)))
    codes, nested, offset = ops.quantize_absmax(block)
    assert (nested.item(), offset.item()) == (1, 0)
    return codes[:1]


def test_equal_scales_are_restored_exactly(device: torch.device) -> None:
    for numel in (1, 256, 300):
        absmax = torch.full((numel,), 0.3, device=device)
        assert torch.equal(reference.scales_float32(*ops.quantize_absmax(absmax)), absmax)


def test_double_quantization_does_not_depend_on_threads() -> None:
    absmax = torch.rand(400_000)
    before = torch.get_num_threads()
    answers = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            answers.append(ops.quantize_absmax(absmax))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*answers, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("quant_type", oracles.QUANT_TYPES)
@pytest.mark.parametrize("dtype", oracles.FLOATS, ids=str)
@pytest.mark.parametrize("numel", [0, 1, 63, 64, 65, 333])
def test_dequantized_values_one_by_one(
    device: torch.device, quant_type: str, dtype: torch.dtype, numel: int
) -> None:
    packed = torch.randint(256, ((numel + 1) // 2,), dtype=torch.uint8)
    absmax = torch.rand(-(-numel // 64))
    codes = oracles.unpacked(packed, numel).numpy()
    scales = absmax.numpy()[np.arange(numel) // 64]
    expected = torch.from_numpy(oracles.table(quant_type)[codes] * scales).to(dtype)
    for held in (absmax, absmax.view(torch.int32)):
        ours = ops.dequantize_4bit(
            (packed.to(device), held.to(device), None, None),
            blocksize=64,
            quant_type=quant_type,
            shape=(numel,),
            dtype=dtype,
        )
        assert ours.dtype == dtype
        assert torch.equal(ours.cpu(), expected)


def test_nested_scales_one_by_one(device: torch.device) -> None:
    codes = torch.randint(256, (600,), dtype=torch.uint8)
    nested, offset = torch.rand(3), torch.rand(1)
    values = codebook.signed_dynamic_map(torch.device("cpu"))
    expected = torch.stack(
        [values[int(codes[i])] * nested[i // 256] + offset[0] for i in range(600)]
    )
    for view in (torch.float32, torch.int32):
        ours = reference.scales_float32(
            codes.to(device), nested.view(view).to(device), offset.view(view).to(device)
        )
        assert torch.equal(ours.cpu(), expected)


@pytest.mark.parametrize("quant_type", oracles.QUANT_TYPES)
def test_a_tail_is_divided_and_not_multiplied(device: torch.device, quant_type: str) -> None:
    bounds = codebook.thresholds(quant_type, torch.device("cpu"))
    told_apart = 0
    for _ in range(100):
        largest = torch.rand(1) + 0.5
        tail = torch.cat((largest, bounds * largest))
        packed, _ = ops.quantize_4bit(tail.to(device), blocksize=64, quant_type=quant_type)
        assert torch.equal(packed.cpu(), oracles.quantized(tail, quant_type, 64)[0])
        product = (tail * (1 / largest)).clamp(-1, 1).numpy()
        quotient = (tail / largest).clamp(-1, 1).numpy()
        codes = [oracles.nearest_codes(scaled, quant_type) for scaled in (product, quotient)]
        told_apart += int((codes[0] != codes[1]).any())
    assert told_apart > 0
