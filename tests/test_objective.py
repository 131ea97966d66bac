"""The summed loss against full logits, accumulation, recomputation, and planted leaks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

from fourbit.errors import InputError
from fourbit.integrations.peft import add_adapter
from fourbit.integrations.transformers import enable_checkpointing, quantize_model
from fourbit.lora import LoraSettings
from fourbit.objective import Objective
from fourbit.quantize import QuantConfig
from models import (
    PACKABLE,
    UNPACKABLE,
    documents,
    gradients,
    make_batch,
    tiny_model,
)

ALL = (*PACKABLE, *UNPACKABLE, "mamba")


NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}


def adapted(name, *, own_dropout=False, **settings):
    """A quantized model with adapters whose B is not zero, so that every gradient flows."""
    model = tiny_model(name, **(NO_DROPOUT if name == "gpt2" and not own_dropout else {}))
    model.requires_grad_(False)
    quantize_model(model, QuantConfig())
    torch.manual_seed(1)
    wrapped = add_adapter(model, LoraSettings(r=4, **{"lora_dropout": 0, **settings}))
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, 0.05)
    return wrapped


def reference_loss(model, batch):
    """Full logits in float64, position by position."""
    logits = Objective(model).logits(batch).double().log_softmax(-1)
    total = 0
    for row in range(batch.labels.shape[0]):
        for place in range(1, batch.labels.shape[1]):
            label = int(batch.labels[row, place])
            if label >= 0:
                total = total - logits[row, place - 1, label]
    return total


def loss_and_gradients(objective, batches, *, scale=1.0):
    objective.model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = objective.loss_sum(batch)
        (loss * scale).backward()
        total += float(loss.detach())
    return total, gradients(objective.model)


def assert_same_gradients(ours, wanted, tolerance):
    assert ours.keys() == wanted.keys()
    assert wanted
    # Some gradients are zero but for rounding (a key's bias shifts all scores alike).
    floor = 1e-2 * max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        scale = max(float(gradient.abs().max()), floor)
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("name", ALL)
def test_the_chunked_loss_is_the_loss_of_the_models_own_logits(name):
    model = tiny_model(name)
    model.requires_grad_(True)
    batch = make_batch([[text] for text in documents(3)])
    objective = Objective(model)
    chunked, ours = loss_and_gradients(objective, [batch])
    model.zero_grad()
    reference = reference_loss(model, batch)
    reference.backward()
    assert chunked == pytest.approx(float(reference.detach()), rel=1e-5)
    assert_same_gradients(ours, gradients(model), 1e-4)
    full, theirs = loss_and_gradients(Objective(model, chunked=False), [batch])
    assert full == pytest.approx(chunked, rel=1e-5)
    assert_same_gradients(theirs, ours, 1e-4)
    assert objective.choose_head(batch)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma2", {"final_logit_softcapping": 0.5}),
        ("cohere", {"logit_scale": 3.0}),
        ("granite", {"logits_scaling": 0.25}),
    ],
)
def test_caps_and_scales_of_the_logits_matter_and_are_followed(name, changes):
    batch = make_batch([documents(1)])
    losses = []
    for model in (tiny_model(name), tiny_model(name, **changes)):
        with torch.no_grad():
            losses.append(float(Objective(model).loss_sum(batch)))
            assert losses[-1] == pytest.approx(float(reference_loss(model, batch)), rel=1e-5)
    assert losses[0] != pytest.approx(losses[1], rel=1e-2)


def test_undeclared_arithmetic_on_the_logits_falls_back_to_full_logits():
    class Louder(modeling_llama.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.7
            return output

    plain = tiny_model("llama")
    model = Louder(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    batch, objective = make_batch([documents(1)]), Objective(model)
    assert objective.choose_head(batch) is False
    assert not objective.chunked
    with torch.no_grad():
        wanted = float(reference_loss(model, batch))
        assert float(objective.loss_sum(batch)) == pytest.approx(wanted, rel=1e-5)


def test_choosing_the_head_leaves_the_mode_and_the_gradients_alone():
    model = adapted("llama").train()
    batch, objective = make_batch([documents(2)]), Objective(model)
    objective.choose_head(batch)
    objective.require_isolation(batch)
    assert model.training
    assert not gradients(model)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_accumulated_gradients_equal_those_of_one_big_batch(name):
    texts, objective = documents(6, seed=4), Objective(adapted(name).train())
    whole = make_batch([[text] for text in texts])
    total = whole.num_supervised
    loss, wanted = loss_and_gradients(objective, [whole], scale=1 / total)
    for split in ([1, 2, 3], [1] * 6, [5, 1]):
        parts, at = [], 0
        for size in split:
            parts.append(make_batch([[text] for text in texts[at : at + size]]))
            at += size
        assert sum(part.num_supervised for part in parts) == total
        other, ours = loss_and_gradients(objective, parts, scale=1 / total)
        assert other == pytest.approx(loss, rel=1e-5)
        assert_same_gradients(ours, wanted, 1e-4)


@pytest.mark.parametrize("name", PACKABLE)
def test_packing_changes_no_gradient(name):
    texts, objective = documents(3, seed=5), Objective(adapted(name).train())
    loss, wanted = loss_and_gradients(objective, [make_batch([[text]]) for text in texts])
    other, ours = loss_and_gradients(objective, [make_batch([texts, texts[:1]])])
    again, first = loss_and_gradients(objective, [make_batch([texts[:1]])])
    assert other - again == pytest.approx(loss, rel=1e-5)
    assert_same_gradients({k: g - first[k] for k, g in ours.items()}, wanted, 5e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_recomputing_activations_changes_no_gradient(name, dropout):
    batch, results = make_batch([documents(3)]), []
    for recompute in (False, True):
        model = adapted(name, own_dropout=True, lora_dropout=dropout)
        if recompute:
            enable_checkpointing(model.get_base_model())
        # Hidden dropout of GPT-2 is drawn again in the recomputation, as it must be.
        torch.manual_seed(7)
        results.append(loss_and_gradients(Objective(model.train()), [batch]))
    assert results[0][0] == results[1][0]
    assert_same_gradients(results[1][1], results[0][1], 1e-6)


def test_every_adapter_has_a_gradient():
    objective = Objective(adapted("phi3").train())
    _, found = loss_and_gradients(objective, [make_batch([documents(2)])])
    names = {n for n, p in objective.model.named_parameters() if p.requires_grad}
    assert found.keys() == names
    assert all(gradient.any() for gradient in found.values())


def test_a_batch_without_supervised_tokens_has_loss_zero():
    batch = make_batch([documents(1)])
    batch.labels.fill_(-100)
    loss = Objective(adapted("llama")).loss_sum(batch)
    assert float(loss) == 0
    loss.backward()


# Planted leaks.


def refused(model):
    with pytest.raises(InputError) as caught:
        Objective(model).require_isolation(make_batch([documents(3)]))
    return caught.value.line() == (
        "error[packing-leaks] data.packing: llama does not keep packed documents apart;"
        " fix: set data.packing: false"
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_mask_that_forgets_the_documents_is_found(attention, monkeypatch):
    real = modeling_llama.create_causal_mask
    model = tiny_model("llama")
    model.set_attn_implementation(attention)
    Objective(model).require_isolation(make_batch([documents(3)]))
    monkeypatch.setattr(
        modeling_llama,
        "create_causal_mask",
        lambda **keywords: real(**{**keywords, "position_ids": None}),
    )
    assert refused(model)


class NeighbourMixer(nn.Module):
    """Adds a trace of the token before, as a short convolution does."""

    def __init__(self, inner, strength):
        super().__init__()
        self.inner, self.strength = inner, strength

    def forward(self, x):
        return self.inner(x) + self.strength * x.roll(1, dims=1)


class Recurrence(nn.Module):
    """A running sum over the whole row, as a recurrent layer keeps."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + 1e-3 * x.cumsum(1)


@pytest.mark.parametrize("strength", [1.0, 1e-4])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_convolution_over_the_border_is_found(strength, layer):
    model = tiny_model("llama")
    block = model.model.layers[layer]
    block.mlp = NeighbourMixer(block.mlp, strength)
    assert refused(model)


def test_a_recurrence_over_the_border_is_found():
    model = tiny_model("llama")
    model.model.layers[1].mlp = Recurrence(model.model.layers[1].mlp)
    assert refused(model)


def test_adapters_do_not_disturb_the_proof():
    Objective(adapted("llama", lora_dropout=0.5).train()).require_isolation(
        make_batch([documents(3)])
    )


@pytest.mark.parametrize("length", [2, 3, 5])
def test_the_probe_takes_the_shortest_batches(length):
    batch = make_batch([[list(range(length))]])
    Objective(tiny_model("llama")).require_isolation(batch)
