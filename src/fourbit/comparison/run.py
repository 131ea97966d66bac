"""Trains and measures every method with every seed, each in a process of its own.

A process each, because a peak of memory is the process's: what one run leaves in the allocator
would count for the next. What is finished is on disk, so a comparison that was stopped goes on.
"""

from __future__ import annotations

import glob
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from fourbit.comparison.results import Comparison, Outcome
from fourbit.comparison.variants import Variant, has_own_base, held
from fourbit.errors import EnvironmentFault, InputError
from fourbit.evaluation.run import split_tasks
from fourbit.files import replace_file, valid_json
from fourbit.methods import quantized_base
from fourbit.rundir import ADAPTER, BASE, PLAN, RunDir, check_path
from fourbit.settings import Resolved, dump_settings, replaced
from fourbit.training.child import ChildFailed, run_command
from fourbit.training.config import TrainConfig
from fourbit.training.progress import Reporter
from fourbit.training.reporting import flatten
from fourbit.training.signals import SignalGuard

STATE = "compare.json"
_NOT_COMPARED = {"output", "resume", "seed"}


@dataclass(frozen=True)
class CompareOptions:
    """How methods are compared.

    Attributes:
        output: folder of everything.
        seeds: runs of each method; seeds count from the configuration's.
        tasks: as for `fourbit eval`, asked of every tuned model and of the untouched ones.
        text: general text whose perplexity shows what fine-tuning made the model forget.
        window: tokens of a perplexity window.
        limit: rows of each task.
        max_new_tokens: of generated answers.
        overwrite: move an earlier comparison aside.
    """

    output: Path
    seeds: int = 3
    tasks: Sequence[str] = ()
    text: Path | None = None
    window: int = 512
    limit: int | None = None
    max_new_tokens: int = 128
    overwrite: bool = False


def compare(
    path: Path | None,
    overrides: Sequence[tuple[str, str]],
    variants: Sequence[Variant],
    *,
    options: CompareOptions,
    reporter: Reporter,
) -> Comparison:
    """Trains and measures; writes ``compare.json``, ``compare.html`` and ``compare.png``.

    Args:
        path: configuration of the runs, or None.
        overrides: settings over it, as on the command line of `fourbit train`.
        variants: the methods; the others are compared with the first.
        options: how.
        reporter: progress.

    Raises:
        InputError: a setting, a task or the output folder cannot be used.
        Interrupted, Preempted: stopped; the same command goes on.
    """
    check_path(options.output)
    configs = {variant.name: variant.config(path, overrides) for variant in variants}
    job = _Job(variants, configs, options, reporter)
    with SignalGuard():
        job.open()
        return job.run()


