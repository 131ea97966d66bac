"""The demo writes files and calls the real commands; the files alone give the same adapter."""

from __future__ import annotations

import json

import pytest

from commands import fourbit
from fourbit.demo.run import DemoShape, write_inputs
from fourbit.errors import InputError
from fourbit.files import sha256_of
from fourbit.settings import load_settings
from fourbit.training.config import TrainConfig

SMALL = DemoShape(train_rows=30, test_rows=4, pattern_rows=2)


def test_inputs_are_ordinary_files_with_real_settings(tmp_path):
    path = write_inputs(tmp_path / "demo", SMALL, overwrite=False)
    config = load_settings(TrainConfig, path=path).value
    assert config.method == "qlora"
    assert config.quant.quant_type == "nf4"
    assert config.quant.double_quant
    rows = (tmp_path / "demo" / "train.jsonl").read_text().splitlines()
    assert len(rows) == SMALL.train_rows
    assert set(json.loads(rows[0])) == {"prompt", "completion"}


def test_an_earlier_demo_is_not_overwritten(tmp_path):
    write_inputs(tmp_path / "demo", SMALL, overwrite=False)
    with pytest.raises(InputError, match="--overwrite"):
        write_inputs(tmp_path / "demo", SMALL, overwrite=False)


@pytest.mark.slow
@pytest.mark.model
def test_the_demo_and_its_files_give_the_same_adapter(tmp_path):
    words = ("--train-rows", "40", "--test-rows", "4", "--json")
    done = fourbit("demo", "-o", tmp_path / "demo", *words)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["verified"] is True
    assert result["exact_match_before"] <= 0.1
    again = fourbit("train", tmp_path / "demo" / "config.yaml", "-o", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    file = "adapter/adapter_model.safetensors"
    assert sha256_of(tmp_path / "demo" / "run" / file) == sha256_of(tmp_path / "again" / file)
