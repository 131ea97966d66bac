"""Which tokens carry the loss, for templates of every kind that is met in practice."""

from __future__ import annotations

import json

import pytest

from fourbit.data import DataConfig, read_rows, resolve_template, show_mask, tokenize
from fourbit.data.templates import BUILT_IN
from fourbit.errors import InputError

CHATML = BUILT_IN["chatml"]

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As reasoning models do it: the last answer shows an empty thought, earlier ones show none.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n{% endif %}"
    + CHATML
)
FORCED_THOUGHT = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
STRICT = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}"
    "{% endif %}[{{ m['content'] }}]{% endfor %}"
)


def examples(tmp_path, *conversations, **extra):
    path = tmp_path / "a.jsonl"
    rows = [
        {"messages": [{"role": r, "content": c} for r, c in turns], **extra}
        for turns in conversations
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_rows(DataConfig(train=str(path))).train


def shown(dataset, tokenizer):
    return [show_mask(tokenizer, s.input_ids, s.supervised) for s in dataset]


TWO = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2 ")]
MASKED = (
    "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n[[a1<|im_end|>]]\n"
    "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n[[a2 <|im_end|>]]\n"
)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_only_the_assistant_and_its_end_of_turn_carry_the_loss(tmp_path, with_template, template):
    tokenizer = with_template(template)
    dataset = tokenize(examples(tmp_path, TWO), tokenizer, DataConfig())
    assert shown(dataset, tokenizer) == [MASKED]


def test_a_default_system_message_is_no_obstacle(tmp_path, with_template):
    tokenizer = with_template(DEFAULT_SYSTEM)
    dataset = tokenize(examples(tmp_path, TWO), tokenizer, DataConfig())
    assert shown(dataset, tokenizer) == ["<|im_start|>system\nBe kind<|im_end|>\n" + MASKED]


def test_turns_that_change_later_become_samples_of_their_own(tmp_path, with_template):
    tokenizer = with_template(THINKING)
    dataset = tokenize(examples(tmp_path, TWO), tokenizer, DataConfig())
    assert shown(dataset, tokenizer) == [
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n<|im_start|>user\n"
        "q2<|im_end|>\n<|im_start|>assistant\n[[<think></think>a2 <|im_end|>]]\n",
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n[[<think></think>a1<|im_end|>]]\n",
    ]
    assert dataset.stats.apart == 1
    assert {str(sample.origin) for sample in dataset} == {f"{tmp_path}/a.jsonl:1"}


def test_a_prompt_that_the_chat_does_not_continue_is_refused_by_row(tmp_path, with_template):
    tokenizer = with_template(FORCED_THOUGHT)
    with pytest.raises(InputError) as caught:
        tokenize(examples(tmp_path, TWO), tokenizer, DataConfig())
    assert caught.value.code == "template-prefix"
    assert caught.value.where == f"{tmp_path}/a.jsonl:1, turn 2"
    everything = tokenize(examples(tmp_path, TWO), tokenizer, DataConfig(train_on="all"))
    assert everything[0].supervised.sum() == len(everything[0].input_ids) - 1


def test_content_that_repeats_the_header_does_not_fool_the_mask(tmp_path, chatml):
    trick = [("user", "assistant\nassistant\na1"), ("assistant", "user\nassistant\n")]
    dataset = tokenize(examples(tmp_path, trick), chatml, DataConfig())
    assert shown(dataset, chatml) == [
        "<|im_start|>user\nassistant\nassistant\na1<|im_end|>\n"
        "<|im_start|>assistant\n[[user\nassistant\n<|im_end|>]]\n"
    ]


def test_bytes_of_one_character_stay_together(tmp_path, chatml):
    dataset = tokenize(
        examples(tmp_path, [("user", "é"), ("assistant", "日本🙂")]), chatml, DataConfig()
    )
    assert shown(dataset, chatml)[0].endswith("[[日本🙂<|im_end|>]]\n")
    assert dataset.num_supervised == len("日本🙂".encode()) + 1


def test_a_template_that_refuses_a_row_is_quoted_with_the_row(tmp_path, with_template):
    turns = [*TWO[:1], ("assistant", "a"), ("tool", "t"), ("assistant", "b")]
    for template in (STRICT, STRICT + "{% generation %}{% endgeneration %}"):
        with pytest.raises(InputError) as caught:
            tokenize(examples(tmp_path, turns), with_template(template), DataConfig())
        assert caught.value.where == f"{tmp_path}/a.jsonl:1"
        assert "no tools here" in caught.value.what


def test_an_empty_rendering_is_refused(tmp_path, with_template):
    with pytest.raises(InputError, match="renders nothing"):
        tokenize(examples(tmp_path, TWO), with_template("{{ '' }}"), DataConfig())


def test_templates_cannot_reach_python(tmp_path, with_template):
    evil = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(InputError):
        tokenize(examples(tmp_path, TWO), with_template(evil), DataConfig())


def test_calls_are_text_where_the_template_knows_none(tmp_path, with_template):
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    path = tmp_path / "a.jsonl"
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    path.write_text(json.dumps({"messages": turns, "tools": [call]}) + "\n", encoding="utf-8")
    rows = read_rows(DataConfig(train=str(path))).train
    shows = (
        "{% if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}{% endif %}<|im_end|>"
    )
    plain = with_template(CHATML)
    structured = with_template(
        CHATML.replace("<|im_end|>", shows) + "{% if tools %}TOOLS{% endif %}"
    )
    dataset = tokenize(rows, plain, DataConfig())
    assert '[[{"name": "f", "arguments": {"x": 1}}<|im_end|>]]' in shown(dataset, plain)[0]
    assert dataset.stats.tools_hidden == 1
    dataset = tokenize(rows, structured, DataConfig(train_on="all"))
    assert '"type": "function"' in shown(dataset, structured)[0]
    assert "TOOLS" in shown(dataset, structured)[0]
    assert dataset.stats.tools_hidden == 0


def test_without_a_template_the_fitting_ones_are_listed(tmp_path, with_template):
    tokenizer = with_template(None)
    with pytest.raises(InputError) as caught:
        tokenize(examples(tmp_path, TWO), tokenizer, DataConfig())
    assert caught.value.fix == (
        "set one that fits: chatml, zephyr, alpaca, plain, or a .jinja file"
    )
    with pytest.raises(InputError, match=r"llama3 needs <\|begin_of_text\|>"):
        resolve_template(tokenizer, chat_template="llama3")
    with pytest.raises(InputError, match="did you mean 'chatml'"):
        resolve_template(tokenizer, chat_template="chatlm")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", MASKED),
        (
            "zephyr",
            "<|user|>\nq1<|im_end|>\n<|assistant|>\n[[a1<|im_end|>]]\n"
            "<|user|>\nq2<|im_end|>\n<|assistant|>\n[[a2 <|im_end|>]]\n",
        ),
        (
            "alpaca",
            "### Instruction:\nq1\n\n### Response:\n[[a1<|im_end|>]]\n\n"
            "### Instruction:\nq2\n\n### Response:\n[[a2 <|im_end|>]]\n\n",
        ),
        ("plain", "q1[[a1<|im_end|>]]q2[[a2 <|im_end|>]]"),
    ],
)
def test_built_in_templates(tmp_path, with_template, name, expected):
    tokenizer = with_template(None)
    dataset = tokenize(examples(tmp_path, TWO), tokenizer, DataConfig(chat_template=name))
    assert shown(dataset, tokenizer) == [expected]


