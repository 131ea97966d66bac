from __future__ import annotations

import json

import pytest

from fourbit.data import DataConfig, prompt_of, read_rows
from fourbit.errors import InputError


def read(tmp_path, *rows, **settings):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_rows(DataConfig(train=str(path), **settings))


def turns(rows):
    return [(turn["role"], turn["content"]) for turn in rows.train[0].messages]


def fault(tmp_path, *rows, **settings) -> InputError:
    with pytest.raises(InputError) as caught:
        read(tmp_path, *rows, **settings)
    return caught.value


def chat(*contents, roles=("user", "assistant")):
    cycle = [roles[i % len(roles)] for i in range(len(contents))]
    return {"messages": [{"role": r, "content": c} for r, c in zip(cycle, contents, strict=True)]}


USER, BOT = ("user", "q"), ("assistant", "a")


@pytest.mark.parametrize(
    ("row", "name", "expected"),
    [
        (chat("q", "a"), "messages", [USER, BOT]),
        ({"prompt": "q", "completion": "a"}, "prompt_completion", [USER, BOT]),
        ({"prompt": "q", "completion": 7}, "prompt_completion", [USER, ("assistant", "7")]),
        (
            {"prompt": [{"role": "user", "content": "q"}], "completion": "a"},
            "prompt_completion",
            [USER, BOT],
        ),
        (
            {
                "prompt": [{"role": "user", "content": "q"}],
                "completion": [{"role": "assistant", "content": "a"}],
            },
            "prompt_completion",
            [USER, BOT],
        ),
        ({"instruction": "q", "input": "", "output": "a"}, "instruction", [USER, BOT]),
        (
            {"instruction": "i", "input": "n", "response": "a"},
            "instruction",
            [("user", "i\n\nn"), BOT],
        ),
        ({"instruction": "q", "output": "a"}, "instruction", [USER, BOT]),
        (
            {"instruction": "q", "output": "a", "system": "s"},
            "instruction",
            [("system", "s"), USER, BOT],
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "sharegpt",
            [USER, BOT],
        ),
    ],
)
def test_every_shape_becomes_the_same_turns(tmp_path, row, name, expected):
    rows = read(tmp_path, row)
    assert (rows.format, turns(rows)) == (name, expected)
    assert turns(read(tmp_path, row, format=name)) == expected


def test_raw_text(tmp_path):
    rows = read(tmp_path, {"text": "once", "url": "x"})
    assert (rows.train[0].text, rows.train[0].messages) == ("once", None)
    assert rows.describe() == ["format: text, 1 rows (columns not used: url)"]
    assert prompt_of(rows.train[0]) is None


def test_a_labelled_text_is_not_silently_read_as_plain_text(tmp_path):
    row = {"text": "where is my card", "label": "card_arrival"}
    assert '--data.prompt "{text}" --data.completion "{label}"' in fault(tmp_path, row).fix
    assert read(tmp_path, row, format="text").train[0].text == "where is my card"


def test_sharegpt_calls_and_tools(tmp_path):
    call = {"name": "f", "arguments": {"x": 1}}
    conversations = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "42"},
        {"from": "gpt", "value": "a"},
    ]
    rows = read(tmp_path, {"conversations": conversations, "tools": json.dumps([{"name": "f"}])})
    example = rows.train[0]
    assert [turn["role"] for turn in example.messages] == [
        *("system", "user", "assistant", "tool", "assistant")
    ]
    assert example.messages[2]["tool_calls"] == [{"type": "function", "function": call}]
    assert example.tools == ({"type": "function", "function": {"name": "f"}},)


def test_a_system_message_goes_before_chats_that_have_none(tmp_path):
    assert turns(read(tmp_path, chat("q", "a"), system="S"))[0] == ("system", "S")
    own = chat("mine", "q", "a", roles=("system", "user", "assistant"))
    assert turns(read(tmp_path, own, system="S"))[0] == ("system", "mine")


