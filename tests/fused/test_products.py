"""Products with weights and adapters equal plain float32 arithmetic on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from fourbit import native
from fourbit.fused import products
from fourbit.fused.weights import Weights
from fourbit.linear import Linear4bit, QuantizedLinear
from fourbit.quantize import QuantConfig

DTYPES = [torch.float32, torch.bfloat16]
QUANT_TYPES: list[Literal["nf4", "fp4"]] = ["nf4", "fp4"]
SIZES = [*range(1, 70), 127, 128, 129, 513]


@pytest.fixture(params=[*native.supported(), None], ids=str)
def _isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param is None:
        monkeypatch.setattr(native, "isa", lambda: None)
        yield
        return
    # every size, on every set: what is measured to be faster is not the question here
    monkeypatch.setattr(products, "_native", lambda *tensors: True)
    monkeypatch.setattr(products, "multiplies", lambda *tensors: True)
    monkeypatch.setattr(products, "_DECODING", native.supported())
    with native.using(request.param):
        yield


pytestmark = pytest.mark.usefixtures("_isa")


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan")).to(dtype)


def close(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    # one rounding to the dtype (two where PyTorch adds in a second step), sums in another order
    relative = 2e-5 if dtype == torch.float32 else 2**-7
    scale = float(wanted.abs().max().clamp(min=1.0)) if wanted.numel() else 1.0
    torch.testing.assert_close(got.double(), wanted, rtol=relative, atol=relative * scale)


def strided(rows: int, columns: int, dtype: torch.dtype, *, gap: int) -> Tensor:
    """Rows ``gap`` elements apart, NaN between them, the first at an odd place."""
    whole = poisoned(rows, columns + gap, dtype=dtype)
    part = whole[:, gap // 2 : gap // 2 + columns]
    part.copy_(torch.randn(rows, columns))
    return part


def cases() -> Iterator[tuple[int, int, int, int, int]]:
    """Rows, depth, columns, rank, gap: every size in every place."""
    for index, size in enumerate(SIZES):
        others = SIZES[(7 * index + 3) % 70], SIZES[(11 * index + 29) % 70]
        yield size, *others, index % 20, index % 4
        yield others[0], size, others[1], 1 + index % 33, (index + 1) % 4
        yield *others, size, 16, (index + 2) % 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("standing", [False, True])
def test_multiply(dtype: torch.dtype, standing: bool):
    for index, (rows, depth, width, rank, gap) in enumerate(cases()):
        x, u = strided(rows, depth, dtype, gap=gap), strided(rows, rank, dtype, gap=gap)
        weight = (torch.randn(width, depth).t() if standing else torch.randn(depth, width)).to(
            dtype
        )
        factor = torch.randn(width, rank).t() if index % 2 else torch.randn(rank, width)
        factor = factor.to(DTYPES[index % 3 == 0])
        bias = torch.randn(width).to(dtype) if index % 3 else None
        added = strided(rows, width, dtype, gap=gap) if index % 5 < 2 else None
        thin = (u, factor, 0.5) if rank else None
        wanted = x.double() @ weight.double()
        if thin is not None:
            wanted += 0.5 * (u.double() @ factor.to(dtype).double())
        wanted += 0 if bias is None else bias.double()
        wanted += 0 if added is None else added.double()
        whole = poisoned(rows, width + gap, dtype=dtype)
        out = whole[:, gap // 2 : gap // 2 + width]
        products.multiply(x, weight, out, thin=thin, bias=bias, added=added)
        close(out, wanted, dtype)
        out.fill_(float("nan"))
        assert whole.isnan().all(), "written outside of the result"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_packed_weight_gives_the_bits_of_the_expanded_one(
    dtype: torch.dtype, transposed: bool, double_quant: bool
):
    for index, (rows, depth, height, rank, gap) in enumerate(list(cases())[::3]):
        blocksize, quant_type = (64, 128, 4096)[index % 3], QUANT_TYPES[index % 2]
        quant = QuantConfig(quant_type=quant_type, blocksize=blocksize, double_quant=double_quant)
        heights = [height] if index % 2 else [height, 1 + index % 50, 64]
        layers = tuple(packed_linear(depth, out, quant) for out in heights)
        weights = Weights(layers).t() if transposed else Weights(layers)
        expanded = torch.cat([layer.dequantize(dtype) for layer in layers])
        expanded = expanded.t() if transposed else expanded
        assert torch.equal(weights.expanded(expanded), expanded)
        x = strided(rows, expanded.shape[0], dtype, gap=gap)
        thin = (strided(rows, rank, dtype, gap=gap), torch.randn(rank, expanded.shape[1]), 0.5)
        found = []
        for weight in (expanded, weights):
            found.append(poisoned(rows, expanded.shape[1], dtype=dtype))
            products.multiply(x, weight, found[-1], thin=thin if rank else None)
        assert torch.equal(*found)


def packed_linear(depth: int, height: int, quant: QuantConfig) -> Linear4bit:
    layer = QuantizedLinear.from_linear(nn.Linear(depth, height, bias=False), quant)
    assert isinstance(layer, Linear4bit)
    return layer


@pytest.mark.parametrize("change", ["plain", "strided"])
def test_a_weight_that_cannot_be_read_packed_is_expanded(change: str):
    layer = packed_linear(96, 40, QuantConfig())
    layers: tuple[Linear4bit | nn.Linear, ...] = (layer, nn.Linear(96, 8, bias=False))
    if change == "strided":
        holder = torch.zeros(40, 96, dtype=torch.uint8)
        holder[:, ::2] = layer.weight
        layer.weight = nn.Parameter(holder[:, ::2], requires_grad=False)
        layers = (layer,)
    weights = Weights(layers).t()
    assert weights.packed() is None
    x, wanted = torch.randn(33, 96), torch.cat([_matrix(layer) for layer in layers])
    out = poisoned(33, wanted.shape[0])
    products.multiply(x, weights, out)
    close(out, x.double() @ wanted.double().t(), torch.float32)


def _matrix(layer: Linear4bit | nn.Linear) -> Tensor:
    return layer.dequantize() if isinstance(layer, Linear4bit) else layer.weight.detach()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reduce_and_gradient(dtype: torch.dtype):
    for index, (rows, depth, _, rank, gap) in enumerate(cases()):
        rank = max(rank, 1)
        x, u = strided(rows, depth, dtype, gap=gap), strided(rows, rank, dtype, gap=gap)
        factor = torch.randn(depth, rank).t() if index % 2 else torch.randn(rank, depth)
        out = poisoned(rows, rank + gap, dtype=dtype)
        products.reduce(x, factor, out[:, :rank], scale=2.0)
        close(out[:, :rank], 2 * (x.double() @ factor.to(dtype).double().t()), dtype)
        assert out[:, rank:].isnan().all()
        wanted = 0.5 * (u.double().t() @ x.double())
        for lying in (True, False):
            grad = poisoned(rank, depth) if lying else poisoned(depth, rank).t()
            products.gradient(u, x, grad, scale=0.5)
            close(grad, wanted, dtype)
        grad = poisoned(rank, depth, dtype=torch.bfloat16)
        if dtype == torch.bfloat16:
            products.gradient(u, x, grad, scale=0.5)
            close(grad, wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype):
    x, weight, u = (torch.randn(*s).to(dtype) for s in ((301, 200), (200, 333), (301, 6)))
    factor, before = torch.randn(6, 333), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, thin, grad = poisoned(301, 333, dtype=dtype), poisoned(301, 6), poisoned(6, 333)
            products.multiply(x, weight, out, thin=(u, factor, 1.0))
            products.reduce(out, factor, thin := thin.to(dtype))
            products.gradient(u, out, grad)
            found.append((out, thin, grad))
    finally:
        torch.set_num_threads(before)
    if products._native is not _ORIGINAL:  # plain PyTorch promises no such thing
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_nan_stays_where_it_is():
    x, weight = torch.randn(20, 64), torch.randn(64, 70)
    x[3, 5] = float("nan")
    out = poisoned(20, 70)
    products.multiply(x, weight, out)
    assert out[3].isnan().all()
    assert not out[[*range(3), *range(4, 20)]].isnan().any()


_ORIGINAL = products._native
