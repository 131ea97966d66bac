"""From checked rows to the token tables of a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fourbit.data.audit import Audit, find_repeats, fingerprint, length_facts
from fourbit.data.dataset import Dataset
from fourbit.data.formats import Example
from fourbit.data.packing import BatchPlan, hash_index
from fourbit.data.templates import ChatTemplate, resolve_template
from fourbit.data.tokens import Progress, check_context, tokenize
from fourbit.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fourbit.data.config import DataConfig
    from fourbit.data.source import Rows

_SPLIT_STREAM = -1


@dataclass(frozen=True)
class PreparedData:
    """Everything the training loop needs of the data.

    Args:
        train: samples to train on.
        eval: samples held out; None without evaluation.
        train_examples: the rows behind ``train``.
        eval_examples: the rows behind ``eval``, for generation.
        template: the chat template in use; None for raw text.
        audit: what was counted.
        fingerprint: hash of all that decides tokens and order.
    """

    train: Dataset
    eval: Dataset | None
    train_examples: tuple[Example, ...]
    eval_examples: tuple[Example, ...]
    template: ChatTemplate | None
    audit: Audit
    fingerprint: str


def split(
    examples: Sequence[Example], config: DataConfig, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Holds out a part of the examples, as ``data.eval`` says.

    The choice depends on the seed and the number of examples alone. Rows that say the same go to
    the same side, so that nothing held out is also trained on.

    Args:
        examples: all examples, in file order.
        config: fraction or rows; a separate file or None holds out nothing here.
        seed: the run's seed.

    Returns:
        Examples to train on and held out, each in file order.

    Raises:
        InputError: as many rows are to be held out as there are.
    """
    wanted = _held_out_rows(len(examples), config)
    if wanted == 0:
        return tuple(examples), ()
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        groups[example.digest()].append(index)
    members = list(groups.values())
    keys = hash_index(np.arange(len(members)), seed=seed, stream=_SPLIT_STREAM)
    chosen: set[int] = set()
    for place in np.argsort(keys, kind="stable").tolist():
        if len(chosen) + len(members[place]) <= wanted:
            chosen.update(members[place])
        if len(chosen) == wanted:
            break
    train = tuple(e for i, e in enumerate(examples) if i not in chosen)
    return train, tuple(e for i, e in enumerate(examples) if i in chosen)


def _held_out_rows(total: int, config: DataConfig) -> int:
    part = config.eval
    if part is None or isinstance(part, str) or part == 0 or (total < 2 and part < 1):
        return 0
    if isinstance(part, int):
        if part >= total:
            raise InputError(
                "eval-rows",
                where="data.eval",
                what=f"{part} rows to hold out, but there are only {total}",
                fix="a smaller number, a fraction such as 0.05, or 0 for none",
            )
        return part
    return min(max(1, round(part * total)), total - 1)


def prepare(
    config: DataConfig,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    vocab_size: int | None = None,
    context_length: int | None = None,
    progress: Progress | None = None,
) -> PreparedData:
    """Splits, tokenizes and counts.

    Args:
        config: the data settings.
        rows: what :func:`fourbit.data.read_rows` gave for them.
        tokenizer: the model's tokenizer.
        seed: the run's seed.
        vocab_size: rows of the model's embedding.
        context_length: longest sequence the model knows, in tokens.
        progress: called with the examples done and their number, train and eval each by itself.

    Raises:
        InputError: the data cannot be trained on with this tokenizer and these settings.
    """
    check_context(config, context_length)
    train_examples, eval_examples = split(rows.train, config, seed)
    if rows.eval is not None:
        eval_examples = rows.eval
    has_chats = any(e.messages is not None for e in (*train_examples, *eval_examples))
    template = (
        resolve_template(tokenizer, chat_template=config.chat_template) if has_chats else None
    )

    def tokens(examples: Sequence[Example]) -> Dataset:
        return tokenize(examples, tokenizer, config, vocab_size=vocab_size, progress=progress)

    train = tokens(train_examples)
    held_out = tokens(eval_examples) if eval_examples else None
    return PreparedData(
        train=train,
        eval=held_out,
        train_examples=train_examples,
        eval_examples=eval_examples,
        template=template,
        audit=_audit(config, rows, train, (train_examples, eval_examples), seed, template),
        fingerprint=fingerprint(rows, config, tokenizer, seed=seed, template=template),
    )


def _audit(
    config: DataConfig,
    rows: Rows,
    train: Dataset,
    sides: tuple[Sequence[Example], Sequence[Example]],
    seed: int,
    template: ChatTemplate | None,
) -> Audit:
    stats, repeats = train.stats, find_repeats(*sides)
    plan = BatchPlan(
        train, max_length=config.max_length, packing=config.packing, batch_size=1, seed=seed
    )
    lengths = length_facts(train)
    return Audit(
        format=rows.format,
        rows=len(sides[0]),
        eval_rows=len(sides[1]),
        bad_lines=rows.bad_lines,
        samples=len(train),
        tokens=train.num_tokens,
        supervised_tokens=train.num_supervised,
        mean_length=lengths["mean_length"],
        median_length=lengths["median_length"],
        longest=int(lengths["longest"]),
        max_length=config.max_length,
        truncated=stats.truncated,
        split_texts=stats.split_texts,
        dropped_long=stats.dropped_long,
        masked_by_template=stats.masked_by_template,
        masked_by_length=stats.masked_by_length,
        needed_length=stats.needed_length,
        apart=stats.apart,
        tools_hidden=stats.tools_hidden,
        duplicates=repeats.within_train,
        eval_duplicates=repeats.in_eval,
        eval_pairs=repeats.pairs,
        packing_efficiency=plan.efficiency(0),
        template=template.name if template is not None else "",
    )
