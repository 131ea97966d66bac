"""`report.html` made from the files of a run directory, so that it can be made again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fourbit.report import ReportContent, plot_summary, write_report
from fourbit.rundir import PLAN, SAMPLES, SCORES, SUMMARY, RunDir
from fourbit.settings import load_settings
from fourbit.training.config import TrainConfig


def report_content(folder: RunDir) -> ReportContent:
    """Everything the report shows, read from the run's files."""
    resolved = load_settings(TrainConfig, path=folder.config_path)
    plan = _read(folder.path / PLAN) or {}
    receipt = _read(folder.receipt_path) or {}
    return ReportContent(
        title=folder.path.name,
        config=flatten(resolved.value.model_dump(mode="json")),
        origins=plan.get("origins", {}),
        metrics=folder.read_metrics(),
        plan=plan.get("plan", {}),
        measured_peak_bytes=receipt.get("peak_memory_bytes"),
        receipt=receipt,
        samples=_read(folder.path / SAMPLES) or [],
        scores=_read(folder.path / SCORES),
        audit=plan.get("audit", {}),
        machine=plan.get("machine", {}),
    )


def write_run_report(
    folder: RunDir, *, scores: Mapping[str, Any] | None = None, picture: bool = False
) -> None:
    """Writes ``report.html``.

    Args:
        folder: a run that has ended.
        scores: task scores to store with the run and to show.
        picture: also write ``summary.png``.
    """
    if scores is not None:
        folder.write_json(SCORES, dict(scores))
    content = report_content(folder)
    write_report(folder.report_path, content)
    if picture:
        plot_summary(folder.path / SUMMARY, content)


def gave_way(folder: RunDir) -> dict[str, Any]:
    """The settings that gave way to the budget when the run in ``folder`` began."""
    plan = (_read(folder.path / PLAN) or {}).get("plan", {})
    return dict(plan.get("recommended", {}))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
