from __future__ import annotations

import json

import pytest

from fourbit.data import DataConfig, Example, Origin, prepare, read_rows, split
from fourbit.data.audit import find_repeats
from fourbit.errors import InputError


def chat(number: int, line: int | None = None) -> Example:
    turns = (
        {"role": "user", "content": f"question {number}"},
        {"role": "assistant", "content": f"answer {number}"},
    )
    return Example(turns, None, None, Origin("a.jsonl", number if line is None else line))


def lines(examples):
    return [example.origin.line for example in examples]


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def put(name, numbers):
        rows = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in numbers]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return name

    return put


@pytest.mark.parametrize(
    ("part", "count"), [(0.05, 5), (0.3, 30), (7, 7), (0, 0), (None, 0), (0.001, 1), (0.999, 99)]
)
def test_a_split_is_complete_exact_and_decided_by_the_seed(part, count):
    rows = [chat(n) for n in range(100)]
    config = DataConfig(eval=part)
    train, held = split(rows, config, 3)
    assert len(held) == count
    assert sorted(lines(train) + lines(held)) == list(range(100))
    assert lines(held) == sorted(lines(held))
    assert lines(split(rows, config, 3)[1]) == lines(held)
    if 5 <= count <= 30:
        assert lines(split(rows, config, 4)[1]) != lines(held)


def test_repeated_rows_stay_on_one_side():
    rows = [chat(n // 4, line=n) for n in range(200)]
    train, held = split(rows, DataConfig(eval=0.1), 0)
    assert len(held) == 20
    assert find_repeats(train, held).in_eval == 0
    assert find_repeats(train, held).within_train == 180 - 45


def test_small_data():
    assert split([chat(1)], DataConfig(), 0) == ((chat(1),), ())
    assert len(split([chat(1), chat(2)], DataConfig(), 0)[1]) == 1
    for rows in (2, 5):
        with pytest.raises(InputError, match=r"data\.eval"):
            split([chat(1), chat(2)], DataConfig(eval=rows), 0)


def test_the_audit_counts_what_is_there(write, chatml):
    train = write("train.jsonl", [*range(50), 3, 4])
    held = write("dev.jsonl", [7, 100, 101])
    config = DataConfig(train=train, eval=held, max_length=256)
    data = prepare(config, read_rows(config), chatml, seed=0, vocab_size=len(chatml))
    audit = data.audit
    facts = audit.as_dict()
    assert (audit.rows, audit.eval_rows, audit.samples, audit.duplicates) == (52, 3, 52, 2)
    assert (audit.eval_duplicates, audit.eval_pairs) == (1, ("dev.jsonl:1 = train.jsonl:8",))
    assert audit.tokens == data.train.num_tokens == int(data.train.lengths.sum())
    assert facts["supervised_share"] == data.train.num_supervised / audit.tokens
    assert 0.8 < audit.packing_efficiency <= 1
    json.dumps(facts)
    assert "format: prompt_completion, 52 rows, 3 held out" in audit.lines()
    assert (
        "warning: 1 evaluation rows are also trained on (dev.jsonl:1 = train.jsonl:8)"
        in audit.lines()
    )
    assert not any("truncated" in line for line in audit.lines())
    assert len(data.eval) == len(data.eval_examples) == 3


def test_no_evaluation(write, chatml):
    config = DataConfig(train=write("a.jsonl", range(5)), eval=0)
    data = prepare(config, read_rows(config), chatml, seed=0)
    assert (data.eval, data.eval_examples, data.audit.eval_rows) == (None, (), 0)


def test_max_length_is_checked_before_the_work(write, chatml):
    config = DataConfig(train=write("a.jsonl", range(5)))
    with pytest.raises(InputError, match="context of 512"):
        prepare(config, read_rows(config), chatml, seed=0, context_length=512)


def test_the_fingerprint_follows_bytes_settings_tokenizer_and_seed(write, chatml, with_template):
    def mark(name, *, seed=0, tokenizer=chatml, **settings):
        config = DataConfig(train=name, **settings)
        return prepare(config, read_rows(config), tokenizer, seed=seed).fingerprint

    base = mark(write("a.jsonl", range(9)))
    assert mark("a.jsonl") == base
    assert mark(write("b.jsonl", range(9))) == base
    assert mark("a.jsonl", skip_bad_lines=3) == base
    others = [
        mark("a.jsonl", seed=1),
        mark("a.jsonl", max_length=512),
        mark("a.jsonl", packing=False),
        mark("a.jsonl", eval=0.2),
        mark("a.jsonl", chat_template="plain"),
        mark("a.jsonl", tokenizer=with_template(chatml.chat_template + "{# another #}")),
        mark(write("a.jsonl", range(10))),
    ]
    assert len({base, *others}) == 8
