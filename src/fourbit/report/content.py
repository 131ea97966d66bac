"""What a report is made from, and the curves and scores in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fourbit.report.charts import Point, Series, finite, running_mean
from fourbit.report.markup import spoken

_SMOOTH_FROM = 40
PARTS = {
    "weights": "weights",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "logits": "logits",
    "workspace": "workspace",
    "baseline": "process itself",
}
"""The parts of a plan in the order in which they are drawn, and their names for people."""


@dataclass(frozen=True)
class ReportContent:
    """All a report shows; every part may be empty.

    Attributes:
        title: the run's name.
        config: dotted keys to values.
        origins: dotted keys to where the value came from.
        metrics: one object a step, as in ``metrics.jsonl``; values may be missing or None.
        plan: ``{"parts": {name: bytes}, "peak_bytes": bytes}``.
        measured_peak_bytes: highest memory of the run, None when unknown.
        receipt: ``{"ok", "checks": [{"name", "ok", "detail"}], "findings": [...]}`` and facts.
        samples: ``{"prompt", "reference", "before", "after"}`` each.
        scores: figures of an evaluation; ``x_before`` and ``x_after`` are shown together.
        audit: facts about the data.
        machine: facts about the machine.
    """

    title: str
    config: dict[str, Any]
    origins: dict[str, str]
    metrics: list[dict[str, Any]]
    plan: dict[str, Any]
    measured_peak_bytes: int | None
    receipt: dict[str, Any]
    samples: list[dict[str, Any]]
    scores: dict[str, Any] | None
    audit: dict[str, Any]
    machine: dict[str, Any]


def score_pairs(scores: Mapping[str, Any] | None) -> list[tuple[str, float, float]]:
    """``(name, before, after)`` of the scores that were taken twice."""
    pairs = []
    for key, value in (scores or {}).items():
        stem = key.removesuffix("_before")
        before, after = finite(value), finite((scores or {}).get(f"{stem}_after"))
        if stem != key and before is not None and after is not None:
            pairs.append((spoken(stem), before, after))
    return pairs


def is_share(name: str, value: float) -> bool:
    """Whether a score is shown in percent."""
    return 0 <= value <= 1 and not re.search("loss|perplexity|bits", name)


def known_values(metrics: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    """The finite values of ``key``."""
    return [value for line in metrics if (value := finite(line.get(key))) is not None]


def curve_points(metrics: Iterable[Mapping[str, Any]], key: str, scale: float = 1.0) -> list[Point]:
    """The curve of ``key`` in units of ``scale``; a recorded None is a gap."""
    out: list[Point] = []
    for line in metrics:
        step = finite(line.get("step"))
        if step is not None and step >= 0 and key in line:
            value = finite(line[key])
            out.append((step, None if value is None else value / scale))
    return out


def evaluations(metrics: Iterable[Mapping[str, Any]]) -> list[Point]:
    """The evaluation losses."""
    # Only some steps are evaluated: None there is no gap in a curve.
    return [point for point in curve_points(metrics, "eval_loss") if point[1] is not None]


def smoothed(points: list[Point], name: str) -> list[Series]:
    """A curve; a long one as its running mean over the faint steps."""
    if len(points) < _SMOOTH_FROM:
        return [Series(name, points)]
    window = max(5, len(points) // 40)
    mean = running_mean(points, window)
    return [
        Series(f"{name}, each step", points, "faint"),
        Series(f"{name}, mean of the last {window}", mean),
    ]


def loss_series(metrics: Iterable[Mapping[str, Any]]) -> list[Series]:
    """The curves of the loss picture."""
    lines = list(metrics)
    return [
        *smoothed(curve_points(lines, "loss"), "training"),
        Series("evaluation", evaluations(lines), "dots"),
    ]
