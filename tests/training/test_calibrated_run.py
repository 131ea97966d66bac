"""`quant.calibrate`: a run makes its own base first, and everything after it uses that one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

from commands import fourbit, write_config
from fourbit.rundir import LOCK, PARTS
from models import write_chats, write_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The model's folder, and a finished run on it."""
    folder = tmp_path_factory.mktemp("calibrated")
    model = write_model(folder / "model", "llama")
    done = fourbit("train", configured(folder, model), "--json")
    assert done.returncode == 0, done.stderr
    return model, folder / "run"


def configured(folder: Path, model: Path, **quant: str) -> Path:
    folder.mkdir(exist_ok=True)
    data = {"train": str(write_chats(folder / "many.jsonl", 90)), "eval": 2, "max_length": 128}
    return write_config(folder, model, data=data, max_steps=2, quant={"calibrate": "data", **quant})


def test_the_base_is_the_calibrated_one_and_the_proof_holds(run):
    model, folder = run
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["model"] == str(folder / "base")
    assert settings["quant"]["calibrate"] is None
    assert {path.name for path in folder.iterdir()} <= {*PARTS, LOCK}  # else --overwrite leaves it
    assert not (folder / "calibration.npy").exists()
    done = fourbit("quantize", model, "-o", folder.parent / "plain")
    assert done.returncode == 0
    ours, plain = (
        load_file(path / "model.safetensors") for path in (folder / "base", folder.parent / "plain")
    )
    assert ours.keys() == plain.keys()
    packed = [name for name in plain if plain[name].dtype.itemsize == 1 and "q_proj" in name]
    assert any(not ours[name].equal(plain[name]) for name in packed)
    assert fourbit("verify", folder).returncode == 0


def test_a_resumed_run_keeps_its_base(run):
    model, folder = run
    before = (folder / "base" / "model.safetensors").stat().st_mtime_ns
    done = fourbit("train", configured(folder.parent, model), "--resume", "auto", "--json")
    assert done.returncode == 0, done.stderr
    assert "calibrated before" in done.stderr
    assert (folder / "base" / "model.safetensors").stat().st_mtime_ns == before


def test_a_merge_starts_from_that_base(run, tmp_path):
    _, folder = run
    done = fourbit("merge", folder, "-o", tmp_path / "merged", "--json")
    assert done.returncode == 0, done.stderr


def test_a_missing_text_is_told_once_and_at_once_and_the_output_stays_free(run, tmp_path):
    model, _ = run
    config = configured(tmp_path, model, calibrate="none.txt")
    for _ in range(2):
        missing = fourbit("train", config)
        assert missing.returncode == 2
        (told,) = [line for line in missing.stderr.splitlines() if "none.txt" in line]
        assert told.startswith("error[no-file] none.txt: no such file")


@pytest.mark.slow
def test_an_error_of_calibration_is_told_once(run, tmp_path):
    model, _ = run
    (tmp_path / "ids.npy").write_bytes(b"no array")
    config = configured(tmp_path, model, calibrate=str(tmp_path / "ids.npy"))
    done = fourbit("train", config, "--json")
    assert done.returncode == 2
    assert done.stderr.count("error[bad-token-ids]") == 1
    assert json.loads(done.stdout)["error"]["code"] == "bad-token-ids"


@pytest.mark.slow
def test_what_cannot_be_calibrated_is_one_line(run, tmp_path):
    model, folder = run
    twice = fourbit("train", configured(tmp_path / "twice", folder / "base"))
    assert twice.returncode == 2
    assert "quant.calibrate" in twice.stderr.splitlines()[-1]
    config = write_config(tmp_path / "little", model, quant={"calibrate": "data"})
    little = fourbit("train", config)
    assert little.returncode == 2
    assert "tokens, calibration needs 1024" in little.stderr.splitlines()[-1]
    method = configured(tmp_path / "lora", model)
    assert fourbit("train", method, "--method", "lora").returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "ids", [np.array([1.5] * 2000), np.array([[1] * 2000]), np.array([10**6] * 2000), None]
)
def test_token_ids_that_are_none_are_refused(run, tmp_path, ids):
    model, _ = run
    path = tmp_path / "ids.npy"
    if ids is None:
        path.write_bytes(b"no array")
    else:
        np.save(path, ids)
    done = fourbit("quantize", model, "-o", tmp_path / "out", "--calibrate", path, "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["code"] == "bad-token-ids"
