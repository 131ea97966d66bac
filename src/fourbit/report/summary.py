"""The picture of a run in one PNG, for a README or a chat."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourbit.files import replace_file
from fourbit.report.content import ReportContent, is_share, loss_series, score_pairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_summary(path: Path, content: ReportContent) -> None:
    """Writes one picture (1200 x 500 pixels, PNG): the loss, and the scores before and after.

    Args:
        path: the file to write; replaced as a whole.
        content: metrics and scores are used.

    Raises:
        EnvironmentFault: the disk refused.
    """
    # pyplot would choose a window system and keep every figure alive; these two classes do not.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), dpi=100, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    pairs = [pair for pair in score_pairs(content.scores) if is_share(pair[0], max(pair[1:]))]
    if pairs:
        grid = figure.add_gridspec(1, 2, width_ratios=[2.2, 1])
        _plot_scores(figure.add_subplot(grid[1]), pairs)
        _plot_loss(figure.add_subplot(grid[0]), content.metrics)
    else:
        _plot_loss(figure.add_subplot(), content.metrics)
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
