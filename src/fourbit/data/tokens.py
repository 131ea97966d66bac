"""Examples to tokens: one tokenization of each text, with the loss on the right part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fourbit.data.chat import render_example, render_whole, tokens_in_spans
from fourbit.data.dataset import Dataset, TokenStats
from fourbit.data.readers import TEXT_SUFFIXES
from fourbit.data.templates import (
    TEMPLATE_FAULTS,
    ChatTemplate,
    resolve_template,
    template_fault,
    turns_for,
)
from fourbit.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fourbit.data.config import DataConfig
    from fourbit.data.formats import Example
    from fourbit.data.rows import Origin

Progress = Callable[[int, int], None]
"""Called with the examples done and their number."""

_BATCH_ROWS = 256
_BATCH_CHARACTERS = 2**20
_SHOWN_TOKENS = 160
_Tokens = tuple[NDArray[np.int32], NDArray[np.bool_]]


def tokenize(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    vocab_size: int | None = None,
    context_length: int | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Turns examples into samples of at most ``max_length`` tokens.

    Args:
        examples: what to learn; at least one.
        tokenizer: the model's tokenizer; a fast one when there are chats.
        config: template, lengths and what carries the loss.
        vocab_size: rows of the model's embedding, to check token ids against.
        context_length: longest sequence the model knows.
        progress: told after each batch.

    Raises:
        InputError: no template, a token outside the vocabulary, too many samples without any
            supervised token.
    """
    check_context(config, context_length)
    makers = _Makers(tokenizer, config, any(e.messages is not None for e in examples))
    builder = _Builder(tokenizer, config)
    done = 0
    for batch in _batches(examples):
        for example, samples in makers.make(batch):
            builder.add(example, samples)
        done += len(batch)
        if progress is not None:
            progress(done, len(examples))
    builder.stats.apart = makers.apart
    builder.stats.tools_hidden = makers.tools_hidden
    dataset = builder.finish()
    _check_vocabulary(dataset, tokenizer, vocab_size)
    return dataset


