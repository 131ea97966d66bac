"""Decoding on a GPU: prompts by the model's own forward, then a recorded step for each token.

A step is recorded once for each number of rows and each capacity of the cache, both rounded up to
powers of two, and replayed from then on. Greedy answers need nothing from the host: a step leaves
its token where the next one reads it, and the host looks every few steps which rows have ended.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from fourbit.decoding.capture import Capture
from fourbit.decoding.engine import HeadSketch
from fourbit.decoding.growing import Growing
from fourbit.decoding.parts import Parts
from fourbit.decoding.reading import read_prompts
from fourbit.decoding.sampling import GREEDY, Choice
from fourbit.decoding.step import Network, State
from fourbit.errors import InputError
from fourbit.integrations import anatomy

_PREFILL_TOKENS = 8192
"""Tokens of one forward of the prompts: bounds its activations."""
_LEAST_CAPACITY = 256
"""Positions of the smallest cache that a step is recorded for."""
_MOST_ROWS = 64
"""Of one batch: up to here 4-bit weights are multiplied without being expanded."""
_UNSEEN_STEPS = 8
"""Greedy steps between two looks of the host; at most so many less one are computed in vain."""


class _Memory:
    """Caches and tables that steps were recorded on; it never moves.

    Args:
        parts: the model.
        places: rows times positions that each layer's cache holds.
        longest: positions that the tables hold.
    """

    def __init__(self, parts: Parts, *, places: int, longest: int) -> None:
        self.places, self.longest, self._parts = places, longest, parts
        device = parts.table.weight.device
        # not empty: what no token was written to is multiplied by zero
        self._flat = [
            torch.zeros(
                2, places * layer.heads.kv_heads * layer.heads.head_dim,
                dtype=parts.dtype, device=device,
            )
            for layer in parts.layers
        ]  # fmt: skip
        self.tables: dict[str | None, tuple[Tensor, Tensor]] = {}
        positions = torch.arange(longest, device=device)[None]
        for layer in parts.layers:
            if layer.rotary and layer.kind not in self.tables:
                cos, sin = anatomy.rotary_tables(
                    parts.source, layer.module, positions, dtype=parts.dtype
                )
                self.tables[layer.kind] = cos[0].contiguous(), sin[0].contiguous()
        self.recorded: dict[tuple[int, int, int], _Recording] = {}
        self.inputs: dict[int, _Inputs] = {}

    def caches(self, rows: int, capacity: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, ``[rows, kv_heads, capacity, head_dim]``."""
        found = []
        for flat, layer in zip(self._flat, self._parts.layers, strict=True):
            shape = rows, layer.heads.kv_heads, capacity, layer.heads.head_dim
            used = rows * capacity * shape[1] * shape[3]
            keys, values = flat[:, :used].unflatten(1, shape)
            found.append((keys, values))
        return found


@dataclass(frozen=True)
class _Inputs:
    """What steps of so many rows share: tokens and places ``[2, R]``, logits ``[R, V]``."""

    numbers: Tensor
    logits: Tensor


@dataclass(frozen=True)
class _Recording:
    state: State
    replay: Callable[[], None]


@dataclass
class _Batch:
    """The sequences at work.

    Attributes:
        places: of each one's next token.
        limits: at which place each must have ended.
        rows: of the step, at least as many.
        capacity: positions of each row in memory.
    """

    places: list[int]
    limits: list[int]
    rows: int
    capacity: int


