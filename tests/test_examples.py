"""Each example runs on a tiny model and says what it promises."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import fourbit

EXAMPLES = Path(__file__).parents[1] / "examples"

ARGUMENTS = {
    "own_loop": ["--steps", "3"],
    "dora": ["--steps", "3"],
    "prompt_tuning": ["--steps", "8"],
    "p_tuning": ["--steps", "8"],
    "trainer": ["--steps", "8"],
    "sft": ["--steps", "8"],
    "dpo": ["--steps", "8"],
}
"""What each example is called with besides ``--model FOLDER --output FOLDER``."""

NEEDS = {"sft": "trl", "dpo": "trl"}
"""Packages of extras."""

LINE = r"^loss (\d+\.\d{4}) -> (\d+\.\d{4})$"


def command(name: str, model: Path, output: Path) -> list[str]:
    script = str(EXAMPLES / f"{name}.py")
    return [script, "--model", str(model), "--output", str(output), *ARGUMENTS[name]]


def check(name: str, printed: str, output: Path) -> None:
    assert "base unchanged" in printed
    losses = re.search(LINE, printed, re.MULTILINE)
    assert losses
    if name in ("trainer", "sft", "dpo"):  # measured on the same rows before and after
        assert float(losses[2]) < float(losses[1])
    if name == "dpo":
        assert losses[1] == "0.6931"
    if name == "trainer":
        assert "differ by at most 0.0e+00" in printed
    assert list(output.rglob("*.safetensors")), name


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_example_does_what_it_says(
    name: str, model_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    words = command(name, model_folder("llama"), tmp_path / "out")
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(words[0], run_name="__main__")
    check(name, capsys.readouterr().out, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_example_runs_from_a_shell(name: str, model_folder, tmp_path: Path) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    words = command(name, model_folder("llama"), tmp_path / "out")
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    check(name, done.stdout, tmp_path / "out")


def test_the_shipped_chats_are_whole() -> None:
    lines = (EXAMPLES / "data" / "chats.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["messages"] for line in lines]
    assert len(rows) >= 60
    for messages in rows:
        assert [message["role"] for message in messages] == ["user", "assistant"]
        assert all(message["content"].strip() for message in messages)
    assert len({messages[0]["content"] for messages in rows}) == len(rows)


def test_the_shipped_preferences_are_whole() -> None:
    lines = (EXAMPLES / "data" / "preferences.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) >= 30
    for row in rows:
        assert [message["role"] for message in row["prompt"]] == ["user"]
        for answer in ("chosen", "rejected"):
            assert [message["role"] for message in row[answer]] == ["assistant"]
            assert row[answer][0]["content"].strip()
        assert row["chosen"] != row["rejected"]
    assert len({row["prompt"][0]["content"] for row in rows}) == len(rows)


def test_every_example_is_tested() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - {"chats"}
    assert scripts == set(ARGUMENTS)


def test_the_notebook_runs(model_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    for name in ("trl", "ipykernel"):
        pytest.importorskip(name)
    notebook = nbformat.read(EXAMPLES / "qlora_notebook.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "stored outputs"
    (parameters,) = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    given = {"MODEL": str(model_folder("llama")), "OUTPUT": str(tmp_path / "out"), "STEPS": 3}
    parameters.source += "".join(f"\n{name} = {value!r}" for name, value in given.items())
    # the kernel is a process of its own, in the notebook's folder
    monkeypatch.setenv("PYTHONPATH", str(Path(fourbit.__file__).parents[1]))
    nbclient.NotebookClient(
        notebook, timeout=120, resources={"metadata": {"path": str(EXAMPLES)}}
    ).execute()
    printed = "".join(out.get("text", "") for cell in code for out in cell.outputs)
    assert "ok  base_unchanged" in printed
    assert "FAILED" not in printed
    assert re.search(r"^\d\.\d\d bits a weight", printed, re.MULTILINE)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
