"""Tasks: rows of every shape, metrics with their errors, windows of text."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from fourbit.data import Origin, Row
from fourbit.errors import InputError
from fourbit.evaluation.choices import Choice, mmlu_header, read_choice, with_shots
from fourbit.evaluation.metrics import Metric, exponential, macro_mean, mean, token_f1
from fourbit.evaluation.run import split_tasks
from fourbit.evaluation.scoring import Scorer
from fourbit.evaluation.tasks import LastWord, Material, Mmlu, MultipleChoice, Perplexity
from fourbit.generate import Generator
from models import tiny_model, tiny_tokenizer

QUESTION = "Question: What is wet?\nAnswer:"


def row(**data: object) -> Row:
    return Row(data, Origin("rows.jsonl", 3))


@pytest.mark.parametrize(
    "data",
    [
        {"query": QUESTION, "choices": ["sand", "water"], "gold": 1},
        {"question": "What is wet?", "choices": ["sand", "water"], "answer": 1},
        {"question": "What is wet?", "choices": ["sand", "water"], "answer": "B"},
        {"question": "What is wet?", "choices": ["sand", "water"], "answer": "water"},
        {"question": "What is wet?", "choices": ["sand", "water"], "label": "1"},
        {
            "question": "What is wet?",
            "choices": {"text": ["sand", "water"], "label": ["1", "2"]},
            "answerKey": "2",
        },
        {"goal": "What is wet?", "sol1": "sand", "sol2": "water", "label": 1},
    ],
    ids=str,
)
def test_shapes_of_rows(data):
    assert read_choice(row(**data)) == Choice(QUESTION, ("sand", "water"), 1)


def test_hellaswag_is_cleaned_as_lm_eval_does():
    from lm_eval.tasks.hellaswag.utils import preprocess

    endings = ["[substeps] runs  away.", " stops [header] there.", "a", "b"]
    hub = {"activity_label": "Dogs", "ctx_a": "A dog [title] sits.", "ctx_b": "it Then"}
    ours = read_choice(row(**hub, ctx="unused", endings=endings, label="2"))
    assert ours.query == preprocess("Dogs: A dog [title] sits. It then")
    assert ours.choices == tuple(map(preprocess, endings))
    assert ours.gold == 2
    joined = {"activity_label": "Dogs", "ctx": "A dog [title] sits. it", "endings": endings}
    assert read_choice(row(**joined, label=0)).query == preprocess("Dogs: A dog [title] sits. it")


def test_letters():
    data = {"question": " Which? ", "choices": ["w", "x", "y"], "answer": "C", "subject": "a_b"}
    item = read_choice(row(**data), letters=True)
    assert item == Choice("Which?\nA. w\nB. x\nC. y\nAnswer:", ("A", "B", "C"), 2, "a_b")
    assert mmlu_header("a_b").endswith("about a b.\n\n")
    written = "The following are ... about  x.\n\nQ?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    item = read_choice(row(subject="x", input=written, output="D"), letters=True)
    assert item == Choice(written, ("A", "B", "C", "D"), 3, "x")


def test_shots_stand_before_the_question():
    shot, item = Choice("1+1?\nAnswer:", ("1", "2"), 1), Choice("2+2?\nAnswer:", ("4", "5"), 0)
    query = with_shots(item, [shot], "Sums.\n\n").query
    assert query == "Sums.\n\n1+1?\nAnswer: 2\n\n2+2?\nAnswer:"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"query": "q", "choices": ["a", "b"]}, "no key 'gold'"),
        ({"query": "q", "choices": ["a", "b"], "gold": 2}, "2 is none of 2"),
        ({"query": "q", "choices": ["a", "b"], "gold": -1}, "-1 is none of 2"),
        ({"query": "q", "choices": ["a"], "gold": 0}, "nothing to choose"),
        ({"query": "q", "choices": ["a", ""], "gold": 0}, "choice is empty"),
        ({"query": " ", "choices": ["a", "b"], "gold": 0}, "question is empty"),
        ({"query": 3, "choices": ["a", "b"], "gold": 0}, "query is int"),
        ({"query": "q", "choices": "ab", "gold": 0}, "no list of texts"),
        ({"query": "q", "choices": [1, 2], "gold": 0}, "no list of texts"),
        ({"query": "q", "choices": ["a", "b"], "gold": True}, "no index"),
        ({"query": "q", "choices": ["a", "b"], "gold": "zz"}, "'zz' is no index"),
        ({"text": "q"}, "no key"),
    ],
    ids=str,
)
def test_bad_rows_say_where_and_what(data, said):
    with pytest.raises(InputError, match="bad-row") as error:
        read_choice(row(**data))
    assert said in error.value.line()
    assert "rows.jsonl:3" in error.value.line()
    assert "fix" in error.value.line()


def test_mean_and_its_error():
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    found = mean(values, chance=0.25)
    assert found.value == 0.6
    assert found.stderr == pytest.approx(statistics.stdev(values) / math.sqrt(5))
    assert math.isnan(mean([1.0]).stderr)
    assert math.isnan(mean([]).value)
    assert mean([0.0, 0.0, 1.0, 0.0], chance=0.25).is_chance
    assert not Metric(0.9, 0.1, chance=0.25).is_chance


def test_macro_mean_counts_groups_alike():
    found = macro_mean({"a": [1.0] * 9, "b": [0.0, 1.0], "c": [0.0]})
    assert found.value == pytest.approx((1 + 0.5 + 0) / 3)
    assert found.stderr > mean([0.0, 1.0]).stderr / 3


def test_perplexity_of_a_loss():
    found = exponential(Metric(2.0, 0.1, share=False))
    assert (found.value, found.stderr) == (math.exp(2), pytest.approx(0.1 * math.exp(2)))
    assert exponential(Metric(1000.0, 1.0, share=False)).value == math.inf


@pytest.mark.parametrize(
    ("prediction", "reference", "wanted"),
    [
        ("The cat, sat!", "cat sat", 1.0),
        ("cat", "cat sat", 2 / 3),
        ("dog", "cat", 0.0),
        ("", "", 1.0),
        ("", "cat", 0.0),
        ("a a the", "an", 1.0),
        ("cat cat", "cat", 2 / 3),
    ],
)
def test_f1_counts_words(prediction, reference, wanted):
    assert token_f1(prediction, reference) == pytest.approx(wanted)


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(tiny_model("llama").eval(), tiny_tokenizer(), None)


def run(task, generator, rows, path="rows.jsonl", **material):
    scorer = Scorer(generator.model)
    return task.run(generator, scorer, Material(rows, path, **material), lambda *_: None)


def text_rows(*texts: str) -> list[Row]:
    return [Row({"text": text}, Origin("rows.jsonl", n + 1)) for n, text in enumerate(texts)]


@torch.no_grad()
def plain_losses(generator, text: str) -> list[float]:
    ids = torch.tensor([generator.tokenizer(text, add_special_tokens=False).input_ids])
    logits = generator.model(ids).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()


def test_perplexity_of_one_window(generator):
    text = "A text that is read as it is, once."
    found = run(Perplexity(), generator, text_rows(text))
    losses = plain_losses(generator, text)
    assert found.n == len(losses)
    assert found.metrics["loss"].value == pytest.approx(statistics.mean(losses), rel=1e-5)
    wanted = math.exp(statistics.mean(losses))
    assert found.metrics["perplexity"].value == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("stride", [1, 3, 7, 9, 10])
def test_windows_score_every_token_once(generator, stride):
    text = "".join(chr(97 + n % 26) for n in range(43))
    found = run(Perplexity(), generator, text_rows(text), window=10, stride=stride)
    ids = generator.tokenizer(text, add_special_tokens=False).input_ids
    losses: list[float] = []
    scored, start = 1, 0
    while scored < len(ids):
        stop = min(start + 10, len(ids))
        logits = generator.model(torch.tensor([ids[start:stop]])).logits[0].log_softmax(-1)
        first = max(scored, start + 1)
        losses += [-logits[t - 1 - start, ids[t]].item() for t in range(first, stop)]
        scored, start = stop, start + stride
    assert found.n == len(losses)
    assert found.metrics["loss"].value == pytest.approx(statistics.mean(losses), rel=1e-4)


def test_a_text_file_is_one_text_and_rows_are_many(generator):
    rows = text_rows("abc" * 9 + "\n", "def" * 9 + "\n")
    many = run(Perplexity(), generator, rows)
    one = run(Perplexity(), generator, rows, path="book.txt.gz")
    assert many.facts["texts"] == 2
    assert one.facts["texts"] == 1
    assert one.n == many.n + 1, "the second block's first letter has something before it"


@pytest.mark.parametrize(
    ("material", "said"),
    [
        ({"window": 10, "stride": 11}, "stride"),
        ({"window": 10**6}, "10000"),
    ],
)
def test_windows_that_cannot_be(generator, material, said):
    with pytest.raises(InputError, match=said):
        run(Perplexity(), generator, text_rows("some text"), **material)


def test_rows_without_text_are_named(generator):
    with pytest.raises(InputError, match="rows.jsonl:3"):
        run(Perplexity(), generator, [row(body="x")])


def test_last_word(generator):
    found = run(LastWord(), generator, text_rows("the dog saw the cat", "one two three"))
    assert found.n == 2
    assert found.metrics["acc"].value == 0
    text = "the dog saw the cat"
    ids = generator.tokenizer(text).input_ids
    start = len(generator.tokenizer("the dog saw the").input_ids)
    logits = generator.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = sum(logits[t - 1, ids[t]].item() for t in range(start, len(ids)))
    assert found.items[0]["log_likelihood"] == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(InputError, match="several words"):
        run(LastWord(), generator, text_rows("alone"))


def test_choices_by_sum_and_by_length(generator):
    rows = [row(query="Q:", choices=["a", "bbbbbbbb"], gold=1) for _ in range(3)]
    found = run(MultipleChoice(), generator, rows)
    totals = found.items[0]["log_likelihoods"]
    assert found.items[0]["acc"] == totals.index(max(totals)) == 0
    norms = [totals[0] / 1, totals[1] / 8]
    assert found.items[0]["acc_norm"] == norms.index(max(norms))
    assert found.metrics["acc"].chance == 0.5
    assert found.n == 3


def test_mmlu_is_the_mean_over_subjects(generator):
    def item(subject: str, answer: str) -> Row:
        return row(question="Q", choices=["w", "x"], answer=answer, subject=subject)

    rows = [item("a", "A"), item("a", "A"), item("a", "A"), item("b", "B")]
    found = run(Mmlu(), generator, rows)
    by_subject = found.facts["subjects"]
    assert set(by_subject) == {"a", "b"}
    assert found.metrics["acc"].value == pytest.approx(sum(by_subject.values()) / 2)
    micro = (3 * by_subject["a"] + by_subject["b"]) / 4
    assert found.metrics["acc_micro"].value == pytest.approx(micro)


def test_mmlu_shots_are_of_the_subject(generator):
    rows = [row(question="Q", choices=["w", "x"], answer="A", subject=s) for s in ("a", "b")]
    alone = run(Mmlu(), generator, rows)
    shots = [row(question="S", choices=["y", "z"], answer="B", subject="a")]
    shown = run(Mmlu(), generator, rows, shots=shots)
    assert shown.items[0] != alone.items[0]
    kept = alone.items[1]["log_likelihoods"]
    assert shown.items[1]["log_likelihoods"] == pytest.approx(kept, abs=1e-4)
    assert shown.prompts_sha256 != alone.prompts_sha256


def test_tasks_are_split_at_commas_that_begin_a_task():
    words = ["hellaswag=a,b.jsonl,perplexity=c.txt", "mmlu=x"]
    assert split_tasks(words) == ["hellaswag=a,b.jsonl", "perplexity=c.txt", "mmlu=x"]
    assert split_tasks(["arc_easy,piqa"]) == ["arc_easy", "piqa"]
