"""`fourbit eval`: a model, some tasks, one result."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fourbit import __version__
from fourbit.data import is_text_file, read_plain_rows
from fourbit.errors import InputError
from fourbit.evaluation.options import EvalOptions
from fourbit.evaluation.scoring import Scorer
from fourbit.evaluation.tasks import Material, TaskResult, task_of
from fourbit.files import replace_file, valid_json
from fourbit.generate import Generator, open_generator
from fourbit.rundir import CONFIG, EVALUATIONS
from fourbit.settings import load_settings
from fourbit.training.config import TrainConfig
from fourbit.training.progress import Reporter


@dataclass(frozen=True)
class EvalResult:
    """What was found, task by task."""

    model: str
    results: Mapping[str, TaskResult]
    data: Mapping[str, tuple[str, str]]
    """Task to its file and that file's SHA-256."""
    seconds: Mapping[str, float]
    settings: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {
            "model": self.model,
            "results": {name: self._entry(name) for name in self.results},
            "data_sha256": {name: sha256 for name, (_, sha256) in self.data.items()},
            "settings": dict(self.settings),
        }

    def _entry(self, name: str) -> dict[str, Any]:
        found = self.results[name]
        entry: dict[str, Any] = {}
        for metric, value in found.metrics.items():
            entry[metric] = value.value
            entry[f"{metric}_stderr"] = value.stderr
        first = next(iter(found.metrics.values()))
        return {
            **entry,
            "stderr": first.stderr,
            "n": found.n,
            "unit": found.unit,
            **({} if first.chance is None else {"chance": first.chance}),
            **found.facts,
            **({"data": self.data[name][0]} if name in self.data else {}),
            "prompts_sha256": found.prompts_sha256,
            "seconds": round(self.seconds[name], 2),
        }

    def lines(self) -> list[str]:
        """For people: one line for each task, and a warning where it shows nothing."""
        lines = []
        for name, found in self.results.items():
            words = [f"{metric} {value.text()}" for metric, value in found.metrics.items()]
            count = f"{found.n} {found.unit}, {self.seconds[name]:.0f} s"
            lines.append(f"{name}: {', '.join(words)}  ({count})")
            first = next(iter(found.metrics.values()))
            if first.is_chance:
                lines.append(
                    f"  not above chance ({100 * (first.chance or 0):.1f} %):"
                    " this score says nothing about the model"
                )
        return lines

    def write_items(self, folder: Path) -> None:
        """One JSON Lines file for each task: what happened to each item."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, found in self.results.items():
            rows = "".join(valid_json(item) + "\n" for item in found.items)
            replace_file(folder / f"{name}.jsonl", rows.encode())


def evaluate(
    model: str, tasks: Sequence[str], *, options: EvalOptions, reporter: Reporter
) -> EvalResult:
    """Loads a model once and measures it.

    Args:
        model: as for `fourbit.load`.
        tasks: ``NAME=FILE`` for rows of ours; ``NAME`` for a task of lm-eval.
        options: how.
        reporter: progress.

    Raises:
        InputError: a task that does not exist, or data that it cannot use.
        ModelError: a model or adapter that cannot be used.
    """
    wanted = [_parse(task) for task in tasks]
    if not wanted:
        raise InputError("no-tasks", where="--tasks", what="names no task",
                         fix="--tasks hellaswag=rows.jsonl")  # fmt: skip
    run = None if options.adapter is None else run_of(options.adapter)
    if run is not None:
        options = _as_trained(options, run)
    ours, theirs = _material(wanted, options), [name for name, path in wanted if path is None]
    generator = open_generator(
        model,
        adapter=options.adapter,
        quant=options.quant,
        chat_template=options.chat_template,
        dtype=options.dtype,
    )
    scorer = Scorer(generator.model, batch_size=options.batch_size)
    results, seconds, data = {}, {}, {}
    for name, (material, sha256) in ours.items():
        began = time.perf_counter()
        results[name] = _measure(name, generator, scorer, material, reporter)
        seconds[name] = time.perf_counter() - began
        data[name] = (material.path, sha256)
    for name in theirs:
        from fourbit.evaluation.hub import evaluate_with_lm_eval

        began = time.perf_counter()
        results |= evaluate_with_lm_eval(name, generator, scorer, options, reporter)
        seconds |= {task: time.perf_counter() - began for task in results if task not in seconds}
    result = EvalResult(model, results, data, seconds, _settings(generator, options))
    if run is not None:
        _record(run, result, reporter)
    return result


def run_of(adapter: Path) -> Path | None:
    """The run directory that an adapter's path names or lies in; None for other adapters."""
    candidates = (adapter, adapter.parent) if adapter.name == "adapter" else (adapter,)
    return next((path for path in candidates if (path / CONFIG).is_file()), None)


