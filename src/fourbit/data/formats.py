"""Rows of the usual shapes, recognised by their columns and brought into one form."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from fourbit.data.columns import ColumnTemplate
from fourbit.data.rows import BadLines, Origin, Row, RowError
from fourbit.data.turns import (
    Message,
    check_turns,
    kind_of,
    read_message,
    read_sharegpt_turn,
    text_of,
)
from fourbit.errors import InputError

if TYPE_CHECKING:
    from fourbit.data.config import DataConfig

_NEEDED = {
    "messages": (("messages",),),
    "sharegpt": (("conversations",),),
    "prompt_completion": (("prompt",), ("completion",)),
    "instruction": (("instruction",), ("output", "response")),
    "text": (("text",),),
}
_EXTRA = {
    "messages": ("tools",),
    "sharegpt": ("tools", "system"),
    "prompt_completion": ("system", "tools"),
    "instruction": ("input", "system"),
    "text": (),
}
_QUESTION_NAMES = ("question", "query", "prompt", "instruction", "input", "text", "source")
_ANSWER_NAMES = ("answer", "response", "completion", "output", "label", "target", "sql", "summary")


@dataclass(frozen=True, slots=True)
class Example:
    """A row in the one form that everything after reading works on.

    Exactly one of ``messages`` and ``text`` is given.

    Args:
        messages: turns of a chat.
        text: raw text.
        tools: JSON schemas of the tools that the chat may call.
        origin: the row it came from.
        weight: copies per epoch.
    """

    messages: tuple[Message, ...] | None
    text: str | None
    tools: tuple[dict[str, Any], ...] | None
    origin: Origin
    weight: float = 1.0

    def digest(self) -> bytes:
        """A hash of the content alone, equal for rows that say the same."""
        content = self.text if self.messages is None else [self.messages, self.tools]
        data = json.dumps(content, sort_keys=True, ensure_ascii=True, default=str).encode()
        return hashlib.blake2b(data, digest_size=16).digest()


class Prompt(NamedTuple):
    """What a model is asked, and what the data answers."""

    messages: tuple[Message, ...]
    reference: str


def prompt_of(example: Example) -> Prompt | None:
    """The turns before the last assistant turn, and that turn's text; None for raw text."""
    if example.messages is None:
        return None
    last = max(i for i, turn in enumerate(example.messages) if turn["role"] == "assistant")
    return Prompt(example.messages[:last], text_of(example.messages[last]))


def thousands(number: int) -> str:
    """``1204`` as ``1 204``."""
    return f"{number:,}".replace(",", " ")


@dataclass(frozen=True)
class FileFormat:
    """What one file was taken for.

    Args:
        name: the format.
        file: the file.
        rows: usable rows.
        unused: columns that play no part.
    """

    name: str
    file: str
    rows: int
    unused: tuple[str, ...]

    def __str__(self) -> str:
        text = f"{self.name}, {thousands(self.rows)} rows"
        return f"{text} (columns not used: {', '.join(self.unused)})" if self.unused else text


def to_examples(
    rows: Sequence[Row], config: DataConfig, *, bad: BadLines, weight: float = 1.0
) -> tuple[list[Example], FileFormat]:
    """Brings the rows of one file into the one form.

    Args:
        rows: at least one row, all of one file.
        config: format, column templates and system message.
        bad: account of rows that break the format.
        weight: copies of each row per epoch.

    Raises:
        InputError: the columns fit no format, or a template names a column that does not exist.
    """
    columns = Counter(name for row in rows for name in row.data)
    file = rows[0].origin.file
    if config.prompt is not None and config.completion is not None:
        name = "prompt_completion"
        prompt = ColumnTemplate(config.prompt, "data.prompt", columns)
        completion = ColumnTemplate(config.completion, "data.completion", columns)
        used = prompt.columns | completion.columns
        make = _FromTemplates(prompt, completion)
    else:
        name = detect_format(rows, config.format)
        used = {column for options in _NEEDED[name] for column in options} | set(_EXTRA[name])
        make = _MAKERS[name]
    examples = []
    for row in rows:
        try:
            examples.append(_example(row, make(row.data), config.system, weight))
        except RowError as error:
            bad.add(row.origin, str(error))
    unused = tuple(column for column in columns if column not in used)
    return examples, FileFormat(name, file, len(examples), unused)


def detect_format(rows: Sequence[Row], wanted: str = "auto") -> str:
    """Names the format that most rows have the columns for.

    Args:
        rows: the rows of one file.
        wanted: a format to check for instead of choosing one.

    Raises:
        InputError: no row fits; shows the columns and what to do about them.
    """
    shapes = Counter(frozenset(row.data) for row in rows)
    fits = {
        name: sum(n for shape, n in shapes.items() if _has_columns(shape, needed))
        for name, needed in _NEEDED.items()
        if wanted in ("auto", name)
    }
    best = max(fits, key=lambda name: fits[name])
    found = sorted(set().union(*shapes))
    if wanted == "auto" and best == "text" and fits[best]:
        _refuse_forgotten_answer(rows[0], found)
    if fits[best]:
        return best
    raise InputError(
        "unknown-columns",
        where=rows[0].origin.file,
        what=f"found the columns {', '.join(found)}; expected {_expected(wanted)}",
        fix=f"name the columns: {_template_hint(rows[0].data)}",
    )


