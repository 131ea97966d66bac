"""One step of AdamW: native kernels give the reference's bits, the reference torch's numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fourbit import codebook, native
from fourbit.optim.update import BLOCK, Coefficients, Moment, update_8bit, update_32bit

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [*range(1, 34), 63, 64, 65, 255, 256, 257, 511, 512, 513, 4097, 70_001]
GROUP = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def poisoned(values: Tensor) -> Tensor:
    """A copy at an odd address, NaN (255 for codes) on both sides."""
    around = 255 if values.dtype == torch.uint8 else float("nan")
    whole = torch.full((values.numel() + 6,), around, dtype=values.dtype)
    part = whole[3 : 3 + values.numel()]
    part.copy_(values)
    return part


def untouched_around(part: Tensor) -> bool:
    whole = torch.as_strided(part, (part.numel() + 6,), (1,), part.storage_offset() - 3)
    outside = torch.cat((whole[:3], whole[-3:]))
    return bool((outside == 255).all() if part.dtype == torch.uint8 else outside.isnan().all())


def moment(count: int, *, signed: bool) -> Moment:
    codes = poisoned(torch.randint(256, (count,), dtype=torch.uint8))
    return Moment(codes, poisoned(torch.rand(-(-count // BLOCK))), signed)


def copied(moment: Moment) -> Moment:
    return Moment(poisoned(moment.codes), poisoned(moment.absmax), moment.signed)


def tensors_of(state: Tensor | Moment) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else [state.codes, state.absmax]


@pytest.mark.parametrize("isa", native.supported())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [32, 8])
def test_native_bits_are_the_references(
    isa: str, dtype: torch.dtype, bits: int, monkeypatch: pytest.MonkeyPatch
):
    for index, count in enumerate(SIZES):
        scalars = Coefficients.of(GROUP, 1 + index)
        p, grad = (poisoned(torch.randn(count).to(dtype)) for _ in range(2))
        if index % 4 == 0:
            grad.zero_()
        states: list = [torch.randn(count), torch.rand(count)]
        if bits == 8:
            states = [moment(count, signed=True), moment(count, signed=False)]
        results = []
        for chosen in (isa, None):
            ours = poisoned(p)
            pair = [poisoned(s) if isinstance(s, Tensor) else copied(s) for s in states]
            update = update_32bit if bits == 32 else update_8bit
            if chosen is None:
                with monkeypatch.context() as patch:
                    patch.setattr(native, "isa", lambda: None)
                    update(ours, grad, *pair, scalars)
            else:
                with native.using(isa):
                    update(ours, grad, *pair, scalars)
            flat = [
                t for s in pair for t in ([s] if isinstance(s, Tensor) else [s.codes, s.absmax])
            ]
            assert all(untouched_around(tensor) for tensor in (ours, *flat))
            results.append([ours, *flat])
        for mine, wanted in zip(*results, strict=True):
            assert torch.equal(mine, wanted), (count, dtype)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_32_bits_are_the_numbers_of_torch(weight_decay: float):
    group = {**GROUP, "weight_decay": weight_decay}
    theirs = torch.nn.Parameter(torch.randn(3, 700).double())
    oracle = torch.optim.AdamW([theirs], foreach=False, **group)  # float64: no rounding to excuse
    ours = theirs.detach().float().view(-1)
    m, v = torch.zeros(2100), torch.zeros(2100)
    for step in range(1, 41):
        grad = torch.randn(3, 700).double() * 10 ** torch.randn(3, 1)
        theirs.grad = grad
        oracle.step()
        update_32bit(ours, grad.float().view(-1), m, v, Coefficients.of(group, step))
    torch.testing.assert_close(ours.double().view(3, 700), theirs.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("signed", [True, False])
def test_8_bits_take_the_nearest_value(signed: bool):
    values = torch.randn(1000) if signed else torch.rand(1000) ** 6
    held = Moment(torch.empty(1000, dtype=torch.uint8), torch.empty(4), signed)
    held.encode_(values)
    table = held.tables[0]
    padded = torch.nn.functional.pad(values, (0, 24)).view(4, 256)
    assert torch.equal(held.absmax, padded.abs().amax(1))
    relative = (padded / held.absmax[:, None]).view(-1)[:1000]
    nearest = (relative[:, None] - table).abs().amin(dim=1)
    found = (relative - table[held.codes.long()]).abs()
    torch.testing.assert_close(found, nearest, rtol=0, atol=1e-7)
    zeros = Moment(torch.full((300,), 9, dtype=torch.uint8), torch.ones(2), signed)
    zeros.encode_(torch.zeros(300))
    assert not zeros.decode().any()


def test_the_unsigned_map_is_the_published_one():
    table = codebook.unsigned_dynamic_map(CPU)
    assert table.shape == (256,)
    assert bool((table.diff() > 0).all())
    first = torch.tensor([0.0, 3.25e-07, 7.75e-07, 2.125e-06])
    torch.testing.assert_close(table[:4], first, rtol=1e-6, atol=0)
    last = torch.tensor([0.98945, 0.99648, 1.0])
    torch.testing.assert_close(table[-3:], last, rtol=1e-5, atol=0)
