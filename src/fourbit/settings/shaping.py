"""Turns a tree of texts into the values a schema wants, and collects every mistake."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from fourbit.errors import InputError, nearest
from fourbit.settings.accepts import Accepts, accepts, all_keys, default_of, plain_text
from fourbit.settings.redaction import HIDDEN, is_secret_key, redact
from fourbit.settings.yamltree import Entries, Items, KeyPath, Node, Scalar, dotted

DEFAULT = "default"
TRUE_WORDS = frozenset({"true", "yes", "on"})
FALSE_WORDS = frozenset({"false", "no", "off"})
NONE_WORDS = frozenset({"none", "null", "~"})
_INTEGER = re.compile(r"[-+]?(0[xX][0-9a-fA-F]+|[0-9][0-9_]*)")
REAL_NUMBER = re.compile(
    r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.?(inf|infinity|nan)", re.I
)
_LIST_NAME = re.compile(r"[A-Za-z0-9_.*/+-]+")


class Shaper:
    """Turns texts into values as the schema wants them; keeps places and mistakes."""

    def __init__(self) -> None:
        self.problems: dict[KeyPath, InputError] = {}
        self._places: dict[KeyPath, Node] = {}

    def section(
        self, node: Entries, model: type[BaseModel], path: KeyPath, base: BaseModel | None
    ) -> dict[str, Any]:
        """The values of one section, unset ones taken from what the default instance sets."""
        set_by_default = base.model_fields_set if base is not None else ()
        data = {name: getattr(base, name) for name in set_by_default}
        for key, child in node.entries.items():
            here = (*path, key)
            self._places[here] = child
            info = model.model_fields.get(key)
            if info is None:
                self._unknown(here, child, model, path)
                continue
            wanted = accepts(info.annotation, info)
            below = getattr(base, key) if base is not None else default_of(info)
            value = self._value(child, wanted, here, below)
            if here not in self.problems:
                data[key] = value
        return data

    def _unknown(self, path: KeyPath, node: Node, model: type[BaseModel], parent: KeyPath) -> None:
        prefix = dotted(parent) + "." if parent else ""
        known = [prefix + key for key in all_keys(model)]
        self.problems[path] = unknown_key(node.where, dotted(path), known)

    def _value(self, node: Node, wanted: Accepts, path: KeyPath, base: Any = None) -> Any:
        self._places[path] = node
        if isinstance(node, Scalar):
            if wanted.section and node.tag == "null" and not wanted.none:
                return self.section(
                    Entries(where=node.where), wanted.section, path, model_or_none(base)
                )
            return self._scalar(node, wanted, path)
        if isinstance(node, Items):
            item = accepts(wanted.item if wanted.item is not None else Any)
            return [self._value(child, item, (*path, i)) for i, child in enumerate(node.items)]
        if wanted.section:
            return self.section(node, wanted.section, path, model_or_none(base))
        entry = accepts(wanted.entry if wanted.entry is not None else Any)
        return {key: self._value(child, entry, (*path, key)) for key, child in node.entries.items()}

    def _scalar(self, node: Scalar, wanted: Accepts, path: KeyPath) -> Any:
        value = _scalar_value(node, wanted)
        if isinstance(value, float) and not math.isfinite(value):
            self._bad(path, node, wanted)
        elif value is node.text and wanted.text and node.plain:
            self._check_quotes(node, path)
        return value

    def _check_quotes(self, node: Scalar, path: KeyPath) -> None:
        kinds = {"bool": "true or false", "int": "a number", "float": "a number"}
        kind = kinds.get(node.tag)
        if node.tag == "null":
            self.problems[path] = InputError(
                "bad-value",
                where=node.where,
                what=f"{dotted(path)} has no value",
                fix="give a text, or remove the line",
            )
        elif kind:
            self.problems[path] = InputError(
                "needs-quotes",
                where=node.where,
                what=f"{dotted(path)} = {node.text} is {kind} in YAML, and a text is wanted",
                fix=f'quote it: "{node.text}"',
            )

    def _bad(self, path: KeyPath, node: Node, wanted: Accepts) -> None:
        given = "a mapping" if isinstance(node, Entries) else "a list"
        if isinstance(node, Scalar):
            given = repr(node.text[:80]) if node.text else "nothing"
        if is_secret_key(dotted(path)):
            given = HIDDEN
        self.problems[path] = InputError(
            "bad-value",
            where=node.where,
            what=redact(f"{dotted(path)} = {given} is not allowed"),
            fix=f"give {wanted.words() or 'a finite number'}",
        )

    def refuse(self, path: KeyPath, wanted: Accepts, where: str, error: Mapping[str, Any]) -> None:
        """Records what the schema itself refused, unless the key has a mistake already."""
        if path in self.problems:
            return
        node = self._places.get(path)
        if error["type"] == "missing":
            self.problems[path] = InputError(
                "missing-key",
                where=where,
                what=f"'{dotted(path)}' is required",
                fix=f"add '{dotted(path)}:' to the file or --{dotted(path)}",
            )
        elif error["type"] in ("value_error", "assertion_error") or node is None:
            what = redact(str(error.get("ctx", {}).get("error", error["msg"])))
            section = dotted(path)
            self.problems[path] = InputError(
                "bad-value",
                where=f"{node.where if node else where}" + (f": {section}" if section else ""),
                what=what,
            )
        else:
            self._bad(path, node, wanted)

    def origin(self, key: str) -> str:
        """Where a leaf came from. A section that is written says nothing about its other keys."""
        node = self._places.get(tuple(key.split(".")))
        return node.origin if node is not None else DEFAULT


def _scalar_value(node: Scalar, wanted: Accepts) -> Any:
    """The value a text stands for; the text itself where the schema must refuse it."""
    text, word = node.text, node.text.lower()
    for choice in wanted.choices:
        if plain_text(choice) == text:
            return choice
    if not node.plain and (wanted.text or wanted.anything):
        return text
    if (wanted.none or wanted.anything) and (node.tag == "null" or word in NONE_WORDS):
        return None
    if wanted.item is not None and node.tag == "flag":
        pieces = [piece.strip() for piece in text.split(",")]
        # A pattern may hold a comma, so where text is welcome too only names make a list.
        if not wanted.text or (len(pieces) > 1 and all(map(_LIST_NAME.fullmatch, pieces))):
            item = accepts(wanted.item)
            filled = [piece for piece in pieces if piece]
            return [_scalar_value(Scalar(piece, True, "flag"), item) for piece in filled]
    if wanted.boolean or (wanted.anything and node.tag in ("bool", "flag")):
        if word in TRUE_WORDS:
            return True
        if word in FALSE_WORDS:
            return False
    return _number(text, wanted)


def _number(text: str, wanted: Accepts) -> Any:
    if (wanted.integer or wanted.real or wanted.anything) and _INTEGER.fullmatch(text):
        digits = text.replace("_", "")
        number = int(digits, 16) if "x" in digits.lower() else _decimal(digits)
        if number is not None:
            return number
    if REAL_NUMBER.fullmatch(text):
        number = float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
        if wanted.real or wanted.anything:
            return number
        if wanted.integer and math.isfinite(number) and number.is_integer():
            return int(number)
    return text


def _decimal(digits: str) -> int | None:
    # Python refuses to read thousands of digits, and no setting needs more than forty.
    return int(digits) if len(digits) <= 40 else None


def unknown_key(where: str, key: str, known: Sequence[str]) -> InputError:
    """The error for a key that the schema does not have."""
    what = redact(f"unknown key '{key}'")
    return InputError("unknown-key", where=redact(where), what=what, fix=nearest(key, known))


def model_or_none(value: Any) -> BaseModel | None:
    """The value when it is a section, as a base for partly given sections."""
    return value if isinstance(value, BaseModel) else None
