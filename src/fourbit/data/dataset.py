"""Token tables: every sample of a data set in three flat arrays."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fourbit.data.rows import Origin


class Sample(NamedTuple):
    """One sample: its token ids, which of them carry the loss, and its row."""

    input_ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    origin: Origin


@dataclass
class TokenStats:
    """What happened to the examples on the way to samples, in samples unless said otherwise.

    Args:
        truncated: cut off at ``max_length``.
        split_texts: raw texts (rows) cut into several samples.
        dropped_long: left out for their length.
        masked_by_template: left out because nothing in them is the assistant's.
        masked_by_length: left out because the assistant's part lies beyond ``max_length``.
        needed_length: tokens of the longest chat before it was cut.
        apart: made for single turns that the template shows differently later.
        tools_hidden: chats (rows) whose tools the template cannot show.
    """

    truncated: int = 0
    split_texts: int = 0
    dropped_long: int = 0
    masked_by_template: int = 0
    masked_by_length: int = 0
    needed_length: int = 0
    apart: int = 0
    tools_hidden: int = 0

    @property
    def dropped_masked(self) -> int:
        """Samples left out without any supervised token, for either cause."""
        return self.masked_by_template + self.masked_by_length


@dataclass(frozen=True)
class Dataset:
    """Samples in flat arrays; sample ``i`` lies at ``offsets[i]:offsets[i + 1]``.

    Args:
        ids: token ids of all samples, one after another.
        supervised: which of them carry the loss; never a sample's first.
        offsets: starts of the samples and the end of the last, ``len(self) + 1`` numbers.
        origin_index: for each sample its place in ``origins``.
        origins: the rows.
        weights: copies of each sample per epoch.
        stats: what was cut and left out.
    """

    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    origin_index: NDArray[np.int64]
    origins: tuple[Origin, ...]
    weights: NDArray[np.float64]
    stats: TokenStats = field(default_factory=TokenStats)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        part = slice(self.offsets[index], self.offsets[index + 1])
        origin = self.origins[self.origin_index[index]]
        return Sample(self.ids[part], self.supervised[part], origin)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample."""
        return np.diff(self.offsets)

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples."""
        return len(self.ids)

    @property
    def num_supervised(self) -> int:
        """Tokens that carry the loss."""
        return int(self.supervised.sum())
