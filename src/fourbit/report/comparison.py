"""The page of a comparison: the verdicts, a table, and pictures on common scales."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourbit.files import human_bytes, replace_file
from fourbit.report.charts import (
    Bar,
    Series,
    Span,
    interval_chart,
    line_chart,
    running_mean,
    stacked_bars,
)
from fourbit.report.content import PARTS, curve_points, evaluations
from fourbit.report.markup import (
    figure,
    html_page,
    html_section,
    html_table,
    plain,
    remark,
    shown_text,
    significant,
    value_text,
)
from fourbit.report.style import CSS, PART_COLORS

TONES = len(PART_COLORS) - 1


@dataclass(frozen=True)
class ComparedMethod:
    """One method: its name, its row of figures, and the metrics of its runs by seed."""

    name: str
    row: Mapping[str, Any]
    metrics: Mapping[int, Sequence[Mapping[str, Any]]]

    @property
    def curve(self) -> Sequence[Mapping[str, Any]]:
        """The steps of its first seed."""
        return self.metrics[min(self.metrics)] if self.metrics else ()


@dataclass(frozen=True)
class ComparisonContent:
    """All that the page shows.

    Attributes:
        title: of the comparison.
        methods: in order; the others are compared with the first.
        verdicts: in words.
        tasks: tasks to what they are called.
        common: settings that all methods share.
    """

    title: str
    methods: Sequence[ComparedMethod]
    verdicts: Sequence[str]
    tasks: Mapping[str, str]
    common: Mapping[str, Any]


def write_comparison(path: Path, content: ComparisonContent) -> None:
    """Writes the page as one self-contained HTML file.

    Args:
        path: replaced as a whole.
        content: what to show.

    Raises:
        EnvironmentFault: the disk refused.
    """
    replace_file(path, _page(content).encode("utf-8"))


def _page(content: ComparisonContent) -> str:
    verdicts = "".join(f"<li>{shown_text(words)}</li>" for words in content.verdicts)
    lead = (
        f'<ul class="verdict">{verdicts}</ul>' if verdicts else remark("Nothing is compared yet.")
    )
    sections = (
        html_section("Results", _quality(content) + _scores(content)),
        html_section("Memory and speed", _cost_table(content) + _memory(content)),
        html_section("Training", _curves(content)),
        html_section("Settings", _settings(content.common)),
    )
    return html_page(
        content.title, maker="fourbit comparison", lead=lead, body="\n".join(sections), css=CSS
    )


def _settings(common: Mapping[str, Any]) -> str:
    rows = [[f"<code>{plain(key)}</code>", plain(value_text(key, v))] for key, v in common.items()]
    return html_table("What all methods share", ("setting", "value"), rows)


def number(value: object, digits: int = 4) -> str:
    """For people; a dash where there is none."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "–"
    return f"{value:,.{digits}g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _interval(found: Mapping[str, Any] | None) -> str:
    if not found or found.get("value") is None:
        return "–"
    half = found.get("half")
    return number(found["value"]) + (f" ± {significant(half, 2)}" if half is not None else "")


def _quality(content: ComparisonContent) -> str:
    names = ["method", "seeds", "evaluation loss", *map(plain, content.tasks.values())]
    rows = []
    for method in content.methods:
        row = method.row
        cells = [plain(method.name), str(len(row.get("seeds") or ()))]
        before = row.get("eval_loss_before")
        cells.append(_with_before(_interval(row.get("eval_loss")), before))
        for task in content.tasks:
            found = (row.get("scores") or {}).get(task)
            cells.append(_with_before(_interval(found), (found or {}).get("before")))
        rows.append(cells)
        for seed, line in (row.get("failed") or {}).items():
            told = f"seed {plain(seed)} failed: {plain(str(line))}"
            rows.append([plain(method.name), told, *[""] * (len(names) - 2)])
    caption = "Mean over seeds ± half of its 95% interval; small: the untouched model"
    return html_table(caption, names, rows, style="compared")


def _with_before(text: str, before: object) -> str:
    return text + (f"<br><small>{number(before)}</small>" if number(before) != "–" else "")


def _scores(content: ComparisonContent) -> str:
    """A picture for each measure."""
    figures = []
    measures: list[tuple[str | None, str]] = [(None, "evaluation loss"), *content.tasks.items()]
    for task, label in measures:
        spans, before = [], None
        for place, method in enumerate(content.methods):
            row = method.row
            found = row.get("eval_loss") if task is None else (row.get("scores") or {}).get(task)
            if found and found.get("value") is not None:
                half = found["half"] if found.get("half") is not None else math.nan
                heading = f"{method.name}: {_interval(found)}"
                spans.append(Span(heading, found["value"], half, place % TONES))
        if spans:
            told = f"{label}: " + ", ".join(span.heading for span in spans)
            figures.append(figure(plain(label), interval_chart(spans, summary=told, before=before)))
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def _cost_table(content: ComparisonContent) -> str:
    rows = []
    for method in content.methods:
        row = method.row
        rows.append(
            [
                plain(method.name),
                _size(row.get("peak_memory_bytes")),
                _size(row.get("planned_peak_bytes")),
                number(row.get("tokens_per_second")),
                number(row.get("trainable_parameters")),
                _size(row.get("adapter_bytes")),
                number(row.get("learning_rate")),
            ]
        )
    names = ("method", "peak memory", "planned", "tokens/s", "trained", "saved", "learning rate")
    return html_table("Medians over seeds", names, rows, style="compared")


def _size(value: object) -> str:
    return human_bytes(value) if isinstance(value, (int, float)) and value else "–"


def _memory(content: ComparisonContent) -> str:
    bars = []
    for method in content.methods:
        parts = {k: v for k, v in (method.row.get("parts") or {}).items() if v}
        if parts:
            heading = f"{method.name} {human_bytes(sum(parts.values()))}"
            pieces = [
                (f"part-{part}" if part in PARTS else "part-other", float(size))
                for part, size in parts.items()
            ]
            bars.append(Bar(heading, pieces))
    if not bars:
        return ""
    keys = "".join(
        f'<li><svg class="swatch" viewBox="0 0 12 12" aria-hidden="true">'
        f'<rect class="part-{part}" width="12" height="12"/></svg>{plain(label)}</li>'
        for part, label in PARTS.items()
    )
    summary = "Planned memory: " + ", ".join(bar.heading for bar in bars)
    picture = stacked_bars(bars, summary=summary) + f'<ul class="legend">{keys}</ul>'
    return f'<div class="charts">{figure("Planned memory by part", picture, wide=True)}</div>'


def _curves(content: ComparisonContent) -> str:
    training, held = [], []
    for place, method in enumerate(content.methods):
        steps = [line for line in method.curve if "lr" in line]
        points = curve_points(steps, "loss")
        window = max(1, len(points) // 20)
        tone = place % TONES
        training.append(Series(method.name, running_mean(points, window), tone=tone))
        held.append(Series(method.name, evaluations(method.curve), tone=tone))
    pictures = (
        figure(
            "Training loss, first seed, running mean",
            line_chart(training, summary=f"Training loss of {len(training)} methods"),
            wide=True,
        ),
        figure(
            "Evaluation loss, first seed",
            line_chart(held, summary=f"Evaluation loss of {len(held)} methods"),
            wide=True,
        ),
    )
    return f'<div class="charts">{"".join(pictures)}</div>' if any(pictures) else ""
