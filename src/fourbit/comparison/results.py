"""What the runs of a comparison gave, as rows, verdicts and a page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from fourbit.comparison.statistics import (
    Difference,
    Interval,
    compare_items,
    compare_losses,
    over_seeds,
)
from fourbit.report import ComparedMethod, ComparisonContent
from fourbit.report.markup import significant

_LOSS = "evaluation loss"


@dataclass(frozen=True)
class Outcome:
    """One method with one seed.

    Attributes:
        trained: what `fourbit train --json` said.
        before: results of the untouched model, task by task, with ``each`` item.
        after: the same of the tuned one.
        metrics: of its steps.
        plan: bytes by part.
        failed: the error that ended it; nothing else is there then.
    """

    trained: Mapping[str, Any] = field(default_factory=dict)
    before: Mapping[str, Any] = field(default_factory=dict)
    after: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()
    plan: Mapping[str, Any] = field(default_factory=dict)
    failed: str = ""

    @classmethod
    def read(cls, path: Path) -> Outcome | None:
        """A finished one from its file; what failed is tried again."""
        if not path.is_file():
            return None
        try:
            found = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            return None
        return None if found.failed else found

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dict(vars(self))


def quoted(result: Mapping[str, Any]) -> str:
    """The metric of a task's result that is quoted: its first."""
    return next(iter(result))


def item_values(result: Mapping[str, Any]) -> list[float]:
    """What each item gave for the quoted metric; empty where items have no value of their own."""
    metric, values = quoted(result), []
    for item in result.get("each") or ():
        found = item.get(metric)
        if found is None:
            return []
        # a choice is right where it is the gold one; other tasks say what an item gave
        values.append(float(found == item["gold"]) if "gold" in item else float(found))
    return values


