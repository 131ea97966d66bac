"""What can be measured: a task turns rows into questions to a model and answers into metrics."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from transformers import PreTrainedTokenizerBase

from fourbit.data import BadLines, DataConfig, Row, is_text_file, to_examples
from fourbit.errors import InputError, nearest
from fourbit.evaluation.answers import score_examples
from fourbit.evaluation.choices import Choice, mmlu_header, read_choice, with_shots
from fourbit.evaluation.metrics import Metric, exponential, macro_mean, mean, token_f1
from fourbit.evaluation.scoring import Likelihood, Question, Scorer
from fourbit.generate import Generator, Sampling

Progress = Callable[[int, str], None]


@dataclass(frozen=True)
class Material:
    """What a task is given besides the model.

    Attributes:
        rows: of the data.
        path: where they come from.
        shots: solved rows to show before each question.
        window: tokens of a perplexity window; None: the model's own length, at most 2048.
        stride: tokens from one window to the next; None: the window.
        max_new_tokens: of a generated answer.
        data: how rows with questions and answers are read: format, templates, system message.
    """

    rows: Sequence[Row]
    path: str
    shots: Sequence[Row] = ()
    window: int | None = None
    stride: int | None = None
    max_new_tokens: int = 128
    data: DataConfig = field(default_factory=DataConfig)


@dataclass(frozen=True)
class TaskResult:
    """What one task found.

    Attributes:
        metrics: by name; the first is the one to quote.
        n: items, or scored tokens of a perplexity.
        unit: what ``n`` counts.
        prompts_sha256: of everything the model was asked, as token ids.
        items: what happened to each item, for whoever wants to look or compare.
        facts: what else describes the measurement.
    """

    metrics: Mapping[str, Metric]
    n: int
    unit: str
    prompts_sha256: str
    items: list[dict[str, Any]] = field(default_factory=list)
    facts: Mapping[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """One thing to measure."""

    def size(self, material: Material) -> int:
        """Steps of its progress bar."""
        ...

    def run(
        self, generator: Generator, scorer: Scorer, material: Material, progress: Progress
    ) -> TaskResult:
        """Measures."""
        ...


def encode_pair(tokenizer: PreTrainedTokenizerBase, text: str, rest: str) -> tuple[list[int], ...]:
    """Token ids of a text and of what follows it, cut where lm-eval cuts.

    Spaces at the end of the text go to what follows, so that words stay whole.
    """
    bare = text.rstrip()
    whole = tokenizer(text + rest).input_ids
    beginning = tokenizer(bare).input_ids if bare else _start(tokenizer)
    return beginning, whole[len(beginning) :] if bare else whole


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a sequence begins with where nothing is given."""
    for found in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(found, int):
            return [found]
    return [0]


def _digest(questions: Sequence[Question]) -> str:
    digest = hashlib.sha256()
    for question in questions:
        digest.update(json.dumps([question.beginning, question.continuations]).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class MultipleChoice:
    """The likeliest of several answers: by sum (``acc``), by sum per character (``acc_norm``)."""

    def size(self, material: Material) -> int:
        """Items."""
        return len(material.rows)

    def run(
        self, generator: Generator, scorer: Scorer, material: Material, progress: Progress
    ) -> TaskResult:
        """Asks for every choice behind its query."""
        shots = [read_choice(row) for row in material.shots]
        items = [with_shots(read_choice(row), shots) for row in material.rows]
        questions = [_question(generator.tokenizer, item) for item in items]
        found = scorer.score(questions, progress=progress)
        right: dict[str, list[float]] = {"acc": [], "acc_norm": []}
        told = []
        for row, item, likelihoods in zip(material.rows, items, found, strict=True):
            totals = [likelihood.total for likelihood in likelihoods]
            norms = [t / len(text) for t, text in zip(totals, item.choices, strict=True)]
            chosen = {"acc": _best(totals), "acc_norm": _best(norms)}
            for name, index in chosen.items():
                right[name].append(float(index == item.gold))
            told.append(_told(row, item, totals, **chosen))
        chance = mean([1 / len(item.choices) for item in items]).value
        metrics = {name: mean(values, chance=chance) for name, values in right.items()}
        facts = {"shots": len(shots)}
        return TaskResult(metrics, len(items), "items", _digest(questions), told, facts)


def _question(tokenizer: PreTrainedTokenizerBase, item: Choice) -> Question:
    pairs = [encode_pair(tokenizer, item.query, " " + text) for text in item.choices]
    return Question(tuple(pairs[0][0]), tuple(tuple(rest) for _, rest in pairs))


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda index: values[index])


def _told(row: Row, item: Choice, totals: Sequence[float], **chosen: int) -> dict[str, Any]:
    return {
        "where": str(row.origin),
        "gold": item.gold,
        **chosen,
        "log_likelihoods": [round(total, 6) for total in totals],
    }


