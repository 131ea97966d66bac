"""What a schema accepts at one key, read from its type annotations."""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, Literal

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fourbit.settings.yamltree import KeyPath


@dataclass
class Accepts:
    """The kinds of value one key takes, and their limits in words."""

    none: bool = False
    boolean: bool = False
    integer: bool = False
    real: bool = False
    text: bool = False
    anything: bool = False
    choices: list[Any] = field(default_factory=list)
    section: type[BaseModel] | None = None
    item: Any = None
    entry: Any = None
    limits: list[str] = field(default_factory=list)

    def short(self) -> str:
        """``auto|int``: for a flag's help."""
        names = [plain_text(choice) for choice in self.choices]
        names += ["true|false"] if self.boolean else []
        names += ["int"] if self.integer else []
        names += ["float"] if self.real else []
        names += ["text"] if self.text else []
        names += [f"list of {accepts(self.item).short()}"] if self.item is not None else []
        names += ["mapping"] if self.entry is not None or self.section else []
        names += ["value"] if self.anything else []
        names += ["none"] if self.none else []
        return "|".join(names)

    def words(self) -> str:
        """``a whole number, at least 1, or one of: auto``: for an error."""
        limits = f", {' and '.join(self.limits)}" if self.limits else ""
        parts = ["true or false"] if self.boolean else []
        if self.real:
            parts.append(f"a finite number{limits}")
        elif self.integer:
            parts.append(f"a whole number{limits}")
        if self.text:
            parts.append(f"text{'' if self.integer or self.real else limits}")
        if self.item is not None:
            parts.append(f"a list of {accepts(self.item).short()}{limits}")
        if self.entry is not None or self.section:
            parts.append("'key: value' lines")
        if self.choices:
            parts.append("one of: " + ", ".join(plain_text(choice) for choice in self.choices))
        if self.none:
            parts.append("none")
        return ", or ".join(parts)


def accepts(annotation: Any, info: FieldInfo | None = None) -> Accepts:
    """What an annotation lets in, unions and ``Annotated`` taken apart."""
    found = Accepts()
    _accept(annotation, found)
    for constraint in info.metadata if info else ():
        _limit(constraint, found)
    return found


def _accept(annotation: Any, found: Accepts) -> None:
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is typing.Annotated:
        for extra in arguments[1:]:
            for constraint in extra.metadata if isinstance(extra, FieldInfo) else (extra,):
                _limit(constraint, found)
        _accept(arguments[0], found)
    elif origin in (typing.Union, types.UnionType):
        for member in arguments:
            _accept(member, found)
    elif origin is Literal:
        found.none |= None in arguments
        found.choices += [choice for choice in arguments if choice is not None]
    elif hasattr(annotation, "__value__"):
        _accept(annotation.__value__, found)
    else:
        _accept_class(origin or annotation, arguments, found)


def _accept_class(kind: Any, arguments: tuple[Any, ...], found: Accepts) -> None:
    simple = {bool: "boolean", int: "integer", float: "real", type(None): "none"}
    if kind in (Any, object):
        found.anything = True
    elif kind in simple:
        setattr(found, simple[kind], True)
    elif not isinstance(kind, type):
        found.text = True
    elif issubclass(kind, enum.Enum):
        found.choices += [member.value for member in kind]
    elif issubclass(kind, BaseModel):
        found.section = kind
    elif issubclass(kind, Mapping):
        found.entry = arguments[1] if len(arguments) > 1 else Any
    elif issubclass(kind, (Sequence, AbstractSet)) and not issubclass(kind, (str, bytes)):
        found.item = arguments[0] if arguments else Any
    else:
        found.text = True


def _limit(constraint: Any, found: Accepts) -> None:
    # Pydantic keeps a bound it does not know by class, such as a pattern, as plain attributes.
    unit = "entries" if found.item is not None else "characters"
    words = {
        annotated_types.Ge: ("ge", "at least {}"),
        annotated_types.Gt: ("gt", "more than {}"),
        annotated_types.Le: ("le", "at most {}"),
        annotated_types.Lt: ("lt", "less than {}"),
        annotated_types.MultipleOf: ("multiple_of", "a multiple of {}"),
        annotated_types.MinLen: ("min_length", f"{{}} or more {unit}"),
        annotated_types.MaxLen: ("max_length", f"{{}} or fewer {unit}"),
    }
    for kind, (attribute, text) in words.items():
        if isinstance(constraint, kind):
            found.limits.append(text.format(getattr(constraint, attribute)))
    pattern = getattr(constraint, "pattern", None)
    if pattern:
        found.limits.append(f"matching {pattern}")


def default_of(info: FieldInfo) -> Any:
    """A field's default; None when it has none."""
    if info.is_required():
        return None
    if info.default_factory is None:
        return info.default
    return info.get_default(call_default_factory=True, validated_data={})


def all_keys(model: type[BaseModel]) -> list[str]:
    """Every dotted key of a schema, sections included."""
    keys = []
    for name, info in model.model_fields.items():
        keys.append(name)
        section = accepts(info.annotation).section
        if section:
            keys += [f"{name}.{key}" for key in all_keys(section)]
    return keys


def wanted_at(model: type[BaseModel], key: str) -> Accepts | None:
    """What a dotted key accepts, or None when the schema has no such key."""
    wanted = Accepts(section=model)
    for name in key.split("."):
        info = wanted.section.model_fields.get(name) if wanted.section else None
        if info is None:
            return None
        wanted = accepts(info.annotation, info)
    return wanted


def locate(loc: tuple[str | int, ...], model: type[BaseModel]) -> tuple[KeyPath, Accepts]:
    """A pydantic location without the names it adds for members of a union."""
    path: KeyPath = ()
    wanted = Accepts(section=model)
    for part in loc:
        if wanted.section and part in wanted.section.model_fields:
            info = wanted.section.model_fields[str(part)]
            wanted = accepts(info.annotation, info)
        elif isinstance(part, int) and wanted.item is not None:
            wanted = accepts(wanted.item)
        elif wanted.entry is not None and isinstance(part, str) and part != "[key]":
            wanted = accepts(wanted.entry)
        else:
            continue
        path = (*path, part)
    return path, wanted


def plain_text(value: Any) -> str:
    """A choice, boolean or number as it is written in YAML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, float) else str(value)
