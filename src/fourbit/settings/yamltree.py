"""YAML as a tree of texts that remembers where each of them stands.

Nothing is converted here: what a text means is for a schema to say. The reader works on the event
stream, so the caps on size, depth and aliases act before anything is expanded.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn

import yaml

from fourbit.errors import InputError, nearest, one_line

MAX_BYTES = 1 << 20
MAX_NODES = 10_000
MAX_DEPTH = 32


@dataclass
class Scalar:
    """One text as it was written; ``tag`` is what YAML alone takes it for."""

    text: str
    plain: bool
    tag: Literal["bool", "int", "float", "null", "str", "flag"]
    where: str = ""
    origin: str = ""


@dataclass
class Items:
    """A list."""

    items: list[Node] = field(default_factory=list)
    where: str = ""
    origin: str = ""


@dataclass
class Entries:
    """A mapping; keys are unique texts."""

    entries: dict[str, Node] = field(default_factory=dict)
    where: str = ""
    origin: str = ""


Node = Scalar | Items | Entries
KeyPath = tuple[str | int, ...]


def read_text(path: Path) -> str:
    """The text of a settings file: regular, at most 1 MiB, UTF-8 with or without a mark.

    Raises:
        InputError: it is none of that, or cannot be read; near names are listed.
    """
    where = str(path)
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
            raise InputError("not-a-file", where=where, what=f"is {kind}", fix="name a YAML file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError(
            "missing-file", where=where, what="no such file", fix=_near_files(path)
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            "unreadable-file", where=where, what=reason, fix="check the path"
        ) from None
    if len(data) > MAX_BYTES:
        raise InputError(
            "config-too-large",
            where=where,
            what=f"is larger than {MAX_BYTES} bytes",
            fix="a settings file is a few kilobytes; data belongs in data.train",
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            "not-utf8",
            where=f"{where}:{line}",
            what=f"byte {error.start} (0x{data[error.start]:02x}) is not UTF-8",
            fix="save the file as UTF-8",
        ) from None


def _near_files(path: Path) -> str:
    try:
        names = [e.name for e in os.scandir(path.parent) if e.name.endswith((".yaml", ".yml"))]
    except OSError:
        return f"the folder {path.parent} cannot be read either; check the path"
    return nearest(path.name, names) if names else f"no YAML file in {path.parent}; check the path"


class YamlReader:
    """Turns YAML into a tree by its event stream, so caps act before anything is expanded."""

    def __init__(self, text: str, *, file: str, name: str, fixed_origin: str = "") -> None:
        self._text = text
        self._file = file
        self._name = name
        self._fixed_origin = fixed_origin
        self._anchors: dict[str, tuple[Node, int]] = {}
        self._nodes = 0
        self.problems: dict[KeyPath, InputError] = {}

    def read(self) -> tuple[Entries, dict[KeyPath, InputError]]:
        """The top-level mapping (empty for an empty file) and the duplicate keys."""
        node = self.read_node()
        if node is None:
            return Entries(where=self._file, origin=self._name), {}
        if not isinstance(node, Entries):
            kind = "a list" if isinstance(node, Items) else "a single value"
            raise InputError(
                "not-a-mapping",
                where=node.where,
                what=f"the file holds {kind}, not 'key: value' lines",
                fix="start with a line such as 'model: smollm2'",
            )
        node.where = self._file
        return node, self.problems

    def read_node(self) -> Node | None:
        """The one document, whatever it is; None when it is empty."""
        try:
            self._loader = yaml.SafeLoader(self._text)
            self._loader.get_event()
            if self._loader.check_event(yaml.StreamEndEvent):
                return None
            self._loader.get_event()
            node = self._node(())
            self._loader.get_event()
            if not self._loader.check_event(yaml.StreamEndEvent):
                event = self._loader.peek_event()
                self._refuse(event, "the file holds more than one YAML document", "keep one")
        except yaml.YAMLError as error:
            raise self._syntax_error(error) from None
        return None if isinstance(node, Scalar) and node.tag == "null" else node

    def _node(self, path: KeyPath) -> Node:
        event = self._loader.get_event()
        self._nodes += 1
        if len(path) > MAX_DEPTH:
            self._refuse(event, f"nested deeper than {MAX_DEPTH} levels", "flatten the file")
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        if getattr(event, "tag", None) is not None:
            self._refuse(
                event, f"the YAML tag '{event.tag}' is not allowed", "write the plain value"
            )
        before = self._nodes
        node = self._content(event, path)
        if event.anchor is not None:
            self._anchors[event.anchor] = (node, self._nodes - before + 1)
        self._check_size(event)
        return node

    def _content(self, event: yaml.Event, path: KeyPath) -> Node:
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event)
        where, origin = self._place(event)
        if isinstance(event, yaml.SequenceStartEvent):
            sequence = Items(where=where, origin=origin)
            while not self._loader.check_event(yaml.SequenceEndEvent):
                sequence.items.append(self._node((*path, len(sequence.items))))
            self._loader.get_event()
            return sequence
        mapping = Entries(where=where, origin=origin)
        while not self._loader.check_event(yaml.MappingEndEvent):
            self._entry(mapping, path)
        self._loader.get_event()
        return mapping

    def _scalar(self, event: yaml.ScalarEvent) -> Scalar:
        tag = self._loader.resolve(yaml.ScalarNode, event.value, event.implicit).rsplit(":", 1)[-1]
        where, origin = self._place(event)
        # Dates and the merge sign are only text to a schema.
        known = tag if tag in ("bool", "int", "float", "null") else "str"
        return Scalar(event.value, event.style is None, known, where, origin)  # pyright: ignore[reportArgumentType]

    def _entry(self, mapping: Entries, path: KeyPath) -> None:
        event = self._loader.peek_event()
        if not isinstance(event, yaml.ScalarEvent) or event.tag is not None:
            self._refuse(event, "a key must be plain text", "write 'key: value'")
        if event.value == "<<" and event.style is None:
            self._refuse(event, "merge keys '<<' are not read", "write the keys out")
        self._node(path)
        key = event.value
        where, origin = self._place(event)
        value = self._node((*path, key))
        self._check_size(event)
        if key in mapping.entries:
            full = dotted((*path, key))
            self.problems[(*path, key, "again")] = InputError(
                "duplicate-key",
                where=where,
                what=f"key '{full}' is given twice, first at {mapping.entries[key].where}",
                fix="keep one of them",
            )
            return
        # An alias shares its node with its anchor; the place is the key's own.
        mapping.entries[key] = _placed(value, where, origin)

    def _alias(self, event: yaml.AliasEvent) -> Node:
        if event.anchor not in self._anchors:
            self._refuse(
                event, f"alias '*{event.anchor}' names nothing above it", "define it first"
            )
        node, size = self._anchors[event.anchor]
        self._nodes += size
        self._check_size(event)
        return node

    def _check_size(self, event: yaml.Event) -> None:
        if self._nodes > MAX_NODES:
            self._refuse(
                event, f"more than {MAX_NODES} values, aliases expanded", "shorten the file"
            )

    def _place(self, event: yaml.Event) -> tuple[str, str]:
        if self._fixed_origin:
            return self._file, self._fixed_origin
        line = event.start_mark.line + 1 if event.start_mark else 1
        return f"{self._file}:{line}", f"{self._name}:{line}"

    def _refuse(self, event: yaml.Event, what: str, fix: str) -> NoReturn:
        raise InputError("bad-yaml", where=self._place(event)[0], what=what, fix=fix)

    def _syntax_error(self, error: yaml.YAMLError) -> InputError:
        line, what, fix = 1, "is not YAML", "check the line against YAML's rules"
        if isinstance(error, yaml.MarkedYAMLError):
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            what = ", ".join(part for part in (error.context, error.problem) if part) or what
        elif isinstance(error, yaml.reader.ReaderError):
            line = self._text.count("\n", 0, error.position) + 1
            what = f"the character U+{_code_point(error.character):04X} is not allowed"
            fix = "remove it, or escape it inside double quotes"
        if re.match(r"[ ]*\t", self._text.split("\n")[line - 1] if self._text else ""):
            what, fix = "the line is indented with a tab", "indent with spaces"
        where = self._file if self._fixed_origin else f"{self._file}:{line}"
        return InputError("bad-yaml", where=where, what=what, fix=fix)


def _placed(node: Node, where: str, origin: str) -> Node:
    if isinstance(node, Scalar):
        return Scalar(node.text, node.plain, node.tag, where, origin)
    if isinstance(node, Items):
        return Items(node.items, where, origin)
    return Entries(node.entries, where, origin)


def _code_point(character: object) -> int:
    # PyYAML's stubs say str; its reader of decoded text passes the number.
    return character if isinstance(character, int) else ord(str(character)[:1] or "\0")


def dotted(path: KeyPath) -> str:
    """``data.files[2]``, with what could disguise a line escaped."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return one_line(text)
