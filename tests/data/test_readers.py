from __future__ import annotations

import gzip
import hashlib
import json
import os
import tracemalloc

import pytest

from fourbit.data import DataConfig, Limits, read_rows
from fourbit.errors import EnvironmentFault, FourbitError, InputError

CHAT = {"prompt": "2+2?", "completion": "4"}
LINE = json.dumps(CHAT)


@pytest.fixture
def put(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name, content):
        data = content if isinstance(content, bytes) else content.encode("utf-8")
        (tmp_path / name).write_bytes(data)
        return name

    return write


def read(path, *, limits=None, **settings):
    return read_rows(DataConfig(train=path, **settings), limits=limits)


def error_of(path, **settings) -> InputError:
    with pytest.raises(InputError) as caught:
        read(path, **settings)
    assert "\n" not in caught.value.line()
    return caught.value


def places(rows):
    return [str(example.origin) for example in rows.train]


def content(rows):
    return [tuple(turn["content"] for turn in example.messages) for example in rows.train]


def test_lines_keep_their_numbers_over_blank_ones(put):
    rows = read(put("a.jsonl", f"{LINE}\n\n  \n{LINE}"))
    assert places(rows) == ["a.jsonl:1", "a.jsonl:4"]
    assert rows.describe() == ["format: prompt_completion, 2 rows"]


def test_lines_are_cut_at_line_feeds_only(put):
    odd = "a\u2028b\u2029c\x85d\x0be"
    line = json.dumps({"prompt": odd, "completion": "x"}, ensure_ascii=False)
    rows = read(put("a.jsonl", f"{line}\r\n{LINE}\r\n".replace("\x0b", "\\u000b")))
    assert content(rows) == [(odd, "x"), ("2+2?", "4")]
    assert places(rows) == ["a.jsonl:1", "a.jsonl:2"]


def test_a_malformed_line_is_named_with_its_column(put):
    bad = '{"prompt": "2+2?" "completion": "4"}'
    error = error_of(put("train.jsonl", f"{LINE}\n{bad}\n"))
    assert error.line() == (
        "error[bad-rows] train.jsonl:2:19: expected ','; "
        "fix: correct the file, or leave such rows out with data.skip_bad_lines: 1"
    )


def test_the_first_ten_bad_lines_are_listed_and_all_counted(put):
    name = put("a.jsonl", f"{LINE}\n" + "{oops}\n" * 25)
    text = error_of(name).line()
    assert "a.jsonl:2:2" in text
    assert "25 bad rows in all" in text
    assert "a.jsonl:11:2" in text
    assert "a.jsonl:12:2" not in text
    assert read(name, skip_bad_lines=25).bad_lines == 25
    assert error_of(name, skip_bad_lines=24).code == "bad-rows"


def test_the_budget_covers_bad_turns_too(put):
    name = put("a.jsonl", f'{LINE}\n{{"prompt": "x", "completion": " "}}\nnope\n')
    rows = read(name, skip_bad_lines=2)
    assert (len(rows.train), rows.bad_lines) == (1, 2)
    error_of(name, skip_bad_lines=1)


def test_json_array_in_jsonl_and_lines_in_json(put):
    array = json.dumps([CHAT, CHAT], indent=1)
    rows = read(put("a.jsonl", array))
    assert places(rows) == ["a.jsonl:2", "a.jsonl:6"]
    assert places(read(put("b.json", f"{LINE}\n{LINE}\n"))) == ["b.json:1", "b.json:2"]


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ('[{"a": 1},\n {"a" 2}]', "a.json:2:7", "expected ':'"),
        ('[{"a": 1}\n{"a": 2}]', "a.json:2:1", "expected ',' or ']'"),
        ('[{"a": 1}', "a.json:1:10", "expected ',' or ']'"),
        ('[{"a": 1}] x', "a.json:1:12", "extra data after the list"),
        ('[{"a": NaN}]', "a.json:1", "NaN is not JSON"),
        ("[" * 100_000, "a.json:1", "nested too deeply"),
    ],
)
def test_a_broken_array_is_named_with_its_place(put, text, where, what):
    error = error_of(put("a.json", text))
    assert (error.where, error.what) == (where, what)


def test_one_pretty_printed_object_is_explained(put):
    error = error_of(put("a.json", json.dumps({"version": 1, "data": [CHAT]}, indent=2)))
    assert error.code == "one-object"
    assert "'data'" in error.fix