def _batches(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """Bounded in characters too: a token and its offsets take far more memory than its text."""
    batch: list[Example] = []
    size = 0
    for example in examples:
        length = len(example.text or "") + sum(len(t["content"]) for t in example.messages or ())
        if batch and (len(batch) == _BATCH_ROWS or size + length > _BATCH_CHARACTERS):
            yield batch
            batch, size = [], 0
        batch.append(example)
        size += length
    if batch:
        yield batch


def _is_running_text(example: Example) -> bool:
    """Rows of a plain text file are cut out of one text; they are no documents of their own."""
    suffixes = {suffix.lower() for suffix in PurePath(example.origin.file).suffixes}
    return bool(suffixes & set(TEXT_SUFFIXES))


def cut_text(text: str, limit: int) -> list[str]:
    """Cuts a text into pieces of at most ``limit`` characters, before white space if there is some.

    Most tokenizers attach the space before a word to the word, so this hardly changes the tokens.
    """
    pieces, start = [], 0
    while len(text) - start > limit:
        space = max(text.rfind(mark, start + 1, start + limit) for mark in " \n")
        end = space if space > start else start + limit
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def check_context(config: DataConfig, context_length: int | None) -> None:
    """Refuses samples longer than the model's context.

    Raises:
        InputError: names both lengths.
    """
    if context_length is not None and config.max_length > context_length:
        raise InputError(
            "max-length",
            where="data.max_length",
            what=f"{config.max_length} is more than the model's context of {context_length}",
            fix=f"at most data.max_length: {context_length}",
        )


class _Makers:
    """Tokenizes batches of examples, chats and texts each by their own way."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: DataConfig, has_chats: bool
    ) -> None:
        self._tokenizer: Any = tokenizer
        self._train_on_all = config.train_on == "all"
        self._template: ChatTemplate | None = None
        self.apart = 0
        self.tools_hidden = 0
        if has_chats:
            self._template = resolve_template(tokenizer, chat_template=config.chat_template)
            if not tokenizer.is_fast:
                raise InputError(
                    "slow-tokenizer",
                    where=type(tokenizer).__name__,
                    what="gives no character offsets, so the assistant's tokens cannot be found",
                    fix="use a model with a tokenizer.json (a fast tokenizer)",
                )

    def make(self, batch: Sequence[Example]) -> Iterator[tuple[Example, list[_Tokens]]]:
        chats = self._chats([e for e in batch if e.messages is not None])
        for example in batch:
            if example.text is None:
                yield example, next(chats)
            else:
                ids = self._text_ids(example.text)
                if not _is_running_text(example):
                    ids = self._ended(ids)
                yield example, [(ids, np.ones(len(ids), dtype=np.bool_))]

    def _ended(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """A document ends with EOS, or the model would never learn to stop after one."""
        eos = self._tokenizer.eos_token_id
        if eos is None or (len(ids) and ids[-1] == eos):
            return ids
        return np.append(ids, np.int32(eos))

    def _text_ids(self, text: str) -> NDArray[np.int32]:
        pieces = cut_text(text, _BATCH_CHARACTERS)
        if len(pieces) == 1:
            return np.asarray(self._tokenizer(text, verbose=False).input_ids, dtype=np.int32)
        # Each piece goes without special tokens; a short text shows which belong at the ends.
        probe, bare = (
            self._tokenizer("a", add_special_tokens=special).input_ids for special in (True, False)
        )
        before = next(i for i in range(len(probe)) if probe[i : i + len(bare)] == bare)
        parts = [probe[:before], probe[before + len(bare) :]]
        parts[1:1] = [
            np.asarray(
                self._tokenizer(piece, add_special_tokens=False, verbose=False).input_ids,
                dtype=np.int32,
            )
            for piece in pieces
        ]
        return np.concatenate(parts, dtype=np.int32, casting="unsafe")

    def _chats(self, examples: list[Example]) -> Iterator[list[_Tokens]]:
        template = self._template
        if template is None or not examples:
            return
        if not template.knows_tools:
            self.tools_hidden += sum(example.tools is not None for example in examples)
        if template.marks_generation and not self._train_on_all:
            yield from (self._marked(example, template) for example in examples)
        else:
            yield from self._spanned(examples, template)

    def _marked(self, example: Example, template: ChatTemplate) -> list[_Tokens]:
        try:
            out = self._tokenizer.apply_chat_template(
                turns_for(example.messages or (), template),
                tools=list(example.tools) if example.tools and template.knows_tools else None,
                chat_template=template.source,
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"verbose": False},
            )
        except TEMPLATE_FAULTS as error:
            raise template_fault(template, error, where=str(example.origin)) from error
        ids = np.asarray(out["input_ids"], dtype=np.int32)
        return [(ids, np.asarray(out["assistant_masks"], dtype=np.bool_))]

    def _spanned(self, examples: list[Example], template: ChatTemplate) -> Iterator[list[_Tokens]]:
        draw = render_whole if self._train_on_all else render_example
        groups = [draw(example, self._tokenizer, template) for example in examples]
        texts = [rendering.text for group in groups for rendering in group]
        out = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        place = 0
        for group in groups:
            samples = []
            for rendering in group:
                ids = np.asarray(out["input_ids"][place], dtype=np.int32)
                offsets = np.asarray(out["offset_mapping"][place], dtype=np.int64).reshape(-1, 2)
                samples.append((ids, tokens_in_spans(offsets, rendering.spans)))
                place += 1
            self.apart += len(group) - 1
            yield samples


class _Builder:
    """Cuts samples to length, leaves out what teaches nothing, and counts both."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._ids: list[NDArray[np.int32]] = []
        self._supervised: list[NDArray[np.bool_]] = []
        self._origin_index: list[int] = []
        self._weights: list[float] = []
        self._origins: list[Origin] = []
        self._masked: tuple[Origin, _Tokens] | None = None
        self.stats = TokenStats()

    def add(self, example: Example, samples: Sequence[_Tokens]) -> None:
        self._origins.append(example.origin)
        for ids, supervised in samples:
            pieces = self._cut(ids, supervised, is_text=example.text is not None)
            for piece in pieces:
                self._keep(example, piece)

    def _cut(
        self, ids: NDArray[np.int32], supervised: NDArray[np.bool_], *, is_text: bool
    ) -> list[_Tokens]:
        longest = self._config.max_length
        if len(ids) <= longest:
            return [(ids, supervised)]
        if is_text:
            self.stats.split_texts += 1
            # One token of overlap: the first of a piece is only context, so none goes unlearned.
            starts = range(0, len(ids) - 1, longest - 1)
            return [(ids[i : i + longest], supervised[i : i + longest]) for i in starts]
        self.stats.needed_length = max(self.stats.needed_length, len(ids))
        if self._config.on_long == "drop":
            self.stats.dropped_long += 1
            return []
        self.stats.truncated += 1
        if supervised[1:].any() and not supervised[1:longest].any():
            self.stats.masked_by_length += 1
            self._masked = self._masked or (self._origins[-1], (ids, supervised))
            return []
        return [(ids[:longest], supervised[:longest])]

    def _keep(self, example: Example, tokens: _Tokens) -> None:
        ids, supervised = tokens[0], tokens[1].copy()
        # Nothing precedes a sample's first token, so nothing can predict it.
        supervised[:1] = False
        if not supervised.any():
            self.stats.masked_by_template += 1
            self._masked = self._masked or (example.origin, (ids, supervised))
            return
        self._ids.append(ids)
        self._supervised.append(supervised)
        self._origin_index.append(len(self._origins) - 1)
        self._weights.append(example.weight)

    def finish(self) -> Dataset:
        self._check_masked()
        if not self._ids:
            raise InputError(
                "empty-data",
                where="data",
                what=f"no sample is left: {self.stats.dropped_long} of {len(self._origins)} "
                f"dropped as longer than max_length {self._config.max_length}",
                fix=f"data.max_length: {self.stats.needed_length} or data.on_long: truncate",
            )
        lengths = [len(ids) for ids in self._ids]
        return Dataset(
            ids=np.concatenate(self._ids),
            supervised=np.concatenate(self._supervised),
            offsets=np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))),
            origin_index=np.asarray(self._origin_index, dtype=np.int64),
            origins=tuple(self._origins),
            weights=np.asarray(self._weights, dtype=np.float64),
            stats=self.stats,
        )

    def _check_masked(self) -> None:
        stats, total = self.stats, len(self._ids) + self.stats.dropped_masked
        if self._masked is None:
            return
        if self._ids and stats.dropped_masked <= self._config.max_masked * total:
            return
        origin, (ids, supervised) = self._masked
        causes, fixes = [], []
        if stats.masked_by_length:
            causes.append(
                f"{stats.masked_by_length} have the assistant's part beyond max_length "
                f"{self._config.max_length}"
            )
            fixes.append(f"data.max_length: {stats.needed_length} keeps every chat whole")
        if stats.masked_by_template:
            causes.append(f"{stats.masked_by_template} have none after the chat template")
            fixes.append("check data.chat_template and its {% generation %} marks")
        raise InputError(
            "all-masked" if not self._ids else "masked",
            where=str(origin),
            what=f"{stats.dropped_masked} of {total} samples have no supervised token: "
            f"{'; '.join(causes)}; this row, supervised parts in [[ ]]: "
            f"{show_mask(self._tokenizer, ids, supervised)}",
            fix="; ".join(fixes) + f" (data.max_masked: {self._config.max_masked:g})",
        )


