"""Line charts and stacked bars as inline SVG: small, following the page's light or dark theme.

Colours, fonts and line styles are classes that `fourbit.report` styles; nothing here is a script,
a font or a link.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Point = tuple[float, float | None]
"""``(step, value)``; None breaks the line."""

_WIDTH, _HEIGHT = 640, 298
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 20, 16, 54
_BUCKETS = 250
_HUGE, _TINY = 1e100, 1e-30
_BAR_HEIGHT, _BAR_STEP = 34, 74
_SPAN_STEP = 54


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        label: for the legend.
        points: in order of steps.
        kind: ``line``, ``faint`` (behind a line), ``dots`` (few points, joined) or ``limit``
            (dashed).
        tone: which of the page's colours, for curves that are compared; None: that of its kind.
    """

    label: str
    points: Sequence[Point]
    kind: Literal["line", "faint", "dots", "limit"] = "line"
    tone: int | None = None

    @property
    def style(self) -> str:
        """Its classes."""
        return f"curve {self.kind}" + ("" if self.tone is None else f" tone-{self.tone}")


@dataclass(frozen=True)
class _Frame:
    """The mapping from data to the picture."""

    x_max: float
    low: float
    high: float

    def x(self, step: float) -> float:
        return _LEFT + step / self.x_max * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def finite(value: object) -> float | None:
    """``value`` as a float, or None when it is no number that can be drawn."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    # Nothing measured is larger; beyond it the arithmetic of the axes would overflow.
    return float(value) if -_HUGE < value < _HUGE else None


def decimate(points: Sequence[Point], *, buckets: int = _BUCKETS) -> list[Point]:
    """At most three points a bucket: lowest, highest and a gap, so that no spike is lost."""
    if len(points) <= 2 * buckets:
        return list(points)
    kept = {0, len(points) - 1}
    for bucket in range(buckets):
        span = range(bucket * len(points) // buckets, (bucket + 1) * len(points) // buckets)
        known = [(value, i) for i in span if (value := points[i][1]) is not None]
        if known:
            kept |= {min(known)[1], max(known)[1]}
        gap = next((i for i in span if points[i][1] is None), None)
        if gap is not None:
            kept.add(gap)
    return [points[i] for i in sorted(kept)]


def running_mean(points: Sequence[Point], window: int) -> list[Point]:
    """Mean of the last ``window`` known values at each step; a gap stays a gap."""
    recent: list[float] = []
    out: list[Point] = []
    for step, value in points:
        if value is None:
            out.append((step, None))
            continue
        recent = [*recent[1 - window :], value] if window > 1 else [value]
        out.append((step, sum(recent) / len(recent)))
    return out


def ticks(low: float, high: float, *, count: int = 4, whole: bool = False) -> list[float]:
    """Round values that cover ``low`` to ``high``, about ``count`` intervals.

    Args:
        low: smallest value.
        high: largest value, above ``low``.
        count: intervals wanted.
        whole: only whole numbers.
    """
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_text(value: float, step: float) -> str:
    """A tick label with the digits that ``step`` needs: ``0.25``, ``1,500``, ``2e-4``."""
    if value == 0:
        return "0"
    if step < 1e-3 or step >= 1e6:
        digits = max(0, math.floor(math.log10(abs(value))) - math.floor(math.log10(step)))
        mantissa, exponent = f"{value:.{digits}e}".split("e")
        if "." in mantissa:
            mantissa = mantissa.rstrip("0").rstrip(".")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def line_chart(series: Sequence[Series], *, summary: str, from_zero: bool = False) -> str:
    """The curves over steps, as SVG with a legend; empty when there is nothing to draw.

    Args:
        series: curves; those without a value are left out.
        summary: what the picture shows, in words, for those who cannot see it.
        from_zero: let the value axis begin at zero.
    """
    shown = [s for s in series if any(value is not None for _, value in s.points)]
    if not shown:
        return ""
    values = [value for s in shown for _, value in s.points if value is not None]
    low, high = (min(0.0, min(values)) if from_zero else min(values)), max(values)
    if high - low <= max(1e-9 * max(abs(low), abs(high)), _TINY):
        # A flat curve belongs in the middle, whatever its size.
        pad = abs(high) * 0.5 if abs(high) > _TINY else 1.0
        low, high = (low if from_zero and low < high else low - pad), high + pad
    levels = ticks(low, high)
    x_max = max(1.0, *(step for s in shown for step, _ in s.points))
    frame = _Frame(x_max, levels[0], levels[-1])
    body = _axes(frame, levels) + "".join(_curve(s, frame) for s in shown)
    return _svg(_HEIGHT, body, summary) + _legend(shown)


def _axes(frame: _Frame, levels: Sequence[float]) -> str:
    parts = []
    for level in levels:
        y = frame.y(level)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        label = tick_text(level, levels[1] - levels[0])
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 5:.1f}" text-anchor="end">{label}</text>')
    steps = [t for t in ticks(0.0, frame.x_max, whole=True) if t <= frame.x_max]
    for step in steps:
        place = f'x="{frame.x(step):.1f}" y="{_HEIGHT - _BOTTOM + 26}"'
        parts.append(f'<text {place} text-anchor="middle">{step:,.0f}</text>')
    # Under the numbers, where it cannot meet one of them.
    parts.append(
        f'<text class="unit" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">step</text>'
    )
    return "".join(parts)


def _curve(series: Series, frame: _Frame) -> str:
    points = decimate(series.points)
    path, pen_down = [], False
    for step, value in points:
        if value is None:
            pen_down = False
            continue
        path.append(f"{'L' if pen_down else 'M'}{frame.x(step):.1f} {frame.y(value):.1f}")
        pen_down = True
    out = f'<path class="{series.style}" d="{"".join(path)}"/>'
    if len(path) == 1 and series.kind == "line":
        # A path of one point draws nothing.
        place = path[0][1:].split()
        out += f'<circle class="single" cx="{place[0]}" cy="{place[1]}" r="4"/>'
    if series.kind == "dots":
        for step, value in points:
            if value is not None:
                out += (
                    f'<circle class="dot" cx="{frame.x(step):.1f}" cy="{frame.y(value):.1f}"'
                    f' r="4.5"><title>step {step:,.0f}: {value:.4g}</title></circle>'
                )
    return out


def _legend(series: Sequence[Series]) -> str:
    rows = []
    for s in series:
        dot = '<circle class="dot" cx="14" cy="6" r="4"/>' if s.kind == "dots" else ""
        mark = f'<path class="{s.style}" d="M2 6H26"/>{dot}'
        rows.append(
            f'<li><svg class="key" viewBox="0 0 28 12" aria-hidden="true">{mark}</svg>'
            f"{html.escape(s.label)}</li>"
        )
    return f'<ul class="legend">{"".join(rows)}</ul>'


@dataclass(frozen=True)
class Bar:
    """One horizontal bar: its heading and the sizes of its pieces, each with a style class."""

    heading: str
    pieces: Sequence[tuple[str, float]]


def stacked_bars(bars: Sequence[Bar], *, summary: str) -> str:
    """Bars on one scale from zero, one under the other.

    Args:
        bars: pieces are drawn in order; the classes are ``part-…``.
        summary: what the picture shows, in words.
    """
    longest = max((sum(size for _, size in bar.pieces) for bar in bars), default=0.0)
    if longest <= 0:
        return ""
    body = []
    for row, bar in enumerate(bars):
        top, x = row * _BAR_STEP, 0.0
        body.append(f'<text x="0" y="{top + 20}">{html.escape(bar.heading)}</text>')
        for style, size in bar.pieces:
            width = size / longest * _WIDTH
            body.append(
                f'<rect class="{style}" x="{x:.2f}" y="{top + 30}" width="{width:.2f}"'
                f' height="{_BAR_HEIGHT}"/>'
            )
            x += width
    return _svg(_BAR_STEP * len(bars), "".join(body), summary)


@dataclass(frozen=True)
class Span:
    """One value with its interval: its heading, the value, half the interval (NaN: none)."""

    heading: str
    value: float
    half: float
    tone: int


def interval_chart(spans: Sequence[Span], *, summary: str, before: float | None = None) -> str:
    """A dot and a bar for each, one under the other, on one scale.

    Args:
        spans: in order.
        summary: what the picture shows, in words.
        before: a dashed line, where things began.
    """
    ends = [
        s.value + side * (0 if math.isnan(s.half) else s.half) for s in spans for side in (-1, 1)
    ]
    ends += [] if before is None else [before]
    low, high = min(ends), max(ends)
    if high - low <= max(1e-9 * max(abs(low), abs(high)), _TINY):
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    levels = ticks(low, high)
    low, high = levels[0], levels[-1]

    def x(value: float) -> float:
        return 36 + (value - low) / (high - low) * (_WIDTH - 88)

    bottom, body = _SPAN_STEP * len(spans), []
    for level in levels:
        body.append(f'<path class="grid" d="M{x(level):.1f} 0V{bottom}"/>')
        label = tick_text(level, levels[1] - levels[0])
        # the first begins at the edge: letters are larger on paper and on a phone
        first = level == levels[0]
        place = f'x="{0 if first else x(level):.1f}" y="{bottom + 22}"'
        anchor = "start" if first else "middle"
        body.append(f'<text {place} text-anchor="{anchor}">{label}</text>')
    if before is not None:
        body.append(f'<path class="curve limit" d="M{x(before):.1f} 0V{bottom}"/>')
    for row, span in enumerate(spans):
        y = row * _SPAN_STEP + 40
        body.append(f'<text x="0" y="{y - 16}">{html.escape(span.heading)}</text>')
        if not math.isnan(span.half):
            left, right = x(span.value - span.half), x(span.value + span.half)
            body.append(
                f'<path class="curve line tone-{span.tone}" d="M{left:.1f} {y}H{right:.1f}"/>'
            )
        body.append(f'<circle class="fill-{span.tone}" cx="{x(span.value):.1f}" cy="{y}" r="6"/>')
    return _svg(bottom + 30, "".join(body), summary)


def _svg(height: int, body: str, summary: str) -> str:
    label = html.escape(summary)
    return (
        f'<svg class="picture" viewBox="0 0 {_WIDTH} {height}" role="img"'
        f' aria-label="{label}">{body}</svg>'
    )
