"""The bookkeeping of answers while they grow, whoever computes their scores."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from torch import Tensor

from fourbit.decoding.sampling import Choice, choose


class Growing:
    """What follows each prompt so far.

    Args:
        prompts: token ids.
        stop: ids that end a row; they are not part of it.
        choice: how tokens are chosen.
        on_tokens: told the new token of each row that goes on.

    Attributes:
        found: the new tokens of every prompt.
        rows: numbers of the prompts that go on, ascending.
        last: the newest token of each of these.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        stop: Collection[int],
        choice: Choice,
        on_tokens: Callable[[dict[int, int]], None] | None,
    ) -> None:
        self.found: list[list[int]] = [[] for _ in prompts]
        self.rows, self.last = list(range(len(prompts))), []
        self._seen = None if choice.repetition_penalty == 1 else [list(p) for p in prompts]
        self._stop, self._choice, self._on_tokens = frozenset(stop), choice, on_tokens

    def choose(self, logits: Tensor) -> list[int]:
        """A token for each row that goes on, from its scores ``[A, V]``, which are changed."""
        said = None if self._seen is None else [self._seen[row] for row in self.rows]
        return choose(logits, self._choice, seen=said).tolist()

    def take(self, tokens: Sequence[int]) -> None:
        """Appends a token to each row that goes on, or ends it."""
        fresh = {
            row: token
            for row, token in zip(self.rows, tokens, strict=True)
            if token not in self._stop
        }
        for row, token in fresh.items():
            self.found[row].append(token)
            if self._seen is not None:
                self._seen[row].append(token)
        if self._on_tokens is not None and fresh:
            self._on_tokens(fresh)
        self.rows, self.last = list(fresh), list(fresh.values())