class GraphDecoder:
    """Continues token sequences on a GPU; see `build_decoder`.

    Args:
        parts: the model.
        capture: records a step.

    Raises:
        UnknownModel: a weight is held in a form that a step does not compute.
    """

    def __init__(self, parts: Parts, capture: Capture) -> None:
        self._parts, self._network, self._capture = parts, Network(parts), capture
        self._device = parts.table.weight.device
        self._memory: _Memory | None = None
        self._batch: _Batch | None = None
        self._records = True

    @property
    def sketch(self) -> HeadSketch | None:
        """None: a GPU reads the whole head."""
        return None

    @property
    def vocabulary(self) -> int:
        """How many tokens the head scores."""
        return self._network.vocabulary

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], *, room: int) -> Tensor:
        """Begins a batch, replacing the one before.

        Args:
            prompts: token ids, at least one each.
            room: how many tokens each row may grow by.

        Returns:
            Scores of each prompt's next token, float32 ``[B, V]``.

        Raises:
            InputError: a prompt is longer than the positions that the model has learned.
        """
        lengths = [len(prompt) for prompt in prompts]
        self._require_positions(max(lengths))
        limits = [length + room for length in lengths]
        rows, capacity = _rounded(len(prompts), 1), _rounded(max(limits), _LEAST_CAPACITY)
        self._reserve(rows, capacity)
        self._batch = _Batch(lengths, limits, rows, capacity)
        cache, states = read_prompts(self._parts.source, prompts, tokens=_PREFILL_TOKENS)
        self._keep(cache, lengths)
        return self._network.score(states.to(self._parts.dtype))

    @torch.no_grad()
    def step(self, tokens: Tensor, *, rows: Tensor | None = None) -> Tensor:
        """Appends a token to rows of the batch.

        Args:
            tokens: int64 ``[A]``.
            rows: which of the batch's rows, int64 ``[A]``; None for all of them.

        Returns:
            Scores of the next token, float32 ``[A, V]``, good until the next call.
        """
        chosen = list(range(len(tokens))) if rows is None else rows.tolist()
        state = self._advance(chosen, tokens.tolist())
        if chosen == list(range(len(chosen))):
            return state.logits[: len(chosen)]
        return state.logits[torch.tensor(chosen, device=self._device)]

    def release(self) -> None:
        """Frees the cache and what was recorded on it."""
        self._batch = self._memory = None

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop: Collection[int] = (),
        choice: Choice = GREEDY,
        on_tokens: Callable[[dict[int, int]], None] | None = None,
    ) -> list[list[int]]:
        """What follows each prompt, without the token that ended it.

        The cache and the recorded steps stay for the next batch, until `release`.

        Args:
            prompts: token ids, at least one each.
            max_new_tokens: upper bound.
            stop: ids that end a row.
            choice: how tokens are chosen; sampling draws from torch's generator.
            on_tokens: told the new token of each row that goes on.

        Raises:
            InputError: an answer outgrows the positions that the model has learned.
        """
        found: list[list[int]] = []
        for start in range(0, len(prompts), _MOST_ROWS):
            part = prompts[start : start + _MOST_ROWS]
            growing = Growing(part, stop=stop, choice=choice, on_tokens=_shifted(on_tokens, start))
            if max_new_tokens > 0:
                each = 1 if on_tokens is not None else _UNSEEN_STEPS
                run = self._likeliest(part, growing, max_new_tokens, each)
                if not choice.plain:
                    run = self._chosen(part, growing, max_new_tokens)
                for tokens in run:
                    growing.take(tokens)
                    if not growing.rows:
                        break
            found += growing.found
        return found

    def _chosen(
        self, prompts: Sequence[Sequence[int]], growing: Growing, count: int
    ) -> Iterator[list[int]]:
        """A token of each row that goes on, ``count`` times, as `Choice` says."""
        logits = self.prefill(prompts, room=count)
        yield growing.choose(logits)
        for _ in range(1, count):
            rows = torch.tensor(growing.rows)
            yield growing.choose(self.step(torch.tensor(growing.last), rows=rows))

    def _likeliest(
        self, prompts: Sequence[Sequence[int]], growing: Growing, count: int, each: int
    ) -> Iterator[list[int]]:
        """The likeliest token of each row that goes on, ``count`` times.

        Args:
            prompts: to begin with.
            growing: whose rows go on.
            count: of tokens.
            each: so many steps are launched before the host looks at one.
        """
        yield self.prefill(prompts, room=count).argmax(dim=-1).tolist()
        left = count - 1
        tokens: list[int] | None = growing.last
        while left:
            seen = []
            for _ in range(min(each, left, self._positions_left(growing.rows))):
                state = self._advance(growing.rows, tokens)
                tokens = None  # from here on each step leaves them for the next
                seen.append(state.tokens.clone())
            left -= len(seen)
            for row in torch.stack(seen).tolist():
                yield [row[number] for number in growing.rows]

    def _advance(self, rows: Sequence[int], tokens: Sequence[int] | None) -> State:
        """Appends to rows the given tokens, or those that the last step left.

        In the second case the rows are among those of the last step.
        """
        batch = self._batch
        assert batch is not None
        self._require_positions(1 + max(batch.places[row] for row in rows))
        for row in rows:
            assert batch.places[row] < batch.limits[row]
        if tokens is not None:
            given = torch.zeros(2, batch.rows, dtype=torch.long)
            # what the others write at their next place is overwritten when they get there
            given[1, : len(batch.places)] = torch.tensor(batch.places)
            given[0, list(rows)] = torch.tensor(tokens)
            # before anything is recorded, which writes there as well
            self._inputs().numbers.copy_(given)
        # of all rows, for a step writes to each of them; one that is full is not read again
        recording = self._recording(min(1 + max(batch.places), batch.capacity))
        recording.replay()
        for row in rows:
            batch.places[row] += 1
        return recording.state

    def _inputs(self) -> _Inputs:
        batch, memory = self._batch, self._memory
        assert batch is not None
        assert memory is not None
        if batch.rows not in memory.inputs:
            device = self._device
            numbers = torch.zeros(2, batch.rows, dtype=torch.long, device=device)
            shape = batch.rows, self.vocabulary
            memory.inputs[batch.rows] = _Inputs(
                numbers, torch.zeros(shape, dtype=torch.float32, device=device)
            )
        return memory.inputs[batch.rows]

    def _recording(self, longest: int) -> _Recording:
        """The step for caches that hold ``longest`` positions, recorded where it was not yet."""
        batch, memory = self._batch, self._memory
        assert batch is not None
        assert memory is not None
        capacity = _rounded(longest, _LEAST_CAPACITY)
        key = batch.rows, batch.capacity, capacity
        if key not in memory.recorded:
            caches = [
                (keys[:, :, :capacity], values[:, :, :capacity])
                for keys, values in memory.caches(batch.rows, batch.capacity)
            ]
            inputs = self._inputs()
            tokens, places = inputs.numbers
            state = State(tokens, places, inputs.logits, caches, memory.tables)
            memory.recorded[key] = self._record(state)
        return memory.recorded[key]

    def _record(self, state: State) -> _Recording:
        network = self._network

        def run() -> None:
            network.step(state)

        if not self._records:
            return _Recording(state, run)
        before = state.tokens.clone(), state.places.clone()
        try:
            replay = self._capture(run)
        except RuntimeError as error:
            self._records, replay = False, run
            first = next((line for line in str(error).splitlines() if line.strip()), "")
            warnings.warn(
                f"a decoding step cannot be recorded and is launched anew each time: {first}",
                stacklevel=2,
            )
        # recording ran it
        state.tokens.copy_(before[0])
        state.places.copy_(before[1])
        return _Recording(state, replay)

    def _reserve(self, rows: int, capacity: int) -> None:
        memory = self._memory
        if memory and rows * capacity <= memory.places and capacity <= memory.longest:
            return
        places, longest = rows * capacity, capacity
        if memory:
            longest = max(longest, memory.longest)
        self._memory = memory = None  # before the new one is made
        self._memory = _Memory(self._parts, places=places, longest=longest)

    def _keep(self, cache: DynamicCache, lengths: list[int]) -> None:
        batch, memory = self._batch, self._memory
        assert batch is not None
        assert memory is not None
        count, longest = len(lengths), max(lengths)
        for index, targets in enumerate(memory.caches(batch.rows, batch.capacity)):
            held: Any = cache.layers[index]
            for target, source in zip(targets, (held.keys, held.values), strict=True):
                target[:count, :, :longest].copy_(source[:, :, :longest])
            held.keys = held.values = None

    def _positions_left(self, rows: Sequence[int]) -> int:
        """How many steps can be launched unseen, for an answer may end before they run out."""
        table, batch = self._parts.positions, self._batch
        assert batch is not None
        if table is None:
            return _UNSEEN_STEPS
        return max(1, table.num_embeddings - max(batch.places[row] for row in rows))

    def _require_positions(self, longest: int) -> None:
        table = self._parts.positions
        if table is not None and longest > table.num_embeddings:
            raise InputError(
                "too-long",
                where="prompt",
                what=f"{longest} tokens; the model has {table.num_embeddings} positions",
                fix="a shorter prompt, or fewer new tokens",
            )


def _rounded(count: int, least: int) -> int:
    """The next power of two."""
    return max(least, 1 << (count - 1).bit_length())


def _shifted(
    told: Callable[[dict[int, int]], None] | None, start: int
) -> Callable[[dict[int, int]], None] | None:
    """Tells of the rows of a part of the prompts under their numbers among all."""
    if told is None or start == 0:
        return told
    return lambda fresh: told({row + start: token for row, token in fresh.items()})
