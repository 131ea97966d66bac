"""Tasks defined by lm-eval, answered by our models: its definitions and metrics, our scoring."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator
from typing import Any

from fourbit.errors import EnvironmentFault, InputError, one_line
from fourbit.evaluation.metrics import Metric
from fourbit.evaluation.options import EvalOptions
from fourbit.evaluation.scoring import Scorer
from fourbit.evaluation.tasks import TaskResult
from fourbit.generate import Generator
from fourbit.training.progress import Reporter

_NO_SHARE = ("perplexity", "loss", "bits", "bleu", "ter", "chrf")


def evaluate_with_lm_eval(
    name: str, generator: Generator, scorer: Scorer, options: EvalOptions, reporter: Reporter
) -> dict[str, TaskResult]:
    """Runs one task, or a group of them, of lm-eval.

    Args:
        name: as lm-eval knows it, or as a YAML file in ``options.include`` calls it.
        generator: for answers that are generated.
        scorer: for likelihoods.
        options: limit and shots.
        reporter: progress.

    Raises:
        EnvironmentFault: lm-eval is not installed, or the hub cannot be reached.
        InputError: it knows no such task.
    """
    lm_eval = _lm_eval(name)
    from lm_eval.tasks import TaskManager

    from fourbit.evaluation.lm_eval_model import AskedModel

    include = None if options.include is None else str(options.include)
    with _quiet():
        manager = TaskManager(include_path=include, include_defaults=False)
        if name not in manager.all_tasks:  # reading all of lm-eval's own takes seconds
            manager = TaskManager(include_path=include)
        if name not in manager.all_tasks:
            raise InputError(
                "unknown-task",
                where=f"--tasks {name}",
                what="is neither a task of ours with a file nor one of lm-eval",
                fix=f"--tasks {name}=FILE, or a name of `lm-eval ls tasks`",
            )
        asked = AskedModel(generator, scorer, reporter)
        try:
            found = lm_eval.simple_evaluate(
                model=asked,
                tasks=[name],
                num_fewshot=options.shots or None,
                limit=options.limit,
                task_manager=manager,
                bootstrap_iters=1000,
                random_seed=0,
            )
        except (OSError, ConnectionError, ValueError) as error:
            raise EnvironmentFault(
                "no-task-data",
                where=f"--tasks {name}",
                what=f"lm-eval cannot load its data: {one_line(str(error))[:200]}",
                fix=f"give the rows yourself: --tasks {name}=FILE",
            ) from error
    assert found is not None
    return {task: _result(task, found) for task in found["results"]}


def _lm_eval(name: str) -> Any:
    try:
        import lm_eval
        import lm_eval.evaluator  # noqa: F401  # what the package offers lazily
    except ImportError:
        raise EnvironmentFault(
            "missing-extra",
            where=f"--tasks {name}",
            what="a task without a file is lm-eval's, which is not installed",
            fix=f"pip install 'fourbit[eval]', or --tasks {name}=FILE",
        ) from None
    return lm_eval


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's log and bars; ours tell what is going on."""
    before = logging.root.manager.disable
    bars = os.environ.get("TQDM_DISABLE")
    logging.disable(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        logging.disable(before)
        if bars is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = bars


def _result(task: str, found: dict[str, Any]) -> TaskResult:
    metrics = {}
    values = found["results"][task]
    for key, value in values.items():
        name, comma, kind = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = values.get(f"{name}_stderr,{kind}")
        stderr = float(error) if isinstance(error, (int, float)) else math.nan
        label = name if kind == "none" else f"{name}_{kind}"
        share = not any(word in name for word in _NO_SHARE)
        metrics[label] = Metric(float(value), stderr, share=share)
    samples = found.get("samples", {}).get(task, [])
    items = [
        {
            "doc_id": sample["doc_id"],
            "target": sample["target"],
            "answers": sample["filtered_resps"],
            **{name: sample[name] for name in metrics if name in sample},
        }
        for sample in samples
    ]
    asked = hashlib.sha256(json.dumps([s["arguments"] for s in samples], default=str).encode())
    counts = found.get("n-samples", {}).get(task, {})
    facts = {"lm_eval": True, "version": found.get("versions", {}).get(task)}
    return TaskResult(
        metrics,
        int(counts.get("effective", len(samples))),
        "items",
        asked.hexdigest(),
        items,
        facts,
    )