class _Job:
    """A comparison under way."""

    def __init__(
        self,
        variants: Sequence[Variant],
        configs: Mapping[str, TrainConfig],
        options: CompareOptions,
        reporter: Reporter,
    ) -> None:
        self.variants, self.configs, self.options, self.say = variants, configs, options, reporter
        self.folder = options.output
        self.others: dict[str, Any] = {}
        self.tasks = split_tasks(options.tasks)
        if options.text is not None:
            self.tasks = [*self.tasks, f"perplexity={options.text}"]
        self.comparison = Comparison(
            [variant.name for variant in variants],
            {name: flatten(config.model_dump(mode="json")) for name, config in configs.items()},
            text=None if options.text is None else options.text.name,
        )

    def open(self) -> None:
        """Takes the folder, or goes on with what is there."""
        state = self.folder / STATE
        wanted = self._identity()
        if state.is_file() and not self.options.overwrite:
            try:
                found = json.loads(state.read_text(encoding="utf-8")).get("identity")
            except (ValueError, AttributeError):
                found = None
            wanted = json.loads(valid_json(wanted))
            _fill_in_defaults(found, wanted)
            self._let_change_what_is_unfinished(found, wanted)
            changed = _first_difference(found, wanted)
            if not changed and found is not None:
                self._keep_others(found)
            if changed:
                raise InputError(
                    "output-exists",
                    where=str(self.folder),
                    what=f"holds another comparison ({changed})",
                    fix="choose another --output, or --overwrite moves it aside",
                )
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            if not state.is_file():
                raise InputError(
                    "not-a-comparison",
                    where=str(self.folder),
                    what="holds files that are not of a comparison",
                    fix="choose an empty or new output folder",
                )
            _move_aside(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError("bad-path", where=str(self.folder), what=str(error.strerror),
                             fix="choose another output folder") from None  # fmt: skip
        self._write()

    def _let_change_what_is_unfinished(self, found: Any, wanted: Mapping[str, Any]) -> None:
        """Settings of a method that gave no result yet are corrected, not mixed in."""
        stored = found.get("settings") if isinstance(found, dict) else None
        if not isinstance(stored, dict):
            return
        for name in self.configs:
            results = (self.folder / "results").glob(f"{glob.escape(name)}-seed*.json")
            finished = any(Outcome.read(path) is not None for path in results)
            if name in stored and stored[name] != wanted["settings"][name] and not finished:
                del stored[name]
                if (self.folder / name).exists():
                    _move_aside(self.folder / name)

    def _keep_others(self, found: Mapping[str, Any]) -> None:
        """The settings of methods that an earlier command compared are remembered."""
        self.others = {k: v for k, v in found["settings"].items() if k not in self.configs}

    def _identity(self) -> dict[str, Any]:
        """What must be the same for results to stand beside each other.

        Methods and seeds may be added.
        """
        settings = {
            name: {k: v for k, v in flat.items() if k not in _NOT_COMPARED}
            for name, flat in self.comparison.settings.items()
        }
        return {
            "settings": {**self.others, **settings},
            "tasks": self.tasks,
            "limit": self.options.limit,
            "window": self.options.window,
            "max_new_tokens": self.options.max_new_tokens,
        }

    def _write(self) -> None:
        values = {"identity": self._identity(), **self.comparison.as_dict()}
        replace_file(self.folder / STATE, (valid_json(values, indent=2) + "\n").encode())

    def run(self) -> Comparison:
        """Everything that is not finished yet."""
        first = next(iter(self.configs.values())).seed
        seeds = range(first, first + self.options.seeds)
        todo = [(seed, variant.name) for seed in seeds for variant in self.variants]
        began, made = time.monotonic(), 0
        for number, (seed, name) in enumerate(todo, 1):
            stored = self.folder / "results" / f"{name}-seed{seed}.json"
            outcome = Outcome.read(stored)
            if outcome is None:
                left = ""
                if made:
                    rest = (time.monotonic() - began) / made * (len(todo) - number + 1)
                    left = f", about {max(1, round(rest / 60))} min left"
                self.say.line(f"[{number}/{len(todo)}] {name}, seed {seed}{left}")
                outcome = self._one(name, seed)
                made += 1
                stored.parent.mkdir(exist_ok=True)
                replace_file(stored, valid_json(outcome.as_dict()).encode())
            self.comparison.add(name, seed, outcome)
            self._write()
            self._show()
        return self.comparison

    def _show(self) -> None:
        from fourbit.report import plot_comparison, write_comparison

        content = self.comparison.content(self.folder.name)
        write_comparison(self.folder / "compare.html", content)
        plot_comparison(self.folder / "compare.png", content)

    def _one(self, name: str, seed: int) -> Outcome:
        config = self.configs[name]
        try:
            run = self.folder / name / f"seed-{seed}"
            own = has_own_base(config)
            # a base that the run makes for itself is there only afterwards
            before = {} if own else self._untouched(config, config.model)
            trained = self._train(config, name, seed, run)
            if own:
                before = self._untouched(config, run / BASE)
            after = self._measured(config, run, f"{name}-seed{seed}")
        except ChildFailed as failure:
            self.say.warn(f"{name}, seed {seed}: {failure.line()}")
            return Outcome(failed=failure.line())
        metrics = RunDir(run).read_metrics()
        plan = json.loads((run / PLAN).read_text(encoding="utf-8")).get("plan", {})
        return Outcome(trained, before, after, metrics, plan)

    def _train(self, config: TrainConfig, name: str, seed: int, run: Path) -> dict[str, Any]:
        value = replaced(config, {"output": str(run), "seed": seed})
        path = self.folder / "configs" / f"{name}-seed{seed}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(dump_settings(Resolved(value, {})), encoding="utf-8")
        return self._child("train", path, "--resume", "auto", "--json")

    def _untouched(self, config: TrainConfig, base: str | Path) -> dict[str, Any]:
        """The scores of a base as this run holds it: measured once for each way of holding."""
        if not self.tasks:
            return {}
        kind = held(config)
        if base != next(iter(self.configs.values())).model:
            kind += f"-{sha256(str(base).encode()).hexdigest()[:12]}"
        path = self.folder / "untouched" / f"{kind}.json"
        if not path.is_file():
            self.say.line(f"the untouched {base}, held as {held(config)}")
            found = self._asked(config, [base], path.with_suffix(""))
            path.parent.mkdir(exist_ok=True)
            replace_file(path, valid_json(found).encode())
        return json.loads(path.read_text(encoding="utf-8"))

    def _measured(self, config: TrainConfig, run: Path, name: str) -> dict[str, Any]:
        if not self.tasks:
            return {}
        if config.method == "full":
            model: list[object] = [run / ADAPTER]
        else:
            base = run / BASE if has_own_base(config) else config.model
            model = [base, "--adapter", run]
        return self._asked(config, model, self.folder / "items" / name)

    def _asked(self, config: TrainConfig, model: Sequence[object], items: Path) -> dict[str, Any]:
        """What `fourbit eval` finds, with what each item gave."""
        options = self.options
        words: list[object] = ["eval", *model]
        words += ["--quant", config.quant.quant_type if quantized_base(config.method) else "none"]
        if quantized_base(config.method) and config.quant.quant_type != "int8":
            words += ["--blocksize", config.quant.blocksize]
            words += [] if config.quant.double_quant else ["--no-double-quant"]
        for task in self.tasks:
            words += ["--tasks", task]
        words += ["--precision", config.precision, "--window", options.window]
        words += ["--max-new-tokens", options.max_new_tokens, "--items", items, "--json"]
        words += [] if options.limit is None else ["--limit", options.limit]
        for key in ("prompt", "completion", "system"):
            value = getattr(config.data, key)
            words += [] if value is None else [f"--{key}", value]
        if config.data.chat_template is not None:
            words += ["--chat-template", config.data.chat_template]
        found = self._child(*words)["results"]
        return {
            name: {**one, "each": _each(items / f"{name}.jsonl")} for name, one in found.items()
        }

    def _child(self, *words: object) -> dict[str, Any]:
        return run_command(*words, where=str(self.folder))


def _move_aside(folder: Path) -> None:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(aside)


def _each(path: Path) -> list[dict[str, Any]]:
    """What an evaluation wrote about its items.

    Raises:
        EnvironmentFault: the file cannot be read.
    """
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise EnvironmentFault(
            "damaged-record",
            where=str(path),
            what=str(error),
            fix="remove it, and start the comparison again",
        ) from None


def _fill_in_defaults(found: Any, wanted: Mapping[str, Any]) -> None:
    """Gives stored settings those that a newer version added, at their defaults."""
    defaults = json.loads(valid_json(flatten(TrainConfig().model_dump(mode="json"))))
    stored = found.get("settings") if isinstance(found, dict) else None
    for name, flat in stored.items() if isinstance(stored, dict) else ():
        if isinstance(flat, dict):
            for key in wanted["settings"].get(name, {}).keys() & defaults.keys():
                flat.setdefault(key, defaults[key])


def _first_difference(found: Any, wanted: Any, where: str = "") -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        # a method that only one of the two has changes nothing for the others
        keys = found.keys() & wanted.keys() if where == "settings" else found.keys() | wanted.keys()
        for key in sorted(keys):
            told = _first_difference(
                found.get(key), wanted.get(key), f"{where}, {key}" if where else key
            )
            if told:
                return told
        return ""
    return "" if found == wanted else f"{where}: {found!r}, now {wanted!r}"
