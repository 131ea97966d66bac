"""Whether two methods differ: means, intervals and the words for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from fourbit.report.markup import significant

# Two-sided 95% of Student's t by degrees of freedom; the last for all above.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_Z = 1.96
_MANY = 30


def t_value(freedom: int) -> float:
    """The 97.5% point of Student's t."""
    if freedom < 1:
        return math.nan
    return _T[freedom - 1] if freedom <= len(_T) else 2.05 if freedom < _MANY else _Z


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and half the width of its 95% interval (NaN for one seed)."""

    value: float
    half: float
    n: int


def over_seeds(values: Sequence[float]) -> Interval:
    """The mean over runs that differ in their seed alone."""
    n = len(values)
    half = t_value(n - 1) * stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return Interval(fmean(values), half, n)


@dataclass(frozen=True)
class Difference:
    """A method against the reference on one measure.

    Attributes:
        method: the one.
        reference: the other.
        measure: what was measured.
        value: mean difference, ``method - reference``.
        half: half of its 95% interval, over seeds and, where there are items, over items.
        seeds: runs of each that were paired.
        items: items asked; 0 for a loss.
        higher_is_better: whether a larger value is a better one.
    """

    method: str
    reference: str
    measure: str
    value: float
    half: float
    seeds: int
    items: int
    higher_is_better: bool

    @property
    def seen(self) -> bool:
        """Whether the interval leaves zero out."""
        return abs(self.value) > self.half

    def words(self) -> str:
        """The verdict, no stronger than the numbers."""
        scale, unit = (100.0, " points") if self.items else (1.0, "")
        seeds = f"{self.seeds} seed" + ("s" if self.seeds != 1 else "")
        n = f"{self.items} items x {seeds}" if self.items else seeds
        if self.items:
            value, half = f"{scale * self.value:+.1f}", f"{scale * self.half:.1f}"
        else:
            sign = "+" if self.value >= 0 else ""
            value, half = sign + significant(self.value, 4), significant(self.half, 2)
        told = f"{value} +- {half}{unit}"
        if math.isnan(self.half):
            return (
                f"{self.method} against {self.reference}, {self.measure}:"
                f" {value}{unit}; one seed cannot tell whether that is more than chance"
            )
        if not self.seen:
            return (
                f"{self.method} against {self.reference}, {self.measure}:"
                f" no difference seen at n = {n} ({told})"
            )
        better = (self.value > 0) == self.higher_is_better
        return (
            f"{self.method} is {'better' if better else 'worse'} than {self.reference},"
            f" {self.measure}: {told}, n = {n}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**asdict(self), "seen": self.seen, "verdict": self.words()}


def compare_losses(
    method: str,
    reference: str,
    measure: str,
    ours: Mapping[int, float],
    theirs: Mapping[int, float],
    *,
    higher_is_better: bool = False,
) -> Difference | None:
    """Two methods by one number a seed, paired: the same seed draws the same order of rows."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    found = over_seeds([ours[seed] - theirs[seed] for seed in seeds])
    return Difference(
        method, reference, measure, found.value, found.half, len(seeds), 0, higher_is_better
    )


def compare_items(
    method: str,
    reference: str,
    measure: str,
    ours: Mapping[int, Sequence[float]],
    theirs: Mapping[int, Sequence[float]],
) -> Difference | None:
    """Two methods by what each item gave, paired by item and by seed.

    The error has two parts: other items could have been asked, and other seeds drawn. The first is
    the spread over items of the difference averaged over seeds, the second the spread over seeds.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds or len({len(s[seed]) for seed in seeds for s in (ours, theirs)}) != 1:
        return None
    each = [[a - b for a, b in zip(ours[s], theirs[s], strict=True)] for s in seeds]
    n = len(each[0])
    if n < 2:
        return None
    items = [fmean(column) for column in zip(*each, strict=True)]
    by_item = _Z * stdev(items) / math.sqrt(n)
    by_seed = over_seeds([fmean(row) for row in each]).half if len(seeds) > 1 else 0.0
    half = math.hypot(by_item, by_seed)
    return Difference(method, reference, measure, fmean(items), half, len(seeds), n, True)
