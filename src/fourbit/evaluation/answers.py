"""Scores of generated answers against references."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fourbit.data import Example, prompt_of
from fourbit.evaluation.metrics import mean
from fourbit.generate import Generator, Sampling


@dataclass(frozen=True)
class ExactMatch:
    """Share of answers equal to their reference.

    Attributes:
        score: between 0 and 1.
        stderr: standard error of the share.
        n: answers scored.
        predictions: in the order of the rows.
        correct: which of them match.
        references: what they were compared with.
        prompts_sha256: of the prompts' token ids, where the answers were generated here.
    """

    score: float
    stderr: float
    n: int
    predictions: tuple[str, ...]
    correct: tuple[bool, ...]
    references: tuple[str, ...] = ()
    prompts_sha256: str = ""


def matches(prediction: str, reference: str) -> bool:
    """Whether an answer equals its reference.

    A reference that is a JSON object or array is compared as JSON (order of keys and white space
    do not count, everything else does); any other text is compared exactly, outer white space
    apart.
    """
    wanted = _json(reference)
    if isinstance(wanted, (dict, list)):
        found = _json(prediction)
        # Python holds True == 1 and 1 == 1.0; JSON does not.
        return json.dumps(found, sort_keys=True) == json.dumps(wanted, sort_keys=True)
    return prediction.strip() == reference.strip()


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> ExactMatch:
    """Scores answers; both sequences have the same length."""
    correct = tuple(matches(p, r) for p, r in zip(predictions, references, strict=True))
    found = mean([float(right) for right in correct])
    return ExactMatch(
        found.value, found.stderr, len(correct), tuple(predictions), correct, tuple(references)
    )


def score_examples(
    generator: Generator,
    examples: Sequence[Example],
    sampling: Sampling,
    *,
    progress: Callable[[int, str], None] | None = None,
) -> ExactMatch:
    """Generates an answer to each example's prompt and compares it with its last turn."""
    prompts, references = [], []
    for example in examples:
        prompt = prompt_of(example)
        if prompt is None:
            continue  # raw text asks nothing
        prompts.append(generator.prompt_ids(prompt.messages))
        references.append(prompt.reference)
    answers = generator.answers(prompts, sampling, progress=progress)
    asked = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    found = exact_match([answer.text for answer in answers], references)
    return replace(found, prompts_sha256=asked)
