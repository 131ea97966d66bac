"""The order of training: pure functions of seed, epoch and position.

Nothing is stored about the order; a resumed run computes it again and goes on at its position.
The shuffle uses its own integer hash, because a library's generator may change between versions
while a run must not.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fourbit.data.dataset import Dataset

if TYPE_CHECKING:
    from torch import Tensor

    from fourbit.data.rows import Origin

ORDER_VERSION = 1
"""Changes whenever the same seed would give another order."""

IGNORED = -100
"""The label of a token that carries no loss."""

_WINDOW = 2048
_GROUPED_BATCHES = 64
_MASK = (1 << 64) - 1

Pack = list[int]
"""Indices of the samples that share one sequence."""


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64: every input bit changes every output bit."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def hash_index(index: ArrayLike, *, seed: int, stream: int) -> NDArray[np.uint64]:
    """64 random-looking bits for each index, the same on every platform.

    Args:
        index: non-negative integers.
        seed: the run's seed.
        stream: separates uses of one seed, such as epochs.
    """
    key = np.array([seed & _MASK, stream & _MASK], dtype=np.uint64)
    base = _mix(_mix(key[:1]) ^ key[1:])
    return _mix(_mix(np.atleast_1d(np.asarray(index)).astype(np.uint64)) ^ base)


def epoch_order(n_or_weights: int | ArrayLike, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The sample indices of one epoch, shuffled.

    Args:
        n_or_weights: number of samples, or a weight for each: weight w gives floor(w) copies and
            one more with the probability of the fraction, drawn anew each epoch.
        seed: the run's seed.
        epoch: from 0.
    """
    if isinstance(n_or_weights, (int, np.integer)):
        weights = np.ones(int(n_or_weights))
    else:
        weights = np.asarray(n_or_weights, dtype=np.float64)
    every = np.arange(len(weights))
    whole = np.floor(weights)
    chance = hash_index(every, seed=seed, stream=2 * epoch) >> np.uint64(11)
    copies = whole.astype(np.int64) + (chance * 2.0**-53 < weights - whole)
    index = np.repeat(every, copies)
    copy = np.arange(len(index)) - np.repeat(np.cumsum(copies) - copies, copies)
    keys = hash_index(index * 2**20 + copy, seed=seed, stream=2 * epoch + 1)
    return index[np.argsort(keys, kind="stable")].astype(np.int64)


