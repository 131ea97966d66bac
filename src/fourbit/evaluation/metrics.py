"""Numbers with their standard errors."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One number.

    Attributes:
        value: a share between 0 and 1 where ``share``.
        stderr: its standard error; NaN for a single item.
        share: whether people read it in per cent.
        chance: what guessing gives; None where that has no meaning.
    """

    value: float
    stderr: float
    share: bool = True
    chance: float | None = None

    def text(self) -> str:
        """For people: ``31.2 +- 1.5 %``."""
        scale, unit = (100.0, " %") if self.share else (1.0, "")
        digits = 1 if self.share else 4 if self.value < 10 else 3
        return f"{scale * self.value:.{digits}f} +- {scale * self.stderr:.{digits}f}{unit}"

    @property
    def is_chance(self) -> bool:
        """Whether guessing would explain it: less than two standard errors above chance."""
        return self.chance is not None and self.value < self.chance + 2 * self.stderr


def mean(values: Sequence[float], *, share: bool = True, chance: float | None = None) -> Metric:
    """The mean of independent items, with the error of a sample: s / sqrt(n)."""
    n = len(values)
    if n == 0:
        return Metric(math.nan, math.nan, share, chance)
    middle = math.fsum(values) / n
    spread = math.fsum((value - middle) ** 2 for value in values)
    return Metric(middle, math.sqrt(spread / (n - 1) / n) if n > 1 else math.nan, share, chance)


def macro_mean(groups: Mapping[str, Sequence[float]], *, chance: float | None = None) -> Metric:
    """The mean of the groups' means, each group counting the same.

    A group of one item, whose own spread is unknown, is given that of all items.
    """
    means = [mean(values) for values in groups.values()]
    whole = mean([value for values in groups.values() for value in values])
    spread = whole.stderr * math.sqrt(sum(map(len, groups.values())))
    errors = [spread if math.isnan(m.stderr) else m.stderr for m in means]
    error = math.sqrt(math.fsum(e * e for e in errors)) / max(1, len(means))
    return Metric(mean([m.value for m in means]).value, error, chance=chance)


def exponential(loss: Metric) -> Metric:
    """The perplexity of a mean loss in nats; its error to first order."""
    value = math.exp(loss.value) if loss.value < 700 else math.inf
    return Metric(value, value * loss.stderr, share=False)


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words, as SQuAD counts them.

    Case, punctuation, articles and the order of words do not count.
    """
    found, wanted = Counter(_words(prediction)), Counter(_words(reference))
    if not found or not wanted:
        return float(found == wanted)
    common = sum((found & wanted).values())
    return 2 * common / (sum(found.values()) + sum(wanted.values()))


def _words(text: str) -> list[str]:
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()
