"""Raw text: each row is a document that ends; a text file is one running text."""

from __future__ import annotations

import json

import pytest

from fourbit.data import DataConfig, read_rows, tokenize
from models import tiny_tokenizer


def samples(path, **changes):
    config = DataConfig(train=str(path), eval=0, **changes)
    tokenizer = tiny_tokenizer()
    return tokenize(read_rows(config).train, tokenizer, config), tokenizer


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "documents.jsonl"
    lines = [json.dumps({"text": text}) + "\n" for text in ("first", "second document")]
    path.write_text("".join(lines))
    return path


def test_rows_of_text_end_with_eos_that_is_learned(rows):
    dataset, tokenizer = samples(rows)
    assert tokenizer.eos_token_id is not None
    for index in range(len(dataset)):
        sample = dataset[index]
        assert sample.input_ids[-1] == tokenizer.eos_token_id
        assert (sample.input_ids == tokenizer.eos_token_id).sum() == 1
        assert sample.supervised[-1]


def test_a_text_file_is_not_cut_into_documents(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("one paragraph\n\nanother one\n")
    dataset, tokenizer = samples(path)
    assert tokenizer.eos_token_id not in dataset.ids
