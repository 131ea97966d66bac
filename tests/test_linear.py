"""`Linear4bit`: survives everything modules go through, counts honestly, keeps nothing."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fourbit.errors import ModelError
from fourbit.linear import Linear4bit, keep_dequantized, parameter_counts
from fourbit.quantize import QuantConfig

FP32 = {"rtol": 1e-5, "atol": 1e-5}
"""Two float32 products of these sizes summed in different orders."""

SIZES = [(12, 10), (7, 5), (1, 1), (65, 3), (2, 33)]


def layer(
    in_features: int = 12,
    out_features: int = 10,
    *,
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Linear4bit:
    linear = nn.Linear(in_features, out_features, device=device).requires_grad_(False)
    quant = QuantConfig(blocksize=32, double_quant=double_quant)
    return Linear4bit.from_linear(linear, quant, compute_dtype=compute_dtype)


ROUND_TRIPS: dict[str, Callable[[Linear4bit], Linear4bit]] = {
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "float": lambda m: m.half().float(),
    "double": lambda m: m.double(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "train and eval": lambda m: m.train().eval(),
}


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("change", ROUND_TRIPS)
def test_weight_survives(
    device: torch.device, change: str, sizes: tuple[int, int], double_quant: bool
) -> None:
    before = layer(*sizes, double_quant=double_quant, device=device)
    weight = before.dequantize()
    after = ROUND_TRIPS[change](before)
    assert torch.equal(after.dequantize(torch.float32), weight)
    assert after.weight.dtype == torch.uint8
    assert {
        getattr(after, n).dtype for n in Linear4bit.scale_names if getattr(after, n) is not None
    } <= {
        torch.uint8,
        torch.int32,
    }
    x = torch.randn(3, sizes[0], device=device).to(after.bias.dtype)  # type: ignore[union-attr]
    assert after(x).dtype == x.dtype


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_state_dict_round_trip(
    device: torch.device, sizes: tuple[int, int], double_quant: bool, assign: bool
) -> None:
    source = layer(*sizes, double_quant=double_quant, device=device)
    target = layer(*sizes, double_quant=double_quant, device=device)
    assert not torch.equal(target.dequantize(), source.dequantize())
    target.load_state_dict(source.state_dict(), strict=True, assign=assign)
    assert torch.equal(target.dequantize(), source.dequantize())
    assert not any(p.requires_grad for p in target.parameters())


def test_copies_do_not_share_memory() -> None:
    source = layer()
    twin = copy.deepcopy(source)
    weight = twin.dequantize()
    source.weight.data.zero_()
    assert torch.equal(twin.dequantize(), weight)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_forward_is_the_dequantized_product(device: torch.device, sizes: tuple[int, int]) -> None:
    base = layer(*sizes, device=device)
    x = torch.randn(2, 3, sizes[0], device=device)
    expected = nn.functional.linear(x, base.dequantize(), base.bias)
    torch.testing.assert_close(base(x), expected, **FP32)


def test_packed_shape_tells_even_from_odd() -> None:
    assert layer(12, 10).weight.shape == (10, 6)
    assert layer(7, 5).weight.shape == (18, 1)


def test_compute_dtype_is_used_inside_and_hidden_outside(device: torch.device) -> None:
    base = layer(compute_dtype=torch.bfloat16, device=device)
    x = torch.randn(3, 12, device=device)
    y = base(x)
    assert y.dtype == torch.float32
    assert base.bias is not None
    narrow = nn.functional.linear(
        x.bfloat16(), base.dequantize(torch.bfloat16), base.bias.bfloat16()
    )
    assert torch.equal(y, narrow.float())


@pytest.mark.parametrize("compute_dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_autocast_gives_what_a_plain_linear_gives(device: torch.device, compute_dtype) -> None:
    base = layer(compute_dtype=compute_dtype, device=device)
    plain = nn.Linear(12, 10, device=device)
    plain.weight.data, plain.bias.data = base.dequantize(), base.bias.detach()  # type: ignore[union-attr]
    x = torch.randn(3, 12, device=device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        y, expected = base(x), plain(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    if compute_dtype is not torch.float32:
        assert torch.equal(y, expected)
    (grad,) = torch.autograd.grad(y.float().sum(), x)
    assert grad.dtype == torch.float32


def test_repr_shows_the_format() -> None:
    assert repr(layer()) == (
        "Linear4bit(in_features=12, out_features=10, bias=True, quant_type=nf4,"
        " blocksize=32, double_quant=True)"
    )


def test_packed_weight_has_the_name_peft_looks_for() -> None:
    base = layer()
    assert base.W_q is base.weight


def test_bias_is_shared_and_frozen_weights_take_no_gradient() -> None:
    linear = nn.Linear(4, 3)
    base = Linear4bit.from_linear(linear, QuantConfig())
    assert base.bias is linear.bias
    assert not base.weight.requires_grad


@pytest.mark.parametrize("double_quant", [False, True])
def test_on_meta_only_shapes_are_made(double_quant: bool) -> None:
    quant = QuantConfig(blocksize=32, double_quant=double_quant)
    with torch.device("meta"):
        linear = nn.Linear(65, 12, dtype=torch.bfloat16)
    base = Linear4bit.from_linear(linear, quant)
    real = Linear4bit.from_linear(nn.Linear(65, 12, dtype=torch.bfloat16), quant)
    assert all(p.is_meta for p in base.parameters())
    assert {k: (v.shape, v.dtype) for k, v in base.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in real.state_dict().items()
    }
    assert base.original_dtype == torch.bfloat16
    assert base(torch.empty(2, 65, device="meta", dtype=torch.bfloat16)).shape == (2, 12)


def test_mode_is_taken_over() -> None:
    assert not Linear4bit.from_linear(nn.Linear(4, 3).eval(), QuantConfig()).training


def test_broken_weights_are_named() -> None:
    linear = nn.Linear(4, 3)
    linear.weight.data[1, 2] = float("nan")
    with pytest.raises(ModelError, match=r"model\.fc: nan at flat index 6"):
        Linear4bit.from_linear(linear, QuantConfig(), name="model.fc")


def test_counts_are_of_weights_not_of_bytes() -> None:
    model = nn.Sequential(layer(12, 10), nn.Linear(10, 4), layer(7, 5, double_quant=False))
    frozen = 12 * 10 + 10 + 7 * 5 + 5
    assert parameter_counts(model) == (10 * 4 + 4, frozen + 10 * 4 + 4)
    shared = nn.ModuleList([model, model[0]])
    assert parameter_counts(shared) == parameter_counts(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kept_weights_change_nothing(device: torch.device, dtype: torch.dtype) -> None:
    model = nn.Sequential(layer(12, 10, device=device), layer(10, 7, device=device)).to(dtype)
    x = torch.randn(3, 12, device=device, dtype=dtype)
    with torch.no_grad():
        expected = model(x)
        with keep_dequantized(model, dtype, budget=10**6) as kept:
            assert kept
            assert all(m._kept is not None for m in model)  # type: ignore[union-attr]
            assert torch.equal(model(x), expected)
    assert all(m._kept is None for m in model)  # type: ignore[union-attr]


@pytest.mark.parametrize("compute_dtype", [None, torch.float32], ids=str)
def test_nothing_is_kept_above_the_budget(compute_dtype: torch.dtype | None) -> None:
    model = nn.Sequential(layer(12, 10, compute_dtype=compute_dtype))
    needed = 120 * (compute_dtype or torch.bfloat16).itemsize
    for budget, expected in ((needed, True), (needed - 1, False)):
        with keep_dequantized(model, torch.bfloat16, budget=budget) as kept:
            assert kept is expected
            held = model[0]._kept
            assert (held.nbytes if held is not None else 0) <= budget


def test_kept_weights_go_when_generation_fails() -> None:
    model = nn.Sequential(layer())
    with pytest.raises(RuntimeError), keep_dequantized(model, torch.float32, budget=10**6):
        raise RuntimeError
    assert model[0]._kept is None


def test_training_never_uses_kept_weights() -> None:
    model = nn.Sequential(layer())
    x = torch.randn(3, 12, requires_grad=True)
    with keep_dequantized(model, torch.float32, budget=10**6):
        model[0]._kept.fill_(float("nan"))
        assert bool(model(x).isfinite().all())


def test_no_floating_copy_of_a_weight_outlives_its_product(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = (37, 41)
    model = nn.Sequential(layer(*sizes, device=device), layer(sizes[1], sizes[0], device=device))
    x = torch.randn(3, sizes[0], device=device, requires_grad=True)
    made: list[weakref.ref[Tensor]] = []
    allocate = torch.empty

    def recording(*args, **kwargs) -> Tensor:
        out = allocate(*args, **kwargs)
        if out.is_floating_point() and out.numel() == sizes[0] * sizes[1]:
            made.append(weakref.ref(out))
        return out

    def alive() -> list[Tensor]:
        gc.collect()
        known = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
        return [t for t in known if t.is_floating_point() and t.numel() == sizes[0] * sizes[1]] + [
            t for ref in made if (t := ref()) is not None
        ]

    monkeypatch.setattr(torch, "empty", recording)
    between: list[int] = []
    model[1].register_forward_pre_hook(lambda *_: between.append(len(alive())))
    y = model(x)
    assert between == [0]
    assert alive() == []
    y.sum().backward()
    assert alive() == []
    if device.type == "cpu":  # other kernels may allocate in their own way
        assert len(made) == 4
