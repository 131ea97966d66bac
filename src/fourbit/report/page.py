"""The report of a run: one HTML file that needs no network, for people who were not there.

Everything that came from data, models or users is escaped, and characters that could disguise a
text are written out. The same content gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from fourbit.files import human_bytes, replace_file
from fourbit.report.charts import Bar, Series, finite, line_chart, stacked_bars
from fourbit.report.content import (
    PARTS,
    ReportContent,
    curve_points,
    is_share,
    known_values,
    loss_series,
    score_pairs,
    smoothed,
)
from fourbit.report.markup import (
    LONGEST,
    duration,
    facts_table,
    figure,
    html_page,
    html_section,
    html_table,
    long_text,
    plain,
    remark,
    shown_text,
    spoken,
    value_text,
)
from fourbit.report.style import CSS

_ALL_TEXT = 300_000


def write_report(path: Path, content: ReportContent) -> None:
    """Writes the report as one self-contained HTML file.

    Args:
        path: usually ``report.html`` of the run; replaced as a whole.
        content: what to show.

    Raises:
        EnvironmentFault: the disk refused.
    """
    replace_file(path, _page(content).encode("utf-8"))


def _page(content: ReportContent) -> str:
    verified, verdict = _verdict(content.receipt)
    style = "good" if verified else "bad"
    sections = (
        _figures(content),
        _curves(content),
        _memory(content),
        _samples(content.samples),
        _receipt(content.receipt),
        html_section("Data audit", facts_table(content.audit, "What the data amounts to")),
        _configuration(content),
        html_section("Machine", facts_table(content.machine, "Where the run was made")),
    )
    body = "\n".join(part for part in sections if part)
    lead = f'<p class="verdict {style}">{verdict}</p>'
    return html_page(content.title, maker="fourbit training report", lead=lead, body=body, css=CSS)


def _verdict(receipt: Mapping[str, Any]) -> tuple[bool, str]:
    checks = receipt.get("checks") or []
    failed = [str(check.get("name")) for check in checks if not check.get("ok")]
    if not checks:
        return False, "<strong>NOT verified</strong>: nothing was checked"
    if failed:
        names = plain(", ".join(failed))
        return False, (
            f"<strong>NOT verified</strong>: {len(failed)} of {len(checks)} checks failed ({names})"
        )
    if receipt.get("ok") is not True:
        return False, "<strong>NOT verified</strong>: the receipt says so"
    return True, f"<strong>Verified</strong>: all {len(checks)} checks hold"


def _figures(content: ReportContent) -> str:
    rows = [*_score_figures(content.scores), *_metric_figures(content.metrics)]
    planned = finite(content.plan.get("peak_bytes"))
    measured = finite(content.measured_peak_bytes)
    if measured:
        note = ""
        if planned:
            note = f"planned {human_bytes(planned)} ({(planned - measured) / measured:+.1%})"
        rows.append(("peak memory", human_bytes(measured), note))
    elif planned:
        rows.append(("planned peak memory", human_bytes(planned), "not measured"))
    cards = "".join(
        f"<div><dt>{plain(name)}</dt><dd>{plain(value)}<small>{plain(note)}</small></dd></div>"
        for name, value, note in rows
    )
    body = f'<dl class="figures">{cards}</dl>' if cards else remark("No figures were recorded.")
    return html_section("In short", body)


def _score_figures(scores: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    rows = []
    for name, before, after in score_pairs(scores):
        rows.append((name, f"{_score(name, before)} → {_score(name, after)}", "before → after"))
    for key, value in (scores or {}).items():
        if not key.endswith(("_before", "_after")) and finite(value) is not None:
            rows.append((spoken(key), _score(key, value), ""))
    return rows


def _score(name: str, value: float) -> str:
    return f"{value:.1%}" if is_share(name, value) else f"{value:,.4g}"


def _metric_figures(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    rows = []
    for key, name in (("loss", "training loss"), ("eval_loss", "evaluation loss")):
        values = known_values(metrics, key)
        if len(values) > 1:
            rows.append((name, f"{values[0]:.3f} → {values[-1]:.3f}", "first → last"))
        elif values:
            rows.append((name, f"{values[0]:.3f}", "recorded once"))
    steps = [step for line in metrics if (step := finite(line.get("step"))) is not None]
    if steps:
        seconds = sum(known_values(metrics, "seconds"))
        rows.append(("steps", f"{max(steps):,.0f}", f"in {duration(seconds)}" if seconds else ""))
    speeds = known_values(metrics, "tokens_per_second")
    if speeds:
        rows.append(("tokens per second", f"{median(speeds):,.0f}", "median of the steps"))
    tokens, learned = (
        sum(known_values(metrics, "tokens")),
        sum(known_values(metrics, "supervised_tokens")),
    )
    if tokens:
        note = f"{learned:,.0f} of them supervised" if learned else ""
        rows.append(("tokens seen", f"{tokens:,.0f}", note))
    return rows


def _curves(content: ReportContent) -> str:
    metrics = content.metrics
    loss = loss_series(metrics)
    rate = [Series("learning rate", curve_points(metrics, "lr"))]
    speed = smoothed(curve_points(metrics, "tokens_per_second"), "tokens per second")
    figures = (
        figure("Loss", line_chart(loss, summary=_told("Loss", loss)), wide=True),
        figure(
            "Learning rate", line_chart(rate, summary=_told("Learning rate", rate), from_zero=True)
        ),
        figure(
            "Speed, tokens per second",
            line_chart(speed, summary=_told("Speed", speed), from_zero=True),
        ),
    )
    body = f'<div class="charts">{"".join(figures)}</div>'
    return html_section("Training", body if any(figures) else remark("No step was recorded."))


def _told(name: str, series: Sequence[Series]) -> str:
    told = []
    for one in series:
        known = [(step, value) for step, value in one.points if value is not None]
        if known and one.kind == "limit":
            told.append(f"{one.label} {known[0][1]:.4g}")
        elif known:
            (first, start), (last, end) = known[0], known[-1]
            told.append(
                f"{one.label} from {start:.4g} at step {first:.0f} to {end:.4g} at step {last:.0f}"
            )
    return f"{name}: " + "; ".join(told)


def _memory(content: ReportContent) -> str:
    plan = content.plan
    parts = _sizes(plan.get("parts"))
    planned = finite(plan.get("peak_bytes"))
    body = _memory_curve(content.metrics, planned)
    bars = _memory_bars(parts, planned, finite(content.measured_peak_bytes))
    if bars:
        body += f"<div>{bars}{_parts_table(parts, planned)}</div>"
    body += _planned_bars("Planned by phase of the run", plan.get("phases") or {})
    methods = {name: found.get("parts") for name, found in (plan.get("methods") or {}).items()}
    body += _planned_bars("The same run with other methods, planned", methods)
    charts = f'<div class="charts">{body}</div>' if body else ""
    return html_section("Memory", charts or remark("Memory was neither planned nor measured."))


def _sizes(parts: Mapping[str, Any] | None) -> dict[str, float]:
    found = {name: finite(value) for name, value in (parts or {}).items()}
    return {name: size for name, size in found.items() if size is not None and size > 0}


def _planned_bars(caption: str, plans: Mapping[str, Any]) -> str:
    bars = []
    for name, parts in plans.items():
        sizes = _sizes(parts)
        heading = f"{name} {human_bytes(sum(sizes.values()))}"
        bars.append(Bar(heading, [(_part_style(part), size) for part, size in sizes.items()]))
    if not bars:
        return ""
    summary = f"{caption}: " + ", ".join(bar.heading for bar in bars)
    return figure(caption, stacked_bars(bars, summary=summary))


def _memory_curve(metrics: Sequence[Mapping[str, Any]], planned: float | None) -> str:
    highest = max([*known_values(metrics, "memory_bytes"), planned or 0.0])
    unit, scale = ("GB", 1e9) if highest >= 1e9 else ("MB", 1e6)
    points = curve_points(metrics, "memory_bytes", scale)
    if not any(value is not None for _, value in points):
        return ""
    series = [Series("highest in the step", points)]
    if planned:
        level = planned / scale
        series.append(Series("planned peak", [(0.0, level), (points[-1][0], level)], "limit"))
    summary = _told(f"Memory in {unit}", series)
    return figure(
        f"Memory over the steps, {unit}", line_chart(series, summary=summary, from_zero=True)
    )


def _memory_bars(parts: Mapping[str, float], planned: float | None, measured: float | None) -> str:
    bars = []
    if parts:
        heading = f"planned {human_bytes(planned or sum(parts.values()))}"
        bars.append(Bar(heading, [(_part_style(name), size) for name, size in parts.items()]))
    elif planned:
        bars.append(Bar(f"planned {human_bytes(planned)}", [("part-weights", planned)]))
    if measured:
        bars.append(Bar(f"measured {human_bytes(measured)}", [("part-measured", measured)]))
    summary = "Peak memory: " + ", ".join(bar.heading for bar in bars)
    return figure("Peak, planned by part and measured", stacked_bars(bars, summary=summary))


def _part_style(name: str) -> str:
    return f"part-{name}" if name in PARTS else "part-other"


def _parts_table(parts: Mapping[str, float], planned: float | None) -> str:
    if not parts:
        return ""
    total = sum(parts.values())
    rows = [
        [
            f'<svg class="swatch" viewBox="0 0 12 12" aria-hidden="true"><rect'
            f' class="{_part_style(name)}" width="12" height="12"/></svg>'
            f"{plain(PARTS.get(name, name))}",
            human_bytes(size),
            f"{size / total:.1%}",
        ]
        for name, size in parts.items()
    ]
    note = ""
    if planned and abs(total - planned) > 0.01 * planned:
        note = remark(
            f"The parts add up to {human_bytes(total)}, the peak is {human_bytes(planned)}:"
            " not all of them are in memory at the same moment."
        )
    return (
        html_table("Planned memory by part", ("part", "bytes", "share"), rows, style="numbers")
        + note
    )


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    if not samples:
        return ""
    limit = max(1000, min(LONGEST, _ALL_TEXT // (4 * len(samples))))
    shown = samples[: max(1, _ALL_TEXT // 4000)]
    rows = [
        [
            long_text(sample.get("prompt"), limit),
            long_text(sample.get("reference"), limit),
            _answer(sample, "before", limit),
            _answer(sample, "after", limit),
        ]
        for sample in shown
    ]
    names = ("prompt", "reference", "before training", "after training")
    table = html_table("Answers before and after training", names, rows, style="samples")
    left = len(samples) - len(shown)
    return html_section(
        "Samples", table + (remark(f"{left:,} more are not shown.") if left else "")
    )


def _answer(sample: Mapping[str, Any], key: str, limit: int) -> str:
    answer, reference = sample.get(key), sample.get("reference")
    cell = long_text(answer, limit)
    if not isinstance(answer, str) or not isinstance(reference, str) or not reference.strip():
        return cell
    same = answer.strip() == reference.strip()
    words = "equals the reference" if same else "differs from the reference"
    return f'{cell}<p class="match {"good" if same else "bad"}">{words}</p>'


def _receipt(receipt: Mapping[str, Any]) -> str:
    checks = receipt.get("checks") or []
    rows = [
        [
            f'<span class="{"good" if check.get("ok") else "bad"}">'
            f"{'holds' if check.get('ok') else 'FAILS'}</span>",
            plain(str(check.get("name", ""))),
            long_text(check.get("detail"), LONGEST),
        ]
        for check in checks
    ]
    body = html_table("Checks", ("result", "check", "what was seen"), rows, style="checks")
    findings = [f"<li>{long_text(str(f), LONGEST)}</li>" for f in receipt.get("findings") or []]
    if findings:
        body += f"<h3>Findings</h3><ul>{''.join(findings)}</ul>"
    facts = {k: v for k, v in receipt.items() if k not in ("ok", "checks", "findings")}
    if facts:
        table = facts_table(facts, "Figures behind the checks")
        body += f"<details><summary>Figures behind the checks</summary>{table}</details>"
    return html_section("Receipt", body or remark("There is no receipt."))


def _configuration(content: ReportContent) -> str:
    rows = [
        [
            f"<code>{plain(key)}</code>",
            long_text(value_text(key, value), LONGEST),
            shown_text(content.origins.get(key, "")),
        ]
        for key, value in content.config.items()
    ]
    table = html_table("Every setting and where it came from", ("setting", "value", "origin"), rows)
    return html_section("Configuration", table)
