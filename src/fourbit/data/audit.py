"""What the data amounts to, for the plan, the log and the receipt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fourbit.data.formats import Example, thousands
from fourbit.data.packing import ORDER_VERSION

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fourbit.data.config import DataConfig
    from fourbit.data.dataset import Dataset
    from fourbit.data.source import Rows
    from fourbit.data.templates import ChatTemplate

_SHOWN_PAIRS = 3
# These decide what is refused, not what is trained on, or are covered by the files' hashes.
_NOT_IN_FINGERPRINT = {"train", "eval", "skip_bad_lines", "max_masked", "chat_template"}


@dataclass(frozen=True)
class Repeats:
    """Rows that say the same.

    Args:
        within_train: training rows that repeat an earlier one.
        in_eval: evaluation rows that are also in the training rows.
        pairs: the first few of those, as ``eval place = train place``.
    """

    within_train: int
    in_eval: int
    pairs: tuple[str, ...]


def find_repeats(train: Sequence[Example], held_out: Sequence[Example]) -> Repeats:
    """Counts exact repeats, by content."""
    seen: dict[bytes, Example] = {}
    for example in train:
        seen.setdefault(example.digest(), example)
    leaked = [(e, seen[d]) for e in held_out if (d := e.digest()) in seen]
    pairs = tuple(f"{e.origin} = {t.origin}" for e, t in leaked[:_SHOWN_PAIRS])
    return Repeats(len(train) - len(seen), len(leaked), pairs)


@dataclass(frozen=True)
class Audit:
    """Facts about the data of a run; counts are of the training set unless named otherwise.

    Args:
        format: format of the rows.
        rows: examples to train on.
        eval_rows: examples held out.
        bad_lines: unusable rows left out.
        samples: sequences of tokens the examples became.
        tokens: tokens of all samples.
        supervised_tokens: those that carry the loss.
        mean_length: tokens.
        median_length: tokens.
        longest: tokens.
        max_length: tokens, the limit.
        truncated: samples cut at the limit.
        split_texts: texts cut into several samples.
        dropped_long: samples left out for their length.
        masked_by_template: samples left out without anything of the assistant.
        masked_by_length: samples left out whose assistant part lies beyond the limit.
        needed_length: tokens of the longest chat before cutting; 0 when none was cut.
        apart: samples made for turns that the template shows differently later.
        tools_hidden: chats whose tools the template cannot show.
        duplicates: training rows that repeat an earlier one.
        eval_duplicates: evaluation rows that are also trained on.
        eval_pairs: the first of those.
        packing_efficiency: share of the positions of epoch 0 that hold a token, batch size 1.
        template: where the chat template came from; empty for raw text.
    """

    format: str
    rows: int
    eval_rows: int
    bad_lines: int
    samples: int
    tokens: int
    supervised_tokens: int
    mean_length: float
    median_length: float
    longest: int
    max_length: int
    truncated: int
    split_texts: int
    dropped_long: int
    masked_by_template: int
    masked_by_length: int
    needed_length: int
    apart: int
    tools_hidden: int
    duplicates: int
    eval_duplicates: int
    eval_pairs: tuple[str, ...]
    packing_efficiency: float
    template: str

    @property
    def supervised_share(self) -> float:
        """Share of tokens that carry the loss."""
        return self.supervised_tokens / self.tokens

    @property
    def dropped_masked(self) -> int:
        """Samples left out because nothing in them carries the loss."""
        return self.masked_by_template + self.masked_by_length

    def as_dict(self) -> dict[str, Any]:
        """All facts, for JSON."""
        derived = {
            "supervised_share": self.supervised_share,
            "dropped_masked": self.dropped_masked,
        }
        return {**asdict(self), "eval_pairs": list(self.eval_pairs), **derived}

    def lines(self) -> list[str]:
        """The facts for people; what was lost or looks wrong only where there is some."""
        held = f", {thousands(self.eval_rows)} held out" if self.eval_rows else ", none held out"
        lines = [
            f"format: {self.format}, {thousands(self.rows)} rows{held}",
            f"tokens: {thousands(self.tokens)} in {thousands(self.samples)} samples, "
            f"{self.supervised_share:.1%} supervised",
            f"lengths: median {self.median_length:.0f}, mean {self.mean_length:.0f}, "
            f"longest {thousands(self.longest)} of {thousands(self.max_length)}",
            f"packing: {self.packing_efficiency:.1%} of positions hold a token",
        ]
        if self.template:
            lines.append(f"chat template: {self.template}")
        return lines + [text for count, text in self._losses() if count]

    def _losses(self) -> list[tuple[int, str]]:
        keep = f"data.max_length: {self.needed_length} keeps every chat whole"
        pairs = ", ".join(self.eval_pairs)
        return [
            (self.bad_lines, f"left out: {self.bad_lines} bad rows"),
            (self.truncated, f"truncated: {self.truncated} samples ({keep})"),
            (self.dropped_long, f"left out: {self.dropped_long} long samples ({keep})"),
            (
                self.masked_by_length,
                f"left out: {self.masked_by_length} samples whose answer is cut off ({keep})",
            ),
            (
                self.masked_by_template,
                f"left out: {self.masked_by_template} samples without any answer in the template",
            ),
            (self.split_texts, f"cut: {self.split_texts} long texts into several samples"),
            (
                self.apart,
                f"added: {self.apart} samples for turns that the template shows differently later",
            ),
            (
                self.tools_hidden,
                f"warning: the chat template cannot show the tools of {self.tools_hidden} chats",
            ),
            (self.duplicates, f"repeats: {self.duplicates} training rows repeat an earlier one"),
            (
                self.eval_duplicates,
                f"warning: {self.eval_duplicates} evaluation rows are also trained on ({pairs})",
            ),
        ]


def length_facts(dataset: Dataset) -> dict[str, float]:
    """Mean, median and longest sample, in tokens."""
    lengths = dataset.lengths
    return {
        "mean_length": float(lengths.mean()),
        "median_length": float(np.median(lengths)),
        "longest": int(lengths.max()),
    }


def fingerprint(
    rows: Rows,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    template: ChatTemplate | None = None,
) -> str:
    """One hash of everything that decides which tokens come in which order.

    Files count by their bytes, not their names, so moving a data set does not change it.

    Args:
        rows: the files that were read.
        config: the data settings.
        tokenizer: what makes the tokens.
        seed: decides the split and the order.
        template: the chat template in use.
    """
    settings = config.model_dump(mode="json", exclude=_NOT_IN_FINGERPRINT)
    settings["eval"] = "file" if isinstance(config.eval, str) else config.eval
    facts = {
        "order_version": ORDER_VERSION,
        "files": [[file.sha256, file.weight] for file in rows.files],
        "settings": settings,
        "tokenizer": _tokenizer_sha256(tokenizer),
        "template": template.sha256() if template is not None else None,
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab()))
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    return hashlib.sha256((text + special).encode()).hexdigest()