def _refuse_forgotten_answer(row: Row, found: Sequence[str]) -> None:
    """A labelled data set with a ``text`` column would otherwise be learned without its labels."""
    answers = [name for name in found if name in _ANSWER_NAMES]
    if answers:
        raise InputError(
            "ambiguous-columns",
            where=row.origin.file,
            what=f"has text beside {answers[0]}: plain text, or a question and its answer?",
            fix=f"{_template_hint(row.data)}, or --data.format text",
        )


def _has_columns(shape: frozenset[str], needed: tuple[tuple[str, ...], ...]) -> bool:
    return all(any(option in shape for option in options) for options in needed)


def _expected(wanted: str) -> str:
    names = list(_NEEDED) if wanted == "auto" else [wanted]
    shown = (" + ".join(" or ".join(options) for options in _NEEDED[name]) for name in names)
    return "; or ".join(shown)


def _template_hint(data: Mapping[str, Any]) -> str:
    names = [name for name, value in data.items() if isinstance(value, (str, int, float))]
    question = next((n for n in _QUESTION_NAMES if n in names), names[0] if names else "question")
    others = [name for name in names if name != question]
    answer = next((n for n in _ANSWER_NAMES if n in others), others[-1] if others else "answer")
    return f'--data.prompt "{{{question}}}" --data.completion "{{{answer}}}"'


class _FromTemplates(NamedTuple):
    prompt: ColumnTemplate
    completion: ColumnTemplate

    def __call__(self, data: Mapping[str, Any]) -> _Parts:
        return _Parts(_exchange(self.prompt.fill(data), self.completion.fill(data)))


class _Parts(NamedTuple):
    messages: list[Message] | None
    text: str | None = None
    tools: tuple[dict[str, Any], ...] | None = None


def _example(row: Row, parts: _Parts, system: str | None, weight: float) -> Example:
    messages = parts.messages
    if messages is None:
        return Example(None, parts.text, None, row.origin, weight)
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return Example(tuple(messages), None, parts.tools, row.origin, weight)


def _from_messages(data: Mapping[str, Any]) -> _Parts:
    turns = [read_message(turn, n) for n, turn in enumerate(_list(data, "messages"), start=1)]
    return _Parts(check_turns(turns), tools=_tools(data))


def _from_sharegpt(data: Mapping[str, Any]) -> _Parts:
    turns = [
        read_sharegpt_turn(turn, n) for n, turn in enumerate(_list(data, "conversations"), start=1)
    ]
    if data.get("system"):
        turns.insert(0, {"role": "system", "content": _text(data, "system")})
    return _Parts(check_turns(turns), tools=_tools(data))


def _from_prompt_completion(data: Mapping[str, Any]) -> _Parts:
    prompt, completion = data.get("prompt"), data.get("completion")
    if not isinstance(prompt, list):
        return _Parts(_exchange(_text(data, "prompt"), _text(data, "completion"), data))
    turns = [read_message(turn, n) for n, turn in enumerate(prompt, start=1)]
    if isinstance(completion, list):
        offset = len(turns) + 1
        turns += [read_message(turn, n) for n, turn in enumerate(completion, start=offset)]
    else:
        turns.append({"role": "assistant", "content": _text(data, "completion")})
    return _Parts(check_turns(turns), tools=_tools(data))


def _from_instruction(data: Mapping[str, Any]) -> _Parts:
    question = _text(data, "instruction")
    if data.get("input"):
        question += "\n\n" + _text(data, "input")
    answer = "output" if "output" in data else "response"
    return _Parts(_exchange(question, _text(data, answer), data))


def _from_text(data: Mapping[str, Any]) -> _Parts:
    text = _text(data, "text")
    if not text.strip():
        raise RowError("field 'text' is empty")
    return _Parts(None, text)


_MAKERS = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "prompt_completion": _from_prompt_completion,
    "instruction": _from_instruction,
    "text": _from_text,
}


def _exchange(question: str, answer: str, data: Mapping[str, Any] | None = None) -> list[Message]:
    if not question.strip():
        raise RowError("the prompt is empty")
    if not answer.strip():
        raise RowError("the answer is empty")
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if data is not None and data.get("system"):
        turns.insert(0, {"role": "system", "content": _text(data, "system")})
    return turns


def _field(data: Mapping[str, Any], name: str, expected: str) -> Any:
    if name not in data:
        raise RowError(f"has no field {name!r}; expected {expected}")
    return data[name]


def _wrong_type(name: str, value: Any, expected: str) -> RowError:
    return RowError(f"field {name!r} is {kind_of(value)}; expected {expected}")


def _text(data: Mapping[str, Any], name: str) -> str:
    value = _field(data, name, "text")
    if isinstance(value, str):
        return value
    # Labels are often numbers; anything else in place of text is a change of schema.
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise _wrong_type(name, value, "text")


def _list(data: Mapping[str, Any], name: str) -> list[Any]:
    value = _field(data, name, "a list of turns")
    if not isinstance(value, list):
        raise _wrong_type(name, value, "a list of turns")
    if not value:
        raise RowError(f"field {name!r} is an empty list")
    return value


def _tools(data: Mapping[str, Any]) -> tuple[dict[str, Any], ...] | None:
    tools = data.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise RowError("field 'tools' is text that is no JSON list") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _wrong_type("tools", tools, "a list of objects")
    return tuple(
        tool if "type" in tool and "function" in tool else {"type": "function", "function": tool}
        for tool in tools
    )
