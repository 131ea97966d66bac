"""Every pass of the fused blocks equals plain PyTorch, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fourbit import native, ops
from fourbit.fused import Norm
from fourbit.fused import primitives as p

SETS = (*native.supported(), None)
WIDTHS = [*range(1, 70), 127, 128, 129, 513]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=SETS, ids=str)
def _isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param is None:
        monkeypatch.setattr(native, "isa", lambda: None)
        yield
        return
    with native.using(request.param):
        yield


pytestmark = pytest.mark.usefixtures("_isa")


def nan_like(x: Tensor) -> Tensor:
    return torch.full_like(x, float("nan"))


def close(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    # one rounding to the dtype, after float32 sums in another order
    relative = 2e-5 if dtype == torch.float32 else 2**-7
    scale = float(wanted.detach().float().abs().max().clamp(min=1.0))
    torch.testing.assert_close(
        got.float(), wanted.detach().float(), rtol=relative, atol=relative * scale
    )


def norm(width: int, dtype: torch.dtype, *, layer: bool = False, offset: float = 0.0) -> Norm:
    weight = torch.randn(width).to(dtype)
    return Norm(weight, torch.randn(width).to(dtype) if layer else None, 1e-5, offset)


def truth(x: Tensor, kind: Norm) -> Tensor:
    weight = kind.weight.double() + kind.offset
    shape = (x.shape[-1],)
    if kind.bias is None:
        return torch.nn.functional.rms_norm(x, shape, weight, kind.eps)
    return torch.nn.functional.layer_norm(x, shape, weight, kind.bias.double(), kind.eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", [False, True])
def test_norms_and_their_gradients(dtype: torch.dtype, layer: bool):
    for width in WIDTHS:
        kind = norm(width, dtype, layer=layer, offset=0.0 if layer else float(width % 2))
        rows = 1 + width % 19
        x, grad, added = (torch.randn(rows, width).to(dtype) for _ in range(3))
        wide = x.double().requires_grad_()
        wanted = truth(wide, kind)
        (dx,) = torch.autograd.grad(wanted, wide, grad.double())
        y, statistics = nan_like(x), p.statistics_like(x, kind).fill_(float("nan"))
        p.normalize(x, kind, y, statistics)
        close(y, wanted, dtype)
        got = nan_like(x)
        p.normalize_backward(grad, x, kind, statistics, got)
        close(got, dx, dtype)
        in_place = grad.clone()
        p.normalize_backward(in_place, x, kind, statistics, in_place, added=added)
        close(in_place, dx + added.float(), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_of_heads_inside_a_wider_buffer(dtype: torch.dtype):
    for heads, width in ((3, 8), (1, 20), (5, 33)):
        kind = norm(width, dtype, offset=1.0)
        buffer = torch.randn(7, heads * width + 11).to(dtype)
        x, out = buffer[:, 5 : 5 + heads * width], torch.zeros_like(buffer)
        view = out[:, 5 : 5 + heads * width]
        statistics = p.statistics_like(x, kind, groups=heads)
        p.normalize(x, kind, view, statistics, groups=heads)
        split = x.double().reshape(7, heads, width).requires_grad_()
        wanted = truth(split, kind)
        close(view, wanted.reshape(7, -1), dtype)
        assert not out[:, :5].any()
        assert not out[:, 5 + heads * width :].any()
        grad = torch.randn(7, heads * width + 11).to(dtype)
        part = grad[:, 5 : 5 + heads * width]
        (dx,) = torch.autograd.grad(wanted, split, part.double().reshape(split.shape))
        p.normalize_backward(part, x, kind, statistics, part, groups=heads)
        close(part, dx.reshape(7, -1), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotation_turns_and_turns_back(dtype: torch.dtype):
    for heads, head_dim, rotary in ((3, 8, 8), (2, 20, 10), (5, 33, 32), (4, 64, 64)):
        buffer = torch.randn(6, heads * head_dim + 7).to(dtype)
        before, x = buffer.clone(), buffer[:, 3 : 3 + heads * head_dim]
        angles = torch.rand(3, rotary // 2) * 6
        # halves that differ: nothing says that a model's tables repeat
        cos, sin = (
            torch.cat((f(angles), f(angles + 0.5)), 1).to(dtype) for f in (torch.cos, torch.sin)
        )
        wide = before[:, 3 : 3 + heads * head_dim].float().view(2, 3, heads, head_dim)
        wide = wide.clone().requires_grad_()
        turned, rest = wide[..., :rotary], wide[..., rotary:]
        low, high = turned.chunk(2, -1)
        c, s = cos.float()[:, None], sin.float()[:, None]
        wanted = torch.cat((turned * c + torch.cat((-high, low), -1) * s, rest), -1)
        p.rotate_(x, cos, sin, heads=heads)
        close(x, wanted.reshape(6, -1), dtype)
        assert torch.equal(buffer[:, :3], before[:, :3])
        assert torch.equal(buffer[:, 3 + heads * head_dim :], before[:, 3 + heads * head_dim :])
        grad = torch.randn(6, heads * head_dim).to(dtype)
        (dx,) = torch.autograd.grad(wanted, wide, grad.float().view(wide.shape))
        p.rotate_(grad, cos, sin, heads=heads, back=True)
        close(grad, dx.reshape(6, -1), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("gated", [False, True])
def test_activations_and_their_gradients(dtype: torch.dtype, kind: str, gated: bool):
    function = {
        "silu": torch.nn.functional.silu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    }[kind]
    for width in WIDTHS:
        rows = 1 + width % 5
        x = (3 * torch.randn(rows, width * (1 + gated))).to(dtype)
        x[0, 0] = -40.0  # the exponential overflows on the way, the value does not
        wide = x.float().requires_grad_()
        wanted = function(wide[:, :width])
        wanted = wanted * wide[:, width:] if gated else wanted
        grad = torch.randn(rows, width).to(dtype)
        (dx,) = torch.autograd.grad(wanted, wide, grad.float())
        h, got = nan_like(x[:, :width].contiguous()), nan_like(x)
        p.activate(x, h, kind=kind, gated=gated)
        close(h, wanted, dtype)
        again = nan_like(h)
        p.activate_backward(x, grad, got, again, kind=kind, gated=gated)
        close(got, dx, dtype)
        close(again, h, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_is_the_mask_of_the_op(dtype: torch.dtype):
    for count in (1, 7, 64, 513, 70_001):
        x = torch.randn(count).to(dtype)
        for seed in (0, 5, 2**61 + 12345):
            mask = ops.reference.dropout_mask(x, torch.tensor([seed]), 0.3)
            out = nan_like(x)
            p.drop(x, out, seed=seed, dropout=0.3)
            assert torch.equal(out, x * mask)
            assert torch.equal(torch.ops.fourbit.dropout_mask(x, torch.tensor([seed]), 0.3), mask)
            base = torch.randn(count).to(dtype)
            added = base.clone()
            p.drop(x, added, seed=seed, dropout=0.3, add=True)
            close(added, base.float() + x.float() * mask.float(), dtype)


def test_dropout_masks_are_fair_and_independent():
    x = torch.ones(200_000)
    masks = [torch.ops.fourbit.dropout_mask(x, torch.tensor([seed]), 0.1) > 0 for seed in range(8)]
    for mask in masks:
        # 5 standard deviations of a binomial share
        assert abs(mask.float().mean() - 0.9) < 5 * (0.09 / 200_000) ** 0.5
        # neighbours, and elements a row apart, know nothing of each other
        for lag in (1, 2, 64, 576):
            both = (mask[lag:] & mask[:-lag]).float().mean()
            assert abs(both - 0.81) < 5 * (0.81 * 0.19 / 200_000) ** 0.5
    both = (masks[0] & masks[1]).float().mean()
    assert abs(both - 0.81) < 5 * (0.81 * 0.19 / 200_000) ** 0.5


def test_the_number_of_threads_changes_no_bit():
    x, kind = torch.randn(300, 65), norm(65, torch.float32)
    grad = torch.randn(300, 65)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y, statistics, dx = nan_like(x), p.statistics_like(x, kind), nan_like(x)
        p.normalize(x, kind, y, statistics)
        p.normalize_backward(grad, x, kind, statistics, dx)
        h = nan_like(x[:, :32].contiguous())
        p.activate(x[:, :64].contiguous(), h, kind="silu", gated=True)
        results.append((y, dx, h))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