def test_llama3_template(tmp_path, with_template):
    tokenizer = with_template(None)
    tokenizer.add_special_tokens(
        {
            "additional_special_tokens": [
                *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
            ]
        }
    )
    dataset = tokenize(examples(tmp_path, TWO[:2]), tokenizer, DataConfig(chat_template="llama3"))
    assert shown(dataset, tokenizer) == [
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nq1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[a1<|eot_id|>]]"
    ]


def test_a_template_file(tmp_path, with_template):
    path = tmp_path / "mine.jinja"
    path.write_text(MARKED, encoding="utf-8")
    tokenizer = with_template(None)
    config = DataConfig(chat_template=str(path))
    assert shown(tokenize(examples(tmp_path, TWO), tokenizer, config), tokenizer) == [MASKED]
    path.write_text("x" * (2**20 + 1), encoding="utf-8")
    with pytest.raises(InputError, match="a template has at most 1048576"):
        resolve_template(tokenizer, chat_template=str(path))
    with pytest.raises(InputError, match="no such file"):
        resolve_template(tokenizer, chat_template=str(tmp_path / "mien.jinja"))


@pytest.mark.model
def test_the_real_template_of_smollm2(tmp_path, smollm2):
    dataset = tokenize(examples(tmp_path, TWO), smollm2, DataConfig())
    assert shown(dataset, smollm2) == [
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n" + MASKED
    ]
    whole = smollm2.apply_chat_template(
        [{"role": role, "content": text} for role, text in TWO], return_dict=True
    )
    assert dataset[0].input_ids.tolist() == whole["input_ids"]