def test_deep_nesting_in_a_line_is_a_bad_line(put):
    assert "nested too deeply" in error_of(put("a.jsonl", f'{{"a":{"[" * 100_000}\n')).what


@pytest.mark.parametrize("text", ["", " \n\n\t\n", "\ufeff", "[]", "[\n]"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_empty_data_is_refused(put, name, text):
    assert error_of(put(name, text)).code == "empty-data"


def test_a_byte_order_mark_is_accepted(put):
    assert len(read(put("a.jsonl", b"\xef\xbb\xbf" + LINE.encode())).train) == 1
    assert len(read(put("b.json", b"\xef\xbb\xbf[" + LINE.encode() + b"]")).train) == 1


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_wide_encodings_are_named(put, encoding):
    error = error_of(put("a.jsonl", f"{LINE}\n{LINE}\n".encode(encoding)))
    assert error.code == "bad-encoding"
    assert encoding[:6].upper() in error.what
    assert "iconv" in error.fix


def test_an_invalid_byte_is_named_by_line_and_offset(put):
    first = LINE.encode() + b"\n"
    latin = '{"prompt": "café", "completion": "x"}\n'.encode("latin-1")
    error = error_of(put("a.jsonl", first + latin))
    at = latin.index(0xE9) + 1
    assert error.where == "a.jsonl:2"
    assert error.what == (
        f"invalid UTF-8 byte 0xe9 at byte {at} of the line (byte {len(first) + at} of the file)"
    )


def test_nul_and_lone_surrogates_are_refused_however_written(put):
    assert "NUL byte at byte 3" in error_of(put("a.jsonl", b'{"\0": 1}\n')).what
    assert "NUL character" in error_of(put("b.jsonl", '{"prompt": "\\u0000"}\n')).what
    assert "\\ud83d" in error_of(put("c.jsonl", '{"prompt": "\\ud83d"}\n')).what


def test_escapes_that_only_look_like_those_are_kept(put):
    row = {"prompt": r"what is \u0000 in C?", "completion": "\U0001f600"}
    assert content(read(put("a.jsonl", json.dumps(row)))) == [tuple(row.values())]


@pytest.mark.parametrize("suffix", [".gz", ".zst", ""])
def test_compression_is_told_by_content(put, suffix):
    zstandard = pytest.importorskip("zstandard")
    plain = f"{LINE}\n{LINE}\n".encode()
    for data in (gzip.compress(plain), zstandard.compress(plain), plain):
        name = put(f"a.jsonl{suffix}", data)
        rows = read(name)
        assert len(rows.train) == 2
        assert rows.files[0].sha256 == hashlib.sha256(data).hexdigest()


def test_damaged_compression_is_one_line(put):
    data = gzip.compress(os.urandom(5000))
    assert "gzip data damaged" in error_of(put("a.jsonl.gz", data[:2000])).what
    assert "gzip data damaged" in error_of(put("b.jsonl.gz", data[:-8] + bytes(8))).what
    zstandard = pytest.importorskip("zstandard")
    broken = bytearray(zstandard.compress(os.urandom(5000)))
    broken[4:40] = bytes(36)
    assert error_of(put("c.jsonl.zst", bytes(broken))).code in ("bad-file", "bad-rows")


def test_a_bomb_stops_at_the_cap_in_bounded_memory(put):
    bomb = gzip.compress(b" " * 2**20 * 256, 1)
    name = put("a.jsonl.gz", bomb)
    limits = Limits(file_bytes=32 * 2**20, line_bytes=8 * 2**20)
    tracemalloc.start()
    error = error_of(name, limits=limits)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error.code == "line-too-long"
    assert peak < 40 * 2**20
    lines = put("b.jsonl.gz", gzip.compress(b" \n" * 2**19 * 4, 1))
    assert error_of(lines, limits=Limits(file_bytes=2**21)).code == "too-large"
    array = put("c.json.gz", gzip.compress(b"[" + b" " * 2**20 * 64, 1))
    assert "JSON Lines" in error_of(array, limits=Limits(array_bytes=2**20)).fix
    plain = put("d.jsonl", b"\n" * 2000)
    assert error_of(plain, limits=Limits(file_bytes=1000)).code == "too-large"


def test_only_regular_files_are_read(put, tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    assert "a pipe" in error_of("pipe.jsonl").what
    assert "a loop of symbolic links" in error_of("loop.jsonl").what
    assert "a folder" in error_of(str(tmp_path)).what
    assert "a device" in error_of("/dev/zero").what
    assert error_of("nul\0.jsonl").code == "bad-path"
    assert error_of("x" * 5000 + ".jsonl").code == "unreadable"
    (tmp_path / "link.jsonl").symlink_to(put("real.jsonl", LINE))
    assert len(read("link.jsonl").train) == 1


def test_a_wrong_path_names_the_near_ones(put):
    put("train.jsonl", LINE)
    error = error_of("trian.jsonl")
    assert error.line() == (
        "error[no-file] trian.jsonl: no such file; fix: did you mean 'train.jsonl'?"
    )
    assert "no such folder" in error_of("nowhere/train.jsonl").what


@pytest.mark.parametrize(("start", "name"), [(b"PK\x03\x04", "zip"), (b"BZh91", "bzip2")])
def test_foreign_archives_are_named(put, start, name):
    assert name in error_of(put("a.jsonl", start + bytes(50))).what


def test_a_nameless_format_is_refused(put):
    assert error_of(put("a.bin", "hello there, nothing known")).code == "unknown-file"


def test_tables(put):
    text = 'prompt,completion\n"two\nlines, ""quoted""",yes\nb,no\n'
    rows = read(put("a.csv", text))
    assert content(rows) == [('two\nlines, "quoted"', "yes"), ("b", "no")]
    assert places(rows) == ["a.csv:2", "a.csv:4"]
    assert content(read(put("b.tsv", "prompt\tcompletion\na, b\tc\n"))) == [("a, b", "c")]
    assert content(read(put("c.csv", "prompt;completion\na;b\n"))) == [("a", "b")]
    error = error_of(put("d.csv", "prompt,completion\na,b\na,b,c\n"))
    assert (error.where, error.what) == ("d.csv:3", "has 3 fields, the header has 2")
    assert "twice" in error_of(put("e.csv", "prompt,prompt\na,b\n")).what
    assert error_of(put("f.csv", 'prompt,completion\n"a,b\n')).code == "bad-csv"


def test_plain_text_is_cut_at_blank_lines_and_nothing_is_lost(put):
    text = "".join(f"paragraph {i}\n" + "word " * 50 + "\n\n" for i in range(200))
    rows = read(put("a.txt", text))
    assert "".join(example.text for example in rows.train) == text
    assert len(rows.train) > 3
    lines = text.split("\n")
    for example in rows.train:
        assert example.text.split("\n")[0] == lines[example.origin.line - 1]
    assert len(read(put("b.txt", "word\n" * 20_000)).train) > 1


def test_parquet(put, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": ["a", "b"], "completion": ["c", "d"]}), tmp_path / "a.bin")
    assert content(read("a.bin")) == [("a", "c"), ("b", "d")]
    assert error_of(put("b.parquet", b"PAR1" + os.urandom(100) + b"PAR1")).code == "bad-file"


def test_several_files_carry_their_weights(put):
    put("a.jsonl", LINE)
    put("b.jsonl", '{"text": "plain"}\n')
    files = [{"path": "a.jsonl", "weight": 0.5}, {"path": "b.jsonl"}]
    rows = read_rows(DataConfig.model_validate({"train": files}))
    assert [example.weight for example in rows.train] == [0.5, 1.0]
    assert rows.format == "prompt_completion + text"
    assert [f"{found.file} {found}" for found in rows.formats] == [
        "a.jsonl prompt_completion, 1 rows",
        "b.jsonl text, 1 rows",
    ]


def test_max_rows_takes_the_first_of_each_file(put):
    name = put("a.jsonl", f"{LINE}\n" * 5 + "broken beyond the cap\n")
    assert places(read(name, max_rows=3)) == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]


def test_data_train_must_be_set():
    with pytest.raises(InputError, match=r"data\.train: is not set"):
        read_rows(DataConfig())


@pytest.mark.slow
def test_hub_names_without_the_package_or_the_hub_are_one_line(put, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FourbitError) as caught:
        read("some-org/no-such-data-set")
    assert isinstance(caught.value, (EnvironmentFault, InputError))
    assert caught.value.where == "some-org/no-such-data-set"
    assert error_of("some-org/data.jsonl").code == "no-file"
