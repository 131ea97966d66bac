"""Bytes of data files: regular files only, decompressed within caps, cut into lines.

Nothing here trusts a file's name: compression is recognised by content, sizes are counted while
they are produced, so an archive that unpacks without end stops at the cap in bounded memory.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import os
import stat
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import IO, Any

from fourbit.errors import EnvironmentFault, InputError, nearest

_CHUNK = 2**20
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_FOREIGN = {
    b"PK\x03\x04": "a zip archive",
    b"BZh": "bzip2 data",
    b"\xfd7zXZ": "xz data",
    b"ARROW1": "an Arrow file",
}
_UTF8_BOM = b"\xef\xbb\xbf"
_WIDE_BOMS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)


@dataclass(frozen=True)
class Limits:
    """Caps on what a data file may hold, in bytes after decompression."""

    file_bytes: int = 16 * 2**30
    line_bytes: int = 64 * 2**20
    array_bytes: int = 2 * 2**30


@dataclass(frozen=True, slots=True)
class Line:
    """One line without its line break: 1-based number, offset of its first byte, its bytes."""

    number: int
    offset: int
    data: bytes


def check_regular_file(path: str, *, key: str) -> int:
    """Makes sure that a path is a readable regular file.

    Args:
        path: the path as the user gave it.
        key: the setting it came from, for the message.

    Returns:
        The file's size in bytes.

    Raises:
        InputError: it is missing (with near names), a folder, a device, a pipe or a link loop.
    """
    try:
        info = os.stat(path)
    except (OSError, ValueError) as error:
        raise _unusable(path, error, key) from None
    if stat.S_ISREG(info.st_mode):
        return info.st_size
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe (FIFO)",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFSOCK: "a socket",
    }
    kind = kinds.get(stat.S_IFMT(info.st_mode), "no regular file")
    raise InputError("not-a-file", where=path, what=f"{kind}, not a file", fix=f"give {key} a file")


def _unusable(path: str, error: OSError | ValueError, key: str) -> InputError:
    if isinstance(error, ValueError):
        return InputError("bad-path", where=key, what=f"{path!r} is no path", fix="correct it")
    if error.errno == errno.ELOOP:
        return InputError("bad-path", where=path, what="a loop of symbolic links")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        folder = os.path.dirname(path) or "."
        try:
            names = os.listdir(folder)
        except OSError:
            return InputError(
                "no-file", where=path, what=f"no such folder: {folder}", fix=f"correct {key}"
            )
        hint = nearest(os.path.basename(path), names) if names else f"{folder} is empty"
        return InputError("no-file", where=path, what="no such file", fix=hint)
    reason = error.strerror or type(error).__name__
    return InputError("unreadable", where=path, what=f"cannot be read: {reason}")


def file_sha256(path: str) -> str:
    """SHA-256 of a file's bytes as they lie on disk, read in pieces."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(_CHUNK):
                digest.update(block)
    except OSError as error:
        raise _unusable(path, error, "data") from None
    return digest.hexdigest()


def read_head(path: str, *, size: int = 4096) -> bytes:
    """The first bytes of a file after decompression."""
    head = b""
    with contextlib.closing(read_chunks(path, limits=Limits())) as chunks:
        for chunk in chunks:
            head += chunk
            if len(head) >= size:
                break
    return head[:size]


