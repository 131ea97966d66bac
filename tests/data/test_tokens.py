from __future__ import annotations

import numpy as np
import pytest

from fourbit.data import DataConfig, Example, Origin, tokenize
from fourbit.data.templates import BUILT_IN
from fourbit.data.tokens import cut_text
from fourbit.errors import InputError


def chat(question: str, answer: str, *, line: int = 1, weight: float = 1.0) -> Example:
    turns = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Example(turns, None, None, Origin("a.jsonl", line), weight)


def text(content: str, line: int = 1) -> Example:
    return Example(None, content, None, Origin("a.txt", line))


def test_tables_hold_each_sample_and_its_row(chatml):
    rows = [chat("q", "a" * n, line=n, weight=n / 2) for n in (1, 5, 3)]
    dataset = tokenize(rows, chatml, DataConfig())
    assert (dataset.ids.dtype, dataset.supervised.dtype) == (np.int32, np.bool_)
    assert dataset.offsets.tolist() == [0, *np.cumsum(dataset.lengths)]
    assert [sample.origin.line for sample in dataset] == [1, 5, 3]
    assert [int(sample.supervised.sum()) for sample in dataset] == [2, 6, 4]
    assert dataset.weights.tolist() == [0.5, 2.5, 1.5]
    assert dataset[-1].origin.line == 3
    with pytest.raises(IndexError):
        dataset[3]


def test_truncation_is_from_the_right_and_counted(chatml):
    config = DataConfig(max_length=40)
    dataset = tokenize([chat("q", "a" * 60), chat("q", "a")], chatml, config)
    assert dataset.lengths.tolist()[0] == 40
    full = tokenize([chat("q", "a" * 60)], chatml, DataConfig())
    assert dataset[0].input_ids.tolist() == full[0].input_ids[:40].tolist()
    assert (dataset.stats.truncated, dataset.stats.needed_length) == (1, len(full[0].input_ids))


def test_long_chats_can_be_dropped(chatml):
    config = DataConfig(max_length=40, on_long="drop")
    dataset = tokenize([chat("q", "a" * 60), chat("q", "a")], chatml, config)
    assert (len(dataset), dataset.stats.dropped_long) == (1, 1)
    with pytest.raises(InputError, match="no sample is left"):
        tokenize([chat("q", "a" * 60)], chatml, config)


def test_masked_rows_are_dropped_by_cause(chatml, with_template):
    rows = [chat("q" * 60, "a")] + [chat("q", "a")] * 99
    config = DataConfig(max_length=40)
    dataset = tokenize(rows, chatml, config)
    assert (len(dataset), dataset.stats.masked_by_length) == (99, 1)
    assert dataset.stats.masked_by_template == 0
    with pytest.raises(InputError) as caught:
        tokenize(rows, chatml, DataConfig(max_length=40, max_masked=0.005))
    needed = len(tokenize(rows[:1], chatml, DataConfig())[0].input_ids)
    assert f"data.max_length: {needed} keeps every chat whole" in caught.value.fix
    assert "1 of 100 samples" in caught.value.what

    marks_nothing = with_template(BUILT_IN["chatml"] + "{% generation %}{% endgeneration %}")
    with pytest.raises(InputError) as caught:
        tokenize([chat("q", "a")], marks_nothing, DataConfig())
    assert caught.value.code == "all-masked"
    assert "1 have none after the chat template" in caught.value.what
    assert "<|im_start|>assistant" in caught.value.what


def test_an_all_masked_error_shows_the_row_with_its_mask(chatml):
    with pytest.raises(InputError) as caught:
        tokenize([chat("q" * 60, "answer")], chatml, DataConfig(max_length=40))
    assert caught.value.code == "all-masked"
    assert "[[answer<|im_end|>]]" in caught.value.what
    assert "beyond max_length 40" in caught.value.what


def test_all_tokens_but_the_first(chatml):
    dataset = tokenize([chat("q", "a"), text("raw")], chatml, DataConfig(train_on="all"))
    for sample in dataset:
        assert sample.supervised.tolist() == [False] + [True] * (len(sample.input_ids) - 1)


@pytest.mark.parametrize("length", [8, 9, 15, 16, 17, 22, 23, 100])
def test_every_token_of_a_long_text_but_the_first_is_learned_once(chatml, length):
    content = "".join(chr(97 + i % 26) for i in range(length))
    dataset = tokenize([text(content)], chatml, DataConfig(max_length=8))
    learned = np.concatenate([sample.input_ids[sample.supervised] for sample in dataset])
    assert learned.tolist() == chatml(content).input_ids[1:]
    assert dataset.lengths.max() <= 8
    assert dataset.stats.split_texts == (length > 8)
    assert dataset.stats.dropped_masked == 0


def test_a_token_outside_the_vocabulary_is_named(chatml):
    size = chatml.convert_tokens_to_ids("<|im_end|>")
    with pytest.raises(InputError) as caught:
        tokenize([chat("q", "a", line=7)], chatml, DataConfig(), vocab_size=size)
    assert caught.value.where == "a.jsonl:7"
    assert f"vocabulary ends at {size - 1}" in caught.value.what
    tokenize([chat("q", "a")], chatml, DataConfig(), vocab_size=len(chatml))


def test_max_length_beyond_the_context_is_refused(chatml):
    with pytest.raises(InputError) as caught:
        tokenize([chat("q", "a")], chatml, DataConfig(max_length=4096), context_length=2048)
    assert (caught.value.where, caught.value.exit_code) == ("data.max_length", 2)
    assert "4096" in caught.value.what
    assert "2048" in caught.value.what


def test_progress_reaches_the_end(chatml):
    seen = []
    tokenize([text("ab")] * 600, chatml, DataConfig(), progress=lambda *now: seen.append(now))
    assert seen == [(256, 600), (512, 600), (600, 600)]


def test_chats_and_texts_may_be_mixed(chatml):
    dataset = tokenize([text("ab"), chat("q", "a"), text("cde")], chatml, DataConfig())
    assert dataset.lengths.tolist()[::2] == [2, 3]
    assert [sample.origin.file for sample in dataset] == ["a.txt", "a.jsonl", "a.txt"]


@pytest.mark.parametrize("limit", [1, 2, 5, 40])
@pytest.mark.parametrize("content", ["", "abc", "one two  three\n\nfour ", "x" * 100, "   "])
def test_pieces_of_a_text_are_the_text(content, limit):
    pieces = cut_text(content, limit)
    assert "".join(pieces) == content
    assert max(map(len, pieces)) <= limit
    assert all(pieces) or content == ""


def test_a_text_of_megabytes_goes_in_pieces(chatml):
    from tokenizers.processors import TemplateProcessing

    content = "some words " * 100_000
    core = chatml.backend_tokenizer
    end = chatml.eos_token_id
    core.post_processor = TemplateProcessing(
        single="<|im_end|> $A <|im_end|>", special_tokens=[("<|im_end|>", end)]
    )
    try:
        dataset = tokenize([text(content)], chatml, DataConfig(max_length=2**21))
    finally:
        core.post_processor = None
    bare = chatml(content, add_special_tokens=False).input_ids
    assert dataset[0].input_ids.tolist() == [end, *bare, end]
