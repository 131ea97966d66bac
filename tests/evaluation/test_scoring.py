"""Likelihoods: against plain transformers on float32, in every batch, with and without sharing."""

from __future__ import annotations

import random

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model

from fourbit.evaluation.scoring import Likelihood, Question, Scorer
from fourbit.integrations.fused import use_fast_paths
from fourbit.loss import LogitTransform, token_losses
from models import PACKABLE, UNPACKABLE, VOCAB, tiny_model

SHARING = ("llama", "qwen2", "qwen3", "gemma", "gpt2", "phi3", "granite")
CLOSE = 1e-4
"""Nats of a sum of up to 20 tokens, float32 in another order."""


def questions(count: int, *, longest: int = 30, seed: int = 0) -> list[Question]:
    draw = random.Random(seed)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(VOCAB) for _ in range(length))

    return [
        Question(
            tokens(draw.randint(1, longest)),
            tuple(tokens(draw.choice((1, 1, 2, 5, 20))) for _ in range(draw.randint(1, 5))),
        )
        for _ in range(count)
    ]


@torch.no_grad()
def truth(model: torch.nn.Module, question: Question) -> list[Likelihood]:
    found = []
    for continuation in question.continuations:
        ids = torch.tensor([[*question.beginning, *continuation]])
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0]
        wanted = torch.tensor(continuation)
        rows = logits[-len(continuation) :].log_softmax(-1)
        total = rows.gather(1, wanted[:, None]).sum().item()
        found.append(Likelihood(total, bool((rows.argmax(-1) == wanted).all())))
    return found


def require_equal(got: list[list[Likelihood]], wanted: list[list[Likelihood]]) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert [x.total for x in a] == pytest.approx([x.total for x in b], abs=CLOSE)
        assert [x.greedy for x in a] == [x.greedy for x in b]


@pytest.mark.parametrize("name", [*PACKABLE, *UNPACKABLE])
def test_every_architecture(name):
    model = tiny_model(name).eval()
    asked = questions(7)
    wanted = [truth(model, question) for question in asked]
    use_fast_paths(model)
    scorer = Scorer(model, max_length=60)
    require_equal(scorer.score(asked), wanted)
    assert scorer.shares == (name in SHARING)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("share", [True, False])
def test_any_batch_gives_the_same(name, fast, share):
    model = tiny_model(name).eval()
    asked = questions(9)
    wanted = [truth(model, question) for question in asked]
    if fast:
        use_fast_paths(model)
    for size in (1, 2, 5, 100):
        require_equal(Scorer(model, batch_size=size, share=share).score(asked), wanted)
    for tokens in (1, 70, 10_000):
        require_equal(Scorer(model, batch_tokens=tokens, share=share).score(asked), wanted)


def test_greedy_is_seen():
    model = tiny_model("llama").eval()
    beginning = (5, 6, 7)
    logits = model(input_ids=torch.tensor([beginning])).logits[0, -1]
    best, worst = int(logits.argmax()), int(logits.argmin())
    (found,) = Scorer(model).score([Question(beginning, ((best,), (worst,)))])
    assert [one.greedy for one in found] == [True, False]
    assert found[0].total > found[1].total


def test_long_sequences_lose_their_beginning():
    model = tiny_model("llama").eval()
    question = Question(tuple(range(40)), ((1, 2, 3), (4,), (9, 9)))
    cut = [
        truth(model, Question(question.beginning[-beginning:], (continuation,)))[0]
        for beginning, continuation in zip((8, 10, 9), question.continuations, strict=True)
    ]
    require_equal(Scorer(model, max_length=10).score([question]), [cut])


def test_adapters_count():
    model = tiny_model("llama").eval()
    asked = questions(4)
    before = Scorer(model).score(asked)
    config = LoraConfig(r=4, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.eval()
    got = Scorer(adapted).score(asked)
    require_equal(got, [truth(adapted, question) for question in asked])
    assert abs(got[0][0].total - before[0][0].total) > 1e-2


def test_learned_prompts_count():
    model = tiny_model("llama").eval()
    config = PromptTuningConfig(num_virtual_tokens=3, task_type=TaskType.CAUSAL_LM)
    prompted = get_peft_model(model, config).eval()
    asked = questions(4)
    scorer = Scorer(prompted)
    require_equal(scorer.score(asked), [truth(prompted, question) for question in asked])
    assert not scorer.shares


def test_a_model_that_ignores_the_mask_is_found_out(monkeypatch):
    model = tiny_model("llama").eval()
    asked = questions(5)
    wanted = [truth(model, question) for question in asked]
    forward = type(model.model).forward

    def without_mask(self, *args, attention_mask=None, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", without_mask)
    scorer = Scorer(model)
    require_equal(scorer.score(asked), wanted)
    assert not scorer.shares


def test_the_mode_of_the_model_is_left_as_it_was():
    model = tiny_model("llama").train()
    Scorer(model).score(questions(2))
    assert model.training


def test_progress_ends_with_all_questions():
    told = []
    asked = questions(6)
    Scorer(tiny_model("llama"), batch_size=2).score(asked, progress=lambda n, _: told.append(n))
    assert told == sorted(told)
    assert told[-1] == len(asked)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5, 3.0)])
def test_token_losses(bias, transform, monkeypatch):
    monkeypatch.setattr("fourbit.loss.CHUNK_BYTES", 4 * 50 * 3)
    hidden, weight = torch.randn(11, 16), torch.randn(50, 16)
    added = torch.randn(50) if bias else None
    labels = torch.randint(0, 50, (11,))
    raw = torch.nn.functional.linear(hidden, weight, added) * transform.scale
    if transform.softcap:
        raw = transform.softcap * torch.tanh(raw / transform.softcap)
    labels[3] = raw[3].argmax()
    losses, likeliest = token_losses(hidden, weight, labels, bias=added, transform=transform)
    wanted = torch.nn.functional.cross_entropy(raw, labels, reduction="none")
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(likeliest, raw.argmax(-1) == labels)
    assert likeliest[3]
