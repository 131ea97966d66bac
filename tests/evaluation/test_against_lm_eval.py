"""Our numbers and lm-eval's own on the same items: every likelihood, every printed digit."""

from __future__ import annotations

import json
import random
from pathlib import Path

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from fourbit.data import read_plain_rows
from fourbit.errors import EnvironmentFault, InputError
from fourbit.evaluation.hub import evaluate_with_lm_eval
from fourbit.evaluation.options import EvalOptions
from fourbit.evaluation.scoring import Scorer
from fourbit.evaluation.tasks import Material, Mmlu, MultipleChoice
from fourbit.generate import Generator
from fourbit.training.progress import Reporter
from models import tiny_model, tiny_tokenizer

WORDS = ["the", "a", "red", "cat", "runs", "sits", "", "on", "table,", "slowly", "twice.", "é", "ω"]
CHOICE = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {rows}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{query}}}}"
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
LETTERS = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}, dev: {rows}}}}}
output_type: multiple_choice
test_split: test
fewshot_split: dev
fewshot_config: {{sampler: first_n}}
description: "{header}"
doc_to_text: "{{{{question.strip()}}}}\\nA. {{{{choices[0]}}}}\\nB. {{{{choices[1]}}}}\\nC. {{{{choices[2]}}}}\\nD. {{{{choices[3]}}}}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""  # noqa: E501  # as lm-eval's own files have it
ROLLING = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {rows}}}}}
output_type: loglikelihood_rolling
validation_split: validation
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: byte_perplexity}}
"""
ANSWERS = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {rows}}}}}
output_type: generate_until
validation_split: validation
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: ["e"], max_gen_toks: 12, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


def phrase(draw: random.Random, longest: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, longest))).strip() or "x"


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def choices(tmp_path_factory) -> Path:
    draw = random.Random(1)
    rows = [
        {
            "query": phrase(draw, 20) + draw.choice(("", " ", "\nAnswer:")),
            # never two alike: which of equals is chosen is up to rounding
            "choices": [f"{phrase(draw, 6)} {number}" for number in range(4)],
            "gold": draw.randrange(4),
        }
        for _ in range(40)
    ]
    return write_rows(tmp_path_factory.mktemp("choices") / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(tiny_model("llama").eval(), tiny_tokenizer(), None)


def truth(generator: Generator, folder: Path, yaml: str, shots: int | None = None) -> dict:
    (folder / "task.yaml").write_text(yaml)
    model = HFLM(
        pretrained=generator.model,
        tokenizer=generator.tokenizer,
        batch_size=4,
        device="cpu",
        max_length=Scorer(generator.model).max_length,
    )
    return lm_eval.simple_evaluate(
        model=model,
        tasks=["local"],
        num_fewshot=shots,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=10,
    )


def likelihoods(found: dict) -> list[list[float]]:
    samples = sorted(found["samples"]["local"], key=lambda sample: sample["doc_id"])
    return [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]


@pytest.mark.parametrize("share", [True, False])
def test_multiple_choice(generator, choices, tmp_path, share):
    wanted = truth(generator, tmp_path, CHOICE.format(name="local", rows=choices))
    rows, _ = read_plain_rows(str(choices), key="rows")
    scorer = Scorer(generator.model, share=share)
    found = MultipleChoice().run(generator, scorer, Material(rows, str(choices)), lambda *_: None)
    values = wanted["results"]["local"]
    for name in ("acc", "acc_norm"):
        assert found.metrics[name].value == pytest.approx(values[f"{name},none"], abs=1e-12)
        error = values[f"{name}_stderr,none"]
        assert found.metrics[name].stderr == pytest.approx(error, abs=1e-12)
    for item, likely in zip(found.items, likelihoods(wanted), strict=True):
        assert item["log_likelihoods"] == pytest.approx(likely, abs=1e-4)


@pytest.mark.parametrize("shots", [0, 2])
def test_mmlu(generator, tmp_path, shots):
    draw = random.Random(2)
    rows = [
        {
            "question": phrase(draw, 12) + " ",
            "choices": [phrase(draw, 4) for _ in range(4)],
            "answer": draw.randrange(4),
            "subject": "high_school",
        }
        for _ in range(20)
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    header = "The following are multiple choice questions (with answers) about high school.\\n\\n"
    yaml = LETTERS.format(name="local", rows=path, header=header)
    wanted = truth(generator, tmp_path, yaml, shots=shots)
    read, _ = read_plain_rows(str(path), key="rows")
    material = Material(read, str(path), shots=read[:shots])
    found = Mmlu().run(generator, Scorer(generator.model), material, lambda *_: None)
    ours = [item["log_likelihoods"] for item in found.items]
    theirs = likelihoods(wanted)
    # its first_n leaves out the row that is asked, ours is shown what it is given
    for a, b in list(zip(ours, theirs, strict=True))[shots:]:
        assert a == pytest.approx(b, abs=1e-4)
    if shots == 0:
        assert found.metrics["acc"].value == wanted["results"]["local"]["acc,none"]


@pytest.mark.parametrize("yaml", [CHOICE, ROLLING, ANSWERS], ids=["choice", "rolling", "answers"])
def test_its_tasks_through_our_scoring(generator, choices, tmp_path, yaml):
    path = choices
    if yaml is ROLLING:
        draw = random.Random(3)
        texts = [{"text": phrase(draw, longest)} for longest in (3, 300, 90)]
        path = write_rows(tmp_path / "texts.jsonl", texts)
    wanted = truth(generator, tmp_path, yaml.format(name="local", rows=path))
    options = EvalOptions(include=tmp_path)
    (found,) = evaluate_with_lm_eval(
        "local", generator, Scorer(generator.model), options, Reporter(quiet=True)
    ).values()
    values = wanted["results"]["local"]
    assert found.metrics
    for name, metric in found.metrics.items():
        assert metric.value == pytest.approx(values[f"{name},none"], rel=1e-5)
    assert found.n == len(path.read_text().splitlines())
    assert len(found.items) == found.n


def test_unknown_names_and_absent_data_are_told_in_one_line(generator, tmp_path):
    def ask(name: str) -> None:
        options = EvalOptions(include=tmp_path)
        scorer = Scorer(generator.model)
        evaluate_with_lm_eval(name, generator, scorer, options, Reporter(quiet=True))

    with pytest.raises(InputError, match="unknown-task"):
        ask("no_such_task")
    yaml = CHOICE.format(name="local", rows=tmp_path / "absent.jsonl")
    (tmp_path / "task.yaml").write_text(yaml)
    with pytest.raises(EnvironmentFault, match="no-task-data"):
        ask("local")
