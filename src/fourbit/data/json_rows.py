"""JSON Lines and JSON arrays, each row with the line it starts on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from fourbit.data.files import Limits, Line, decode_line, read_chunks, read_lines
from fourbit.data.rows import BadLines, Origin, Row
from fourbit.errors import InputError

_SUSPECT_ESCAPE = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SPACE = re.compile(r"[ \t\r\n]*")
_WHOLE_OBJECT_CAP = 64 * 2**20


def read_json_lines(path: str, bad: BadLines, limits: Limits) -> Iterator[Row]:
    """Yields the objects of a file with one JSON object a line; faulty lines go to ``bad``.

    Raises:
        InputError: the file is one pretty-printed object.
    """
    nothing_yet = True
    for line in read_lines(path, limits=limits):
        if not line.data.strip():
            continue
        origin = Origin(path, line.number)
        try:
            value = _parse(decode_line(line))
        except json.JSONDecodeError as error:
            if nothing_yet:
                _explain_whole_object(path, limits)
            bad.add(origin, _fault(error), column=error.colno)
            continue
        except ValueError as error:
            bad.add(origin, str(error))
            continue
        nothing_yet = False
        if isinstance(value, dict):
            yield Row(value, origin)
        else:
            bad.add(origin, f"expected an object of named fields, not {_json_type(value)}")


def _parse(text: str) -> Any:
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _check_characters(text, value)
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _check_characters(text: str, value: Any) -> None:
    # Only escapes can smuggle these in, so most lines skip the second look.
    if not _SUSPECT_ESCAPE.search(text):
        return
    for string in _strings(value):
        if "\0" in string:
            raise ValueError("NUL character (\\u0000) inside a string")
        half = _SURROGATE.search(string)
        if half:
            raise ValueError(f"lone surrogate \\u{ord(half[0]):04x} is no character")


def _strings(value: Any) -> Iterator[str]:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            waiting += item


def _fault(error: json.JSONDecodeError) -> str:
    text = error.msg.replace(" delimiter", "")
    if text.startswith("Expecting "):
        rest = text.removeprefix("Expecting ")
        return "expected a value" if rest == "value" else f"expected {rest}"
    return text[:1].lower() + text[1:]


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _explain_whole_object(path: str, limits: Limits) -> None:
    """A pretty-printed object is no bad line; say what the file is instead."""
    try:
        value = _parse(_whole_text(path, limits.file_bytes, _WHOLE_OBJECT_CAP))
    except (ValueError, InputError):
        return
    inside = [key for key, item in value.items() if isinstance(item, list)]
    what = "is one JSON object, not a list of rows or one object a line"
    fix = f"save the list under {inside[0]!r} as a file of its own" if inside else "save rows"
    raise InputError("one-object", where=path, what=what, fix=fix)


def _whole_text(path: str, file_cap: int, cap: int) -> str:
    data = b"".join(read_chunks(path, limits=Limits(file_bytes=min(file_cap, cap))))
    return decode_line(Line(1, 0, data.removeprefix(b"\xef\xbb\xbf")))


def read_json_array(path: str, bad: BadLines, limits: Limits) -> Iterator[Row]:
    """Yields the objects of one JSON array; a fault in its syntax ends the reading.

    Raises:
        InputError: names the place of a fault, or an array too large to be held at once.
    """
    text = _array_text(path, limits)
    number, seen = 1, 0
    for at, value in _array_items(path, text):
        number, seen = number + text.count("\n", seen, at), at
        origin = Origin(path, number)
        if isinstance(value, dict):
            yield Row(value, origin)
        else:
            bad.add(origin, f"expected an object of named fields, not {_json_type(value)}")


def _array_text(path: str, limits: Limits) -> str:
    try:
        return _whole_text(path, limits.file_bytes, limits.array_bytes)
    except InputError as error:
        if error.code != "too-large":
            raise
        fix = "save it as JSON Lines, one object a line, which is read piece by piece"
        raise InputError(error.code, where=path, what=f"JSON array {error.what}", fix=fix) from None
    except ValueError as error:
        raise InputError("bad-encoding", where=path, what=str(error), fix="save as UTF-8") from None


def _array_items(path: str, text: str) -> Iterator[tuple[int, Any]]:
    """Yields each item of the array with the position where it starts."""
    decoder = json.JSONDecoder(parse_constant=_no_constant)
    at = _skip_space(text, text.index("[") + 1)
    closed = text[at : at + 1] == "]"
    while not closed:
        try:
            value, end = decoder.raw_decode(text, at)
            _check_characters(text[at:end], value)
        except (RecursionError, ValueError) as error:
            raise _array_fault(path, text, at, error) from None
        yield at, value
        at = _skip_space(text, end)
        closed = text[at : at + 1] == "]"
        if not closed:
            if text[at : at + 1] != ",":
                fault = json.JSONDecodeError("Expecting ',' or ']'", text, at)
                raise _array_fault(path, text, at, fault)
            at = _skip_space(text, at + 1)
    rest = _skip_space(text, at + 1)
    if rest < len(text):
        fault = json.JSONDecodeError("Extra data after the list", text, rest)
        raise _array_fault(path, text, rest, fault)


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _array_fault(path: str, text: str, at: int, error: Exception) -> InputError:
    if isinstance(error, json.JSONDecodeError):
        where, what = f"{path}:{error.lineno}:{error.colno}", _fault(error)
    else:
        where = f"{path}:{text.count(chr(10), 0, at) + 1}"
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    return InputError("bad-json", where=where, what=what, fix="correct the JSON array")