def _as_trained(options: EvalOptions, run: Path) -> EvalOptions:
    """Questions are put as the run's own rows were, in all that ``options`` leave open."""
    trained = load_settings(TrainConfig, path=run / CONFIG).value.data
    keys = ("prompt", "completion", "system")
    open_keys = {key for key in keys if getattr(options.data, key) is None}
    if options.data.prompt is not None or options.data.completion is not None:
        open_keys -= {"prompt", "completion"}  # they only go together
    found = {key: getattr(trained, key) for key in open_keys}
    template = options.chat_template if options.chat_template is not None else trained.chat_template
    return replace(options, data=options.data.model_copy(update=found), chat_template=template)


def _record(run: Path, result: EvalResult, reporter: Reporter) -> None:
    """Keeps what was found with the run, for `fourbit doctor RUN`."""
    try:
        with (run / EVALUATIONS).open("a", encoding="utf-8") as file:
            file.write(valid_json(result.as_dict()) + "\n")
    except OSError as error:
        reporter.warn(f"not recorded in {run}: {error.strerror}")


def _parse(task: str) -> tuple[str, str | None]:
    name, equals, path = task.partition("=")
    name = name.strip()
    if equals and not path:
        raise InputError("no-data", where=f"--tasks {task}", what="names no file",
                         fix=f"--tasks {name}=FILE")  # fmt: skip
    if equals:
        task_of(name)
    return name, path if equals else None


def split_tasks(words: Sequence[str]) -> list[str]:
    """``a=x.jsonl,b`` to its parts; a comma inside a file's name stays."""
    return [part for word in words for part in re.split(r",(?=\w+(?:=|,|$))", word) if part]


def _material(
    wanted: Sequence[tuple[str, str | None]], options: EvalOptions
) -> dict[str, tuple[Material, str]]:
    """All data is read and checked before the model is loaded."""
    shots = []
    if options.shots:
        if options.shots_from is None:
            raise InputError("no-shots", where="--shots", what="has no rows to show",
                             fix="name them: --shots-from FILE")  # fmt: skip
        shots, _ = read_plain_rows(str(options.shots_from), key="--shots-from")
    found = {}
    for name, path in wanted:
        if path is None:
            continue
        if name in found:
            raise InputError("bad-argument", where=f"--tasks {name}", what="is named twice",
                             fix="run it again for the other file")  # fmt: skip
        limit = None if is_text_file(path) else options.limit
        rows, sha256 = read_plain_rows(path, key=f"--tasks {name}", limit=limit)
        chosen = shots if name == "mmlu" else shots[: options.shots]
        material = Material(
            rows,
            path,
            shots=_first_of_each(chosen, options.shots) if name == "mmlu" else chosen,
            window=options.window,
            stride=options.stride,
            max_new_tokens=options.max_new_tokens,
            data=options.data,
        )
        found[name] = (material, sha256)
    return found


def _first_of_each(rows: Sequence[Any], count: int) -> list[Any]:
    """The first ``count`` rows of each subject."""
    seen: dict[str, int] = {}
    kept = []
    for row in rows:
        subject = str(row.data.get("subject", ""))
        seen[subject] = seen.get(subject, 0) + 1
        if seen[subject] <= count:
            kept.append(row)
    return kept


def _measure(
    name: str, generator: Generator, scorer: Scorer, material: Material, reporter: Reporter
) -> TaskResult:
    task = task_of(name)
    with reporter.task(name, total=task.size(material)) as advance:
        return task.run(generator, scorer, material, advance)


def _settings(generator: Generator, options: EvalOptions) -> dict[str, Any]:
    floating = [p.dtype for p in generator.model.parameters() if p.is_floating_point()]
    return {
        "quant": "none" if options.quant is None else options.quant.quant_type,
        "adapter": None if options.adapter is None else str(options.adapter),
        "dtype": str(floating[0]).removeprefix("torch.") if floating else None,
        "limit": options.limit,
        "fourbit": __version__,
    }
