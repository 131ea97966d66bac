"""`fourbit demo`: the main job on a generated task, with nothing special about it.

It writes data files and a ``config.yaml``, then calls what `fourbit train` and `fourbit generate`
call; training those files by hand gives the same adapter bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourbit.data import DataConfig, read_rows
from fourbit.demo.orders import SYSTEM, generate, write_jsonl
from fourbit.errors import InputError
from fourbit.evaluation import ExactMatch, score_examples
from fourbit.generate import Generator, Sampling, open_generator
from fourbit.rundir import RunDir
from fourbit.settings import Resolved, dump_settings, load_settings
from fourbit.training.config import TrainConfig
from fourbit.training.progress import Reporter
from fourbit.training.reporting import write_run_report
from fourbit.training.run import TrainResult, train

_MAX_NEW_TOKENS = 56
_SHOWN = 3


@dataclass(frozen=True)
class DemoShape:
    """How much of everything; the defaults take minutes on two cores."""

    seed: int = 0
    train_rows: int = 624
    test_rows: int = 200
    pattern_rows: int = 60


@dataclass(frozen=True)
class DemoResult:
    """The training result and the scores around it."""

    train: TrainResult
    exact_match_before: float
    exact_match_after: float
    exact_match_new_patterns: float

    def as_dict(self) -> dict[str, Any]:
        """The keys of ``fourbit demo --json``."""
        return {
            **self.train.as_dict(),
            "exact_match_before": self.exact_match_before,
            "exact_match_after": self.exact_match_after,
            "exact_match_new_patterns": self.exact_match_new_patterns,
        }


def write_inputs(folder: Path, shape: DemoShape, *, overwrite: bool) -> Path:
    """Writes the three data files and the configuration; returns the configuration's path.

    Raises:
        InputError: the folder holds a demo already.
    """
    config_path = folder / "config.yaml"
    if config_path.exists() and not overwrite:
        raise InputError(
            "demo-exists",
            where=str(folder),
            what="a demo is already there",
            fix="choose another --output, or --overwrite",
        )
    folder.mkdir(parents=True, exist_ok=True)
    rows = generate(
        shape.seed,
        train_rows=shape.train_rows,
        test_rows=shape.test_rows,
        pattern_rows=shape.pattern_rows,
    )
    write_jsonl(rows.train, folder / "train.jsonl")
    write_jsonl(rows.test, folder / "test.jsonl")
    write_jsonl(rows.new_patterns, folder / "new_patterns.jsonl")
    config = TrainConfig.model_validate(
        {
            "model": "smollm2",
            "output": str(folder / "run"),
            "data": {
                "train": str(folder / "train.jsonl"),
                "eval": 24,
                "system": SYSTEM,
                "max_length": 512,
            },
            "lora": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0},
            "optim": {"lr": 1e-3},
            "batch_size": 1,
            "grad_accum": 1,
            "epochs": 1,
            "eval_every": 50,
            "save_every": 50,
        }
    )
    config_path.write_text(dump_settings(Resolved(config, {})), encoding="utf-8")
    return config_path


def run_demo(
    folder: Path, shape: DemoShape, *, overwrite: bool = False, reporter: Reporter | None = None
) -> DemoResult:
    """Shows the untouched model fail, trains it, shows it succeed.

    Raises:
        FourbitError: whatever the real commands raise.
    """
    say = reporter or Reporter()
    config_path = write_inputs(folder, shape, overwrite=overwrite)
    resolved = load_settings(TrainConfig, path=config_path)
    config = resolved.value
    say.line("The task: a sentence about an order becomes JSON. No value of the test rows occurs")
    say.line("in the training rows, so memorising cannot win.")
    say.line()
    test = _examples(folder / "test.jsonl")
    generator = open_generator(config.model, quant=config.quant)
    before = _score(generator, test, say, "the untouched model")
    _show(test, before, say)
    del generator

    result = train(config, origins=resolved.origins, overwrite=overwrite, reporter=say)

    generator = open_generator(config.model, adapter=Path(config.output), quant=config.quant)
    after = _score(generator, test, say, "the tuned model")
    _show(test, after, say)
    patterns = _examples(folder / "new_patterns.jsonl")
    novel = _score(generator, patterns, say, "sentence patterns never seen in training")
    outcome = DemoResult(result, before.score, after.score, novel.score)
    _finish(config, config_path, outcome, say)
    return outcome


def _examples(path: Path) -> list[Any]:
    return list(read_rows(DataConfig(train=str(path), eval=0, system=SYSTEM)).train)


def _score(generator: Generator, rows: list[Any], say: Reporter, title: str) -> ExactMatch:
    with say.task(f"scoring {title}", total=len(rows)) as advance:
        sampling = Sampling(max_new_tokens=_MAX_NEW_TOKENS)
        score = score_examples(generator, rows, sampling, progress=advance)
    say.line(f"exact match of {title}: {score.score:.1%} of {score.n} unseen rows")
    return score


def _show(rows: list[Any], score: ExactMatch, say: Reporter) -> None:
    for row, text, right in list(zip(rows, score.predictions, score.correct, strict=True))[:_SHOWN]:
        first = (text.strip().splitlines() or [""])[0]
        say.line(f"  {row.messages[-2]['content']}")
        say.line(f"    {'right' if right else 'wrong'}: {first[:110]}")
    say.line()


def _finish(config: TrainConfig, config_path: Path, outcome: DemoResult, say: Reporter) -> None:
    run = RunDir(Path(config.output))
    scores = {
        "exact_match_before": outcome.exact_match_before,
        "exact_match_after": outcome.exact_match_after,
        "exact_match_new_patterns": outcome.exact_match_new_patterns,
    }
    write_run_report(run, scores=scores, picture=True)
    say.line(
        f"exact match: {outcome.exact_match_before:.1%} before,"
        f" {outcome.exact_match_after:.1%} after,"
        f" {outcome.exact_match_new_patterns:.1%} on new sentence patterns"
    )
    say.line(f"report:  {run.report_path}")
    say.line(f"again:   fourbit train {config_path} -o runs/again    (the same adapter bytes)")
    say.line(f"try it:  fourbit chat {config.model} --adapter {config.output}")
    say.line("yours:   fourbit train --model smollm2 --data FILE.jsonl -o runs/mine")
