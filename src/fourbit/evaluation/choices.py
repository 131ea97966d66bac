"""Multiple choice: rows of several shapes to a text and its possible continuations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fourbit.data import Row
from fourbit.errors import InputError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SHAPES = (
    "query + choices + gold, question + choices + answer (or answerKey),"
    " goal + sol1 + sol2 + label, activity_label + ctx + endings + label,"
    " or subject + input + output"
)


@dataclass(frozen=True)
class Choice:
    """One item.

    Attributes:
        query: the text before the answer, without a space at its end.
        choices: the answers, without the space before them.
        gold: index of the right one.
        subject: what items are grouped by; empty without groups.
    """

    query: str
    choices: tuple[str, ...]
    gold: int
    subject: str = ""


def read_choice(row: Row, *, letters: bool = False) -> Choice:
    """One row of any of the known shapes.

    Args:
        row: as it stands in its file.
        letters: answers are letters and the texts are listed in the query, as MMLU has it.

    Raises:
        InputError: names file, line and what is wrong.
    """
    data = row.data
    try:
        if letters:
            return _lettered(data)
        if "activity_label" in data:
            return _hellaswag(data)
        if "sol1" in data:
            texts = (_text(data, "sol1"), _text(data, "sol2"))
            query = f"Question: {_text(data, 'goal')}\nAnswer:"
            return _checked(Choice(query, texts, _index(data["label"], texts)))
        if "query" in data:
            texts = _texts(data["choices"])
            return _checked(Choice(_text(data, "query"), texts, _index(_gold(data), texts)))
        texts = _texts(data["choices"])
        query = f"Question: {_text(data, 'question')}\nAnswer:"
        return _checked(Choice(query, texts, _index(_gold(data), texts, _labels(data["choices"]))))
    except KeyError as error:
        what = f"has no key {error.args[0]!r}, only {', '.join(map(str, data)) or 'none'}"
    except (TypeError, ValueError) as error:
        what = str(error)
    raise InputError("bad-row", where=str(row.origin), what=what, fix=f"rows need {_SHAPES}")


def _hellaswag(data: Mapping[str, Any]) -> Choice:
    context = data["ctx"] if "ctx_a" not in data else None
    if context is None:
        context = _text(data, "ctx_a") + " " + _text(data, "ctx_b").capitalize()
    texts = tuple(_plain(text) for text in _texts(data["endings"]))
    query = _plain(f"{_text(data, 'activity_label')}: {context}")
    return _checked(Choice(query, texts, _index(data["label"], texts)))


def _plain(text: str) -> str:
    """HellaSwag's texts without what its WikiHow half left in brackets, as lm-eval has them."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _lettered(data: Mapping[str, Any]) -> Choice:
    subject = str(data.get("subject", ""))
    if "input" in data and "output" in data:  # QLoRA's own file: the prompt is written out
        count = len(re.findall(r"(?m)^[A-Z]\. ", _text(data, "input")))
        letters = tuple(LETTERS[: max(count, 2)])
        query = _text(data, "input").rstrip()
        return _checked(Choice(query, letters, _index(data["output"], letters), subject))
    texts = _texts(data["choices"])
    letters = tuple(LETTERS[: len(texts)])
    lines = [f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True)]
    query = "\n".join([_text(data, "question").strip(), *lines, "Answer:"])
    return _checked(Choice(query, letters, _index(_gold(data), letters), subject))


def mmlu_header(subject: str) -> str:
    """What stands before the questions of one subject."""
    about = f" about {subject.replace('_', ' ')}" if subject else ""
    return f"The following are multiple choice questions (with answers){about}.\n\n"


def with_shots(item: Choice, shots: Sequence[Choice], header: str = "") -> Choice:
    """The item behind solved ones, a blank line between them."""
    solved = [f"{shot.query} {shot.choices[shot.gold]}\n\n" for shot in shots]
    return Choice(header + "".join(solved) + item.query, item.choices, item.gold, item.subject)


def _gold(data: Mapping[str, Any]) -> Any:
    for name in ("gold", "answer", "answerKey", "label"):
        if name in data:
            return data[name]
    raise KeyError("gold")


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        value = value["text"]
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) for text in value):
        raise TypeError("choices are no list of texts")
    return tuple(value)


def _labels(value: Any) -> tuple[str, ...] | None:
    return tuple(value["label"]) if isinstance(value, Mapping) and "label" in value else None


def _text(data: Mapping[str, Any], name: str) -> str:
    value = data[name]
    if not isinstance(value, str):
        raise TypeError(f"{name} is {type(value).__name__}, not text")
    return value


def _index(gold: Any, choices: Sequence[str], labels: Sequence[str] | None = None) -> int:
    """An index, a digit, a letter, one of the labels, or the answer itself."""
    if labels is not None and gold in labels:
        return list(labels).index(gold)
    if isinstance(gold, bool):
        raise TypeError("the answer is no index, letter or choice")
    if isinstance(gold, int):
        return gold
    if isinstance(gold, str):
        if gold in choices:
            return list(choices).index(gold)
        if gold.strip().isdigit():
            return int(gold)
        if len(gold.strip()) == 1 and gold.strip() in LETTERS:
            return LETTERS.index(gold.strip())
    raise TypeError(f"the answer {gold!r} is no index, letter or choice")


def _checked(item: Choice) -> Choice:
    if len(item.choices) < 2:
        raise ValueError("there is nothing to choose from")
    if not 0 <= item.gold < len(item.choices):
        raise ValueError(f"the answer {item.gold} is none of {len(item.choices)} choices")
    if not item.query.strip():
        raise ValueError("the question is empty")
    if not all(item.choices):
        raise ValueError("a choice is empty")
    return item
