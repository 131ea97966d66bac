"""Learned prompts against PEFT's own forward pass, generation and files."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch

from fourbit.errors import ModelError
from fourbit.generate import Generator, Sampling
from fourbit.integrations.prompts import (
    PROMPT_KEY,
    add_prompt,
    encode,
    generation_inputs,
    prompt_count,
    prompt_length,
    prompt_state,
    prompted,
    with_prompt,
)
from fourbit.integrations.transformers import quantize_model
from fourbit.linear import parameter_counts
from fourbit.objective import Objective
from fourbit.prompts import PromptSettings
from fourbit.quantize import QuantConfig
from fourbit.training.adapter import save_adapter
from models import documents, gradients, make_batch, tiny_model, tiny_tokenizer

LSTM = {"encoder_reparameterization_type": "lstm", "encoder_num_layers": 2}
KINDS = {
    "prompt_tuning": ("prompt_tuning", {}),
    "mlp": ("p_tuning", {"encoder_hidden_size": 10}),
    "lstm": ("p_tuning", {**LSTM, "encoder_hidden_size": 6, "encoder_dropout": 0.5}),
}


def make(name, kind="prompt_tuning", *, tokens=5, **changes):
    """A quantized tiny model behind a prompt that differs from position to position."""
    method, values = KINDS[kind]
    model = tiny_model(name, **changes).requires_grad_(False)
    quantize_model(model, QuantConfig())
    torch.manual_seed(3)
    settings = PromptSettings(num_virtual_tokens=tokens, **values)
    return add_prompt(model, settings, method=method), settings, method


def close(got, wanted):
    """The same but for the order of float32 sums: PEFT's prompt takes another attention mask."""
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def pefts_loss(model, batch):
    """The mean loss as PEFT and transformers compute it, padding masked."""
    positions = batch.position_ids
    mask = torch.ones_like(positions)
    mask[:, 1:] = ((positions[:, 1:] <= positions[:, :-1]).cumsum(1) == 0).long()
    return model(input_ids=batch.input_ids, attention_mask=mask, labels=batch.labels).loss


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2", "opt", "bloom", "mamba"])
@pytest.mark.parametrize("kind", ["prompt_tuning", "mlp"])
def test_loss_and_gradients_are_pefts(name, kind):
    model, _, _ = make(name, kind)
    model.eval()  # no dropout of the model's own
    batch, objective = make_batch([[text] for text in documents(3)]), Objective(model)
    assert objective.choose_head(batch)
    (objective.loss_sum(batch) / batch.num_supervised).backward()
    ours = gradients(model)
    model.zero_grad()
    theirs = pefts_loss(model, batch)
    theirs.backward()
    loss = float(objective.loss_sum(batch).detach()) / batch.num_supervised
    assert loss == pytest.approx(float(theirs.detach()), rel=1e-5)
    wanted = gradients(model)
    assert (
        ours.keys()
        == wanted.keys()
        == dict(model.prompt_encoder.named_parameters(prefix="prompt_encoder")).keys()
    )
    for key, gradient in wanted.items():
        scale = float(gradient.abs().max())
        assert scale > 0
        torch.testing.assert_close(ours[key], gradient, rtol=0, atol=1e-4 * scale, msg=key)
    full = Objective(model, chunked=False)
    assert float(full.loss_sum(batch).detach()) / batch.num_supervised == pytest.approx(
        loss, rel=1e-5
    )


def test_the_first_answer_token_is_predicted_from_the_text_before_it():
    """One position too many or too few would change every hidden state's label."""
    model, _, _ = make("llama")
    batch, objective = make_batch([[documents(1)[0]]]), Objective(model.eval())
    with torch.no_grad():
        everything = model(input_ids=batch.input_ids).logits
        close(objective.logits(batch), everything[:, 5:])
        assert objective.hidden(batch).shape[:2] == batch.input_ids.shape


def test_padding_and_neighbours_in_the_batch_change_nothing():
    model, _, _ = make("gemma2")
    objective, texts = Objective(model.eval()), documents(3)
    together = objective.loss_sum(make_batch([[text] for text in texts]))
    apart = sum(objective.loss_sum(make_batch([[text]])) for text in texts)
    assert float(together.detach()) == pytest.approx(float(apart.detach()), rel=1e-5)