def pack(lengths: ArrayLike, order: ArrayLike, *, max_length: int) -> list[Pack]:
    """Fills sequences of at most ``max_length`` tokens with whole samples.

    Within windows of the shuffled order, samples go longest first into the fullest sequence that
    still has room; sequences then stand where their longest sample stood, so the shuffle survives.

    Args:
        lengths: tokens of each sample, indexed by the entries of ``order``.
        order: sample indices; repeated ones are placed that many times.
        max_length: tokens of a sequence.

    Raises:
        ValueError: a sample is longer than ``max_length`` or empty.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    sequence = np.asarray(order, dtype=np.int64)
    used = sizes[sequence]
    if len(used) and (used.max() > max_length or used.min() < 1):
        raise ValueError(f"sample lengths must be in 1..{max_length}")
    packs: list[Pack] = []
    for start in range(0, len(sequence), _WINDOW):
        window = slice(start, start + _WINDOW)
        bins = _best_fit(used[window], max_length)
        packs += [[int(sequence[start + place]) for place in members] for members in bins]
    return packs


def _best_fit(sizes: NDArray[np.int64], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (room left, bin), ascending
    for place in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[place])
        found = bisect.bisect_left(room, (size, -1))
        if found < len(room):
            left, number = room.pop(found)
        else:
            left, number = capacity, len(bins)
            bins.append([])
        bins[number].append(place)
        if left > size:
            bisect.insort(room, (left - size, number))
    # Sorted by its earliest member, a pack of many would come before a pack of few.
    bins.sort(key=lambda members: members[0])
    return [sorted(members) for members in bins]


class BatchPlan:
    """Which samples go into which micro-batch of which epoch.

    Args:
        dataset: the samples.
        max_length: tokens of a sequence.
        packing: several samples a sequence, or one with batches of similar length.
        batch_size: sequences of a micro-batch; the last of an epoch may have fewer.
        seed: the run's seed.
    """

    def __init__(
        self, dataset: Dataset, *, max_length: int, packing: bool, batch_size: int, seed: int
    ) -> None:
        self._lengths = dataset.lengths
        self._weights = dataset.weights
        self._max_length = max_length
        self._packing = packing
        self._batch_size = batch_size
        self._seed = seed
        # An epoch is asked for at every step; the answer depends on its number alone.
        self._latest: tuple[int, list[list[Pack]]] | None = None

    def epoch(self, epoch: int) -> list[list[Pack]]:
        """The micro-batches of an epoch, each a list of packs.

        Args:
            epoch: from 0.
        """
        if self._latest is None or self._latest[0] != epoch:
            self._latest = (epoch, self._plan(epoch))
        return self._latest[1]

    def micro_batches_per_epoch(self, epoch: int) -> int:
        """How many micro-batches an epoch has; fractional weights make it vary."""
        return len(self.epoch(epoch))

    def efficiency(self, epoch: int) -> float:
        """Share of positions that hold a token.

        With packing a sequence has ``max_length`` positions; without, those of the longest sample
        in its micro-batch.

        Args:
            epoch: from 0.
        """
        tokens = positions = 0
        for micro_batch in self.epoch(epoch):
            sizes = [int(self._lengths[members].sum()) for members in micro_batch]
            tokens += sum(sizes)
            positions += len(sizes) * (self._max_length if self._packing else max(sizes))
        return tokens / positions if positions else 1.0

    def _plan(self, epoch: int) -> list[list[Pack]]:
        order = epoch_order(self._weights, seed=self._seed, epoch=epoch)
        if self._packing:
            packs = pack(self._lengths, order, max_length=self._max_length)
            return _chunks(packs, self._batch_size)
        batches: list[list[Pack]] = []
        for window in _chunks(order.tolist(), self._batch_size * _GROUPED_BATCHES):
            place = {index: position for position, index in enumerate(window)}
            window.sort(key=lambda index: int(self._lengths[index]))
            grouped = _chunks(window, self._batch_size)
            # Sorted windows would start each time with the shortest.
            grouped.sort(key=lambda batch: place[batch[0]])
            batches += [[[index] for index in batch] for batch in grouped]
        return batches


def _chunks(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


@dataclass(frozen=True)
class Batch:
    """A micro-batch of B sequences of T positions.

    Positions restart at 0 for every sample and for the padding, so a model that builds its
    attention mask from them keeps samples apart without being given one.

    Args:
        input_ids: int64 [B, T].
        position_ids: int64 [B, T].
        labels: int64 [B, T], not shifted; -100 where no loss is taken.
        num_supervised: labels that carry loss.
        rows: origins of the samples, sequence by sequence.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    num_supervised: int
    rows: list[Origin]

    def part(self, first: int, stop: int) -> Batch:
        """Sequences ``[first, stop)`` of the same; counts and origins stay those of the whole."""
        if first == 0 and stop >= len(self.input_ids):
            return self
        ids, positions, labels = (
            tensor[first:stop] for tensor in (self.input_ids, self.position_ids, self.labels)
        )
        return Batch(ids, positions, labels, self.num_supervised, self.rows)


def collate(
    dataset: Dataset, micro_batch: Sequence[Sequence[int]], *, pad_id: int, pad_to_multiple: int = 1
) -> Batch:
    """Puts the samples of a micro-batch into tensors.

    Args:
        dataset: the samples.
        micro_batch: packs of sample indices; at least one.
        pad_id: token id of the padding; its positions never carry loss.
        pad_to_multiple: T is rounded up to a multiple of this.
    """
    import torch

    starts = dataset.offsets
    longest = max(
        sum(int(starts[index + 1] - starts[index]) for index in members) for members in micro_batch
    )
    width = -(-longest // pad_to_multiple) * pad_to_multiple
    shape = (len(micro_batch), width)
    ids = np.full(shape, pad_id, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    rows: list[Origin] = []
    for line, members in enumerate(micro_batch):
        at = 0
        for index in members:
            sample = dataset[index]
            end = at + len(sample.input_ids)
            ids[line, at:end] = sample.input_ids
            positions[line, at:end] = np.arange(end - at)
            labels[line, at:end] = np.where(sample.supervised, sample.input_ids, IGNORED)
            labels[line, at] = IGNORED
            rows.append(sample.origin)
            at = end
        positions[line, at:] = np.arange(width - at)
    return Batch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        labels=torch.from_numpy(labels),
        num_supervised=int((labels != IGNORED).sum()),
        rows=rows,
    )