@dataclass
class Comparison:
    """All of them; ``names[0]`` is what the others are compared with."""

    names: Sequence[str]
    settings: Mapping[str, Mapping[str, Any]]
    text: str | None = None
    outcomes: dict[str, dict[int, Outcome]] = field(default_factory=dict)

    def add(self, name: str, seed: int, outcome: Outcome) -> None:
        """One more."""
        self.outcomes.setdefault(name, {})[seed] = outcome

    def good(self, name: str) -> dict[int, Outcome]:
        """Those that ended well, by seed."""
        return {s: o for s, o in self.outcomes.get(name, {}).items() if not o.failed}

    def tasks(self) -> list[str]:
        """Tasks with results."""
        found: dict[str, None] = {}
        for name in self.names:
            for outcome in self.good(name).values():
                found |= dict.fromkeys(outcome.after)
        return list(found)

    def measure(self, name: str, task: str | None, *, before: bool = False) -> dict[int, float]:
        """The quoted value of a task by seed; of the evaluation loss without one."""
        found = {}
        for seed, outcome in self.good(name).items():
            if task is None:
                value = outcome.trained.get(f"eval_loss_{'before' if before else 'after'}")
            else:
                result = (outcome.before if before else outcome.after).get(task) or {"": None}
                value = result[quoted(result)]
            if isinstance(value, (int, float)) and math.isfinite(value):
                found[seed] = float(value)
        return found

    def items(self, name: str, task: str | None) -> dict[int, list[float]]:
        """What each item of a task gave, by seed; empty where items have no value."""
        results = {
            seed: outcome.after[task]
            for seed, outcome in self.good(name).items()
            if task is not None and task in outcome.after
        }
        return {s: values for s, result in results.items() if (values := item_values(result))}

    def verdicts(self) -> list[Difference]:
        """Each method against the first, on every measure."""
        reference, found = self.names[0], []
        for name in self.names[1:]:
            for task in (*self.tasks(), None):
                ours, theirs = self.items(name, task), self.items(reference, task)
                label = _LOSS if task is None else self.label(task)
                one = compare_items(name, reference, label, ours, theirs)
                one = one or compare_losses(
                    name,
                    reference,
                    label,
                    self.measure(name, task),
                    self.measure(reference, task),
                    higher_is_better=task not in (None, "perplexity"),
                )
                found += [one] if one is not None else []
        return found

    def label(self, task: str) -> str:
        """A task and its metric, for people."""
        if task == "perplexity":
            return f"perplexity of {self.text}" if self.text else "perplexity"
        for name in self.names:
            for outcome in self.good(name).values():
                if task in outcome.after:
                    metric = quoted(outcome.after[task])
                    return task if metric == task else f"{task} {metric}"
        return task

    def rows(self) -> list[dict[str, Any]]:
        """One object a method."""
        return [self._row(name) for name in self.names if name in self.outcomes]

    def _row(self, name: str) -> dict[str, Any]:
        good = self.good(name)
        settings = self.settings[name]
        failed = {s: o.failed for s, o in self.outcomes[name].items() if o.failed}
        row: dict[str, Any] = {
            "method": name,
            "learning_rate": settings.get("optim.lr"),
            "seeds": sorted(good),
            "failed": {str(seed): line for seed, line in failed.items()},
        }
        if not good:
            return row
        some = next(iter(good.values()))
        trained = [outcome.trained for outcome in good.values()]
        scores = {
            task: {
                "metric": quoted(some.after[task]),
                "before": _mean(self.measure(name, task, before=True)),
                **_interval(self.measure(name, task)),
            }
            for task in some.after
        }
        return row | {
            "trainable_parameters": some.trained.get("trainable_parameters"),
            "adapter_bytes": some.trained.get("adapter_bytes"),
            "parts": dict(some.plan.get("parts") or {}),
            "planned_peak_bytes": some.trained.get("predicted_peak_bytes"),
            "peak_memory_bytes": _median(trained, "peak_memory_bytes"),
            "tokens_per_second": _median(trained, "tokens_per_second"),
            "train_loss_last": _median(trained, "train_loss_last"),
            "eval_loss_before": _mean(self.measure(name, None, before=True)),
            "eval_loss": _interval(self.measure(name, None)),
            "scores": scores,
            "verified": all(one.get("verified") for one in trained),
        }

    def as_dict(self) -> dict[str, Any]:
        """For ``--json`` and ``compare.json``."""
        return {
            "rows": self.rows(),
            "verdicts": [one.as_dict() for one in self.verdicts()],
            "reference": self.names[0],
        }

    def lines(self) -> list[str]:
        """For people: a line a method, then the verdicts."""
        lines = []
        for row in self.rows():
            words = [row["method"]]
            if "eval_loss" in row and row["eval_loss"]["value"] is not None:
                words.append(f"evaluation loss {_told(row['eval_loss'], 4)}")
            for task, score in row.get("scores", {}).items():
                words.append(f"{self.label(task)} {_told(score, 4)} (before {score['before']:.4g})")
            if row.get("peak_memory_bytes"):
                words.append(f"{row['peak_memory_bytes'] / 1e6:,.0f} MB")
            if row.get("tokens_per_second"):
                words.append(f"{row['tokens_per_second']:,.0f} tokens/s")
            words += [f"seed {seed} failed: {line}" for seed, line in row["failed"].items()]
            lines.append("; ".join(words))
        return lines + [one.words() for one in self.verdicts()]

    def content(self, title: str) -> ComparisonContent:
        """For the page and the picture."""
        rows = {row["method"]: row for row in self.rows()}
        methods = [
            ComparedMethod(
                name,
                rows[name],
                {seed: outcome.metrics for seed, outcome in self.good(name).items()},
            )
            for name in self.names
            if name in rows
        ]
        labels = {task: self.label(task) for task in self.tasks()}
        return ComparisonContent(
            title, methods, [one.words() for one in self.verdicts()], labels, self._common()
        )

    def _common(self) -> dict[str, Any]:
        """Settings that all methods share."""
        first, *others = self.settings.values()
        return {
            key: value
            for key, value in first.items()
            if all(other.get(key) == value for other in others)
        }


def _mean(values: Mapping[int, float]) -> float | None:
    return fmean(values.values()) if values else None


def _median(trained: Sequence[Mapping[str, Any]], key: str) -> float | None:
    found = [one[key] for one in trained if isinstance(one.get(key), (int, float))]
    return median(found) if found else None


def _interval(values: Mapping[int, float]) -> dict[str, Any]:
    if not values:
        return {"value": None, "half": None, "seeds": 0}
    found: Interval = over_seeds(list(values.values()))
    return {
        "value": found.value,
        "half": None if math.isnan(found.half) else found.half,
        "seeds": found.n,
    }


def _told(interval: Mapping[str, Any], digits: int) -> str:
    value, half = interval["value"], interval["half"]
    return f"{value:.{digits}g}" + (f" +- {significant(half, 2)}" if half is not None else "")