def test_untouched_is_the_base_itself():
    model, _, _ = make("llama")
    batch, objective = make_batch([documents(1)]), Objective(model.eval())
    with torch.no_grad():
        plain = Objective(model.get_base_model()).loss_sum(batch)
        with objective.untouched() as inner:
            assert inner is model.get_base_model()
            assert torch.equal(objective.loss_sum(batch), plain)
        assert not torch.equal(objective.loss_sum(batch), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_the_count_by_formula_is_the_count(kind):
    model, settings, _ = make("llama", kind)
    assert prompt_count(model) == parameter_counts(model)[0]
    assert prompt_length(model) == settings.num_virtual_tokens
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith("prompt_encoder.")}
    assert all(p.dtype == torch.float32 for p in model.prompt_encoder.parameters())
    assert prompted(model.get_base_model()) is None


def test_the_prompt_starts_from_the_tokens_given():
    model = tiny_model("gemma3_text").requires_grad_(False)
    ids = [7, 8, 7]
    settings = PromptSettings(num_virtual_tokens=3)
    wrapped = add_prompt(model, settings, method="prompt_tuning", init_ids=ids)
    words = model.get_input_embeddings()(torch.tensor([ids]))
    assert torch.equal(wrapped.get_prompt(batch_size=1), words)
    assert torch.equal(with_prompt(wrapped, torch.tensor([[1, 2]]))[:, :3], words)


@pytest.mark.parametrize("kind", KINDS)
def test_pefts_own_loader_gives_the_same_logits(kind, tmp_path):
    model, settings, method = make("llama", kind)
    model.train()  # dropout of the encoder must not be in what is saved
    saved = prompt_state(model)
    assert model.prompt_encoder["default"].training
    assert torch.equal(saved[PROMPT_KEY], prompt_state(model)[PROMPT_KEY])
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert torch.equal(encode(trained, settings, method=method), saved[PROMPT_KEY])
    save_adapter(model, tmp_path / "adapter", save_dtype=torch.float32, card="card")
    base = tiny_model("llama").requires_grad_(False)
    quantize_model(base, QuantConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    batch = make_batch([documents(1)])
    with torch.no_grad():
        theirs = loaded(input_ids=batch.input_ids).logits[:, settings.num_virtual_tokens :]
        close(theirs, Objective(model.eval()).logits(batch))
        close(theirs, Objective(loaded).logits(batch))


def answers(model, prompts, count=6):
    generator = Generator(model, tiny_tokenizer(), None)
    generator._stop = []
    return [answer.text for answer in generator.answers(prompts, Sampling(max_new_tokens=count))]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "bloom", "mamba"])
def test_a_batch_of_prompts_is_answered_as_each_alone(name):
    model, _, _ = make(name)
    texts = [text[:size] for text, size in zip(documents(4), (3, 5, 4, 2), strict=True)]
    assert answers(model, texts) == [answers(model, [text])[0] for text in texts]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_prompt_is_answered_as_peft_does(name):
    model, _, _ = make(name)
    ids = torch.tensor([documents(1)[0]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = model.eval().generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    wanted = tiny_tokenizer().decode(theirs[0, ids.shape[1] :], skip_special_tokens=True)
    assert answers(model, ids.tolist()) == [wanted]


def test_virtual_tokens_stand_between_padding_and_text():
    model, _, _ = make("llama", tokens=2)
    ids, mask = torch.tensor([[0, 0, 5], [6, 7, 8]]), torch.tensor([[0, 0, 1], [1, 1, 1]])
    inputs = generation_inputs(model, ids, mask)
    words, prompt = model.word_embeddings(ids), model.get_prompt(batch_size=1)[0]
    assert inputs["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert torch.equal(inputs["inputs_embeds"][0, 2:4], prompt)
    assert torch.equal(inputs["inputs_embeds"][0, 4], words[0, 2])
    assert torch.equal(inputs["inputs_embeds"][1], torch.cat((prompt, words[1])))


def test_an_architecture_that_takes_no_embeddings_is_refused_in_one_line():
    model = tiny_model("llama")
    model.base_model.forward = lambda input_ids: None
    with pytest.raises(ModelError) as caught:
        add_prompt(model, PromptSettings(), method="p_tuning")
    assert caught.value.line() == (
        "error[no-prompts] method: llama takes no embeddings that a prompt could stand before;"
        " fix: use method: qlora"
    )
