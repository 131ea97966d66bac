"""Choosing the next token from its scores, with the meanings of transformers' generation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen; temperature 0 is greedy.

    Attributes:
        temperature: scores are divided by it; 0 takes the likeliest token.
        top_p: smallest set of tokens with this probability; 1 keeps all.
        top_k: so many of the likeliest tokens; 0 keeps all.
        repetition_penalty: scores of tokens that occurred are divided by it, negative ones
            multiplied; 1 for none.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is always the one."""
        return self.temperature == 0 and self.repetition_penalty == 1


GREEDY = Choice()


def choose(logits: Tensor, choice: Choice, *, seen: list[list[int]] | None = None) -> Tensor:
    """The next token of each row, int64 ``[B]``, drawn from torch's generator.

    Args:
        logits: float32 ``[B, V]``; changed in place.
        choice: how.
        seen: what each row consists of so far, for the repetition penalty.
    """
    if seen is not None and choice.repetition_penalty != 1:
        for row, tokens in zip(logits, seen, strict=True):
            index = torch.tensor(sorted(set(tokens)))
            scores = row[index]
            penalty = choice.repetition_penalty
            row[index] = torch.where(scores < 0, scores * penalty, scores / penalty)
    if choice.temperature == 0:
        return logits.argmax(dim=-1)
    logits.div_(choice.temperature)
    if 0 < choice.top_k < logits.shape[-1]:
        least = logits.topk(choice.top_k, dim=-1).values[:, -1:]
        logits.masked_fill_(logits < least, -torch.inf)
    if choice.top_p < 1:
        ascending, order = logits.sort(dim=-1)
        below = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - choice.top_p
        below[:, -1] = False
        logits.masked_fill_(below.scatter(1, order, below), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1)[:, 0]
