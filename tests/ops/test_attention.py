"""Attention: every kernel against plain PyTorch in float64, and that against PyTorch's own.

Tolerances are of the largest value of a tensor. float32: sums of up to 500 products in another
order. bfloat16: weights, their gradients and the result are rounded once each (2^-9).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fourbit import native
from fourbit.ops import attention as face
from fourbit.ops import attention_schema as plain

OP = torch.ops.fourbit
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2.0**-7}
DTYPES = list(TOLERANCE)

isas = pytest.mark.parametrize("isa", native.supported())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tensors(
    batch: int,
    length: int,
    heads: int,
    kv_heads: int,
    width: int,
    value_width: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the gradient of the output."""
    value_width = value_width or width
    sizes = (heads, width), (kv_heads, width), (kv_heads, value_width), (heads, value_width)
    q, k, v, grad = (torch.randn(batch, length, *size).to(dtype) for size in sizes)
    return q, k, v, grad


def ranges(kind: str, batch: int, length: int) -> Tensor | None:
    at = torch.arange(length, dtype=torch.int32).expand(batch, length)
    if kind == "causal":
        return None
    if kind == "window":
        return (at - 4).clamp(min=0)
    if kind == "packed":
        starts = at.clone()
        for row in range(batch):
            ends = torch.randint(1, 40, (length,)).cumsum(0)
            document = torch.bucketize(at[row], ends, right=True)
            starts[row] = torch.cat((torch.zeros(1, dtype=torch.int64), ends))[document]
        return starts
    if kind == "left":
        return torch.where(at < length // 3, length, length // 3).to(torch.int32)
    return torch.randint(-2, length + 2, (batch, length), dtype=torch.int32)


def everything(
    inputs: tuple[Tensor, ...], first: Tensor | None, scale: float, softcap: float
) -> list[Tensor]:
    q, k, v, grad = inputs
    o, lse = OP.attention(q, k, v, first, scale, softcap)
    return [o, lse, *OP.attention_backward(grad, q, k, v, o, lse, first, scale, softcap)]


def truth(
    inputs: tuple[Tensor, ...], first: Tensor | None, scale: float, softcap: float
) -> list[Tensor]:
    q, k, v, grad = (tensor.double() for tensor in inputs)
    o, lse = plain.attention(q, k, v, first, scale, softcap)
    kept = o.to(inputs[0].dtype).double()  # the output that backward starts from is a rounded one
    grads = plain.attention_backward(grad, q, k, v, kept, lse.double(), first, scale, softcap)
    return [o, lse, *grads]


def require_close(got: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    names = ("o", "lse", "dq", "dk", "dv")
    for name, a, b in zip(names[: len(got)], got, wanted, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a.isinf(), b.isinf()), name
        finite = b.isfinite()
        error = (a.double() - b)[finite].abs().amax().item() if finite.any() else 0.0
        size = max(b[finite].abs().amax().item(), 1.0) if finite.any() else 1.0
        assert error <= TOLERANCE[dtype] * size, f"{name}: {error:.1e} of {size:.1e}"
        assert not a.isnan().any(), name


@isas
@dtypes
def test_every_length(isa, dtype, poisoned_empty):
    with native.using(isa):
        for length in [*range(1, 71), 127, 128, 129]:
            inputs = tensors(1, length, 2, 1, 16, dtype=dtype)
            first = ranges("any", 1, length) if length % 2 else None
            got = everything(inputs, first, 0.25, 0.0)
            require_close(got, truth(inputs, first, 0.25, 0.0), dtype)


@isas
@dtypes
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("kind", ["causal", "window", "packed", "left", "any"])
def test_ranges_and_caps(isa, dtype, kind, softcap, poisoned_empty):
    inputs = tensors(2, 150, 4, 2, 32, dtype=dtype)
    first = ranges(kind, 2, 150)
    with native.using(isa):
        got = everything(inputs, first, 0.3, softcap)
    require_close(got, truth(inputs, first, 0.3, softcap), dtype)


@isas
@dtypes
@pytest.mark.parametrize(
    "shape",
    [
        (1, 66, 1, 1, 1, 1),
        (2, 66, 3, 3, 5, 7),
        (1, 66, 2, 2, 8, 8),
        (1, 66, 6, 2, 20, 20),
        (1, 66, 2, 1, 80, 80),
        (1, 66, 2, 1, 96, 64),
        (1, 66, 3, 1, 128, 128),
        (1, 66, 2, 1, 192, 128),
        (1, 66, 2, 1, 256, 256),
        (5, 3, 8, 4, 16, 16),
        (1, 513, 3, 1, 64, 64),
        (9, 40, 4, 2, 24, 24),
    ],
    ids=str,
)
def test_shapes(isa, dtype, shape, poisoned_empty):
    inputs = tensors(*shape, dtype=dtype)
    scale = shape[4] ** -0.5
    for kind in ("causal", "packed"):
        first = ranges(kind, shape[0], shape[1])
        with native.using(isa):
            got = everything(inputs, first, scale, 0.0)
        require_close(got, truth(inputs, first, scale, 0.0), dtype)


def shared_beginnings(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Rows of one text and several continuations of it, padded at their end."""
    first = torch.full((batch, length), length, dtype=torch.int32)
    shared = torch.zeros(batch, length, dtype=torch.int32)
    for row in range(batch):
        beginning = int(torch.randint(0, max(1, length - 3), ()))
        first[row, :beginning] = 0
        at = beginning
        while at < length - int(torch.randint(1, 9, ())):
            stop = min(length, at + int(torch.randint(1, 70, ())))
            first[row, at:stop], shared[row, at:stop] = at, beginning
            at = stop
    return first, shared


@isas
@dtypes
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_shared_beginnings(isa, dtype, softcap, poisoned_empty):
    for length in (1, 2, 5, 31, 64, 65, 100, 129, 200, 333):
        q, k, v, _ = tensors(3, length, 4, 2, 24, dtype=dtype)
        first, shared = shared_beginnings(3, length)
        with native.using(isa):
            got = OP.attention(q, k, v, first, 0.3, softcap, shared)
        wide = (tensor.double() for tensor in (q, k, v))
        wanted = plain.attention(*wide, first, 0.3, softcap, shared)
        require_close(list(got), list(wanted), dtype)


@isas
def test_beginnings_that_reach_past_the_query(isa, poisoned_empty):
    q, k, v, _ = tensors(2, 150, 2, 1, 16)
    first = ranges("any", 2, 150)
    shared = torch.randint(0, 151, (2, 150), dtype=torch.int32)
    for beginning in (shared, torch.full_like(shared, 150)):
        with native.using(isa):
            got = OP.attention(q, k, v, first, 0.3, 0.0, beginning)
        wide = (tensor.double() for tensor in (q, k, v))
        wanted = plain.attention(*wide, first, 0.3, 0.0, beginning)
        require_close(list(got), list(wanted), torch.float32)


def test_a_shared_beginning_is_what_each_continuation_alone_would_see():
    q, k, v, _ = tensors(1, 30, 2, 1, 16)
    first = torch.tensor([[0] * 10 + [10] * 8 + [18] * 12], dtype=torch.int32)
    shared = torch.tensor([[0] * 10 + [10] * 20], dtype=torch.int32)
    together = face.attention(q, k, v, first=first, shared=shared)
    for begin, end in ((10, 18), (18, 30)):
        alone = [torch.cat((t[:, :10], t[:, begin:end]), 1) for t in (q, k, v)]
        torch.testing.assert_close(together[:, begin:end], face.attention(*alone)[:, 10:])


def test_a_shared_beginning_has_no_gradient():
    q, k, v, _ = tensors(1, 5, 2, 1, 16)
    shared = torch.zeros(1, 5, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="no gradient"):
        face.attention(q.requires_grad_(), k, v, shared=shared)


@isas
@dtypes
def test_parts_of_one_buffer(isa, dtype):
    batch, length, heads, kv, width = 2, 77, 4, 2, 24
    total = (heads + 2 * kv) * width

    def parts(buffer: Tensor) -> tuple[Tensor, ...]:
        inner = buffer[:, :, 3 : 3 + total].unflatten(2, (-1, width))
        return inner.split((heads, kv, kv), dim=2)

    qkv = torch.randn(batch, length, total + 5).to(dtype)
    grads = torch.full_like(qkv, torch.nan)
    out = torch.full((batch, length + 1, heads, width + 2), torch.nan, dtype=dtype)
    o, grad = out[:, 1:, :, 1:-1], torch.randn(batch, heads, length, width).to(dtype)
    q, k, v = parts(qkv)
    dq, dk, dv = parts(grads)
    first = ranges("packed", batch, length)
    settings = {"scale": 0.2, "softcap": 0.0}
    with native.using(isa):
        lse = face.attention_forward(q, k, v, first, **settings, out=o)
        face.attention_backward(
            grad.transpose(1, 2), q, k, v, o, lse, first, **settings, dq=dq, dk=dk, dv=dv
        )
    wanted = truth((q, k, v, grad.transpose(1, 2)), first, 0.2, 0.0)
    require_close([o, lse, dq, dk, dv], wanted, dtype)
    assert grads.isnan().sum() == batch * length * 5, "wrote past its part"
    assert out.isnan().sum() == out.numel() - o.numel()


@isas
@dtypes
@pytest.mark.parametrize(
    "shape", [(1, 200, 3, 1, 16), (1, 130, 1, 1, 16), (3, 70, 6, 2, 16), (1, 40, 40, 5, 8)], ids=str
)
def test_threads_do_not_change_a_bit(isa, dtype, shape):
    inputs = tensors(*shape, dtype=dtype)
    first = ranges("packed", shape[0], shape[1])
    results = []
    with native.using(isa):
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(everything(inputs, first, 0.25, 0.0))
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@isas
@dtypes
def test_who_sees_nothing_gives_and_gets_nothing(isa, dtype):
    inputs = tensors(1, 70, 2, 1, 16, dtype=dtype)
    first = torch.full((1, 70), 70, dtype=torch.int32)
    first[0, 65:] = 65
    with native.using(isa):
        o, lse, dq, dk, dv = everything(inputs, first, 0.25, 0.0)
    assert not o[:, :65].any()
    assert (lse[:, :, :65] == torch.inf).all()
    for grad in (dq, dk, dv):
        assert not grad[:, :65].any()
        assert grad[:, 65:].any()


@isas
@dtypes
def test_documents_of_a_pack_are_apart_to_the_bit(isa, dtype):
    q, k, v, grad = tensors(1, 100, 2, 1, 16, dtype=dtype)
    first = torch.tensor([[0] * 37 + [37] * 63], dtype=torch.int32)
    changed = [tensor.clone() for tensor in (q, k, v, grad)]
    for tensor in changed:
        tensor[:, :37] = 3 * torch.randn_like(tensor[:, :37].float()).to(dtype)
    with native.using(isa):
        one = everything((q, k, v, grad), first, 0.25, 0.0)
        two = everything(tuple(changed), first, 0.25, 0.0)
    for index in (0, 2, 3, 4):
        assert torch.equal(one[index][:, 37:], two[index][:, 37:])


@isas
@dtypes
def test_large_scores_neither_overflow_nor_hide_a_nan(isa, dtype):
    q, k, v, grad = tensors(1, 66, 1, 1, 16, dtype=dtype)
    q, k = (8 * q).round() / 8, (8 * k).round() / 8
    with native.using(isa):
        o, lse, *grads = everything((q, k, v, grad), None, 200.0, 0.0)
        wanted = truth((q, k, v, grad), None, 200.0, 0.0)
        assert all(tensor.isfinite().all() for tensor in (o, lse, *grads))
        # one key takes all: where the runner-up is far away, the result is that value
        torch.testing.assert_close(lse.double(), wanted[1].double(), rtol=1e-5, atol=1e-3)
        q[0, 50] = torch.nan
        o, lse, *grads = everything((q, k, v, grad), None, 0.25, 0.0)
    assert o[0, 50].isnan().all()
    assert lse[0, 0, 50].isnan()
    assert grads[0][0, 50].isnan().all()
    assert grads[1][0, :51].isnan().all(), "keys that it saw"
    assert not o[0, :50].isnan().any()
    assert not grads[1][0, 64:].isnan().any()


def test_the_plain_kernel_is_pytorchs_attention():
    q, k, v, grad = (tensor.double() for tensor in tensors(2, 33, 4, 2, 8))
    leaves = [tensor.transpose(1, 2).detach().requires_grad_() for tensor in (q, k, v)]
    mask = torch.ones(33, 33, dtype=torch.bool).tril() & ~torch.ones(33, 33).tril(-9).bool()
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *leaves, attn_mask=mask, scale=0.4, enable_gqa=True
    )
    wanted.backward(grad.transpose(1, 2))
    first = (torch.arange(33) - 8).clamp(min=0).int().expand(2, -1)
    got = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    o = face.attention(*got, first=first, scale=0.4)
    o.backward(grad)
    torch.testing.assert_close(o, wanted.transpose(1, 2))
    for ours, leaf in zip(got, leaves, strict=True):
        # the logarithms of sums are kept in float32
        torch.testing.assert_close(ours.grad, leaf.grad.transpose(1, 2), rtol=1e-5, atol=1e-6)


def test_the_cap_has_the_gradient_of_tanh():
    inputs = [t.double().requires_grad_() for t in tensors(1, 9, 2, 1, 4)[:3]]

    def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return face.attention(q, k, v, scale=1.0, softcap=1.5)

    assert torch.autograd.gradcheck(capped, inputs)


@pytest.mark.parametrize("first", [None, "any"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16], ids=str
)
def test_opcheck(dtype, first):
    q, k, v, _ = tensors(1, 6, 4, 2, 8, dtype=dtype)
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    seen = None if first is None else ranges("any", 1, 6)
    torch.library.opcheck(OP.attention, (*inputs, seen, 0.3, 0.0))


def test_odd_layouts_and_dtypes_are_served():
    q, k, v, grad = tensors(1, 20, 2, 1, 8)
    wanted = truth((q, k, v, grad), None, 0.3, 0.0)
    turned = tuple(t.transpose(1, 3).contiguous().transpose(1, 3) for t in (q, k, v, grad))
    assert turned[0].stride(-1) != 1
    require_close(everything(turned, None, 0.3, 0.0), wanted, torch.float32)
    got = everything(tuple(t.double() for t in (q, k, v, grad)), None, 0.3, 0.0)
    require_close(got, wanted, torch.float32)
    buffers = [torch.empty_like(t).double() for t in (q, k, v)]
    doubles = tuple(t.double() for t in (q, k, v, grad))
    out = torch.empty_like(doubles[0])
    lse = face.attention_forward(*doubles[:3], None, scale=0.3, softcap=0.0, out=out)
    names = dict(zip(("dq", "dk", "dv"), buffers, strict=True))
    face.attention_backward(
        doubles[3], *doubles[:3], out, lse, None, scale=0.3, softcap=0.0, **names
    )
    require_close([out, lse, *buffers], wanted, torch.float32)


def test_nothing_at_all():
    for shape in ((0, 4, 2, 1, 8), (2, 0, 2, 1, 8)):
        inputs = tensors(*shape)
        for got, like in zip(everything(inputs, None, 1.0, 0.0)[2:], inputs, strict=False):
            assert got.shape == like.shape
