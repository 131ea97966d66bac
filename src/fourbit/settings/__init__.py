"""Settings: one schema read from a YAML file and a command line, each value with its origin.

A schema is a :class:`Settings` class; nested classes are sections, and every leaf has a dotted key
(``lora.r``). :func:`load_settings` reads, :func:`options` lists the flags, :func:`dump_settings`
writes a file that loads back equal. Scalars are kept as the text the user wrote until the schema
says what they are, so ``1e-4`` is a number where a number is wanted.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from fourbit.errors import InputError
from fourbit.settings.accepts import (
    Accepts,
    accepts,
    all_keys,
    default_of,
    locate,
    plain_text,
    wanted_at,
)
from fourbit.settings.redaction import HIDDEN, is_secret_key
from fourbit.settings.redaction import redact as redact
from fourbit.settings.shaping import (
    DEFAULT,
    FALSE_WORDS,
    NONE_WORDS,
    REAL_NUMBER,
    TRUE_WORDS,
    Shaper,
    model_or_none,
    unknown_key,
)
from fourbit.settings.yamltree import Entries, Node, Scalar, YamlReader, read_text

COMMAND_LINE = "command line"
_PLAIN_TEXT = re.compile(r"[A-Za-z_./][A-Za-z0-9_./-]*")


class Settings(BaseModel):
    """Base of every settings section: unknown keys, NaN and infinity are refused; frozen."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


ModelT = TypeVar("ModelT", bound=BaseModel)


@dataclass(frozen=True)
class Resolved(Generic[ModelT]):
    """Checked settings and where each of them came from.

    Attributes:
        value: the validated settings.
        origins: dotted leaf key to ``config.yaml:12``, ``command line`` or ``default``.
    """

    value: ModelT
    origins: dict[str, str]


@dataclass(frozen=True)
class Option:
    """One leaf of a schema, as a flag shows it.

    Attributes:
        key: dotted key, ``lora.r``.
        type_text: what it accepts, such as ``int``, ``nf4|fp4`` or ``auto|int``.
        default_text: the default as it is written in YAML, or ``required``.
        help: the field's description.
    """

    key: str
    type_text: str
    default_text: str
    help: str


def load_settings(
    model: type[ModelT],
    *,
    path: Path | None,
    overrides: Sequence[tuple[str, str]] = (),
    short_forms: Mapping[str, str] | None = None,
) -> Resolved[ModelT]:
    """Reads settings from a file and a command line; the command line wins.

    Args:
        model: the schema.
        path: the YAML file, or None for defaults and command line alone.
        overrides: ``(key, text)`` pairs as typed, without leading dashes; a later one wins.
        short_forms: short flag to dotted key, such as ``{"lr": "optim.lr"}``.

    Raises:
        InputError: the file cannot be read, or a key or value is wrong. The first mistake is named
            in full, the others after it in the same line.
    """
    reader = Shaper()
    root = Entries(where=str(path) if path else COMMAND_LINE, origin=DEFAULT)
    if path is not None:
        text = read_text(path)
        root, duplicates = YamlReader(text, file=str(path), name=path.name).read()
        reader.problems.update(duplicates)
    for flag, text in overrides:
        _overlay(root, flag, text, model, short_forms or {}, reader)
    data = reader.section(root, model, (), None)
    try:
        value = model.model_validate(data)
    except ValidationError as error:
        _collect(error, model, reader, root.where)
        value = None
    if value is None or reader.problems:
        raise _joined(list(reader.problems.values()))
    origins = {key: reader.origin(key) for key, _ in _leaves(value)}
    return Resolved(value=value, origins=origins)


def replaced(settings: ModelT, values: Mapping[str, Any]) -> ModelT:
    """A copy with other values at some dotted keys; they are not checked again."""
    update: dict[str, Any] = {}
    for key, value in values.items():
        name, _, below = key.partition(".")
        old = update.get(name, getattr(settings, name))
        update[name] = replaced(old, {below: value}) if below else value
    return settings.model_copy(update=update)


def options(model: type[BaseModel]) -> list[Option]:
    """Every leaf of a schema in the order of its fields; a free mapping is one leaf."""
    return list(_options(model, "", None))


def dump_settings(resolved: Resolved[Any]) -> str:
    """YAML with every key and its origin as a comment; it loads back equal, secrets apart."""
    return "\n".join(_dump_section(resolved.value, "", 0, resolved.origins)) + "\n"


def _overlay(
    root: Entries,
    flag: str,
    text: str,
    model: type[BaseModel],
    short_forms: Mapping[str, str],
    reader: Shaper,
) -> None:
    """Puts one command line value into the tree."""
    where = f"-{flag}" if len(flag) == 1 else f"--{flag}"
    key = short_forms.get(flag, flag)
    wanted = wanted_at(model, key)
    if wanted is None:
        known = [*all_keys(model), *short_forms]
        reader.problems[("--", flag)] = unknown_key(where, key, known)
        return
    node: Node = Scalar(text, True, "flag", where, COMMAND_LINE)
    structured = wanted.section or wanted.entry is not None or wanted.item is not None
    if structured and text.lstrip().startswith(("[", "{")):
        parser = YamlReader(text, file=where, name=where, fixed_origin=COMMAND_LINE)
        node = parser.read_node() or node
        reader.problems.update(parser.problems)
    *sections, leaf = key.split(".")
    at = root
    for name in sections:
        below = at.entries.get(name)
        if not isinstance(below, Entries):
            below = Entries(where=where, origin=COMMAND_LINE)
        # Never write into a mapping that an alias elsewhere shares.
        below = Entries(dict(below.entries), below.where, below.origin)
        at.entries[name] = below
        at = below
    at.entries[leaf] = node


