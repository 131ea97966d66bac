"""What went wrong in a run, from its own records: symptom, likely cause, what to change.

Every finding cites the number it rests on. A finding is only made where the records can carry it;
a run that went well has none.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from fourbit.errors import InputError
from fourbit.files import human_bytes
from fourbit.methods import trains_prompt
from fourbit.rundir import CONFIG, EVALUATIONS, PLAN, SAMPLES, SCORES, RunDir
from fourbit.settings import load_settings
from fourbit.training.config import TrainConfig

_FEW_STEPS = 20
_LOW_RATE = {"full": 1e-6, "lora": 2e-5, "qlora": 2e-5, "prompt_tuning": 1e-3, "p_tuning": 1e-4}
_FEW_ROWS = 50
_LEARNED = 0.005
"""Share of the loss that has to go away to count as learning."""
_DIVERGED = 1.1
_WORSE = 1.02
_LITTLE_SUPERVISED = 0.02
_MUCH_LOST = 0.2
_SLOWED = 0.6
_LATE = 9
"""Steps from which a trend in speed can be seen."""
_MUCH_UPDATE = 0.3
_HALF_FULL = 0.6
_NEARLY_ALL = 0.93
_ERROR = re.compile(r"error\[([\w-]+)\] (.*)")
_MARKER = re.compile(r"<\|[^|<>]{1,40}\|>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>")
_REPEATED = 4


@dataclass(frozen=True)
class RunFinding:
    """One thing that went wrong.

    Attributes:
        symptom: what was seen, with its number.
        cause: the likely reason, with the number it rests on.
        fix: what to change.
    """

    symptom: str
    cause: str
    fix: str

    def line(self) -> str:
        """For people."""
        return f"{self.symptom}; likely: {self.cause}; change: {self.fix}"

    def as_dict(self) -> dict[str, str]:
        """For ``--json``."""
        return asdict(self)


@dataclass(frozen=True)
class Records:
    """The files of a run, as far as they exist."""

    config: TrainConfig
    metrics: Sequence[Mapping[str, Any]]
    plan: Mapping[str, Any]
    audit: Mapping[str, Any]
    machine: Mapping[str, Any]
    receipt: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]]
    scores: Mapping[str, Any]
    evaluations: Sequence[Mapping[str, Any]]
    log: Sequence[str]

    @classmethod
    def read(cls, path: Path) -> Records:
        """The records in a run directory.

        Raises:
            InputError: it is no run, or its files are not what a run writes.
        """
        if not (path / CONFIG).is_file():
            raise InputError(
                "not-a-run-directory",
                where=str(path),
                what="holds no run (no config.yaml)",
                fix="give the folder that `fourbit train` wrote",
            )
        run = RunDir(path)
        plan = _json(path / PLAN, {})
        return cls(
            config=load_settings(TrainConfig, path=run.config_path).value,
            metrics=run.read_metrics(),
            plan=plan.get("plan") or {},
            audit=plan.get("audit") or {},
            machine=plan.get("machine") or {},
            receipt=_json(run.receipt_path, {}),
            samples=_json(path / SAMPLES, []),
            scores=_json(path / SCORES, {}),
            evaluations=_json_lines(path / EVALUATIONS),
            log=_lines(run.log_path),
        )

    @cached_property
    def steps(self) -> list[Mapping[str, Any]]:
        """Lines of training steps."""
        return [line for line in self.metrics if line.get("step", 0) > 0 and "lr" in line]

    @cached_property
    def losses(self) -> list[float]:
        """Of the steps whose loss is a number."""
        return [float(line["loss"]) for line in self.steps if _number(line.get("loss"))]

    @cached_property
    def evals(self) -> list[tuple[int, float]]:
        """``(step, loss)`` of the evaluations."""
        found = [
            (int(line["step"]), float(line["eval_loss"]))
            for line in self.metrics
            if _number(line.get("eval_loss"))
        ]
        if not any(step == 0 for step, _ in found) and _number(
            self.receipt.get("eval_loss_before")
        ):
            found.insert(0, (0, self.receipt["eval_loss_before"]))
        return found

    @property
    def peak_rate(self) -> float:
        """The highest learning rate of the run."""
        return max((float(line["lr"]) for line in self.steps), default=self.config.optim.lr)

    @cached_property
    def last_error(self) -> tuple[str, str] | None:
        """Code and text of the error that ended the run, where one did."""
        if self.receipt:
            return None
        for line in reversed(self.log[-40:]):
            found = _ERROR.search(line)
            if found:
                return found[1], found[2]
        return None


def _json(path: Path, missing: Any) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else missing
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, type(missing)):
        raise InputError(
            "damaged-record",
            where=str(path),
            what="is not what a run writes",
            fix="restore it, or move it away",
        )
    return found


def _lines(path: Path) -> list[str]:
    return path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []


def _json_lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in _lines(path):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue  # a line cut short by a crash
        if isinstance(values, dict):
            found.append(values)
    return found


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def check_up(path: Path) -> list[RunFinding]:
    """What went wrong in the run at ``path``; empty when nothing did.

    Raises:
        InputError: no run is there, or its records are damaged.
    """
    return findings(Records.read(path))


def findings(records: Records) -> list[RunFinding]:
    """The findings of every check, in order of weight."""
    return [found for check in _CHECKS for found in check(records)]


# How the run ended.


def _memory(r: Records) -> Iterator[RunFinding]:
    error = r.last_error
    parts = {name: size for name, size in (r.plan.get("parts") or {}).items() if size}
    largest = max(parts, key=lambda name: parts[name], default="")
    cause = "the plan has no parts to name"
    if largest:
        room = r.plan.get("available_bytes")
        have = f" of {human_bytes(room)} there were" if room else ""
        cause = (
            f"the largest part is {largest}, {human_bytes(parts[largest])} of"
            f" {human_bytes(r.plan.get('peak_bytes') or sum(parts.values()))} planned{have}"
        )
    if error is not None and error[0] in ("out-of-memory", "does-not-fit"):
        yield RunFinding(
            f"memory ran out: {error[1].split('; fix:')[0]}", cause, _less_memory(r, largest)
        )
    events = r.receipt.get("memory_events") or 0
    if events:
        yield RunFinding(
            f"memory ran out {events} times and was made room for, which costs time",
            cause,
            _less_memory(r, largest),
        )
    if not r.receipt and error is None and r.steps and not _ended_on_purpose(r):
        last = r.steps[-1]
        memory, total = last.get("memory_bytes"), r.machine.get("memory_total")
        used = f"{human_bytes(memory)} of {human_bytes(total)} in use" if memory and total else ""
        close = bool(memory and total and memory > 0.8 * total)
        yield RunFinding(
            f"the run vanished after step {last['step']} without an error or a receipt",
            f"the system ended it for its memory ({used} at that step)"
            if close
            else f"it was killed or is still running{f' ({used})' if used else ''}",
            _less_memory(r, largest) if close else "--resume auto goes on from the last checkpoint",
        )


def _ended_on_purpose(r: Records) -> bool:
    return any("stopped by SIG" in line for line in r.log[-5:])


def _less_memory(r: Records, largest: str) -> str:
    config = r.config
    if largest == "weights":
        if config.method in ("full", "lora"):
            return "method: qlora, which holds the weights in 4 bits"
        return "a smaller model, or more memory"
    if largest == "optimizer" or largest == "gradients":
        return "optim.paged: always, optim.optim_bits: 8, or a smaller lora.r"
    halves = []
    if config.batch_size > 1:
        halves.append(
            f"batch_size: {max(1, config.batch_size // 2)} with grad_accum: {config.grad_accum * 2}"
        )
    if config.gradient_checkpointing != "all":
        halves.append("gradient_checkpointing: all")
    halves.append(f"data.max_length: {max(16, config.data.max_length // 2)}")
    return ", or ".join(halves)


def _nonfinite(r: Records) -> Iterator[RunFinding]:
    bad = [line for line in r.steps if line.get("updated") is False]
    error = r.last_error
    stopped = error is not None and error[0] in ("nonfinite", "scale-collapsed")
    if not bad and not stopped:
        return
    fp16 = r.config.precision == "fp16"
    lost = [line for line in bad if not _number(line.get("loss"))]
    if fp16 and not lost and not stopped and len(bad) <= max(5, 0.1 * len(r.steps)):
        return  # how a loss scale finds its level
    first = bad[0]["step"] if bad else len(r.steps) + 1
    symptom = (
        f"{len(bad)} of {len(r.steps)} updates were skipped for NaN or Inf,"
        f" the first at step {first}"
    )
    before = [line for line in r.steps if line["step"] < first and _number(line.get("grad_norm"))]
    growing = len(before) > 2 and before[-1]["grad_norm"] > 10 * median(
        line["grad_norm"] for line in before
    )
    if fp16:
        cause, fix = "precision is fp16, whose largest number is 65504", "precision: bf16 or fp32"
    elif growing:
        cause = (
            f"the gradient norm had grown to {before[-1]['grad_norm']:.3g} from a median of"
            f" {median(line['grad_norm'] for line in before):.3g} at learning rate {r.peak_rate:g}"
        )
        fix = f"optim.lr: {r.peak_rate / 4:g}"
    else:
        rows = f"{'; '.join(line for line in r.log if 'no update; rows' in line)[-200:]}"
        cause = f"a row of the data, since it came without growth (learning rate {r.peak_rate:g})"
        fix = f"look at the rows named in log.txt{f': …{rows}' if rows else ''}; optim.lr lower"
    yield RunFinding(symptom, cause, fix)


# What was learned.


def _unattached(r: Records) -> Iterator[RunFinding]:
    for check in r.receipt.get("checks") or []:
        if not check.get("ok"):
            yield RunFinding(
                f"the receipt's check {check.get('name')} failed: {check.get('detail')}",
                _WHY_FAILED.get(str(check.get("name")), "see the detail"),
                _THEN.get(str(check.get("name")), "run it again, and report it if it stays"),
            )


_WHY_FAILED = {
    "adapters_moved": "adapters are not attached where the loss passes, or the rate is too low",
    "gradients_reached": "adapters are not attached where the loss passes",
    "labels_supervised": "every label was masked",
    "base_unchanged": "something trained or overwrote the frozen base",
    "optimizer_owns_adapters": "the optimizer was built before the adapters, or from the base",
}
_THEN = {
    "adapters_moved": "lora.target_modules: all-linear, or a higher optim.lr",
    "gradients_reached": "lora.target_modules: all-linear",
    "labels_supervised": "data.train_on: all, or the chat template that the data was written for",
}


def _ends(losses: Sequence[float]) -> tuple[float, float, float]:
    """Mean of the first and of the last steps, and the standard error of their difference."""
    head = losses[: max(2, len(losses) // 10)]
    tail = losses[-max(2, len(losses) // 5) :]
    # the trend drops out of differences between neighbours
    steps = [b - a for a, b in zip(losses, losses[1:], strict=False)]
    spread = stdev(steps) / math.sqrt(2) if len(steps) > 1 else 0.0
    return fmean(head), fmean(tail), spread * math.sqrt(1 / len(head) + 1 / len(tail))


def _loss(r: Records) -> Iterator[RunFinding]:
    if len(r.losses) < 4:
        return
    head, tail, error = _ends(r.losses)
    told = f"from {head:.4f} to {tail:.4f} in {len(r.losses)} steps"
    if tail > head * _DIVERGED and tail - head > 3 * error:
        yield RunFinding(
            f"the training loss rose {told}",
            f"the learning rate {r.peak_rate:g} is too high"
            f" (gradient norm {_norms(r)}, clipped at {r.config.optim.max_grad_norm})",
            f"optim.lr: {r.peak_rate / 5:g}",
        )
        return
    fell = head - tail
    if fell > max(_LEARNED * head, 2 * error):
        return
    if len(r.evals) > 1 and r.evals[0][1] - min(e for _, e in r.evals) > _LEARNED * r.evals[0][1]:
        return  # too noisy to be seen in the steps, but learned
    yield RunFinding(f"the training loss is flat: {told}", *_why_flat(r))


def _norms(r: Records) -> str:
    norms = [line["grad_norm"] for line in r.steps if _number(line.get("grad_norm"))]
    return f"{median(norms):.3g} at the median" if norms else "unknown"


def _why_flat(r: Records) -> tuple[str, str]:
    config, steps = r.config, len(r.steps)
    share = r.audit.get("supervised_share")
    if share is not None and share < _LITTLE_SUPERVISED:
        return (
            f"only {share:.2%} of the tokens carry the loss",
            "data.train_on: all, or shorter prompts",
        )
    low = _LOW_RATE[config.method]
    if r.peak_rate < low:
        return (
            f"the learning rate {r.peak_rate:g} is below what method {config.method} needs"
            f" ({low:g} at least, usually ten times that)",
            f"optim.lr: {10 * low:g}",
        )
    scaling = config.lora.lora_alpha / math.sqrt(config.lora.r) ** (
        1 if config.lora.use_rslora else 2
    )
    if config.method in ("lora", "qlora") and scaling < 0.25:
        return (
            f"lora_alpha {config.lora.lora_alpha:g} over r {config.lora.r} scales what the adapter"
            f" says by {scaling:.3g}",
            f"lora.lora_alpha: {2 * config.lora.r}",
        )
    if config.optim.warmup_ratio > 0.5:
        return (
            f"the warm-up takes {config.optim.warmup_ratio:.0%} of the run",
            "optim.warmup_ratio: 0.03",
        )
    if steps < _FEW_STEPS:
        return f"{steps} steps are few", "more epochs, or a smaller grad_accum"
    return (
        f"nothing in the settings stands out (learning rate {r.peak_rate:g}, {steps} steps,"
        f" gradient norm {_norms(r)}): the data may hold nothing new for this model",
        f"optim.lr: {3 * r.peak_rate:g}, and look at the samples in report.html",
    )


def _generalised(r: Records) -> Iterator[RunFinding]:
    """Evaluation loss and scores against those of the untouched model."""
    learned = len(r.losses) >= 4 and _ends(r.losses)[1] < _ends(r.losses)[0]
    if len(r.evals) > 1:
        start, (last_step, last) = r.evals[0][1], r.evals[-1]
        best_step, best = min(r.evals, key=lambda one: one[1])
        kept = r.config.keep_best
        if last >= start:
            yield RunFinding(
                f"the evaluation loss is no better than the untouched model's:"
                f" {start:.4f} before, {last:.4f} after",
                *_why_worse(r, learned=learned),
            )
        elif last > best * _WORSE and learned and not kept:
            yield RunFinding(
                f"the evaluation loss turned: {best:.4f} at step {best_step},"
                f" {last:.4f} at step {last_step}, while the training loss fell to"
                f" {_ends(r.losses)[1]:.4f}",
                f"overfitting: {r.config.epochs:g} epochs over {r.audit.get('rows', '?')} rows",
                "keep_best: true, early_stopping: 2, fewer epochs, or more data",
            )
    for name, before, after in _scored(r):
        if after <= before:
            yield RunFinding(
                f"{name} is no better than the untouched model's: {before:.3g} before,"
                f" {after:.3g} after",
                *_why_worse(r, learned=learned),
            )


def _scored(r: Records) -> Iterator[tuple[str, float, float]]:
    for key, before in r.scores.items():
        name = key.removesuffix("_before")
        after = r.scores.get(f"{name}_after")
        if key != name and _number(before) and _number(after):
            yield name, float(before), float(after or 0)


def _why_worse(r: Records, *, learned: bool) -> tuple[str, str]:
    config = r.config
    rows = r.audit.get("rows") or 0
    if not learned:
        return _why_flat(r)
    if 0 < rows < _FEW_ROWS:
        return f"{rows} rows are learned by heart", "more data, or fewer epochs"
    if config.epochs >= 4:
        return f"{config.epochs:g} epochs over {rows} rows overfit", "epochs: 1, keep_best: true"
    if r.peak_rate > 1e-3 or (config.method == "full" and r.peak_rate > 1e-4):
        return (
            f"the learning rate {r.peak_rate:g} forgets more than it learns",
            f"optim.lr: {r.peak_rate / 5:g}",
        )
    if config.method in ("lora", "qlora") and config.lora.r < 4:
        return f"lora.r is {config.lora.r}", "lora.r: 16, lora.lora_alpha: 32"
    return (
        f"the evaluation rows ask for something else than the {rows} training rows teach",
        "compare both in report.html; data.eval: 0.05 takes evaluation rows from the same file",
    )


def _answers(r: Records) -> Iterator[RunFinding]:
    answers = [str(one["after"]) for one in r.samples if isinstance(one.get("after"), str)]
    references = [str(one.get("reference") or "") for one in r.samples]
    if len(answers) < 2:
        return
    n = len(answers)
    empty = sum(not text.strip() for text in answers)
    looping = sum(
        _loops(text) and not _loops(ref) for text, ref in zip(answers, references, strict=False)
    )
    marked = sum(
        bool(_MARKER.search(text)) and not _MARKER.search(ref)
        for text, ref in zip(answers, references, strict=False)
    )
    if 2 * empty > n and any(ref.strip() for ref in references):
        yield RunFinding(
            f"{empty} of {n} sampled answers are empty",
            "the model learned to end at once: the end of a turn is all that carried the loss"
            f" ({r.audit.get('supervised_tokens', 0):,} supervised tokens in"
            f" {r.audit.get('samples', 0):,} samples)",
            "look for empty answers in the data, and for the right data.chat_template",
        )
    if 2 * marked > n:
        yield RunFinding(
            f"{marked} of {n} sampled answers write out markers of a chat template",
            f"the data carries its own markers beside the template ({r.audit.get('template')!r})",
            "remove the markers from the data, or train it as plain text",
        )
    if 2 * looping > n:
        yield RunFinding(
            f"{looping} of {n} sampled answers repeat themselves",
            f"overfitting or too high a rate ({r.config.epochs:g} epochs, learning rate"
            f" {r.peak_rate:g})"
            if r.config.epochs > 2 or r.peak_rate > 1e-3
            else f"the model has not learned where to end ({len(r.steps)} steps)",
            "fewer epochs or a lower optim.lr; decode with --temperature 0.7"
            if r.config.epochs > 2 or r.peak_rate > 1e-3
            else "train longer, and check that the template ends the assistant's turn",
        )


def _loops(text: str) -> bool:
    """Whether a text says the same over and over: one piece of it fills most of the text."""
    words = text.split()
    if len(words) < 3 * _REPEATED:
        return False
    threes = Counter(zip(words, words[1:], words[2:], strict=False))
    count = threes.most_common(1)[0][1]
    return count >= _REPEATED and len(threes) < 0.5 * (len(words) - 2)


# What the data lost, and the arithmetic.


def _data(r: Records) -> Iterator[RunFinding]:
    audit = r.audit
    samples = audit.get("samples") or 0
    cut = audit.get("truncated") or 0
    if samples and cut > _MUCH_LOST * samples:
        needed = audit.get("needed_length") or audit.get("longest")
        yield RunFinding(
            f"{cut} of {samples} samples were cut at {audit.get('max_length')} tokens",
            f"the longest needs {needed} tokens",
            f"data.max_length: {needed}, if memory allows (`fourbit plan` says)",
        )
    masked = audit.get("dropped_masked") or 0
    if masked > _MUCH_LOST * (samples + masked):
        yield RunFinding(
            f"{masked} of {samples + masked} samples were left out: nothing in them is learned",
            f"{audit.get('masked_by_template') or 0} hold no assistant's turn,"
            f" {audit.get('masked_by_length') or 0} lose it at {audit.get('max_length')} tokens",
            "a larger data.max_length, data.train_on: all, or another data.chat_template",
        )
    repeated = audit.get("eval_duplicates") or 0
    held = audit.get("eval_rows") or 0
    if repeated and repeated > 0.05 * held:
        yield RunFinding(
            f"{repeated} of {held} evaluation rows are also trained on",
            f"the same rows in both, as {', '.join(audit.get('eval_pairs') or [])}",
            "remove them: the evaluation loss is too good",
        )


def _precision(r: Records) -> Iterator[RunFinding]:
    if r.config.precision == "fp16" and r.machine.get("bf16"):
        where = r.machine.get("accelerator") or r.machine.get("cpu") or "this machine"
        yield RunFinding(
            "the run computes in fp16",
            f"precision: fp16 was chosen ({r.receipt.get('skipped_updates') or 0} updates skipped"
            f" so far) though {where} has bf16",
            "precision: bf16, which needs no loss scale",
        )


def _evaluated(r: Records) -> Iterator[RunFinding]:
    """Evaluations whose prompt is not the one of training."""
    trained = {"template": r.audit.get("template") or "", "system": r.config.data.system or ""}
    said = {"template": "chat template", "system": "system message"}
    options = {"template": "--chat-template", "system": "--system"}
    told = set()
    for name, found in ((n, f) for one in r.evaluations for n, f in _results(one)):
        asked = found.get("prompting")
        if not isinstance(asked, dict) or not r.audit.get("template"):
            continue  # nothing was asked in a chat
        for key, wanted in trained.items():
            other = asked.get(key) or ""
            if other != wanted and (name, key, other) not in told:
                told.add((name, key, other))
                yield RunFinding(
                    f"{name} was asked with another {said[key]} than the run was trained with",
                    f"{other!r} in the evaluation, {wanted!r} in training",
                    f"leave {options[key]} out: --adapter RUN takes what the run was trained with",
                )


def _results(evaluation: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    found = evaluation.get("results")
    pairs = found.items() if isinstance(found, dict) else ()
    return [(name, one) for name, one in pairs if isinstance(one, dict)]


# Speed.


def _slow(r: Records) -> Iterator[RunFinding]:
    speeds = [
        line["tokens_per_second"] for line in r.steps if _number(line.get("tokens_per_second"))
    ]
    third = len(speeds) // 3
    if len(speeds) >= _LATE:
        early, late = median(speeds[:third]), median(speeds[-third:])
        if late < _SLOWED * early:
            memory = [line.get("memory_bytes") or 0 for line in r.steps]
            total = r.machine.get("memory_total") or math.inf
            full = max(memory) > _NEARLY_ALL * total
            yield RunFinding(
                f"steps became slower: {early:,.0f} tokens/s in the first third,"
                f" {late:,.0f} in the last",
                f"memory is nearly full ({human_bytes(max(memory))} of {human_bytes(total)}),"
                " so the system swaps"
                if full
                else "other work on the machine, or a processor that throttles:"
                f" the work of a step is the same ({median(_tokens(r)):,.0f} tokens)",
                _less_memory(r, "activations") if full else "look at what else runs (top)",
            )
    yield from _slow_parts(r)


def _tokens(r: Records) -> list[float]:
    return [line["tokens"] for line in r.steps if _number(line.get("tokens"))] or [0.0]


def _slow_parts(r: Records) -> Iterator[RunFinding]:
    timed = [
        (line["update_seconds"], line["seconds"])
        for line in r.steps
        if _number(line.get("update_seconds")) and line.get("seconds")
    ]
    if len(timed) >= 3:
        update, whole = median(u for u, _ in timed), median(s for _, s in timed)
        if update > _MUCH_UPDATE * whole and update > 0.5:
            optimizer = r.receipt.get("optimizer") or {}
            paged = bool(optimizer.get("paged") or r.plan.get("paged"))
            moved = (optimizer.get("bytes_in") or 0) + (optimizer.get("bytes_out") or 0)
            yield RunFinding(
                f"the update takes {update:.1f} of a step's {whole:.1f} s",
                f"its state is paged ({human_bytes(moved)} moved in {len(r.steps)} steps)"
                if paged
                else f"{r.receipt.get('trainable_parameters') or 0:,} parameters are trained",
                "optim.optim_bits: 8, a larger grad_accum, or more memory"
                if paged
                else "method: qlora, a smaller lora.r, or a larger grad_accum",
            )
    filled = [
        (line["tokens"], line["positions"])
        for line in r.steps
        if _number(line.get("tokens")) and line.get("positions")
    ]
    if filled and not r.config.data.packing:
        share = sum(t for t, _ in filled) / sum(p for _, p in filled)
        if share < _HALF_FULL:
            yield RunFinding(
                f"{1 - share:.0%} of what is computed is padding",
                f"rows of different length share a batch of {r.config.batch_size}"
                f" (mean {r.audit.get('mean_length') or 0:.0f}, longest"
                f" {r.audit.get('longest') or 0} tokens)",
                "batch_size: 1 with a larger grad_accum"
                if trains_prompt(r.config.method)
                else "data.packing: true",
            )
    generic: Counter[str] = Counter()
    for path, count in (r.steps[-1].get("paths") or {} if r.steps else {}).items():
        if path.startswith("generic"):
            generic[path.removeprefix("generic").removeprefix(": ")] += count
    layers = r.plan.get("layers") or 0
    inherent = r.config.method == "full"  # whose layers have no other path
    if layers and sum(generic.values()) > layers / 2 and not inherent:
        reason, count = generic.most_common(1)[0]
        yield RunFinding(
            f"{count} of {layers} decoder layers run through the slower general path",
            reason,
            "change that setting, if you can do without it",
        )


_CHECKS: tuple[Callable[[Records], Iterator[RunFinding]], ...] = (
    _memory,
    _nonfinite,
    _unattached,
    _loss,
    _generalised,
    _answers,
    _data,
    _precision,
    _evaluated,
    _slow,
)
