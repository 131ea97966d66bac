from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from string import Formatter

import pytest

from fourbit.demo import orders
from fourbit.demo.orders import DAYS, KEYS, NEW_PATTERNS, TRAIN_PATTERNS, OrderData, generate

GOLDEN_SHA256 = "2cff3f683e5c73db575963063e21fd60ece51757b3272bfef205e04d5a68505a"
ORDERED_SLOTS = ("name", "item", "qty", "city", "day")
SLOTS = set(ORDERED_SLOTS)
WORDS = r"[A-Za-z]+(?: [A-Za-z]+)?"
SHAPES = {
    "name2": WORDS,
    "item2": WORDS,
    "city2": WORDS,
    "qty2": r"\d{1,3}",
    "day2": "|".join(DAYS),
    "order": r"\d{5}",
    "phone": r"555-0\d{3}",
}
PARSED = {pattern: list(Formatter().parse(pattern)) for pattern in TRAIN_PATTERNS + NEW_PATTERNS}
OPEN_SLOTS = ("name", "item", "qty", "city")


def small(seed: int) -> OrderData:
    return generate(seed, train_rows=300, test_rows=100, pattern_rows=50)


@pytest.fixture(scope="module")
def data() -> OrderData:
    return generate(0, train_rows=800, test_rows=200, pattern_rows=100)


def all_rows(data: OrderData) -> list[dict[str, str]]:
    return data.train + data.test + data.new_patterns


def slots(pattern: str) -> list[str]:
    return [field for _, field, _, _ in PARSED[pattern] if field]


def slot_values(row: dict[str, str], pattern: str) -> dict[str, str] | None:
    """What fills each slot, distractors too, or None if the pattern does not explain the row."""
    if not all(literal in row["prompt"] for literal, _, _, _ in PARSED[pattern]):
        return None
    answer = json.loads(row["completion"])
    known = {slot: str(answer[key]) for key, slot in zip(KEYS, ORDERED_SLOTS, strict=True)}
    parts = []
    for literal, slot, _, _ in PARSED[pattern]:
        parts.append(re.escape(literal))
        if slot in known:
            parts.append(f"(?P<{slot}>{re.escape(known[slot])})")
        elif slot:
            parts.append(f"(?P<{slot}>{SHAPES[slot]})")
    found = re.fullmatch("".join(parts), row["prompt"])
    return found and found.groupdict()


def explained(row: dict[str, str], patterns: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """The one pattern that made the row, and its slots."""
    found = [(p, values) for p in patterns if (values := slot_values(row, p)) is not None]
    assert len(found) == 1, f"{len(found)} patterns explain {row}"
    return found[0]


def shown_words(rows: list[dict[str, str]], patterns: tuple[str, ...]) -> dict[str, set[str]]:
    """All words shown in the slots of each kind, answers and distractors."""
    words: dict[str, set[str]] = {slot: set() for slot in OPEN_SLOTS}
    for row in rows:
        for slot, value in explained(row, patterns)[1].items():
            kind = slot.rstrip("2")
            if kind in words:
                words[kind] |= set(value.lower().split())
    return words


def test_seed_0_keeps_its_bytes(data: OrderData):
    text = "\n".join(json.dumps(row) for row in all_rows(data))
    assert hashlib.sha256(text.encode()).hexdigest() == GOLDEN_SHA256


def test_same_seed_same_rows_and_other_seed_other_rows():
    assert small(3) == small(3)
    first, second = ({row["prompt"] for row in all_rows(small(seed))} for seed in (3, 4))
    assert not first & second


def test_more_test_rows_leave_the_training_rows_alone():
    few = generate(5, train_rows=50, test_rows=1, pattern_rows=0)
    many = generate(5, train_rows=50, test_rows=90, pattern_rows=9)
    assert few.train == many.train


@pytest.mark.parametrize("seed", range(21))
def test_every_seed_gives_the_asked_rows_with_disjoint_values(seed: int):
    data = small(seed)
    assert (len(data.train), len(data.test), len(data.new_patterns)) == (300, 100, 50)
    assert len({row["prompt"] for row in all_rows(data)}) == 450
    known = shown_words(data.train, TRAIN_PATTERNS)
    for rows, patterns in ((data.test, TRAIN_PATTERNS), (data.new_patterns, NEW_PATTERNS)):
        unseen = shown_words(rows, patterns)
        for kind, words in unseen.items():
            assert words
            assert not words & known[kind], kind
        # A word must not change sides by changing kind either, as a surname that becomes a town.
        assert not set().union(*unseen.values()) & set().union(*known.values())


def test_completions_are_the_schema_and_quote_the_prompt(data: OrderData):
    for row in all_rows(data):
        assert set(row) == {"prompt", "completion"}
        answer = json.loads(row["completion"])
        assert tuple(answer) == KEYS
        assert row["completion"] == json.dumps(answer, separators=(",", ":"))
        assert isinstance(answer["quantity"], int)
        assert answer["day"] in DAYS
        for value in answer.values():
            assert re.search(rf"(?<!\w){re.escape(str(value))}(?!\w)", row["prompt"]), row


def test_distractors_share_no_word_with_the_answer(data: OrderData):
    for row in data.train + data.test:
        _, values = explained(row, TRAIN_PATTERNS)
        for slot in SLOTS:
            other = values.get(f"{slot}2", "")
            assert not set(other.split()) & set(values[slot].split()), row


def test_new_patterns_are_new_and_training_patterns_are_used_evenly(data: OrderData):
    assert len(set(TRAIN_PATTERNS)) == len(TRAIN_PATTERNS) >= 20
    assert len(set(NEW_PATTERNS)) == len(NEW_PATTERNS) >= 6
    assert not set(TRAIN_PATTERNS) & set(NEW_PATTERNS)
    for row in data.new_patterns:
        assert all(slot_values(row, pattern) is None for pattern in TRAIN_PATTERNS), row
    used = Counter(explained(row, TRAIN_PATTERNS)[0] for row in data.train)
    assert set(used) == set(TRAIN_PATTERNS)
    assert max(used.values()) - min(used.values()) <= 1


@pytest.mark.parametrize("pattern", TRAIN_PATTERNS + NEW_PATTERNS)
def test_pattern_has_every_answer_once_and_only_known_slots(pattern: str):
    used = slots(pattern)
    assert len(used) == len(set(used))
    assert set(used) >= SLOTS
    assert set(used) <= SLOTS | set(SHAPES)


def test_each_kind_of_distractor_is_trained():
    assert {slot for pattern in TRAIN_PATTERNS for slot in slots(pattern)} >= set(SHAPES)


def test_no_listed_word_is_in_two_lists():
    words = [word.lower() for listed in orders.REAL_WORDS for word in listed]
    assert len(words) == len(set(words))


def test_values_are_varied_enough_not_to_be_learnt_by_heart(data: OrderData):
    answers = [json.loads(row["completion"]) for row in data.train]
    for key, least in (("customer", 400), ("item", 400), ("city", 300), ("quantity", 100)):
        assert len({answer[key] for answer in answers}) >= least, key


def test_no_rows_asked_no_rows_made():
    assert generate(1, train_rows=0, test_rows=0, pattern_rows=0) == OrderData([], [], [])


def test_jsonl_round_trip_with_unix_line_ends(data: OrderData, tmp_path):
    path = tmp_path / "rows.jsonl"
    orders.write_jsonl(data.test, path)
    raw = path.read_bytes()
    assert b"\r" not in raw
    assert raw.endswith(b"\n")
    assert [json.loads(line) for line in raw.decode().splitlines()] == data.test
