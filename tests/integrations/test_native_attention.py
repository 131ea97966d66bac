"""Models switched to our attention answer and learn as they did with transformers' own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from fourbit import native
from fourbit.errors import ModelError
from fourbit.integrations.attention import (
    NAME,
    attention_forward,
    register,
    use_native_attention,
    visible_ranges,
)
from fourbit.integrations.transformers import enable_checkpointing
from models import VOCAB, gradients, tiny_config, tiny_model

pytestmark = pytest.mark.skipif(not native.supported(), reason="no compiled library")

NAMES = ["llama", "qwen3", "gemma2", "gemma3_text", "mistral", "gpt2", "phi"]
LENGTH = 70
"""More than one block of queries; sliding windows of the tiny models are 6."""

CLOSE = {"rtol": 2e-4, "atol": 2e-4}
"""Logits of size 1 and gradients of size 10, float32, summed in another order in two layers."""


class Counted(TorchDispatchMode):
    """Counts calls of our op."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch.ops.fourbit.attention.default
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _best_kernels():
    with native.using(native.supported()[-1]):
        yield


def packed() -> dict[str, Tensor]:
    sizes = (1, 30, 5, 34), (64, 6)
    positions = [torch.cat([torch.arange(size) for size in row]) for row in sizes]
    return {"position_ids": torch.stack(positions)}


def padded(side: str) -> dict[str, Tensor]:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, : LENGTH // 3] = 0
    return {"attention_mask": mask if side == "left" else mask.flip(1)}


CALLS = {
    "causal": dict,
    "packed": packed,
    "left": lambda: padded("left"),
    "right": lambda: padded("right"),
}


def run(
    model: PreTrainedModel, ids: Tensor, inputs: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of what is no padding."""
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False, **inputs).logits
    if "attention_mask" in inputs:
        logits = logits[inputs["attention_mask"].bool()]
    logits.square().mean().backward()
    return logits.detach(), gradients(model)


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("name", NAMES)
def test_a_model_answers_and_learns_as_before(name, kind):
    model = tiny_model(name, attn_implementation="eager")
    ids = torch.randint(0, 256, (2, LENGTH))
    inputs = CALLS[kind]()
    logits, grads = run(model, ids, inputs)
    register()
    model.set_attn_implementation(NAME)
    with Counted() as counted:
        ours, our_grads = run(model, ids, inputs)
    assert counted.calls == 2, "a layer took another path"
    torch.testing.assert_close(ours, logits, **CLOSE)
    for key, grad in grads.items():
        torch.testing.assert_close(our_grads[key], grad, **CLOSE, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", NAMES)
def test_automatic_implementations_are_switched(name):
    model = AutoModelForCausalLM.from_config(tiny_config(name))
    assert use_native_attention(model)
    assert model.config._attn_implementation == NAME
    # a capped model is "eager" by itself; whoever asks for eager is left alone otherwise
    asked = AutoModelForCausalLM.from_config(tiny_config(name), attn_implementation="eager")
    assert use_native_attention(asked) == (name == "gemma2")


@pytest.mark.parametrize("name", ["falcon", "bloom"])
def test_what_names_sdpa_or_has_no_interface_is_left_alone(name):
    model = tiny_model(name)
    before = model.config._attn_implementation
    assert not use_native_attention(model)
    assert model.config._attn_implementation == before


def test_without_kernels_nothing_is_switched(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(native, "isa", lambda: None)
    assert not use_native_attention(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "mistral"])
def test_generation_with_a_cache_is_unchanged(name):
    model = tiny_model(name)
    ids = torch.randint(0, 256, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    wanted = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert use_native_attention(model)
    got = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(got, wanted)


def test_gradient_checkpointing_takes_the_same_path():
    model = tiny_model("mistral")
    ids = torch.randint(0, 256, (2, LENGTH))
    assert use_native_attention(model)
    model.train()
    plain = run(model, ids, packed())
    enable_checkpointing(model)
    with Counted() as counted:
        again = run(model, ids, packed())
    assert counted.calls == 4
    torch.testing.assert_close(again[0], plain[0])
    torch.testing.assert_close(again[1], plain[1])


def test_other_masks_go_to_pytorch():
    model = tiny_model("llama")
    ids = torch.randint(0, 256, (1, 9))
    chosen = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    chosen[..., 5, 2] = False  # a hole
    wanted = model(input_ids=ids, attention_mask=chosen).logits
    assert use_native_attention(model)
    with Counted() as counted:
        got = model(input_ids=ids, attention_mask=chosen).logits
    assert counted.calls == 0
    torch.testing.assert_close(got, wanted)


def test_mixed_precision_is_that_of_pytorch():
    model = tiny_model("llama")
    ids = torch.randint(0, 256, (2, LENGTH))
    with torch.autocast("cpu", torch.bfloat16):
        wanted = model(input_ids=ids).logits
        assert use_native_attention(model)
        with Counted() as counted:
            got = model(input_ids=ids).logits
    assert counted.calls == 2
    exact = tiny_model("llama")(input_ids=ids).logits
    assert (got - exact).norm() < 1.1 * (wanted - exact).norm()


def test_dropout_of_weights_is_pytorchs():
    model = tiny_model("llama", attention_dropout=0.5).train()
    assert use_native_attention(model)
    with Counted() as counted:
        model(input_ids=torch.randint(0, VOCAB, (1, 8)))
    assert counted.calls == 0


def test_ranges_of_padding_and_windows():
    register()
    config = tiny_config("mistral", sliding_window=3)
    config._attn_implementation = NAME
    x = torch.zeros(1, 6, 4)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    made = create_causal_mask(config, x, mask, None)
    assert visible_ranges(made).first.tolist() == [[6, 6, 2, 2, 2, 2]]
    made = create_sliding_window_causal_mask(config, x, None, None)
    assert visible_ranges(made).first.tolist() == [[0, 0, 0, 1, 2, 3]]
    assert visible_ranges(made & made) is None, "a changed mask has no ranges"
    made[0, 0, 3, 3] = False
    assert visible_ranges(made) is None
    assert visible_ranges(None) == (None, None)


def test_sinks_are_refused_in_one_line():
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ModelError, match="attention sinks") as caught:
        attention_forward(torch.nn.Identity(), q, q, q, None, s_aux=torch.zeros(2))
    assert "\n" not in str(caught.value)
