"""Adapter settings: where adapters land, what is refused and in which words."""

from __future__ import annotations

import time

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from fourbit import lora
from fourbit.errors import FourbitError, InputError
from fourbit.linear import Linear4bit
from fourbit.lora import LoraSettings, expected_trainable, lora_forward, rank_of, resolve_targets
from fourbit.quantize import QuantConfig

FP32 = {"rtol": 1e-5, "atol": 1e-5}
"""Two float32 products of these sizes summed in different orders."""

SHAPES = {
    f"model.layers.{i}.{block}": shape
    for i in range(2)
    for block, shape in {
        "self_attn.q_proj": (48, 48),
        "self_attn.v_proj": (48, 24),
        "mlp.up_proj": (48, 80),
    }.items()
} | {"lm_head": (48, 264)}


def resolved(head: str | None = "lm_head", **settings) -> list[str]:
    return list(resolve_targets(SHAPES, LoraSettings(**settings), head=head))


def refusal(head: str | None = "lm_head", **settings) -> str:
    with pytest.raises(InputError) as caught:
        resolve_targets(SHAPES, LoraSettings(**settings), head=head)
    return caught.value.line()


def test_all_linear_is_everything_but_the_head() -> None:
    assert resolved() == [name for name in SHAPES if name != "lm_head"]
    assert resolved(head=None) == list(SHAPES)


def test_a_list_names_endings() -> None:
    assert resolved(target_modules=["q_proj"]) == [n for n in SHAPES if n.endswith("q_proj")]
    assert resolved(target_modules=["1.self_attn.q_proj"]) == ["model.layers.1.self_attn.q_proj"]
    both = resolved(target_modules=["q_proj", "up_proj"])
    assert both == [n for n in SHAPES if n.endswith(("q_proj", "up_proj"))]


def test_an_ending_is_a_whole_name() -> None:
    assert "matches no linear layer" in refusal(target_modules=["proj"])
    assert "matches no linear layer" in refusal(target_modules=["_attn.q_proj"])


def test_a_regex_matches_the_whole_name() -> None:
    assert resolved(target_modules=r".*\.0\..*_proj") == [n for n in SHAPES if ".0." in n]
    assert "matches no linear layer" in refusal(target_modules=r"q_pro")


def test_excluded_modules_are_left_out() -> None:
    names = resolved(exclude_modules=["up_proj", "0.self_attn.q_proj"])
    assert names == [
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]


def test_nothing_matched_shows_the_nearest_name() -> None:
    assert refusal(target_modules=["q_porj"]) == (
        "error[no-target-modules] lora.target_modules: 'q_porj' matches no linear layer of this"
        " model; fix: did you mean 'q_proj'?"
    )
    assert refusal(target_modules=["zzz"]).endswith("fix: known: lm_head, q_proj, up_proj, v_proj")


def test_a_bare_name_is_told_to_become_a_list() -> None:
    assert refusal(target_modules="q_proj") == (
        "error[no-target-modules] lora.target_modules: 'q_proj' matches no linear layer of this"
        " model; fix: write it as a list: [q_proj]"
    )


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"], ".*", "lm_head"])
def test_the_head_is_refused(targets: str | list[str]) -> None:
    assert refusal(target_modules=targets) == (
        "error[target-is-head] lora.target_modules: 'lm_head' is the output head, which takes no"
        " adapter; fix: remove it, or train it whole with lora.modules_to_save: [lm_head]"
    )


def test_a_rank_above_the_layer_names_layer_and_sizes() -> None:
    assert refusal(r=25) == (
        "error[rank-too-large] lora.r: rank 25 exceeds the smaller side of"
        " model.layers.0.self_attn.v_proj (24 x 48); fix: use r <= 24, or set lora.rank_pattern"
    )
    assert resolved(r=24)
    assert resolved(r=48, rank_pattern={"v_proj": 24})


