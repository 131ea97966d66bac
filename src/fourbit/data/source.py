"""Everything that can be known about the data before a model or a tokenizer is loaded."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fourbit.data.files import Limits, check_regular_file, file_sha256
from fourbit.data.formats import Example, FileFormat, to_examples
from fourbit.data.hub import HubName, load_hub_rows, parse_hub_name, read_hub_rows
from fourbit.data.readers import DATA_SUFFIXES, read_file
from fourbit.data.rows import BadLines, Row
from fourbit.errors import InputError

if TYPE_CHECKING:
    from fourbit.data.config import DataConfig


@dataclass(frozen=True)
class FileInfo:
    """One source of rows: its name, the SHA-256 of its bytes, usable rows and weight."""

    path: str
    sha256: str
    rows: int
    weight: float


@dataclass(frozen=True)
class Rows:
    """The data as read and checked.

    Args:
        train: examples of all training files, in file order.
        eval: examples of the separate evaluation file; None without one.
        formats: what each file was taken for.
        files: each file with its hash.
        bad_lines: rows left out under the budget of ``skip_bad_lines``.
    """

    train: tuple[Example, ...]
    eval: tuple[Example, ...] | None
    formats: tuple[FileFormat, ...]
    files: tuple[FileInfo, ...]
    bad_lines: int

    @property
    def format(self) -> str:
        """The format, or several joined by ``+``."""
        return " + ".join(dict.fromkeys(found.name for found in self.formats))

    def describe(self) -> list[str]:
        """One line for each file, such as ``format: messages, 1 204 rows``."""
        if len(self.formats) == 1:
            return [f"format: {self.formats[0]}"]
        return [f"format of {found.file}: {found}" for found in self.formats]


def read_rows(config: DataConfig, *, limits: Limits | None = None) -> Rows:
    """Reads and checks all data files; needs no tokenizer, so bad data is found in seconds.

    Args:
        config: what to read.
        limits: caps on sizes.

    Raises:
        InputError: names file, line and column of what cannot be used.
        EnvironmentFault: an optional package is missing, or the hub cannot be reached.
    """
    sources = config.train_files()
    if not sources:
        raise InputError(
            "no-data", where="data.train", what="is not set", fix="name a file: --data FILE"
        )
    reader = _Reader(config, limits or Limits(), BadLines(config.skip_bad_lines))
    train = [
        example
        for source in sources
        for example in reader.read(source.path, "data.train", source.weight)
    ]
    held_out = config.eval
    separate = reader.read(held_out, "data.eval", 1.0) if isinstance(held_out, str) else None
    return Rows(
        tuple(train),
        None if separate is None else tuple(separate),
        tuple(reader.formats),
        tuple(reader.files),
        reader.bad.count,
    )


def read_plain_rows(
    path: str, *, key: str, limit: int | None = None, limits: Limits | None = None
) -> tuple[list[Row], str]:
    """The rows of one local file as they stand there, and the SHA-256 of its bytes.

    Args:
        path: any file that training could read.
        key: the setting it came from, for messages.
        limit: how many rows to read; None: all.
        limits: caps on sizes.

    Raises:
        InputError: names file and line of what cannot be read.
    """
    caps = limits or Limits()
    size = check_regular_file(path, key=key)
    bad = BadLines(0)
    rows = list(itertools.islice(_local_rows(path, size, bad, caps), limit))
    bad.check()
    if not rows:
        raise InputError("empty-data", where=path, what="holds no rows", fix=f"check {key}")
    return rows, file_sha256(path)


def _local_rows(path: str, size: int, bad: BadLines, limits: Limits) -> Iterator[Row]:
    if size > limits.file_bytes:
        what = f"is larger than {limits.file_bytes} bytes"
        raise InputError("too-large", where=path, what=what, fix="split the file")
    return read_file(path, bad, limits=limits)


class _Reader:
    def __init__(self, config: DataConfig, limits: Limits, bad: BadLines) -> None:
        self._config = config
        self._limits = limits
        self.bad = bad
        self.formats: list[FileFormat] = []
        self.files: list[FileInfo] = []

    def read(self, path: str, key: str, weight: float) -> list[Example]:
        digest = hashlib.sha256()
        hub = None if os.path.lexists(path) else self._hub_name(path)
        if hub is not None:
            rows = read_hub_rows(path, load_hub_rows(path, hub), digest)
        else:
            size = check_regular_file(path, key=key)
            rows = _local_rows(path, size, self.bad, self._limits)
        cap = self._config.max_rows if key == "data.train" else None
        taken = list(itertools.islice(rows, cap))
        if not taken:
            self.bad.check()
            raise InputError("empty-data", where=path, what="holds no rows", fix=f"check {key}")
        examples, found = to_examples(taken, self._config, bad=self.bad, weight=weight)
        self.bad.check()
        if not examples:
            what = f"none of its {len(taken)} rows is usable: {self.bad.first[0][1]}"
            raise InputError("empty-data", where=path, what=what, fix="correct the file")
        sha256 = digest.hexdigest() if hub is not None else file_sha256(path)
        self.formats.append(found)
        self.files.append(FileInfo(path, sha256, len(examples), weight))
        return examples

    @staticmethod
    def _hub_name(path: str) -> HubName | None:
        return None if path.lower().endswith(DATA_SUFFIXES) else parse_hub_name(path)
