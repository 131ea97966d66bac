"""The paged optimizer: the same bits wherever its state is, and state that survives a save."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fourbit.errors import EnvironmentFault
from fourbit.optim import AdamW, resident_bytes
from fourbit.optim.adamw import Paging
from fourbit.optim.pages import RING, Hosted, Mapped, Pages

SHAPES = [(7,), (64, 96), (1,), (130, 33), (4096,), (4095,), (0,), (3, 5000), (20_000,)]
PAGE = 1 << 14
CPU = torch.device("cpu")


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(7)
    found = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    found[3] = nn.Parameter(torch.randn(33, 130).to(dtype).t())  # not contiguous
    return found


def make(trained: list[nn.Parameter], **options: Any) -> AdamW:
    groups = [
        {"params": trained[:4], "weight_decay": 0.1},
        {"params": trained[4:], "lr": 3e-2, "betas": (0.8, 0.95)},
    ]
    return AdamW(groups, lr=1e-2, page_bytes=PAGE, **options)


def train(
    trained: list[nn.Parameter],
    optimizer: AdamW,
    *,
    steps: int = 50,
    first: int = 0,
    between: Callable[[int], None] = lambda step: None,
) -> None:
    for step in range(first, first + steps):
        draw = torch.Generator().manual_seed(step)
        for index, parameter in enumerate(trained):
            wide = torch.randn(parameter.shape, generator=draw) * 10 ** (step % 5 - 3)
            parameter.grad = None if (step + index) % 7 == 6 else wide.to(parameter.dtype)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.step()
        between(step)


def same(left: list[nn.Parameter], right: list[nn.Parameter]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.fixture(params=["mapped", "hosted"])
def home(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both kinds of home; `Hosted`, a GPU's, with a CPU as the device."""
    if request.param == "hosted":
        monkeypatch.setattr(AdamW, "_home", lambda self: Hosted(self.stats, CPU))
    return request.param


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_mode_and_every_eviction_schedule_gives_the_same_bits(
    bits: int, dtype: torch.dtype, home: str
):
    wanted = parameters(dtype)
    still = make(wanted, optim_bits=bits, paged="off")
    train(wanted, still, between=lambda step: still.evict() and None)
    assert not still.is_paged
    assert still.stats.evictions == 0
    for seed, paged in enumerate(("auto", "always", "auto", "always", "auto")):
        draw, trained = random.Random(seed), parameters(dtype)
        optimizer = make(trained, optim_bits=bits, paged=paged)

        def between(step: int, optimizer: AdamW = optimizer, draw: random.Random = draw) -> None:
            if draw.random() < 0.3:
                optimizer.evict()

        # a page may go at any moment at which it is not in use
        taken = _evicting(optimizer, draw)
        train(trained, optimizer, between=between)
        assert same(trained, wanted), (paged, seed)
        assert optimizer.is_paged
        assert optimizer.stats.evictions > 10
        assert taken


def _evicting(optimizer: AdamW, draw: random.Random) -> list[int]:
    seen: list[int] = []
    before = optimizer._update

    def update(*values: Any) -> None:
        if draw.random() < 0.05 and optimizer.is_paged:
            assert optimizer._pages is not None
            seen.append(optimizer._pages.evict())
        before(*values)

    optimizer._update = update  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("bits", [32, 8])
