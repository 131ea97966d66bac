"""Files to rows: JSON Lines, JSON arrays, CSV, Parquet and plain text."""

from __future__ import annotations

import csv
import importlib
import os
import re
from collections.abc import Iterator

from fourbit.data.files import (
    Limits,
    Line,
    decode_line,
    read_head,
    read_lines,
    refuse_wide_text,
)
from fourbit.data.json_rows import read_json_array, read_json_lines
from fourbit.data.rows import BadLines, Origin, Row
from fourbit.errors import EnvironmentFault, InputError

TEXT_BLOCK = 8192
"""Characters after which a plain text file is cut into a new row, at the next blank line."""

_JSON_NAMES = (".jsonl", ".json", ".ndjson")
TEXT_SUFFIXES = (".txt", ".text", ".md")
_TABLE_NAMES = (".csv", ".tsv")
DATA_SUFFIXES = (*_JSON_NAMES, *TEXT_SUFFIXES, *_TABLE_NAMES, ".parquet", ".gz", ".zst")


def read_file(path: str, bad: BadLines, *, limits: Limits) -> Iterator[Row]:
    """Yields the rows of one local file, whatever its format.

    The format follows from the content where that is certain (Parquet, JSON array or lines,
    compression) and from the name where it is not (CSV, plain text).

    Args:
        path: a regular file.
        bad: account of rows that cannot be read.
        limits: caps on sizes.

    Raises:
        InputError: the file as a whole cannot be read.
    """
    head = read_head(path)
    if head.startswith(b"PAR1"):
        yield from _read_parquet(path, limits)
        return
    refuse_wide_text(head, path)
    suffix = os.path.splitext(_without_compression(path))[1]
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if suffix in TEXT_SUFFIXES:
        yield from _read_text(path, limits)
    elif suffix in _TABLE_NAMES:
        yield from _read_table(path, bad, limits)
    elif start.startswith(b"["):
        yield from read_json_array(path, bad, limits)
    elif suffix in _JSON_NAMES or start.startswith(b"{"):
        yield from read_json_lines(path, bad, limits)
    else:
        raise InputError(
            "unknown-file",
            where=path,
            what="neither its name nor its content tells its format",
            fix="name it .jsonl, .json, .csv, .tsv, .parquet or .txt (with .gz or .zst)",
        )


def is_text_file(path: str) -> bool:
    """Whether a file is taken for plain text, whose rows put together are the file."""
    return os.path.splitext(_without_compression(path))[1] in TEXT_SUFFIXES


def _without_compression(path: str) -> str:
    return re.sub(r"\.(gz|zst)$", "", path.lower())


def _read_table(path: str, bad: BadLines, limits: Limits) -> Iterator[Row]:
    before = csv.field_size_limit(limits.line_bytes)
    try:
        yield from _table_rows(path, bad, limits)
    finally:
        csv.field_size_limit(before)


def _table_rows(path: str, bad: BadLines, limits: Limits) -> Iterator[Row]:
    lines = _table_lines(path, limits)
    first = next(lines, "")
    delimiter = next((mark for mark in ",\t;" if mark in first), ",")

    def again() -> Iterator[str]:
        yield first
        yield from lines

    reader = csv.reader(again(), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    at = 1
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            where = f"{path}:{at}"
            raise InputError("bad-csv", where=where, what=str(error), fix="correct it") from None
        origin, at = Origin(path, at), reader.line_num + 1
        if fields is None:
            return
        if not fields:
            continue
        if header is None:
            header = _header(fields, origin)
        elif len(fields) != len(header):
            bad.add(origin, f"has {len(fields)} fields, the header has {len(header)}")
        else:
            yield Row(dict(zip(header, fields, strict=True)), origin)


def _header(fields: list[str], origin: Origin) -> list[str]:
    twice = sorted({name for name in fields if fields.count(name) > 1})
    if twice:
        what = f"column {twice[0]!r} stands twice in the header"
        raise InputError("bad-csv", where=str(origin), what=what, fix="rename one")
    return fields


def _table_lines(path: str, limits: Limits) -> Iterator[str]:
    # A quoted field may run over several lines, so a broken one cannot be left out by itself.
    for line in read_lines(path, limits=limits):
        yield _strict_text(line, path) + "\n"


def _strict_text(line: Line, path: str) -> str:
    try:
        return decode_line(line)
    except ValueError as error:
        where = f"{path}:{line.number}"
        raise InputError(
            "bad-encoding", where=where, what=str(error), fix="save as UTF-8"
        ) from None


def _read_text(path: str, limits: Limits) -> Iterator[Row]:
    """Blocks of whole paragraphs; put together again they are the file."""
    block: list[str] = []
    size, start = 0, 1
    for line in read_lines(path, limits=limits):
        text = _strict_text(line, path) + "\n"
        block.append(text)
        size += len(text)
        # Text without blank lines is cut at a line break, later.
        if size >= TEXT_BLOCK and (not text.strip() or size >= 4 * TEXT_BLOCK):
            yield Row({"text": "".join(block)}, Origin(path, start))
            block, size, start = [], 0, line.number + 1
    if size and "".join(block).strip():
        yield Row({"text": "".join(block)}, Origin(path, start))


def _read_parquet(path: str, limits: Limits) -> Iterator[Row]:
    try:
        pyarrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise EnvironmentFault(
            "missing-extra",
            where=path,
            what="Parquet needs the package pyarrow",
            fix="pip install 'fourbit[data]', or save the data as .jsonl",
        ) from None
    number = 0
    try:
        table = parquet.ParquetFile(path)
        size = sum(table.metadata.row_group(i).total_byte_size for i in range(table.num_row_groups))
        if size > limits.file_bytes:
            what = f"holds more than {limits.file_bytes} bytes after decompression"
            raise InputError("too-large", where=path, what=what, fix="split the file")
        for batch in table.iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                number += 1
                yield Row(record, Origin(path, number))
    except (pyarrow.ArrowException, OSError) as error:
        where = path if number == 0 else f"{path}:{number + 1}"
        what = f"damaged Parquet: {error}".splitlines()[0]
        raise InputError("bad-file", where=where, what=what, fix="copy it again") from None