@dataclass(frozen=True)
class Mmlu:
    """Letters as answers. ``acc`` is the macro mean over subjects.

    ``acc`` and ``acc_micro`` (over items) take the likeliest of " A", " B", ...; ``acc_letters``
    that of the letters' own tokens without a space, as QLoRA's code does. Shots are those of the
    item's subject.
    """

    def size(self, material: Material) -> int:
        """Items."""
        return len(material.rows)

    def run(
        self, generator: Generator, scorer: Scorer, material: Material, progress: Progress
    ) -> TaskResult:
        """Asks for every letter behind the question."""
        shots = defaultdict(list)
        for row in material.shots:
            shot = read_choice(row, letters=True)
            shots[shot.subject].append(shot)
        items = []
        for row in material.rows:
            item = read_choice(row, letters=True)
            written_out = item.query.startswith("The following are")
            header = "" if written_out else mmlu_header(item.subject)
            items.append(with_shots(item, shots[item.subject], header))
        tokenizer = generator.tokenizer
        questions = []
        for item in items:
            question = _question(tokenizer, item)
            bare = [tokenizer(a, add_special_tokens=False).input_ids[:1] for a in item.choices]
            letters = tuple(map(tuple, bare))
            questions.append(Question(question.beginning, question.continuations + letters))
        found = scorer.score(questions, progress=progress)
        groups: dict[str, dict[str, list[float]]] = {"acc": {}, "acc_letters": {}}
        told = []
        for row, item, likelihoods in zip(material.rows, items, found, strict=True):
            totals = [likelihood.total for likelihood in likelihoods]
            count = len(item.choices)
            chosen = {"acc": _best(totals[:count]), "acc_letters": _best(totals[count:])}
            for name, index in chosen.items():
                groups[name].setdefault(item.subject, []).append(float(index == item.gold))
            told.append(_told(row, item, totals[:count], **chosen))
        chance = mean([1 / len(item.choices) for item in items]).value
        flat = [value for values in groups["acc"].values() for value in values]
        metrics = {
            "acc": macro_mean(groups["acc"], chance=chance),
            "acc_micro": mean(flat, chance=chance),
            "acc_letters": macro_mean(groups["acc_letters"], chance=chance),
        }
        facts = {
            "shots": max(map(len, shots.values()), default=0),
            "subjects": {name: mean(v).value for name, v in sorted(groups["acc"].items())},
        }
        return TaskResult(metrics, len(items), "items", _digest(questions), told, facts)


@dataclass(frozen=True)
class Perplexity:
    """How well text is predicted, in windows: a text file is one text, each row of JSONL its own.

    With a stride below the window every token but the first ones has at least ``window - stride``
    tokens before it. The first token of a text without a beginning-of-text token has nothing to be
    predicted from and is not counted; with ``stride = window`` that is so for each window.
    """

    _MOST: ClassVar[int] = 2048

    def size(self, material: Material) -> int:
        """Unknown before tokenizing: texts."""
        return 1 if is_text_file(material.path) else len(material.rows)

    def run(
        self, generator: Generator, scorer: Scorer, material: Material, progress: Progress
    ) -> TaskResult:
        """Scores every window."""
        texts = _texts_of(material)
        length = material.window or min(scorer.max_length, self._MOST)
        stride = material.stride or length
        if length > scorer.max_length:
            what = f"is {length} tokens, the model takes {scorer.max_length}"
            raise InputError("too-long", where="--window", what=what, fix="make it shorter")
        if length < 2 or not 0 < stride <= length:
            what = f"window {length} and stride {stride} leave nothing to predict"
            raise InputError("bad-window", where="--stride", what=what, fix="0 < stride <= window")
        questions, owners, tokens = [], [], 0
        for number, text in enumerate(texts):
            ids, prefix = _ids_and_prefix(generator.tokenizer, text)
            tokens += len(ids)
            found = _windows(ids, prefix, length, stride)
            questions += found
            owners += [number] * len(found)
        if not questions:
            raise InputError("empty-data", where=material.path, what="holds no text to predict")
        share = len(texts) / len(questions)
        found = scorer.score(questions, progress=lambda n, note: progress(int(n * share), note))
        counts = [len(question.continuations[0]) for question in questions]
        sums = [-likelihoods[0].total for likelihoods in found]
        loss = _ratio(sums, counts)
        size = sum(len(text.encode()) for text in texts)
        metrics = {
            "perplexity": exponential(loss),
            "loss": loss,
            "bits_per_byte": Metric(
                loss.value * tokens / size / math.log(2),
                loss.stderr * tokens / size / math.log(2),
                share=False,
            ),
        }
        items = [
            {"text": owner, "tokens": count, "loss": round(total / count, 6)}
            for owner, count, total in zip(owners, counts, sums, strict=True)
        ]
        facts = {"window": length, "stride": stride, "texts": len(texts)}
        return TaskResult(metrics, sum(counts), "tokens", _digest(questions), items, facts)


def _texts_of(material: Material) -> list[str]:
    texts = []
    for row in material.rows:
        text = row.data.get("text")
        if not isinstance(text, str):
            keys = ", ".join(map(str, row.data)) or "none"
            what = f'has no text under "text" (keys: {keys})'
            fix = "give a text file, or rows with a text each"
            raise InputError("bad-row", where=str(row.origin), what=what, fix=fix)
        texts.append(text)
    if is_text_file(material.path):
        texts = ["".join(texts)]
    return [text for text in texts if text]