def test_no_more_than_the_ring_is_resident(bits: int, tmp_path: Path):
    trained = [nn.Parameter(torch.randn(1 << 20)) for _ in range(4)]
    optimizer = AdamW(trained, optim_bits=bits, paged="always", page_bytes=1 << 19, folder=tmp_path)
    for _ in range(3):
        for parameter in trained:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        stats = optimizer.stats
        assert stats.state_bytes >= 4 * RING << 19, "the state is much larger than the ring"
        assert stats.resident_bytes <= stats.peak_resident_bytes <= RING << 19
        assert resident_mapped(tmp_path) <= (RING << 19) + (1 << 16)
    assert stats.evictions >= 3 * (stats.state_bytes // (1 << 19) - RING)
    assert stats.bytes_out > 2 * stats.state_bytes
    assert os.listdir(tmp_path) == [], "the file has no name: nothing is left behind"


def resident_mapped(folder: Path) -> int:
    """Bytes of files of ``folder`` that the kernel counts as resident in this process."""
    text = Path("/proc/self/smaps").read_text()
    found, ours = 0, False
    for line in text.splitlines():
        if "-" in line.split(" ", 1)[0]:
            ours = str(folder) in line
        elif ours and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def test_pressure_moves_the_state_out(tmp_path: Path):
    trained = [nn.Parameter(torch.randn(1 << 20))]
    optimizer = AdamW(trained, page_bytes=1 << 20, folder=tmp_path)
    trained[0].grad = torch.randn(1 << 20)
    optimizer.step()
    assert optimizer.stats.resident_bytes == optimizer.stats.state_bytes == 1 << 23
    before = optimizer.state_of(trained[0])
    assert optimizer.evict() == 1 << 23
    assert optimizer.stats.resident_bytes == 0
    assert resident_mapped(tmp_path) == 0
    after = optimizer.state_of(trained[0])
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert optimizer.stats.resident_bytes <= RING << 20


def test_a_plan_knows_the_bytes():
    for bits in (32, 8):
        trained = parameters()
        optimizer = AdamW(trained, optim_bits=bits, page_bytes=1 << 24)
        train(trained, optimizer, steps=1)
        counts = [p.numel() for p in trained]
        planned = resident_bytes(counts, optim_bits=bits, paged=False)
        assert optimizer.stats.state_bytes == planned
        paged = resident_bytes([1 << 28], optim_bits=bits, paged=True)
        assert paged == RING << 24


MODES: list[tuple[int, Paging]] = [(32, "off"), (32, "always"), (8, "auto"), (8, "always")]


@pytest.mark.parametrize(("bits", "paged"), MODES)
@pytest.mark.parametrize("later", ["off", "always"])
def test_state_goes_from_mode_to_mode(bits: int, paged: Paging, later: Paging, home: str):
    wanted, trained = parameters(), parameters()
    whole = make(wanted, optim_bits=bits, paged="off")
    train(wanted, whole)
    first = make(trained, optim_bits=bits, paged=paged)
    train(trained, first, steps=20)
    second = make(trained, optim_bits=bits, paged=later)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.is_paged == (later == "always")
    train(trained, second, steps=30, first=20)
    assert same(trained, wanted)


def test_state_dicts_are_those_of_torch():
    ours, theirs = parameters(), parameters()
    optimizer = make(ours, paged="always")
    groups = [{"params": theirs[:4], "weight_decay": 0.1}, {"params": theirs[4:]}]
    oracle = torch.optim.AdamW(groups, lr=1e-2, foreach=False)
    train(ours, optimizer, steps=5)
    saved = optimizer.state_dict()
    oracle.load_state_dict(saved)
    for parameter, other in zip(ours, theirs, strict=True):
        other.data.copy_(parameter)
        if parameter.numel() == 0:
            continue
        state = oracle.state[other]
        assert state["exp_avg"].shape == parameter.shape
        assert torch.equal(state["exp_avg_sq"], optimizer.state_of(parameter)["exp_avg_sq"])
        other.grad = None if parameter.grad is None else parameter.grad.clone()
    back = make(ours)
    back.load_state_dict(oracle.state_dict())
    back.step()
    oracle.step()
    for parameter, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-5, atol=1e-6)


