"""`fourbit eval` as a user meets it: results, wrong inputs, answers that are generated."""

from __future__ import annotations

import gzip
import json
import subprocess
from pathlib import Path

import pytest

from commands import fourbit, train_quietly
from fourbit.training.checkup import check_up
from models import write_chats


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [{"query": f"Q {n}:", "choices": ["yes", "no"], "gold": n % 2} for n in range(6)]
    (folder / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with gzip.open(folder / "book.txt.gz", "wt") as file:
        file.write("It was a dark night.\n\nIt rained.\n" * 20)
    asked = [{"text": f"say {n}", "label": str(n)} for n in range(4)]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    return folder


def test_several_tasks_at_once(model_folder, data, tmp_path):
    tasks = f"arc_easy={data}/choice.jsonl,perplexity={data}/book.txt.gz"
    answers = ["--tasks", f"exact_match={data}/asked.jsonl", "--max-new-tokens", "4"]
    templates = ["--prompt", "{text}", "--completion", "{label}"]
    done = fourbit(
        "eval", model_folder("llama"), "--tasks", tasks, *answers, *templates,
        "--items", tmp_path / "items", "--window", "50", "--stride", "25", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    results = told["results"]
    assert set(results) == {"arc_easy", "perplexity", "exact_match"} == set(told["data_sha256"])
    assert results["arc_easy"]["n"] == 6
    assert results["arc_easy"]["stderr"] == results["arc_easy"]["acc_stderr"]
    assert results["perplexity"]["window"] == 50
    assert 0 <= results["exact_match"]["f1"] <= 1
    assert len((tmp_path / "items" / "arc_easy.jsonl").read_text().splitlines()) == 6
    again = fourbit(
        "eval", model_folder("llama"), "--tasks", tasks, "--window", "50", "--stride", "25",
        "--batch-size", "1", "--json",
    )  # fmt: skip
    for task, metric in (("arc_easy", "acc_norm"), ("perplexity", "perplexity")):
        other = json.loads(again.stdout)["results"][task]
        assert results[task][metric] == pytest.approx(other[metric], rel=2e-2)
        assert results[task]["prompts_sha256"] == other["prompts_sha256"]


def test_people_are_told_when_a_score_says_nothing(model_folder, data):
    done = fourbit("eval", model_folder("llama"), "--tasks", f"piqa={data}/choice.jsonl")
    assert done.returncode == 0
    assert "acc " in done.stdout
    assert "6 items" in done.stdout
    assert "not above chance (50.0 %)" in done.stdout


def test_a_run_is_an_adapter(model_folder, data, tmp_path):
    model = model_folder("llama")
    run = train_quietly(tmp_path, model, max_steps=2, epochs=1)
    done = fourbit(
        "eval", model, "--adapter", run, "--tasks", f"piqa={data}/choice.jsonl", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["settings"]["adapter"] == str(run)


def refused(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    done = fourbit("eval", *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error[")]
    assert len(lines) == 1, done.stderr
    return done


def test_mistakes_are_told_before_the_model_is_loaded(data, tmp_path):
    absent = "no-such-model-anywhere"
    choice = f"{data}/choice.jsonl"
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "torn.jsonl").write_text('{"query": "a"')
    for tasks, said in {
        "hellaswg=x.jsonl": "hellaswag",
        f"piqa={tmp_path}/none.jsonl": "none.jsonl",
        f"piqa={tmp_path}/empty.jsonl": "holds no rows",
        f"piqa={tmp_path}/torn.jsonl": "torn.jsonl:1",
        "piqa=": "names no file",
        f"piqa={choice},piqa={choice}": "twice",
    }.items():
        assert said in refused(absent, "--tasks", tasks).stderr
    assert "--shots-from" in refused(absent, "--tasks", f"piqa={choice}", "--shots", "2").stderr
    assert "tasks" in refused(absent).stderr


def test_rows_that_a_task_cannot_use_are_named(model_folder, data):
    model = model_folder("llama")
    assert "choice.jsonl:1" in refused(model, "--tasks", f"lambada={data}/choice.jsonl").stderr
    assert "asked.jsonl:1" in refused(model, "--tasks", f"piqa={data}/asked.jsonl").stderr
    said = refused(model, "--tasks", f"perplexity={data}/book.txt.gz", "--window", "9999999").stderr
    assert "--window" in said


def test_a_run_is_asked_as_it_was_trained_and_remembers_it(model_folder, data, tmp_path):
    model = model_folder("llama")
    chats = write_chats(tmp_path / "chats.jsonl", 12)
    section = {"train": str(chats), "eval": 2, "max_length": 128, "system": "Add."}
    run = train_quietly(tmp_path, model, data=section)
    asked = ["eval", model, "--tasks", f"exact_match={chats}", "--max-new-tokens", "2", "--json"]
    prompts = {}
    for adapter in (run, run / "adapter"):
        done = fourbit(*asked, "--adapter", adapter)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)["results"]["exact_match"]
        assert found["prompting"] == {"template": "tokenizer", "system": "Add."}
        prompts[adapter] = found["prompts_sha256"]
    assert len(set(prompts.values())) == 1
    assert check_up(run) == []
    other = fourbit(*asked, "--adapter", run, "--system", "Subtract.", "--chat-template", "plain")
    assert other.returncode == 0, other.stderr
    seen = " ".join(finding.symptom for finding in check_up(run))
    assert "another system message" in seen
    assert "another chat template" in seen
    assert len((run / "evaluations.jsonl").read_text().splitlines()) == 3
