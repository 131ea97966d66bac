"""The turns of a chat: read, checked, brought into one form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fourbit.data.rows import RowError

Message = dict[str, Any]
"""One turn: ``role``, ``content`` and, for calls of tools, ``tool_calls``."""

ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


def kind_of(value: Any) -> str:
    """A JSON value's kind in words."""
    if value is None:
        return "null"
    for kinds, name in (
        (bool, "a truth value"),
        ((int, float), "a number"),
        (str, "text"),
        (list, "a list"),
        (dict, "an object"),
    ):
        if isinstance(value, kinds):
            return name
    return type(value).__name__


def read_message(turn: Any, number: int) -> Message:
    """One ``{role, content}`` turn.

    Raises:
        RowError: names the turn and what is wrong with it.
    """
    if not isinstance(turn, dict):
        raise RowError(f"turn {number}: is {kind_of(turn)}; expected role and content")
    role = turn.get("role")
    if role not in ROLES:
        raise RowError(f"turn {number}: {_role_fault('role', turn, ROLES)}")
    message: Message = {"role": role, "content": _content(turn, number)}
    for name in ("tool_calls", "tool_call_id", "name", "reasoning_content"):
        if turn.get(name):
            message[name] = turn[name]
    return message


def _role_fault(key: str, turn: Mapping[str, Any], known: Sequence[str]) -> str:
    if key not in turn:
        return f"has no {key!r} (it has {', '.join(map(str, turn)) or 'nothing'})"
    return f"unknown {key} {turn[key]!r}; known: {', '.join(known)}"


def _content(turn: Mapping[str, Any], number: int) -> str:
    content = turn.get("content")
    if content is None and turn.get("tool_calls"):
        return ""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise RowError(f"turn {number}: holds something other than text")
        return "".join(part for part in parts if part)
    if not isinstance(content, str):
        raise RowError(f"turn {number}: content is {kind_of(content)}; expected text")
    return content


def read_sharegpt_turn(turn: Any, number: int) -> Message:
    """One ShareGPT ``{from, value}`` turn; a function call that is JSON becomes a tool call.

    Raises:
        RowError: names the turn and what is wrong with it.
    """
    if not isinstance(turn, dict):
        raise RowError(f"turn {number}: is {kind_of(turn)}; expected from and value")
    who, value = turn.get("from"), turn.get("value")
    if who not in _SHAREGPT_ROLES:
        raise RowError(f"turn {number}: {_role_fault('from', turn, tuple(_SHAREGPT_ROLES))}")
    if not isinstance(value, str):
        raise RowError(f"turn {number}: value is {kind_of(value)}; expected text")
    message: Message = {"role": _SHAREGPT_ROLES[who], "content": value}
    if who == "function_call":
        call = _call(value)
        if call is not None:
            message |= {"content": "", "tool_calls": [{"type": "function", "function": call}]}
    return message


def _call(value: str) -> dict[str, Any] | None:
    """The call in a ShareGPT turn; None when it is not JSON and so stays plain text."""
    try:
        call = json.loads(value)
    except ValueError:
        return None
    return call if isinstance(call, dict) and isinstance(call.get("name"), str) else None


def text_of(turn: Message) -> str:
    """A turn as plain text: its content, then its calls of tools as JSON, one a line."""
    calls = [
        json.dumps(call.get("function", call), ensure_ascii=False)
        for call in turn.get("tool_calls", ())
    ]
    return "\n".join([*filter(None, [turn["content"]]), *calls])


def check_turns(turns: list[Message]) -> list[Message]:
    """Refuses orders of turns that no chat has; leaves out an empty system turn.

    Raises:
        RowError: names the turn and what is wrong with it.
    """
    if turns[0]["role"] == "system" and not turns[0]["content"].strip():
        turns = turns[1:]
    before = ""
    for number, turn in enumerate(turns, start=1):
        role = turn["role"]
        if role == "system" and number > 1:
            raise RowError(f"turn {number}: a system turn must be the first")
        if role == before and role != "tool":
            raise RowError(f"turn {number}: follows another turn of the same role {role!r}")
        if role in ("assistant", "tool") and before in ("", "system"):
            raise RowError(f"turn {number}: the first turn is the {role}'s; expected the user's")
        empty = not turn["content"].strip()
        if empty and role in ("user", "assistant") and not turn.get("tool_calls"):
            raise RowError(f"turn {number}: the {role}'s content is empty")
        before = role
    if not any(turn["role"] == "assistant" for turn in turns):
        raise RowError("has no assistant turn, so there is nothing to learn from")
    return turns