def test_column_templates(tmp_path):
    row = {"q": "why", "a": {"k": [1, "é"]}, "n": 3}
    rows = read(tmp_path, row, prompt="Q{n}: {q} {{x}}", completion="{a}")
    assert turns(rows) == [("user", "Q3: why {x}"), ("assistant", '{"k": [1, "é"]}')]


@pytest.mark.parametrize(
    ("prompt", "where", "words"),
    [
        (
            "{questoin}",
            "data.prompt",
            ["'questoin'", "question, answer", "did you mean 'question'"],
        ),
        ("{question", "data.prompt", ["expected '}'"]),
        ("{question!r}", "data.prompt", ["has a format"]),
        ("{question.__class__}", "data.prompt", ["no column"]),
        ("no column at all", "data.prompt", ["names no column"]),
    ],
)
def test_wrong_templates_are_refused(tmp_path, prompt, where, words):
    row = {"question": "q", "answer": "a"}
    error = fault(tmp_path, row, prompt=prompt, completion="{answer}")
    assert error.where == where
    assert all(word in error.line() for word in words), error.line()


def test_unknown_columns_show_a_fix_that_works(tmp_path):
    row = {"id": 4, "question": "q", "answer": "a"}
    error = fault(tmp_path, row)
    assert "found the columns answer, id, question" in error.what
    assert error.fix == 'name the columns: --data.prompt "{question}" --data.completion "{answer}"'
    assert turns(read(tmp_path, row, prompt="{question}", completion="{answer}")) == [USER, BOT]
    assert fault(tmp_path, row, format="messages").code == "unknown-columns"


def named(*pairs):
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (named(("user", "q"), ("bot", "a")), "turn 2: unknown role 'bot'"),
        (named(("user", " "), ("assistant", "a")), "turn 1: the user's content is empty"),
        (named(("user", "q"), ("assistant", "")), "turn 2: the assistant's content is empty"),
        (named(("user", "q")), "has no assistant turn"),
        (named(("user", "q"), ("user", "q"), ("assistant", "a")), "turn 2: follows another turn"),
        (named(("assistant", "a"), ("user", "q")), "turn 1: the first turn is the assistant's"),
        (named(("user", "q"), ("system", "s"), ("assistant", "a")), "turn 2: a system turn"),
        (named(("user", 3), ("assistant", "a")), "turn 1: content is a number; expected text"),
        ({"messages": []}, "field 'messages' is an empty list"),
        ({"messages": "q"}, "field 'messages' is text; expected a list of turns"),
        ({"messages": None}, "field 'messages' is null; expected a list of turns"),
        ({"messages": ["q"]}, "turn 1: is text; expected role and content"),
        ({"other": 1}, "has no field 'messages'; expected a list of turns"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            "turn 1: holds something other than text",
        ),
        ({"messages": [{"content": "q"}]}, "turn 1: has no 'role' (it has content)"),
    ],
)
def test_bad_chats_name_line_and_turn(tmp_path, row, what):
    error = fault(tmp_path, chat("q", "a"), chat("q", "a"), row)
    assert error.where.endswith("a.jsonl:3")
    assert what in error.what


def test_a_change_of_type_in_mid_file_is_named(tmp_path):
    error = fault(tmp_path, {"text": "a"}, {"text": "b"}, {"text": ["c"]})
    assert error.where.endswith("a.jsonl:3")
    assert "field 'text' is a list; expected text" in error.what


def test_content_in_text_parts_is_joined(tmp_path):
    parts = [{"type": "text", "text": "q"}, {"type": "text", "text": "!"}]
    assert turns(read(tmp_path, named(("user", parts), ("assistant", "a"))))[0] == ("user", "q!")


def test_prompt_of_ends_before_the_last_answer(tmp_path):
    prompt, reference = prompt_of(read(tmp_path, chat("q1", "a1", "q2", "a2", "q3")).train[0])
    assert [turn["content"] for turn in prompt] == ["q1", "a1", "q2"]
    assert reference == "a2"
