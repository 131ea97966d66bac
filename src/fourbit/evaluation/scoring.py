"""How likely a model finds given continuations: batched by length, common beginnings computed once.

A beginning and its continuations lie in one row where the architecture allows it: each
continuation sees the beginning and itself, at the positions that it would have alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fourbit.data import Batch
from fourbit.integrations.anatomy import known_layers
from fourbit.integrations.attention import shared_beginning_mask
from fourbit.integrations.peft import base_model
from fourbit.integrations.prompts import prompted
from fourbit.objective import Objective

BATCH_TOKENS = 2048
"""Tokens of one forward pass unless told otherwise: the products are then as fast as they get."""
_CLOSE = 0.05
"""Nats a token by which the two ways may differ: far above rounding in bf16, far below a wrong
mask."""

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """A beginning of at least one token, and what may follow it, each of at least one token."""

    beginning: Tokens
    continuations: tuple[Tokens, ...]


@dataclass(frozen=True)
class Likelihood:
    """Of one continuation.

    Attributes:
        total: the sum of its tokens' log-probabilities, in nats.
        greedy: whether each of its tokens is the likeliest one at its place.
    """

    total: float
    greedy: bool


@dataclass
class _Row:
    """One row of a batch: tokens with their positions, and which outputs predict what."""

    tokens: list[int]
    positions: list[int]
    first: list[int]
    shared: list[int]
    asked: list[tuple[int, int, int, int]]
    """(place in the row, label, question, continuation)."""


class Scorer:
    """Log-likelihoods under one model.

    Args:
        model: a causal LM, adapters and learned prompts included.
        max_length: tokens of the longest sequence; None: what the model's config says.
        batch_tokens: of one forward pass, padding included.
        batch_size: rows of one forward pass instead; it changes speed and memory only.
        share: None: decided by looking at the model; False: every continuation has its own row.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_length: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
        batch_size: int | None = None,
        share: bool | None = None,
    ) -> None:
        self.model = model
        self.base: PreTrainedModel = base_model(model)
        self.max_length = max_length or longest_sequence(model)
        self._batch_tokens, self._batch_size = batch_tokens, batch_size
        self._objective = Objective(model)
        self._share = share
        self._checked = False

    @property
    def shares(self) -> bool:
        """Whether continuations of one beginning lie in one row; known after the first score."""
        return bool(self._share)

    @torch.no_grad()
    def score(
        self,
        questions: Sequence[Question],
        *,
        progress: Callable[[int, str], None] | None = None,
    ) -> list[list[Likelihood]]:
        """What each continuation of each question gets, in the order given.

        A sequence longer than ``max_length`` loses tokens from its beginning.

        Args:
            questions: at least one continuation each.
            progress: told how many questions are done.
        """
        training = self.model.training
        self.model.eval()
        try:
            self._look(questions)
            return self._score(questions, progress)
        finally:
            self.model.train(training)

    def _score(
        self, questions: Sequence[Question], progress: Callable[[int, str], None] | None
    ) -> list[list[Likelihood]]:
        rows = [row for n, q in enumerate(questions) for row in self._rows(n, q)]
        rows.sort(key=lambda row: -len(row.tokens))
        totals = [[0.0] * len(q.continuations) for q in questions]
        greedy = [[True] * len(q.continuations) for q in questions]
        waiting = [0] * len(questions)
        for row in rows:
            for number in {asked[2] for asked in row.asked}:
                waiting[number] += 1
        done = 0
        for batch in self._batches(rows):
            losses, likeliest = self._run(batch)
            asked = [one for row in batch for one in row.asked]
            for (_, _, n, c), loss, best in zip(asked, losses, likeliest, strict=True):
                totals[n][c] -= loss
                greedy[n][c] &= best
            for row in batch:
                for number in {one[2] for one in row.asked}:
                    waiting[number] -= 1
                    done += waiting[number] == 0
            if progress is not None:
                progress(done, "")
        return [
            [Likelihood(total, best) for total, best in zip(*found, strict=True)]
            for found in zip(totals, greedy, strict=True)
        ]

    def _look(self, questions: Sequence[Question]) -> None:
        """Once a model: which head is exact, and whether rows may be shared."""
        if self._checked or not questions:
            return
        self._checked = True
        probe = torch.tensor([[*questions[0].beginning, *questions[0].continuations[0]]])
        if probe.shape[1] > 1:
            at = torch.arange(probe.shape[1])[None]
            self._objective.choose_head(Batch(probe, at, probe.clone(), 0, []))
        if self._share is None:
            several = [q for q in questions if _saves(q)]
            self._share = bool(several) and _may_share(self.model, self.max_length)
            self._share = self._share and self._agrees(several[0])

    def _agrees(self, question: Question) -> bool:
        """Whether a shared row of this model gives what separate rows give."""
        found = {}
        for share in (True, False):
            self._share = share
            found[share] = self._score([question], None)[0]
        tokens = [len(continuation) for continuation in question.continuations]
        return all(
            abs(a.total - b.total) <= _CLOSE * count
            for a, b, count in zip(found[True], found[False], tokens, strict=True)
        )

    def _rows(self, number: int, question: Question) -> Iterator[_Row]:
        groups = [list(range(len(question.continuations)))]
        if not self._share or not self._fits(question, groups[0]):
            long = [c for c in groups[0] if not self._fits(question, [c], whole=False)]
            groups = [[c] for c in groups[0] if c in long or len(question.continuations[c]) > 1]
            single = [c for c in range(len(question.continuations)) if [c] not in groups]
            groups += [single] if single else []
        for group in groups:
            yield self._row(number, question, group)

    def _fits(self, question: Question, group: list[int], *, whole: bool = True) -> bool:
        longest = max(len(question.continuations[c]) for c in group)
        return len(question.beginning) + longest - 1 <= self.max_length

    def _row(self, number: int, question: Question, group: list[int]) -> _Row:
        longest = max(len(question.continuations[c]) for c in group)
        beginning = list(question.beginning)
        beginning = beginning[max(0, len(beginning) + longest - 1 - self.max_length) :]
        start = len(beginning)
        row = _Row(beginning, list(range(start)), [0] * start, [0] * start, [])
        for index in group:
            continuation = question.continuations[index]
            at = len(row.tokens)
            for step, label in enumerate(continuation):
                row.asked.append((start - 1 if step == 0 else at + step - 1, label, number, index))
            rest = len(continuation) - 1
            row.tokens += continuation[:-1]
            row.positions += range(start, start + rest)
            # a lone continuation goes on where the beginning ends
            row.first += [at if len(group) > 1 else 0] * rest
            row.shared += [start if len(group) > 1 else 0] * rest
        return row

    def _batches(self, rows: Sequence[_Row]) -> Iterator[list[_Row]]:
        """Rows sorted by length, some at a time."""
        start = 0
        while start < len(rows):
            count = self._batch_size or max(1, self._batch_tokens // len(rows[start].tokens))
            yield list(rows[start : start + count])
            start += count

    def _run(self, rows: list[_Row]) -> tuple[list[float], list[bool]]:
        width = max(len(row.tokens) for row in rows)
        device = self._objective.device

        def table(values: Sequence[Sequence[int]], fill: int) -> Tensor:
            return torch.tensor([[*line, *[fill] * (width - len(line))] for line in values])

        ids = table([row.tokens for row in rows], 0)
        positions = table([row.positions for row in rows], 0)
        if any(any(row.shared) for row in rows):
            first = table([row.first for row in rows], width).to(torch.int32)
            shared = table([row.shared for row in rows], 0).to(torch.int32)
            inputs = {
                "input_ids": ids.to(device),
                "position_ids": positions.to(device),
                "attention_mask": shared_beginning_mask(first.to(device), shared.to(device)),
            }
        else:
            # padding lies behind all that counts, where causal layers do not look
            at = torch.arange(width).expand(len(rows), -1)
            inputs = self._objective.inputs_of(Batch(ids, at, torch.full_like(ids, -100), 0, []))
        places, labels = [], []
        for number, row in enumerate(rows):
            places += [number * width + place for place, *_ in row.asked]
            labels += [label for _, label, *_ in row.asked]
        losses, likeliest = self._objective.token_losses(
            inputs, torch.tensor(places, device=device), torch.tensor(labels, device=device)
        )
        return losses.tolist(), likeliest.tolist()


def longest_sequence(model: nn.Module) -> int:
    """Positions that the architecture was made for; 2048 where its config does not say."""
    text = base_model(model).config.get_text_config()
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        found = getattr(text, name, None)
        if isinstance(found, int) and found > 0:
            return found
    return 2048


def _saves(question: Question) -> bool:
    """Whether its continuations would need more than one row of their own."""
    return sum(len(continuation) > 1 for continuation in question.continuations) > 1


def _may_share(model: nn.Module, max_length: int) -> bool:
    """Whether this architecture takes our mask; `Scorer` then tries it."""
    base = base_model(model)
    window = getattr(base.config.get_text_config(), "sliding_window", None)
    known = bool(known_layers(base)) and prompted(model) is None
    return known and (window is None or window >= max_length)