@pytest.mark.parametrize("pattern", ["(", "*.q_proj", "[a"])
def test_an_invalid_regex_is_one_line(pattern: str) -> None:
    line = refusal(target_modules=pattern)
    assert line.startswith("error[bad-regex] lora.target_modules: ")
    assert line.endswith("fix: list module names instead, e.g. [q_proj, v_proj]")
    assert "\n" not in line


def test_a_catastrophic_regex_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "_MATCH_SECONDS", 0.3)
    started = time.monotonic()
    with pytest.raises(FourbitError) as caught:
        resolve_targets({"a" * 60 + "b": (8, 8)}, LoraSettings(target_modules="(a+)+$"), head=None)
    assert time.monotonic() - started < 5
    assert caught.value.code == "regex-too-slow"
    time.sleep(0.4)  # the alarm is off: it would end the process of the tests


def test_rank_pattern_is_read_as_peft_reads_it() -> None:
    settings = LoraSettings(r=4, rank_pattern={"q_proj": 8, r"layers\.1\.mlp\.up_proj": 2})
    assert rank_of("model.layers.0.self_attn.q_proj", settings) == 8
    assert rank_of("model.layers.1.mlp.up_proj", settings) == 2
    assert rank_of("model.layers.0.mlp.up_proj", settings) == 4
    assert rank_of("model.layers.0.self_attn.my_q_proj", settings) == 4


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    ("value", "words"),
    [({"(": 8}, "no valid regular expression"), ({"q": 0}, "not above 0"), ({"q": -1}, "above 0")],
)
def test_patterns_are_checked_where_they_are_written(field: str, value, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        LoraSettings.model_validate({field: value})


@pytest.mark.parametrize(
    "bad",
    [
        {"r": 0},
        {"lora_alpha": 0},
        {"lora_alpha": float("nan")},
        {"lora_dropout": 1.0},
        {"lora_dropout": -0.1},
        {"init_lora_weights": "eva"},
        {"init_lora_weights": "pissa_niter_"},
        {"rank": 8},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LoraSettings.model_validate(bad)


def test_expected_trainable_is_the_formula() -> None:
    settings = LoraSettings(r=4, rank_pattern={"up_proj": 2})
    targets = resolve_targets(SHAPES, settings, head="lm_head")
    per_layer = 4 * (48 + 48) + 4 * (48 + 24) + 2 * (48 + 80)
    assert expected_trainable(targets, settings) == 2 * per_layer
    dora = settings.model_copy(update={"use_dora": True})
    assert expected_trainable(targets, dora) == 2 * (per_layer + 48 + 24 + 80)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("compute_dtype", [None, torch.float32], ids=str)
def test_forward_is_equation_five(device: torch.device, grad: bool, compute_dtype) -> None:
    linear = nn.Linear(7, 5, device=device)
    base = Linear4bit.from_linear(linear, QuantConfig(), compute_dtype=compute_dtype)
    x = torch.randn(3, 7, device=device)
    lora_A, lora_B = torch.randn(2, 7, device=device), torch.randn(5, 2, device=device)
    expected = x @ base.dequantize().t() + base.bias + 1.5 * (x @ lora_A.t()) @ lora_B.t()
    with torch.set_grad_enabled(grad):
        y = lora_forward(base, x, (lora_A, lora_B, 1.5, 0.0))
    torch.testing.assert_close(y, expected, **FP32)


@pytest.mark.parametrize("compute_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_autocast_trains(device: torch.device, compute_dtype, dropout: float) -> None:
    linear = nn.Linear(7, 5, device=device)
    base = Linear4bit.from_linear(linear, QuantConfig(), compute_dtype=compute_dtype)
    x = torch.randn(3, 7, device=device, requires_grad=True)
    lora_A = torch.randn(2, 7, device=device, requires_grad=True)
    lora_B = torch.randn(5, 2, device=device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        y = lora_forward(base, x, (lora_A, lora_B, 1.5, dropout))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    for tensor in (x, lora_A, lora_B):
        assert tensor.grad is not None
        assert tensor.grad.dtype == torch.float32
        assert bool(tensor.grad.isfinite().all())