def read_chunks(path: str, *, limits: Limits) -> Generator[bytes, None, None]:
    """Yields a file's content in pieces, decompressed when its first bytes say so.

    Raises:
        InputError: damaged or foreign compression, or more bytes than the cap.
        EnvironmentFault: zstandard is needed and not installed.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(6)
            file.seek(0)
            for start, name in _FOREIGN.items():
                if magic.startswith(start):
                    fix = "unpack it; .gz and .zst are read as they are"
                    raise InputError("bad-file", where=path, what=f"is {name}", fix=fix)
            yield from _capped(_decompressed(file, magic, path), path, limits.file_bytes)
    except OSError as error:
        raise _unusable(path, error, "data") from None


def _capped(chunks: Iterator[bytes], path: str, cap: int) -> Iterator[bytes]:
    total = 0
    for chunk in chunks:
        total += len(chunk)
        if total > cap:
            what = f"holds more than {cap} bytes after decompression"
            raise InputError("too-large", where=path, what=what, fix="split the file")
        yield chunk


def _decompressed(file: IO[bytes], magic: bytes, path: str) -> Iterator[bytes]:
    if magic.startswith(_GZIP):
        with gzip.GzipFile(fileobj=file) as stream:
            yield from _pieces(stream, path, "gzip", (EOFError, zlib.error, gzip.BadGzipFile))
    elif magic.startswith(_ZSTD):
        zstd = _zstandard(path)
        with zstd.ZstdDecompressor().stream_reader(file, read_across_frames=True) as stream:
            yield from _pieces(stream, path, "zstd", (zstd.ZstdError,))
    else:
        yield from _pieces(file, path, "plain", ())


def _pieces(
    stream: Any, path: str, name: str, faults: tuple[type[Exception], ...]
) -> Iterator[bytes]:
    done = 0
    while True:
        try:
            chunk = stream.read(_CHUNK)
        except faults as error:
            what = f"{name} data damaged after {done} unpacked bytes: {error}"
            raise InputError("bad-file", where=path, what=what, fix="copy it again") from None
        if not chunk:
            return
        done += len(chunk)
        yield chunk


def _zstandard(path: str) -> Any:
    try:
        import zstandard
    except ImportError:
        raise EnvironmentFault(
            "missing-extra",
            where=path,
            what="zstd data needs the package zstandard",
            fix="pip install 'fourbit[zstd]'",
        ) from None
    return zstandard


def refuse_wide_text(head: bytes, path: str) -> None:
    """Refuses UTF-16 and UTF-32, which would otherwise show as thousands of bad lines."""
    name = next((name for mark, name in _WIDE_BOMS if head.startswith(mark)), None)
    if name is None:
        # Latin text in UTF-16 without a mark has a zero in every second byte.
        sample = head[:400]
        if len(sample) < 8 or max(sample[::2].count(0), sample[1::2].count(0)) < len(sample) // 3:
            return
        name = "UTF-16"
    command = f"iconv -f {name} -t UTF-8"
    raise InputError(
        "bad-encoding", where=path, what=f"is {name}, not UTF-8", fix=f"convert it: {command}"
    )


def read_lines(path: str, *, limits: Limits) -> Iterator[Line]:
    r"""Yields the lines of a text file, cut at ``\n`` only, without a byte-order mark.

    Strings inside JSON may hold other Unicode line separators, so those do not end a line.

    Raises:
        InputError: a line longer than the cap, or UTF-16.
    """
    number, offset, rest = 1, 0, b""
    first = True
    for chunk in read_chunks(path, limits=limits):
        if first:
            refuse_wide_text(chunk, path)
            if chunk.startswith(_UTF8_BOM):
                chunk, offset = chunk[3:], 3
            first = False
        *whole, tail = chunk.split(b"\n")
        for piece in whole:
            data = rest + piece
            yield Line(number, offset, data.removesuffix(b"\r"))
            number, offset, rest = number + 1, offset + len(data) + 1, b""
        rest += tail
        if len(rest) > limits.line_bytes:
            what = f"longer than {limits.line_bytes} bytes"
            raise InputError("line-too-long", where=f"{path}:{number}", what=what, fix="split it")
    if rest:
        yield Line(number, offset, rest.removesuffix(b"\r"))


def decode_line(line: Line) -> str:
    """The line as text.

    Raises:
        ValueError: names an invalid byte or a NUL by its place in the line and the file.
    """
    try:
        text = line.data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = line.data[error.start]
        raise ValueError(
            f"invalid UTF-8 byte 0x{byte:02x} at byte {error.start + 1} of the line "
            f"(byte {line.offset + error.start + 1} of the file)"
        ) from None
    at = line.data.find(0)
    if at >= 0:
        raise ValueError(
            f"NUL byte at byte {at + 1} of the line (byte {line.offset + at + 1} of the file)"
        )
    return text
