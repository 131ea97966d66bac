"""The picture of a run in one PNG, for a README or a chat."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourbit.files import replace_file
from fourbit.report.charts import running_mean
from fourbit.report.comparison import ComparisonContent
from fourbit.report.content import (
    PARTS,
    ReportContent,
    curve_points,
    is_share,
    loss_series,
    score_pairs,
)
from fourbit.report.style import PART_COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure


def plot_plans(
    path: Path, plans: Mapping[str, Mapping[str, int]], *, room: int | None, title: str
) -> None:
    """Writes one picture (1000 x 560 pixels, PNG): a bar for each plan, stacked by part.

    Args:
        path: the file to write; replaced as a whole.
        plans: bytes by part, by the name of the plan.
        room: bytes there are; a line where known.
        title: what is planned.

    Raises:
        EnvironmentFault: the disk refused.
    """
    figure, canvas = _canvas(10, 5.6)
    axes = figure.add_subplot()
    names = list(plans)
    lows = dict.fromkeys(names, 0.0)
    highest = max((sum(parts.values()) / 1e9 for parts in plans.values()), default=1.0)
    for color, (part, label) in zip(PART_COLORS, PARTS.items(), strict=False):
        sizes = [plans[name].get(part, 0) / 1e9 for name in names]
        if max(sizes, default=0.0) > 0.001 * highest:
            axes.bar(
                range(len(names)), sizes, 0.55, bottom=list(lows.values()), label=label, color=color
            )
        lows = {name: lows[name] + size for name, size in zip(names, sizes, strict=True)}
    for place, total in enumerate(lows.values()):
        axes.text(place, total + 0.02 * highest, f"{total:,.1f} GB", ha="center", fontsize=13)
    right = len(names) - 0.5
    if room and room / 1e9 < 1.3 * highest:
        right += 0.5
        highest = max(highest, room / 1e9)
        axes.axhline(room / 1e9, color="#a6201b", linewidth=1.4, linestyle="--")
        text = f"{room / 1e9:,.1f} GB there are"
        axes.text(len(names) - 0.45, room / 1e9, text, color="#a6201b", fontsize=12, va="bottom")
    axes.set_xlim(-0.5, right)
    axes.set_ylim(0, 1.12 * highest)
    axes.set_xticks(range(len(names)), names, fontsize=13)
    axes.set_ylabel("GB at the highest moment", fontsize=13)
    axes.set_title(title, fontsize=15, loc="left")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles[::-1], labels[::-1], loc="outside right upper", frameon=False, fontsize=12
    )
    _tidy(axes)
    _write(path, canvas)


def plot_summary(path: Path, content: ReportContent) -> None:
    """Writes one picture (1200 x 500 pixels, PNG): the loss, and the scores before and after.

    Args:
        path: the file to write; replaced as a whole.
        content: metrics and scores are used.

    Raises:
        EnvironmentFault: the disk refused.
    """
    figure, canvas = _canvas(12, 5)
    pairs = [pair for pair in score_pairs(content.scores) if is_share(pair[0], max(pair[1:]))]
    if pairs:
        grid = figure.add_gridspec(1, 2, width_ratios=[2.2, 1])
        _plot_scores(figure.add_subplot(grid[1]), pairs)
        _plot_loss(figure.add_subplot(grid[0]), content.metrics)
    else:
        _plot_loss(figure.add_subplot(), content.metrics)
    _write(path, canvas)


def plot_comparison(path: Path, content: ComparisonContent) -> None:
    """Writes one picture (1200 x 900 pixels, PNG): quality with intervals, losses, memory.

    Args:
        path: the file to write; replaced as a whole.
        content: as for the page.

    Raises:
        EnvironmentFault: the disk refused.
    """
    figure, canvas = _canvas(12, 9)
    grid = figure.add_gridspec(2, 2)
    _plot_quality(figure.add_subplot(grid[0, 0]), content)
    _plot_memory(figure.add_subplot(grid[0, 1]), content)
    _plot_losses(figure.add_subplot(grid[1, :]), content)
    _write(path, canvas)


def _plot_quality(axes: Axes, content: ComparisonContent) -> None:
    task = next((name for name in content.tasks if name != "perplexity"), None)
    rows = []
    for method in content.methods:
        found = method.row.get("eval_loss")
        found = (method.row.get("scores") or {}).get(task) if task else found
        if found and found.get("value") is not None:
            rows.append((method.name, found["value"], found.get("half") or 0.0))
    for place, (_, value, half) in enumerate(rows):
        color = PART_COLORS[place % (len(PART_COLORS) - 1)]
        axes.errorbar(value, place, xerr=half, fmt="o", color=color, markersize=9, capsize=4)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=12)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    title = content.tasks[task] if task else "evaluation loss"
    axes.set_title(f"{title}, 95% over seeds", fontsize=14, loc="left")
    _tidy(axes)
    axes.grid(axis="x", color="#e3e6ea")


def _plot_memory(axes: Axes, content: ComparisonContent) -> None:
    found = [
        (method.name, (method.row.get("peak_memory_bytes") or 0) / 1e9)
        for method in content.methods
    ]
    colors = [PART_COLORS[i % (len(PART_COLORS) - 1)] for i in range(len(found))]
    bars = axes.barh(range(len(found)), [size for _, size in found], 0.6, color=colors)
    axes.bar_label(bars, labels=[f"{size:.2f} GB" for _, size in found], padding=4, fontsize=12)
    axes.set_yticks(range(len(found)), [name for name, _ in found], fontsize=12)
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlim(0, 1.25 * max((size for _, size in found), default=1.0) or 1.0)
    axes.set_title("measured peak memory", fontsize=14, loc="left")
    _tidy(axes)
    axes.grid(axis="y", visible=False)


def _plot_losses(axes: Axes, content: ComparisonContent) -> None:
    from matplotlib.ticker import MaxNLocator

    for place, method in enumerate(content.methods):
        points = curve_points([line for line in method.curve if "lr" in line], "loss")
        mean = running_mean(points, max(1, len(points) // 20))
        values = [float("nan") if value is None else value for _, value in mean]
        color = PART_COLORS[place % (len(PART_COLORS) - 1)]
        axes.plot([s for s, _ in mean], values, label=method.name, color=color, linewidth=2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.lines:
        axes.legend(frameon=False, fontsize=12)
    axes.set_xlabel("step", fontsize=13)
    axes.set_title("training loss, first seed, running mean", fontsize=14, loc="left")
    _tidy(axes)


def _canvas(width: float, height: float) -> tuple[Figure, FigureCanvasAgg]:
    # pyplot would choose a window system and keep every figure alive; these two classes do not.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, facecolor="white", layout="constrained")
    return figure, FigureCanvasAgg(figure)


def _write(path: Path, canvas: FigureCanvasAgg) -> None:
    buffer = io.BytesIO()
    canvas.print_png(buffer, metadata={"Software": None})
    replace_file(path, buffer.getvalue())


def _plot_loss(axes: Axes, metrics: Sequence[Mapping[str, Any]]) -> None:
    styles = {
        "line": {"color": "#1f5fa8", "linewidth": 2.2},
        "faint": {"color": "#1f5fa8", "linewidth": 0.8, "alpha": 0.35},
        "dots": {"color": "#c2410c", "linewidth": 1.2, "marker": "o", "markersize": 7},
    }
    for curve in loss_series(metrics):
        if any(value is not None for _, value in curve.points):
            steps = [step for step, _ in curve.points]
            values = [float("nan") if value is None else value for _, value in curve.points]
            axes.plot(steps, values, label=curve.label, **styles[curve.kind])
    if axes.lines:
        axes.legend(frameon=False, fontsize=12)
    axes.set_xlabel("step", fontsize=13)
    axes.set_title("loss", fontsize=16, loc="left")
    _tidy(axes)


def _plot_scores(axes: Axes, pairs: Sequence[tuple[str, float, float]]) -> None:
    for shift, column, label, color in (
        (-0.2, 1, "before", "#9aa3ad"),
        (0.2, 2, "after", "#1f5fa8"),
    ):
        values = [100 * float(pair[column]) for pair in pairs]
        bars = axes.bar(
            [i + shift for i in range(len(pairs))], values, 0.36, label=label, color=color
        )
        axes.bar_label(bars, labels=[f"{v:.1f}%\n{label}" for v in values], fontsize=12, padding=3)
    axes.set_xticks(range(len(pairs)), [name for name, _, _ in pairs], fontsize=13)
    axes.set_ylim(0, 118)
    axes.set_yticks([0, 25, 50, 75, 100], ["0%", "25%", "50%", "75%", "100%"])
    axes.set_title("score on unseen questions", fontsize=16, loc="left")
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.grid(axis="y", color="#e3e6ea")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=12, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
