"""The chunked head loss against full logits: value, gradients, memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fourbit import loss
from fourbit.loss import (
    IGNORE,
    LogitTransform,
    linear_cross_entropy,
    logits_cross_entropy,
    shift_labels,
)

HIDDEN, VOCAB, TOKENS = 16, 101, 29

FP32 = {"rtol": 2e-5, "atol": 2e-5}
"""float32 products and a softmax over 101 words, summed in another order."""

BF16_RELATIVE_RMS = 2.0**-6
"""Logits, their gradient and the two products are each rounded to bf16 (2^-9)."""

FP16_RELATIVE_RMS = 2.0**-9
"""The same roundings with 3 more bits of mantissa."""

TRANSFORMS = {
    "none": LogitTransform(),
    "scale": LogitTransform(scale=0.25),
    "softcap": LogitTransform(softcap=3.0),
    "both": LogitTransform(scale=2.0, softcap=3.0),
}
MASKS = {"none": 0.0, "some": 0.4, "all": 1.0}


def case(device: torch.device, masked: float = 0.4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = torch.randn(TOKENS, HIDDEN, device=device)
    weight = torch.randn(VOCAB, HIDDEN, device=device) * 0.5
    bias = torch.randn(VOCAB, device=device)
    labels = torch.randint(VOCAB, (TOKENS,), device=device)
    labels[torch.rand(TOKENS, device=device) < masked] = IGNORE
    return hidden, weight, bias, labels


def reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, how: LogitTransform
) -> Tensor:
    raw = hidden @ weight.t() if bias is None else hidden @ weight.t() + bias
    logits = raw * how.scale
    if how.softcap is not None:
        logits = how.softcap * torch.tanh(logits / how.softcap)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE)


def relative_rms(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt())


@pytest.mark.parametrize("how", TRANSFORMS)
@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, TOKENS, 1000])
def test_value_and_gradients(
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    how: str,
    masked: str,
    with_bias: bool,
    rows: int,
) -> None:
    monkeypatch.setattr(loss, "CHUNK_BYTES", rows * 4 * VOCAB)
    hidden, weight, bias, labels = case(device, MASKS[masked])
    inputs = [hidden, weight, bias] if with_bias else [hidden, weight]
    for tensor in inputs:
        tensor.requires_grad_()
    own_bias = bias if with_bias else None
    ours = linear_cross_entropy(hidden, weight, labels, bias=own_bias, transform=TRANSFORMS[how])
    truth = reference(hidden, weight, own_bias, labels, TRANSFORMS[how])
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, truth, **FP32)
    ours_grads = torch.autograd.grad(0.3 * ours, inputs)
    truth_grads = torch.autograd.grad(0.3 * truth, inputs)
    for mine, expected in zip(ours_grads, truth_grads, strict=True):
        torch.testing.assert_close(mine, expected, **FP32)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_only_wanted_gradients_are_made(device: torch.device, wanted: tuple[int, ...]) -> None:
    hidden, weight, bias, labels = case(device)
    tensors = [hidden, weight, bias]
    inputs = [tensors[i].requires_grad_() for i in wanted]
    ours = linear_cross_entropy(hidden, weight, labels, bias=bias)
    truth = reference(hidden, weight, bias, labels, LogitTransform())
    for mine, expected in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(truth, inputs), strict=True
    ):
        torch.testing.assert_close(mine, expected, **FP32)


def test_without_gradients_the_value_is_the_same(device: torch.device) -> None:
    hidden, weight, _, labels = case(device)
    with torch.no_grad():
        plain = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(linear_cross_entropy(hidden.requires_grad_(), weight, labels), plain)


def test_leading_shapes_do_not_matter(device: torch.device) -> None:
    hidden, weight, _, labels = case(device)
    flat = linear_cross_entropy(hidden[:28], weight, labels[:28])
    folded = linear_cross_entropy(hidden[:28].view(4, 7, HIDDEN), weight, labels[:28].view(4, 7))
    assert torch.equal(flat, folded)


def test_masked_positions_take_no_part(device: torch.device) -> None:
    hidden, weight, _, labels = case(device)
    expected = linear_cross_entropy(hidden, weight, labels)
    spoiled = torch.where((labels == IGNORE)[:, None], torch.nan, hidden).requires_grad_()
    ours = linear_cross_entropy(spoiled, weight, labels)
    assert torch.equal(ours, expected)
    (grad,) = torch.autograd.grad(ours, spoiled)
    assert bool((grad[labels == IGNORE] == 0).all())


@pytest.mark.parametrize(
    ("dtype", "budget"),
    [(torch.bfloat16, BF16_RELATIVE_RMS), (torch.float16, FP16_RELATIVE_RMS)],
    ids=str,
)
def test_narrow_arithmetic_stays_within_its_budget(
    device: torch.device, dtype: torch.dtype, budget: float
) -> None:
    hidden, weight, bias, labels = case(device)
    narrow = [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)]
    wide = [t.detach().double().requires_grad_() for t in narrow]
    ours = linear_cross_entropy(narrow[0], narrow[1], labels, bias=narrow[2])
    truth = reference(wide[0], wide[1], wide[2], labels, LogitTransform())
    assert ours.dtype == torch.float32
    assert abs(ours.item() - truth.item()) < budget * truth.item()
    for mine, expected in zip(
        torch.autograd.grad(ours, narrow), torch.autograd.grad(truth, wide), strict=True
    ):
        assert mine.dtype == dtype
        assert relative_rms(mine, expected) < budget


def test_fp16_gradients_do_not_underflow_before_they_are_scaled(device: torch.device) -> None:
    # A mean over 10^6 tokens would push d loss / d hidden under fp16's 6e-8; its loss scale of
    # 2^16 must lift it before it is rounded.
    hidden, weight, _, labels = case(device, 0.0)
    narrow = hidden.half().requires_grad_()
    count, scale = 10.0**6, 2.0**16
    ours = linear_cross_entropy(narrow, weight.half(), labels) / count * scale
    (grad,) = torch.autograd.grad(ours, narrow)
    wide = hidden.half().double().requires_grad_()
    truth = reference(wide, weight.half().double(), None, labels, LogitTransform())
    (expected,) = torch.autograd.grad(truth / count * scale, wide)
    assert relative_rms(grad, expected) < FP16_RELATIVE_RMS


def test_saved_gradients_are_of_the_unscaled_sum(device: torch.device) -> None:
    hidden, weight, _, labels = case(device, 0.0)
    hidden.requires_grad_()
    ours = linear_cross_entropy(hidden, weight, labels)
    plain = torch.autograd.grad(ours, hidden, retain_graph=True)[0]
    half = torch.autograd.grad(ours * 0.5, hidden)[0]
    assert torch.equal(half, plain * 0.5)


class _LargestOf(TorchDispatchMode):
    """The largest tensor that any operation returns, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_logits_of_all_tokens_never_exist(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    tokens, rows = 400, 8
    monkeypatch.setattr(loss, "CHUNK_BYTES", rows * 4 * VOCAB)
    hidden = torch.randn(tokens, HIDDEN, device=device, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, device=device)
    labels = torch.randint(VOCAB, (tokens,), device=device)
    with _LargestOf() as largest:
        linear_cross_entropy(hidden, weight, labels).backward()
    assert largest.numel == max(tokens * HIDDEN, rows * VOCAB)
    with _LargestOf() as largest:
        reference(hidden, weight, None, labels, LogitTransform())
    assert largest.numel == tokens * VOCAB


def test_chunks_are_of_equal_size_and_share_their_memory(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    hidden, weight, _, labels = case(device, 0.0)
    monkeypatch.setattr(loss, "CHUNK_BYTES", 14 * 4 * VOCAB)
    seen: list[tuple[int, int]] = []
    original = loss.cross_entropy_rows_

    def watched(logits: Tensor, *args: Tensor, **kwargs: bool) -> Tensor:
        seen.append((logits.shape[0], logits.data_ptr()))
        return original(logits, *args, **kwargs)

    monkeypatch.setattr(loss, "cross_entropy_rows_", watched)
    linear_cross_entropy(hidden, weight, labels)
    assert [rows for rows, _ in seen] == [10, 10, 9]
    assert len({address for _, address in seen}) == 1


def test_evaluation_makes_no_gradient(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    hidden, weight, bias, labels = case(device)
    for tensor in (hidden, weight, bias):
        tensor.requires_grad_()
    expected = linear_cross_entropy(hidden, weight, labels, bias=bias)
    wanted: list[bool] = []
    original = loss.cross_entropy_rows_

    def watched(*args: Tensor, gradient: bool, **how: float) -> Tensor:
        wanted.append(gradient)
        return original(*args, gradient=gradient, **how)

    monkeypatch.setattr(loss, "cross_entropy_rows_", watched)
    with torch.no_grad():
        plain = linear_cross_entropy(hidden, weight, labels, bias=bias)
    assert wanted == [False]
    assert torch.equal(plain, expected)
    assert not plain.requires_grad


def test_bf16_errs_no_more_than_full_bf16_logits(device: torch.device) -> None:
    """What transformers does: bf16 logits, float32 cross-entropy, bf16 gradient."""
    hidden = torch.randn(60, 64, device=device).bfloat16()
    weight = (torch.randn(2000, 64, device=device) * 0.4).bfloat16()
    labels = torch.randint(2000, (60,), device=device)
    wide = hidden.double().requires_grad_()
    truth = reference(wide, weight.double(), None, labels, LogitTransform())
    (expected,) = torch.autograd.grad(truth, wide)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    value = linear_cross_entropy(ours, weight, labels)
    usual = reference(theirs, weight, None, labels, LogitTransform())
    full = torch.nn.functional.cross_entropy((theirs @ weight.t()).float(), labels, reduction="sum")
    assert abs(value - truth) <= abs(full - truth) + 1e-6 * truth
    assert abs(value - truth) <= abs(usual - truth)
    errors = [
        relative_rms(torch.autograd.grad(made, at)[0], expected)
        for made, at in ((value, ours), (full, theirs))
    ]
    assert errors[0] <= 1.02 * errors[1]


MEMORY = """
import torch
from fourbit.device import peak_memory, reset_peak_memory, resident_memory, resolve_precision
from fourbit.loss import linear_cross_entropy
cpu = torch.device("cpu")
dtype = resolve_precision("auto", cpu)
def step(tokens, vocab):
    hidden = torch.randn(tokens, 576).to(dtype).requires_grad_()
    weight, labels = torch.randn(vocab, 576).to(dtype), torch.randint(vocab, (tokens,))
    before = resident_memory()
    reset_peak_memory(cpu)
    (linear_cross_entropy(hidden, weight, labels) / tokens).backward()
    return peak_memory(cpu) - before
step(64, 512)  # what the libraries allocate once
print(step(8192, 49152))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
def test_8192_tokens_add_little_memory() -> None:
    """Logits of all of them in bf16 are 805 MB, and transformers makes three float32 ones."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=300, check=True
    )
    added = int(done.stdout)
    gradient = 8192 * 576 * 2
    assert gradient < added < 150_000_000


def test_kept_for_backward_is_the_gradient_alone(device: torch.device) -> None:
    hidden, weight, _, labels = case(device, 0.0)
    hidden.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_cross_entropy(hidden, weight, labels)
    assert [t.shape for t in kept if t.is_floating_point()] == [hidden.shape]


def test_materialised_logits_give_the_same(device: torch.device) -> None:
    for masked in MASKS.values():
        hidden, weight, _, labels = case(device, masked)
        ours = linear_cross_entropy(hidden, weight, labels)
        torch.testing.assert_close(logits_cross_entropy(hidden @ weight.t(), labels), ours, **FP32)


def test_labels_are_shifted_by_one_and_the_last_is_ignored() -> None:
    labels = torch.tensor([[1, 2, IGNORE, 4], [5, 6, 7, 8]])
    shifted = shift_labels(labels)
    assert shifted.tolist() == [[2, IGNORE, 4, IGNORE], [6, 7, 8, IGNORE]]
    assert labels.tolist()[0] == [1, 2, IGNORE, 4]
    assert shift_labels(torch.tensor([[3]])).tolist() == [[IGNORE]]


def test_products_have_few_shapes_whatever_is_supervised(device: torch.device) -> None:
    """Compiled code is kept for each shape of a product; a run meets every number of positions."""
    hidden, weight, bias, labels = case(device, masked=0.0)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    shapes = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.__name__.split(".")[0] in ("mm", "addmm"):
                shapes.add(tuple(tuple(a.shape) for a in args[-2:]))
            return func(*args, **(kwargs or {}))

    with Watch():
        for count in range(1, TOKENS + 1):
            some = labels.clone()
            some[count:] = IGNORE
            linear_cross_entropy(hidden, weight, some, bias=bias).backward()
    assert len(shapes) == 3  # logits, and the gradients of states and head
