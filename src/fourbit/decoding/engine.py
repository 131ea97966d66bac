"""Decoding on a CPU: prompts by the model's own forward, then one native call for each token."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from fourbit import native
from fourbit.decoding.growing import Growing
from fourbit.decoding.layout import Sketch, Step, check_sizes, lay_out
from fourbit.decoding.parts import Parts
from fourbit.decoding.reading import read_prompts
from fourbit.decoding.sampling import GREEDY, Choice
from fourbit.integrations import anatomy

_PREFILL_TOKENS = 4096
"""Tokens of one forward of the prompts: bounds its activations."""
_SKETCHED_TOKENS = 16
"""A sketch of the head pays for answers of this length on."""


class HeadSketch:
    """An output projection in eight bits, with how far each row is from it.

    The engine reads it in place of the head to learn which few tokens can be the likeliest; these
    it scores with the head, so that the result is the same.

    Args:
        weight: of the head, float32 or bfloat16 ``[V, D]``.
    """

    def __init__(self, weight: Tensor) -> None:
        rows, columns = weight.shape
        self.of = _identity(weight)
        self.codes = torch.zeros(rows, -(-columns // 64) * 64, dtype=torch.int8)
        self.scales, self.errors, self.sizes = (
            torch.empty(rows, dtype=torch.float32, device="cpu") for _ in range(3)
        )
        for start in range(0, rows, 4096):
            part = slice(start, start + 4096)
            exact = weight[part].float()
            scales = exact.abs().amax(dim=1).div_(127).clamp_(min=torch.finfo(torch.float32).tiny)
            codes = (exact / scales[:, None]).round_()
            self.codes[part, :columns] = codes
            rounded = codes.mul_(scales[:, None])
            self.scales[part], self.sizes[part] = scales, rounded.norm(dim=1)
            self.errors[part] = rounded.sub_(exact).norm(dim=1)
        self.layout = Sketch(
            codes=self.codes.data_ptr(),
            scales=self.scales.data_ptr(),
            errors=self.errors.data_ptr(),
            sizes=self.sizes.data_ptr(),
        )

    def fits(self, weight: Tensor) -> bool:
        """Whether it was made of this weight, as it is now."""
        return self.of == _identity(weight)


def _identity(weight: Tensor) -> tuple[object, ...]:
    return weight.data_ptr(), weight._version, weight.shape, weight.dtype


@dataclass
class _Batch:
    """The sequences at work; positions of all of them lie one after the other in the cache.

    Lists, because a small model's token takes no longer than some fifty calls of torch.
    """

    starts: list[int]
    capacities: list[int]
    places: list[int]  # of the next token
    cache: list[tuple[Tensor, Tensor]]
    tables: list[Tensor]


class _Room:
    """What steps of up to ``rows`` sequences, none over ``longest``, read from and write to."""

    def __init__(
        self, rows: int, longest: int, threads: int, *, vocabulary: int, workspace: int
    ) -> None:
        self.rows, self.longest, self.threads = rows, longest, threads
        array = ctypes.c_int64 * rows
        self.tokens, self.places, self.starts, self.capacities, self.best = (
            array() for _ in range(5)
        )
        self.logits = torch.empty((rows, vocabulary), dtype=torch.float32, device="cpu")
        self.workspace = torch.empty(workspace, dtype=torch.uint8, device="cpu")
        self.step = Step(
            places=ctypes.addressof(self.places),
            starts=ctypes.addressof(self.starts),
            capacities=ctypes.addressof(self.capacities),
            best=ctypes.addressof(self.best),
            workspace=self.workspace.data_ptr(),
        )


class Decoder:
    """Continues token sequences on a CPU; see `build_decoder`.

    Args:
        parts: the model, on the CPU.
        sketch: of an earlier decoder; used if the head is still the same.

    Raises:
        UnknownModel: the engine does not read this model's weights.
    """

    def __init__(self, parts: Parts, sketch: HeadSketch | None = None) -> None:
        check_sizes()
        self._layout = layout = lay_out(parts)
        fits = sketch is not None and layout.head is not None and sketch.fits(layout.head)
        self._sketch = sketch if fits else None
        self._batch: _Batch | None = None
        self._room: _Room | None = None
        self._step = native.kernel("decode_step", "ppli")
        self._measure = native.kernel("decode_workspace", "pllip")

    @property
    def sketch(self) -> HeadSketch | None:
        """What was made of the head for greedy answers to a single prompt, if it was."""
        return self._sketch

    @property
    def vocabulary(self) -> int:
        """How many tokens the head scores."""
        return int(self._layout.model.head.rows)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], *, room: int) -> Tensor:
        """Begins a batch, replacing the one before.

        Args:
            prompts: token ids, at least one each.
            room: how many tokens each row may grow by.

        Returns:
            Scores of each prompt's next token, float32 ``[B, V]``.
        """
        return self._start(prompts, room)[0]

    def step(self, tokens: Tensor, *, rows: Tensor | None = None) -> Tensor:
        """Appends a token to rows of the batch.

        Args:
            tokens: int64 ``[A]``.
            rows: which of the batch's rows, int64 ``[A]``; None for all of them.

        Returns:
            Scores of the next token, float32 ``[A, V]``, good until the next call.
        """
        chosen = range(len(tokens)) if rows is None else rows.tolist()
        return self._call(chosen, tokens=tokens.tolist())[0]

    def release(self) -> None:
        """Frees the cache."""
        self._batch = self._room = None
        self._layout.model.sketch = None

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

        Args:
            prompts: token ids, at least one each.
            max_new_tokens: upper bound.
            stop: ids that end a row; its place in the batch then costs nothing any more.
            choice: how tokens are chosen; sampling draws from torch's generator.
            on_tokens: told the new token of each row that goes on.
        """
        growing = Growing(prompts, stop=stop, choice=choice, on_tokens=on_tokens)
        if choice.plain and len(prompts) == 1 and max_new_tokens >= _SKETCHED_TOKENS:
            self._make_sketch()
        try:
            logits, tokens = self._start(prompts, max_new_tokens)
            for count in range(max_new_tokens):
                growing.take(tokens if choice.plain else growing.choose(logits))
                if not growing.rows or count + 1 == max_new_tokens:
                    break
                logits, tokens = self._call(growing.rows, tokens=growing.last, greedy=choice.plain)
        finally:
            self.release()
        return growing.found

    def _make_sketch(self) -> None:
        if self._sketch is None and self._layout.head is not None:
            self._sketch = HeadSketch(self._layout.head)
        if self._sketch is not None:
            self._layout.model.sketch = ctypes.addressof(self._sketch.layout)
            self._room = None  # it takes more

    def _start(self, prompts: Sequence[Sequence[int]], room: int) -> tuple[Tensor, list[int]]:
        """Begins a batch: scores and likeliest token after each prompt."""
        self._begin([len(prompt) + room for prompt in prompts])
        return self._call(range(len(prompts)), states=self._read(prompts))

    def _begin(self, capacities: list[int]) -> None:
        layout = self._layout
        total, longest = sum(capacities), max(capacities)
        starts = [0, *itertools.accumulate(capacities)][:-1]
        batch = _Batch(starts, capacities, [0] * len(capacities), cache=[], tables=[])
        tables: dict[object, tuple[Tensor, Tensor]] = {}
        for layer, part in zip(layout.layers, layout.parts.layers, strict=True):
            width = total * layer.kv_heads * layer.head_dim
            keys = torch.empty(width, dtype=layout.cache_dtype)
            values = torch.empty_like(keys)
            batch.cache.append((keys, values))
            layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
            if not part.rotary:
                continue
            if part.kind not in tables:
                positions = torch.arange(longest)[None]
                cos, sin = anatomy.rotary_tables(
                    layout.parts.source, part.module, positions, dtype=torch.float32
                )
                tables[part.kind] = (cos[0].contiguous(), sin[0].contiguous())
            cos, sin = tables[part.kind]
            layer.cos, layer.sin, layer.rotary = cos.data_ptr(), sin.data_ptr(), cos.shape[-1]
        batch.tables = [table for pair in tables.values() for table in pair]
        self._batch = batch

    def _read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Runs the prompts and fills the cache; returns the last state of each, ``[B, D]``."""
        batch = self._batch
        assert batch is not None
        cache, states = read_prompts(self._layout.parts.source, prompts, tokens=_PREFILL_TOKENS)
        lengths = [len(prompt) for prompt in prompts]
        self._keep(cache, lengths)
        batch.places = lengths
        return states

    def _keep(self, cache: DynamicCache, lengths: list[int]) -> None:
        batch = self._batch
        assert batch is not None
        for index, layer in enumerate(self._layout.layers):
            held: Any = cache.layers[index]
            for target, source in zip(batch.cache[index], (held.keys, held.values), strict=True):
                for row, length in enumerate(lengths):
                    size = layer.kv_heads * layer.head_dim
                    start, room = batch.starts[row], batch.capacities[row]
                    part = target[start * size : (start + room) * size]
                    part = part.view(layer.kv_heads, room, layer.head_dim)
                    part[:, :length].copy_(source[row, :, :length])
            held.keys = held.values = None

    def _call(
        self,
        rows: Sequence[int],
        *,
        tokens: Sequence[int] | None = None,
        states: Tensor | None = None,
        greedy: bool = False,
    ) -> tuple[Tensor, list[int]]:
        """Scores ``[A, V]`` and the likeliest token after one token more, or of states.

        Greedy, a single row with a sketch gets no scores.
        """
        batch, model = self._batch, self._layout.model
        assert batch is not None
        count, longest = len(rows), max(batch.capacities)
        room = self._make_room(count, longest)
        for at, row in enumerate(rows):
            place, capacity = batch.places[row], batch.capacities[row]
            room.places[at], room.starts[at] = place, batch.starts[row]
            room.capacities[at] = capacity
            if tokens is not None:
                assert place < capacity
                room.tokens[at] = tokens[at]
                batch.places[row] = place + 1
        sketched = greedy and count == 1 and bool(model.sketch)
        step = room.step
        step.tokens = None if tokens is None else ctypes.addressof(room.tokens)
        step.states = None if states is None else states.data_ptr()
        step.logits = None if sketched else room.logits.data_ptr()
        step.rows = count
        self._step(ctypes.addressof(model), ctypes.addressof(step), longest, room.threads)
        return room.logits[:count], room.best[:count]

    def _make_room(self, rows: int, longest: int) -> _Room:
        room, threads = self._room, torch.get_num_threads()
        if room and rows <= room.rows and longest <= room.longest and threads == room.threads:
            return room
        bytes_ = ctypes.c_int64()
        model = ctypes.addressof(self._layout.model)
        self._measure(model, rows, longest, threads, ctypes.addressof(bytes_))
        self._room = _Room(
            rows, longest, threads, vocabulary=self.vocabulary, workspace=bytes_.value
        )
        return self._room
