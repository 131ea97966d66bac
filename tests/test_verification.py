"""`fourbit verify` reads the files again: whatever is changed afterwards is noticed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import fourbit
from commands import write_config
from fourbit.errors import InputError
from fourbit.settings import load_settings
from fourbit.training.config import TrainConfig
from fourbit.training.progress import Reporter


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("finished")
    base = shutil.copytree(model_folder("llama"), folder / "base")
    config = write_config(folder, base, epochs=1)
    resolved = load_settings(TrainConfig, path=config)
    result = fourbit.train(resolved.value, reporter=Reporter(quiet=True))
    assert result.verified
    return folder


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


def failed(run, **keywords) -> set[str]:
    return {check.name for check in fourbit.verify(run, **keywords).checks if not check.ok}


def test_an_untouched_run_verifies_with_its_base(run):
    receipt = fourbit.verify(run)
    assert receipt.ok
    assert "base" in {check.name for check in receipt.checks}


def flip_last_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def test_a_flipped_bit_in_the_adapter(run):
    flip_last_byte(run / "adapter" / "adapter_model.safetensors")
    assert {"adapter_file", "adapter_equals_checkpoint"} <= failed(run, base=False)


def rewrite_adapter(run, change):
    path = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_zeroed_lora_b(run):
    def zero(tensors):
        name = next(n for n in tensors if "lora_B" in n)
        tensors[name] = torch.zeros_like(tensors[name])

    rewrite_adapter(run, zero)
    assert "adapter_tensors" in failed(run, base=False)


def test_a_missing_tensor(run):
    rewrite_adapter(run, lambda tensors: tensors.pop(next(iter(tensors))))
    assert "adapter_count" in failed(run, base=False)


def test_another_dtype(run):
    rewrite_adapter(run, lambda t: t.update({n: v.bfloat16() for n, v in t.items()}))
    assert "adapter_tensors" in failed(run, base=False)


def test_a_flipped_bit_in_a_checkpoint(run):
    newest = sorted((run / "checkpoints").iterdir())[-1]
    flip_last_byte(newest / "optimizer.safetensors")
    assert "checkpoints" in failed(run, base=False)


def test_missing_steps_in_the_metrics(run):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n")
    assert "metrics" in failed(run, base=False)


def test_a_prettier_loss_in_the_metrics(run):
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[-1]["loss"] = 0.01
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "metrics" in failed(run, base=False)


def test_a_verdict_that_was_turned_is_not_trusted(run):
    flip_last_byte(run / "adapter" / "adapter_model.safetensors")
    path = run / "receipt.json"
    receipt = json.loads(path.read_text())
    receipt["ok"] = True
    path.write_text(json.dumps(receipt))
    assert not fourbit.verify(run, base=False).ok


def test_a_failed_check_in_the_receipt_stays_failed(run):
    path = run / "receipt.json"
    receipt = json.loads(path.read_text())
    receipt["checks"][0]["ok"] = False
    path.write_text(json.dumps(receipt))
    assert "receipt" in failed(run, base=False)


def test_a_changed_base_model(finished, run):
    weights = finished / "base" / "model.safetensors"
    original = weights.read_bytes()
    try:
        tensors = load_file(weights)
        name = next(n for n in tensors if "q_proj" in n)
        tensors[name][0, 0] += 0.5
        save_file(tensors, weights, metadata={"format": "pt"})
        assert failed(run) == {"base"}
    finally:
        weights.write_bytes(original)


def test_a_base_that_is_gone_is_a_finding(finished, run):
    moved = finished / "elsewhere"
    (finished / "base").rename(moved)
    try:
        receipt = fourbit.verify(run)
        assert receipt.ok
        assert any("base was not checked" in finding for finding in receipt.findings)
    finally:
        moved.rename(finished / "base")


def test_no_run_and_unfinished_run(tmp_path, run):
    with pytest.raises(InputError, match="no run directory"):
        fourbit.verify(tmp_path / "nothing")
    (run / "receipt.json").unlink()
    with pytest.raises(InputError, match="has not ended"):
        fourbit.verify(run)
