"""Cross-entropy of rows: every instruction set against the plain PyTorch kernel and float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fourbit import native
from fourbit.ops import cross_entropy_rows_
from fourbit.ops import loss as plain

SETS = native.supported()
DTYPES = [torch.float32, torch.bfloat16]
TRANSFORMS = {
    "none": (1.0, None),
    "scale": (0.25, None),
    "negative": (-2.0, None),
    "softcap": (1.0, 5.0),
    "both": (3.0, 5.0),
}
VOCABS = [1, 2, 7, 33, 513, 1024, 1025, 4099]

FP32_GRADIENT = 2e-6
"""exp within 2 ulp, tanh within 4, a float32 sum of 1024 terms."""

BF16_ROUNDING = 2.0**-8
"""Half a step of bf16 is 2^-9 of the value; the float32 before it may sit on the other side."""

needs_kernels = pytest.mark.skipif(not SETS, reason="no compiled kernels here")


@pytest.fixture(params=SETS)
def isa(request):
    with native.using(request.param):
        yield request.param


@pytest.fixture(params=[1, 2], ids="threads-{}".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def case(rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * rows + vocab)
    logits = (torch.randn(rows, vocab, generator=generator) * 4).to(dtype)
    return logits, torch.randint(vocab, (rows,), generator=generator)


def truth(logits: Tensor, labels: Tensor, how: str) -> tuple[Tensor, Tensor]:
    scale, softcap = TRANSFORMS[how]
    wide = logits.double().requires_grad_()
    values = wide * scale
    if softcap is not None:
        values = softcap * torch.tanh(values / softcap)
    losses = torch.nn.functional.cross_entropy(values, labels, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), wide)[0]


def guarded(logits: Tensor) -> tuple[Tensor, Tensor]:
    """A copy that lies unaligned between NaN, and the NaN around it."""
    memory = torch.full((logits.numel() + 34,), math.nan, dtype=logits.dtype)
    inside = memory[17:-17].view(logits.shape)
    inside.copy_(logits)
    return inside, memory


def run(logits: Tensor, labels: Tensor, how: str, *, gradient: bool = True) -> Tensor:
    scale, softcap = TRANSFORMS[how]
    return cross_entropy_rows_(logits, labels, scale=scale, softcap=softcap, gradient=gradient)


@needs_kernels
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", TRANSFORMS)
def test_losses_and_gradients_of_every_set(isa, threads, dtype, how):
    for vocab in VOCABS:
        for rows in (1, 5):
            logits, labels = case(rows, vocab, dtype)
            expected, gradient = truth(logits, labels, how)
            inside, memory = guarded(logits)
            losses = run(inside, labels, how)
            torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=2e-6)
            loose = {"rtol": 1e-5, "atol": FP32_GRADIENT * abs(TRANSFORMS[how][0])}
            if dtype == torch.bfloat16:
                loose["rtol"] = BF16_ROUNDING
            torch.testing.assert_close(inside.double(), gradient, **loose)
            assert bool(memory[:17].isnan().all() and memory[-17:].isnan().all())


@needs_kernels
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size_from_one_to_513(isa, dtype):
    for vocab in range(1, 514):
        logits, labels = case(1, vocab, dtype)
        ours, plainly = logits.clone(), logits.clone()
        losses = run(ours, labels, "none")
        theirs = plain.cross_entropy_rows_(plainly, labels, 1.0, None, True)
        torch.testing.assert_close(losses, theirs, rtol=1e-6, atol=3e-6)
        rtol = BF16_ROUNDING if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(ours, plainly, rtol=rtol, atol=FP32_GRADIENT)


@needs_kernels
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(isa, dtype):
    logits, labels = case(37, 3001, dtype)
    answers = []
    before = torch.get_num_threads()
    for count in (1, 2, 3, 64):
        torch.set_num_threads(count)
        mine = logits.clone()
        answers.append((run(mine, labels, "both"), mine))
    torch.set_num_threads(before)
    for losses, gradient in answers[1:]:
        assert torch.equal(losses, answers[0][0])
        assert torch.equal(gradient, answers[0][1])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("how", TRANSFORMS)
def test_without_gradient_the_logits_stay(dtype, how):
    logits, labels = case(5, 77, dtype)
    mine = logits.clone()
    losses = run(mine, labels, how, gradient=False)
    assert torch.equal(mine, logits)
    assert torch.equal(losses, run(mine, labels, how))


@pytest.mark.parametrize("how", ["none", "both"])
def test_float16_and_strided_rows_are_served_by_pytorch(how):
    logits, labels = case(6, 50, torch.float32)
    expected, gradient = truth(logits.half(), labels, how)
    half = logits.half()
    torch.testing.assert_close(run(half, labels, how).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(half.double(), gradient, rtol=2e-3, atol=1e-6)
    wide = torch.full((6, 90), math.nan)
    wide[:, 20:70] = logits
    expected, gradient = truth(logits, labels, how)
    losses = run(wide[:, 20:70], labels, how)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(wide[:, 20:70].double(), gradient, rtol=1e-4, atol=1e-5)
    assert bool(wide[:, :20].isnan().all() and wide[:, 70:].isnan().all())


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["none", "softcap"])
def test_a_bad_number_spoils_its_own_row_and_no_other(isa, dtype, how):
    for bad in (math.nan, -math.nan, math.inf):
        for place in (0, 17, 999):
            logits, labels = case(3, 1000, dtype)
            expected, gradient = run(other := logits.clone(), labels, how), other
            logits[1, place] = bad
            if how == "softcap" and bad == math.inf:
                continue  # tanh makes it an ordinary number
            losses = run(logits, labels, how)
            assert bool(losses[1].isnan())
            assert bool(logits[1].isnan().all())
            for row in (0, 2):
                assert torch.equal(losses[row], expected[row])
                assert torch.equal(logits[row], gradient[row])


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_words_that_are_ruled_out(isa, dtype):
    logits, labels = case(2, 3000, dtype)
    logits[:, :2500] = -math.inf
    labels[0], labels[1] = 2700, 3
    expected, gradient = truth(logits[:1], labels[:1], "none")
    losses = run(logits, labels, "none")
    torch.testing.assert_close(losses[:1].double(), expected, rtol=1e-6, atol=2e-6)
    assert losses[1] == math.inf
    assert bool((logits[0, :2500] == 0).all())
    torch.testing.assert_close(logits[0].double(), gradient[0], rtol=BF16_ROUNDING, atol=2e-6)
    none_left = torch.full((1, 40), -math.inf, dtype=dtype)
    assert bool(run(none_left, labels[1:], "none").isnan().all())


@needs_kernels
def test_far_apart_logits_neither_overflow_nor_lose_the_loss(isa):
    logits = torch.tensor([[3e38, -3e38, 0.0], [1e4, 1e4 - 50, -1e4], [-200.0, -200.0, -200.0]])
    labels = torch.tensor([0, 1, 2])
    losses = run(logits, labels, "none")
    torch.testing.assert_close(losses, torch.tensor([0.0, 50.0, math.log(3)]))
    assert logits[0].tolist() == [0.0, 0.0, 0.0]


@needs_kernels
@pytest.mark.parametrize("label", [-1, -100, 9])
def test_a_label_outside_the_vocabulary_is_refused(label):
    logits, _ = case(2, 9, torch.float32)
    with pytest.raises(IndexError, match=r"a label is not in \[0, 9\)"):
        run(logits, torch.tensor([1, label]), "none")


def test_no_rows():
    assert run(torch.empty(0, 9), torch.empty(0, dtype=torch.int64), "none").shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gradient", [True, False])
def test_the_op_is_sound(dtype, gradient):
    logits, labels = case(4, 19, dtype)
    op = torch.ops.fourbit.cross_entropy_rows_.default
    for scale, softcap in (TRANSFORMS["none"], TRANSFORMS["both"]):
        torch.library.opcheck(op, (logits, labels, scale, softcap, gradient))