def _collect(error: ValidationError, model: type[BaseModel], reader: Shaper, fallback: str) -> None:
    already_wrong = bool(reader.problems)
    for entry in error.errors(include_url=False):
        path, wanted = locate(entry["loc"], model)
        # Checks across keys ran with a wrong key left out, so they may complain of nothing.
        if already_wrong and wanted.section and entry["type"] == "value_error":
            continue
        reader.refuse(path, wanted, fallback, entry)


def _joined(problems: list[InputError]) -> InputError:
    """The first mistake in reading order, with the others named in its line."""
    problems.sort(key=_reading_order)
    first, others = problems[0], problems[1:]
    if not others:
        return first
    more = "; ".join(f"{other.where}: {other.what}" for other in others[:5])
    more = f" (+{len(others)} more: {more}{'; …' if len(others) > 5 else ''})"
    what, fix = (first.what, first.fix + more) if first.fix else (first.what + more, "")
    return InputError(first.code, where=first.where, what=what, fix=fix)


def _reading_order(problem: InputError) -> tuple[bool, int]:
    line = re.search(r":([0-9]+)(: .*)?$", problem.where)
    return problem.where.startswith("-"), int(line[1]) if line else 1 << 30


def _options(model: type[BaseModel], prefix: str, base: BaseModel | None) -> Iterator[Option]:
    for name, info in model.model_fields.items():
        key = prefix + name
        wanted = accepts(info.annotation, info)
        default = getattr(base, name) if base is not None else default_of(info)
        if wanted.section:
            section, wanted.section = wanted.section, None
            if wanted.short() not in ("", "none"):
                yield _option(key, wanted, info, default)
            yield from _options(section, key + ".", model_or_none(default))
        else:
            yield _option(key, wanted, info, default)


def _option(key: str, wanted: Accepts, info: FieldInfo, default: Any) -> Option:
    text = "required" if info.is_required() else _yaml(default, key)
    text = "none" if default is None and not info.is_required() else text
    return Option(key, wanted.short(), text, info.description or "")


def _leaves(value: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name in type(value).model_fields:
        below = getattr(value, name)
        if isinstance(below, BaseModel):
            yield from _leaves(below, f"{prefix}{name}.")
        else:
            yield prefix + name, below


def _dump_section(
    value: BaseModel, prefix: str, depth: int, origins: Mapping[str, str]
) -> Iterator[str]:
    indent = "  " * depth
    for name in type(value).model_fields:
        below = getattr(value, name)
        key = prefix + name
        if isinstance(below, BaseModel) and type(below).model_fields:
            yield f"{indent}{name}:"
            yield from _dump_section(below, key + ".", depth + 1, origins)
        else:
            origin = redact(_printable(origins.get(key, DEFAULT)))
            yield f"{indent}{name}: {_yaml(below, key)}  # {origin}"


def _yaml(value: Any, key: str) -> str:
    """One value on one line of YAML; strings that could be read as something else are quoted."""
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in type(value).model_fields}
    if isinstance(value, enum.Enum):
        value = value.value
    if value is None:
        return "null"
    if isinstance(value, SecretStr) or is_secret_key(key):
        return f'"{HIDDEN}"'
    if isinstance(value, (bool, int, float)):
        return plain_text(value)
    if isinstance(value, Mapping):
        pairs = (f"{_key(str(k))}: {_yaml(v, f'{key}.{k}')}" for k, v in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, (set, frozenset)):
        return "[" + ", ".join(sorted(_yaml(entry, key) for entry in value)) + "]"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_yaml(entry, key) for entry in value) + "]"
    return _text(redact(str(value)))


def _text(text: str) -> str:
    word = text.lower()
    ambiguous = word in TRUE_WORDS | FALSE_WORDS | NONE_WORDS | {"y", "n"} or REAL_NUMBER.fullmatch(
        text
    )
    if _PLAIN_TEXT.fullmatch(text) and not ambiguous:
        return text
    return '"' + _printable(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def _key(key: str) -> str:
    # YAML ends a key that is not announced after 1024 characters.
    text = _text(key)
    return text if len(text) < 1000 else f"? {text} "


def _printable(text: str) -> str:
    """Escapes what YAML cannot hold as it stands, in YAML's own escapes."""
    out = []
    for char in text:
        code = ord(char)
        if char.isprintable():
            out.append(char)
        elif code < 0x100:
            out.append(f"\\x{code:02x}")
        else:
            out.append(f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")
    return "".join(out)