def test_state_is_converted_between_32_and_8_bits():
    trained = parameters()
    wide = make(trained)
    train(trained, wide, steps=10)
    narrow = make(trained, optim_bits=8)
    narrow.load_state_dict(wide.state_dict())
    again = make(trained)
    again.load_state_dict(narrow.state_dict())
    for parameter in trained:
        if parameter.numel() == 0:
            continue
        before, held = wide.state_of(parameter), narrow.state_of(parameter)
        after = again.state_of(parameter)
        small = parameter.numel() < 4096
        assert held["exp_avg"].dtype == (torch.float32 if small else torch.uint8)
        for key in ("exp_avg", "exp_avg_sq"):
            if small:
                assert torch.equal(before[key], after[key])
            else:
                assert float((before[key] - after[key]).norm() / before[key].norm()) < 0.03


def test_8_bits_learn_like_32():
    torch.manual_seed(0)
    x, wanted = torch.randn(256, 96), torch.randn(256, 80)
    losses = []
    for bits in (32, 8):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(96, 128), nn.Tanh(), nn.Linear(128, 80))
        optimizer = AdamW(model.parameters(), lr=3e-3, optim_bits=bits)
        for _ in range(150):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), wanted)
            loss.backward()
            optimizer.step()
        losses.append(float(loss))
    assert losses[0] < 0.5, "the problem is learned at all"
    assert abs(losses[1] - losses[0]) < 0.1 * losses[0]


def test_parameters_may_come_later():
    trained = parameters()
    optimizer = AdamW(trained[:2], page_bytes=PAGE, paged="always")
    train(trained[:2], optimizer, steps=3)
    before = optimizer.state_of(trained[1])
    optimizer.add_param_group({"params": trained[2:]})
    for parameter in trained:
        parameter.grad = None
    optimizer.step()
    after = optimizer.state_of(trained[1])
    assert all(torch.equal(before[key], after[key]) for key in before)
    values = trained[7].detach().clone()
    trained[7].grad = torch.ones_like(trained[7])
    optimizer.step()
    assert not torch.equal(values, trained[7])


def test_autograd_notices_the_change():
    weight = nn.Parameter(torch.randn(3))
    optimizer = AdamW([weight])
    loss = (weight * weight).sum()
    weight.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        loss.backward()


def test_a_full_disk_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    weight = nn.Parameter(torch.randn(5000))
    weight.grad = torch.ones(5000)
    optimizer = AdamW([weight], paged="always", folder=tmp_path)
    with pytest.raises(EnvironmentFault, match="No space left") as caught:
        optimizer.step()
    assert "\n" not in caught.value.line()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optim_bits": 16}, "optim_bits"),
        ({"paged": "never"}, "paged"),
        ({"lr": -1.0}, "lr"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"page_bytes": 10}, "page_bytes"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        AdamW([nn.Parameter(torch.zeros(2))], **options)


def test_sparse_gradients_and_foreign_state_are_refused():
    table = nn.Embedding(10, 3, sparse=True)
    optimizer = AdamW(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()
    trained = [nn.Parameter(torch.randn(6))]
    optimizer = AdamW(trained)
    with pytest.raises(ValueError, match="exp_avg"):
        optimizer.restore(trained[0], {"step": torch.tensor(1.0), "exp_avg": torch.zeros(5)})


def test_memory_does_not_grow(home: str):
    trained = [nn.Parameter(torch.randn(50_000))]
    optimizer = AdamW(trained, page_bytes=PAGE, paged="always")
    trained[0].grad = torch.ones(50_000)
    optimizer.step()
    pages: Pages | None = optimizer._pages
    assert isinstance(pages, Mapped | Hosted)
    for _ in range(300):
        optimizer.step()
    assert optimizer.stats.resident_bytes <= RING * PAGE
    assert optimizer.stats.state_bytes == sum(pages._sizes)


def test_a_closure_is_called_with_gradients():
    weight = nn.Parameter(torch.ones(2))
    optimizer = AdamW([weight], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss: Tensor = (weight**2).sum()
        loss.backward()
        return float(loss)

    assert optimizer.step(closure) == 2.0
    torch.testing.assert_close(weight.detach(), torch.full((2,), 0.9))
