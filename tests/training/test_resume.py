"""A run killed anywhere ends, when resumed, with the bytes of an undisturbed one."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml

from commands import fourbit, start, write_config
from fourbit.files import sha256_of
from fourbit.rundir import RunDir


def adapter_digest(run: Path) -> str:
    return sha256_of(run / "adapter" / "adapter_model.safetensors")


def steps_done(run: Path) -> int:
    return max((line["step"] for line in RunDir(run).read_metrics()), default=0)


def kill_after(config: Path, step: int, delay: float, number: int = signal.SIGKILL) -> int:
    """Starts or resumes the run, signals it ``delay`` seconds after ``step``; its exit code."""
    run = Path(yaml.safe_load(config.read_text())["output"])
    process = start("train", config, "--resume", "auto")
    while process.poll() is None and steps_done(run) < step:
        time.sleep(0.005)
    time.sleep(delay)
    if process.poll() is None:
        process.send_signal(number)
    process.communicate(timeout=120)
    return process.returncode


def finish(config: Path) -> None:
    done = fourbit("train", config, "--resume", "auto")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, model_folder):
    """Configuration and adapter digest of a run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = write_config(folder, model_folder("llama"))
    done = fourbit("train", config)
    assert done.returncode == 0, done.stderr
    return config, adapter_digest(folder / "run"), steps_done(folder / "run")


def copy_config(source: Path, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    values = yaml.safe_load(source.read_text())
    values["output"] = str(folder / "run")
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder / "config.yaml"


def check_kills(undisturbed, folder: Path, kills: int, seed: int) -> None:
    source, digest, total = undisturbed
    config = copy_config(source, folder)
    draw = random.Random(seed)
    for _ in range(kills):
        step = min(total - 1, steps_done(folder / "run") + draw.randint(0, 3))
        kill_after(config, step, draw.uniform(0, 0.15))
    finish(config)
    assert adapter_digest(folder / "run") == digest
    metrics = [line["step"] for line in RunDir(folder / "run").read_metrics()]
    assert metrics == sorted(set(metrics)), "a step is written once, resumed or not"
    assert metrics[-1] == total


def test_sigkill_twice_then_resume(undisturbed, tmp_path):
    check_kills(undisturbed, tmp_path, kills=2, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_twenty_random_sigkills(undisturbed, tmp_path, seed):
    check_kills(undisturbed, tmp_path, kills=4, seed=100 + seed)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_signals_save_and_exit_with_their_code(undisturbed, tmp_path, number, code):
    source, digest, _ = undisturbed
    config = copy_config(source, tmp_path)
    assert kill_after(config, 3, 0.0, number) == code
    saved = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved, "the signalled run saved a checkpoint"
    finish(config)
    assert adapter_digest(tmp_path / "run") == digest


def test_resuming_a_finished_run_changes_nothing(undisturbed):
    config, digest, _ = undisturbed
    done = fourbit("train", config, "--resume", "auto", "--json")
    assert done.returncode == 0
    assert '"verified": true' in done.stdout
    assert adapter_digest(config.parent / "run") == digest


def test_a_damaged_newest_checkpoint_is_skipped(undisturbed, tmp_path):
    source, digest, _ = undisturbed
    config = copy_config(source, tmp_path)
    shutil.copytree(source.parent / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    weights = newest / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    done = fourbit("train", config, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert "skipped a damaged checkpoint" in done.stderr
    assert adapter_digest(tmp_path / "run") == digest


@pytest.mark.slow  # the same refusal as changed data, by another key
def test_resume_with_other_settings_is_refused(undisturbed):
    config, _, _ = undisturbed
    done = fourbit("train", config, "--resume", "auto", "--lora.r", "8")
    assert done.returncode == 2
    assert "lora.r" in done.stderr
    assert len(done.stderr.strip().splitlines()[-1]) > 0
    assert "Traceback" not in done.stderr


def test_resume_with_changed_data_is_refused(undisturbed, tmp_path):
    source, _, _ = undisturbed
    config = copy_config(source, tmp_path)
    shutil.copytree(source.parent / "run", tmp_path / "run")
    chats = tmp_path / "other.jsonl"
    text = Path(yaml.safe_load(source.read_text())["data"]["train"]).read_text()
    chats.write_text(text + text.splitlines()[0] + "\n")
    done = fourbit("train", config, "--resume", "auto", "--data", chats)
    assert done.returncode == 2
    assert "data" in done.stderr.strip().splitlines()[-1]


def test_an_existing_run_is_not_overwritten(undisturbed):
    config, digest, _ = undisturbed
    done = fourbit("train", config)
    assert done.returncode == 2
    assert "--resume" in done.stderr
    assert "--overwrite" in done.stderr
    assert adapter_digest(config.parent / "run") == digest


@pytest.mark.parametrize("paged", ["always", "off"])
def test_pages_and_8_bits_survive_kill_and_resume(tmp_path, model_folder, paged):
    folder = model_folder("llama")
    whole = write_config(tmp_path / "whole", folder, optim={"optim_bits": 8, "paged": "off"})
    assert fourbit("train", whole).returncode == 0
    config = write_config(tmp_path / "killed", folder, optim={"optim_bits": 8, "paged": paged})
    kill_after(config, 3, 0.05)
    finish(config)
    assert adapter_digest(tmp_path / "killed" / "run") == adapter_digest(tmp_path / "whole" / "run")
    assert not [p for p in (tmp_path / "killed" / "run").iterdir() if p.name.startswith("tmp")]
