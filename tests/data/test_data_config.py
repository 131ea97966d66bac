from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from fourbit.data import DataConfig


@pytest.mark.parametrize(
    ("given", "read"),
    [("0.05", 0.05), ("12", 12), (0, 0), (0.0, 0.0), ("dev.jsonl", "dev.jsonl"), ("none", None)],
)
def test_eval_text_from_a_command_line_means_what_it_looks_like(given, read):
    value = DataConfig(eval=given).eval
    assert value == read
    assert type(value) is type(read)


@pytest.mark.parametrize("given", [1.0, -0.1, -3, "1.5", "nan", True])
def test_eval_out_of_range_is_refused(given):
    with pytest.raises(ValidationError):
        DataConfig(eval=given)


@pytest.mark.parametrize(
    "settings",
    [
        {"prompt": "{a}"},
        {"completion": "{a}"},
        {"prompt": "{a}", "completion": "{b}", "format": "messages"},
        {"max_length": 7},
        {"train": ""},
        {"train": []},
        {"train": [{"path": "a.jsonl", "weight": 0}]},
        {"max_rows": 0},
        {"maxlength": 9},
    ],
)
def test_senseless_settings_are_refused(settings):
    with pytest.raises(ValidationError):
        DataConfig(**settings)


def test_every_field_is_described():
    assert all(field.description for field in DataConfig.model_fields.values())


def test_train_reads_as_a_list_either_way():
    assert [f.path for f in DataConfig(train="a.jsonl").train_files()] == ["a.jsonl"]
    files = DataConfig.model_validate({"train": [{"path": "a", "weight": 0.5}, {"path": "b"}]})
    assert [(f.path, f.weight) for f in files.train_files()] == [("a", 0.5), ("b", 1.0)]
    assert DataConfig().train_files() == ()


def test_importing_the_package_loads_neither_torch_nor_transformers():
    code = (
        "import sys, fourbit.data; "
        "bad = {'torch', 'transformers', 'datasets', 'pyarrow', 'zstandard'} & set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