def _ids_and_prefix(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """A text's own ids, and what the tokenizer puts before every text."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    probe = tokenizer("a").input_ids
    own = tokenizer("a", add_special_tokens=False).input_ids
    before = next((n for n in range(len(probe)) if probe[n : n + len(own)] == own), 0)
    return ids, probe[:before]


def _windows(ids: Sequence[int], prefix: Sequence[int], length: int, stride: int) -> list[Question]:
    room, step = length - len(prefix), max(1, stride - len(prefix))
    windows, scored = [], 0
    for start in range(0, len(ids), step):
        stop = min(start + room, len(ids))
        context = max(start, scored)  # what is scored already is only looked at
        if context == start and not prefix:
            context += 1
        if context < stop:
            beginning = (*prefix, *ids[start:context])
            windows.append(Question(beginning, (tuple(ids[context:stop]),)))
        scored = stop
        if stop == len(ids):
            break
    return windows


def _ratio(sums: Sequence[float], counts: Sequence[int]) -> Metric:
    """A mean over tokens whose error takes windows, not tokens, as independent."""
    total, n = math.fsum(sums), len(sums)
    value = total / sum(counts)
    if n < 2:
        return Metric(value, math.nan, share=False)
    spread = math.fsum((s - value * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return Metric(value, math.sqrt(spread * n / (n - 1)) / sum(counts), share=False)


@dataclass(frozen=True)
class LastWord:
    """LAMBADA: the last word of a text, greedily (``acc``), and its perplexity."""

    def size(self, material: Material) -> int:
        """Items."""
        return len(material.rows)

    def run(
        self, generator: Generator, scorer: Scorer, material: Material, progress: Progress
    ) -> TaskResult:
        """Asks for the last word behind the others."""
        questions = []
        for row, text in zip(material.rows, _texts_of(material), strict=True):
            before, space, word = text.rpartition(" ")
            if not before.strip() or not word:
                what = "needs a text of several words"
                raise InputError("bad-row", where=str(row.origin), what=what)
            beginning, rest = encode_pair(generator.tokenizer, before, space + word)
            questions.append(Question(tuple(beginning), (tuple(rest),)))
        found: list[Likelihood] = [one[0] for one in scorer.score(questions, progress=progress)]
        metrics = {
            "acc": mean([float(one.greedy) for one in found]),
            "perplexity": exponential(mean([-one.total for one in found], share=False)),
        }
        items = [
            {"where": str(row.origin), "acc": one.greedy, "log_likelihood": round(one.total, 6)}
            for row, one in zip(material.rows, found, strict=True)
        ]
        return TaskResult(metrics, len(found), "items", _digest(questions), items)


@dataclass(frozen=True)
class Answers:
    """Generated answers against the last turn of each example: exact match, and F1 over words."""

    first: str

    def size(self, material: Material) -> int:
        """Answers."""
        return len(material.rows)

    def run(
        self, generator: Generator, scorer: Scorer, material: Material, progress: Progress
    ) -> TaskResult:
        """Generates greedily."""
        bad = BadLines(material.data.skip_bad_lines)
        examples, _ = to_examples(material.rows, material.data, bad=bad)
        bad.check()
        found = score_examples(
            generator,
            examples,
            Sampling(max_new_tokens=material.max_new_tokens),
            progress=progress,
        )
        if found.n == 0:
            what = "no row asks anything: plain text has no answer to compare"
            raise InputError("empty-data", where=material.path, what=what)
        overlap = [token_f1(p, r) for p, r in zip(found.predictions, found.references, strict=True)]
        metrics = {
            "exact_match": mean([float(right) for right in found.correct]),
            "f1": mean(overlap),
        }
        items = [
            {"prediction": p, "reference": r, "exact_match": right, "f1": round(f, 6)}
            for p, r, right, f in zip(
                found.predictions, found.references, found.correct, overlap, strict=True
            )
        ]
        ordered = {self.first: metrics.pop(self.first), **metrics}
        template = generator.template.name if generator.template is not None else ""
        asked = {"template": template, "system": material.data.system or ""}
        facts = {"max_new_tokens": material.max_new_tokens, "prompting": asked}
        return TaskResult(ordered, found.n, "answers", found.prompts_sha256, items, facts)


TASKS: dict[str, Task] = {
    **{
        name: MultipleChoice()
        for name in (
            "multiple_choice",
            "hellaswag",
            "arc_easy",
            "arc_challenge",
            "openbookqa",
            "commonsense_qa",
            "piqa",
        )
    },
    "mmlu": Mmlu(),
    "perplexity": Perplexity(),
    "lambada": LastWord(),
    "exact_match": Answers("exact_match"),
    "f1": Answers("f1"),
}


def task_of(name: str) -> Task:
    """The task of that name.

    Raises:
        InputError: there is none.
    """
    if name in TASKS:
        return TASKS[name]
    raise InputError("unknown-task", where=f"--tasks {name}", what="is not a task",
                     fix=nearest(name, list(TASKS)))  # fmt: skip