def show_mask(
    tokenizer: PreTrainedTokenizerBase, ids: NDArray[np.int32], supervised: NDArray[np.bool_]
) -> str:
    """A sample as text, supervised parts in ``[[ ]]``; long stretches are shortened.

    Args:
        tokenizer: decodes the ids.
        ids: token ids.
        supervised: which carry the loss, same length.
    """
    borders = np.flatnonzero(np.diff(supervised)) + 1
    parts = []
    for run in np.split(np.arange(len(ids)), borders):
        shown = run if len(run) <= _SHOWN_TOKENS else run[:_SHOWN_TOKENS]
        text = tokenizer.decode(ids[shown].tolist())
        text = text if isinstance(text, str) else "".join(text)
        text += "…" if len(shown) < len(run) else ""
        parts.append(f"[[{text}]]" if len(run) and supervised[run[0]] else text)
    return "".join(parts)


def _check_vocabulary(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None
) -> None:
    if vocab_size is None or int(dataset.ids.max()) < vocab_size:
        return
    place = int(np.argmax(dataset.ids >= vocab_size))
    sample = int(np.searchsorted(dataset.offsets, place, side="right")) - 1
    token = int(dataset.ids[place])
    raise InputError(
        "token-id",
        where=str(dataset[sample].origin),
        what=f"token {tokenizer.convert_ids_to_tokens(token)!r} has id {token}, the model's "
        f"vocabulary ends at {vocab_size - 1}",
        fix="use the tokenizer that belongs to this model",
    )
