"""Each example runs on a tiny model and says what it promises."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

ARGUMENTS = {
    "own_loop": ["--steps", "3"],
    "dora": ["--steps", "3"],
    "prompt_tuning": ["--steps", "8"],
    "p_tuning": ["--steps", "8"],
}
"""What each example is called with besides ``--model FOLDER --output FOLDER``."""


def command(name: str, model: Path, output: Path) -> list[str]:
    script = str(EXAMPLES / f"{name}.py")
    return [script, "--model", str(model), "--output", str(output), *ARGUMENTS[name]]


def check(name: str, printed: str, output: Path) -> None:
    assert "base unchanged" in printed
    assert re.search(r"^loss \d+\.\d{4} -> \d+\.\d{4}$", printed, re.MULTILINE)
    assert list(output.rglob("*.safetensors")), name


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_example_does_what_it_says(
    name: str, model_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    words = command(name, model_folder("llama"), tmp_path / "out")
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(words[0], run_name="__main__")
    check(name, capsys.readouterr().out, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_example_runs_from_a_shell(name: str, model_folder, tmp_path: Path) -> None:
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


def test_every_example_is_tested() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - {"chats"}
    assert scripts == set(ARGUMENTS)
