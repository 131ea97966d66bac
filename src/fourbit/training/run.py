"""A run from configuration to verified adapter: everything around the loop."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fourbit import __version__, arena, checkpoint, planning
from fourbit import device as devices
from fourbit.data import collate, prompt_of
from fourbit.distributed import Ranks, is_shard, joined, restarts
from fourbit.errors import (
    EnvironmentFault,
    FourbitError,
    InputError,
    Interrupted,
    Preempted,
)
from fourbit.files import human_bytes
from fourbit.generate import Generator, Sampling, pad_id
from fourbit.integrations.transformers import enable_checkpointing
from fourbit.linear import parameter_counts
from fourbit.loading import (
    LoadOptions,
    load_model,
    unquantized_tensors,
)
from fourbit.methods import quantized_base, trains_prompt
from fourbit.objective import Objective, mixed_precision
from fourbit.optim import build_optimizer
from fourbit.receipt import Check, Receipt, Watch, combined_digest, read_receipt
from fourbit.rundir import PLAN, SAMPLES, RunDir, UnwrittenRunDir
from fourbit.settings import Resolved, dump_settings
from fourbit.training import reporting
from fourbit.training.adapter import (
    SAVE_DTYPES,
    inject,
    save_adapter,
)
from fourbit.training.card import model_card
from fourbit.training.checkup import check_up
from fourbit.training.config import TrainConfig
from fourbit.training.exchange import Exchange
from fourbit.training.keeping import Keeper
from fourbit.training.loop import StepResult, TrainLoop
from fourbit.training.preparation import Preparation
from fourbit.training.progress import Reporter, Silent
from fourbit.training.prompts import inject_prompt
from fourbit.training.sharding import Sharding
from fourbit.training.shared_base import packed_once
from fourbit.training.signals import SignalGuard
from fourbit.training.tracking import Tracker

_SAMPLE_TOKENS = 96
_WORTH_COMPARING = 30.0
"""Seconds of training from which the report also shows what other methods would have taken."""


@dataclass
class TrainResult:
    """What `train` returns, and the keys of ``fourbit train --json``."""

    run_dir: str
    steps: int
    tokens_per_second: float | None
    peak_memory_bytes: int | None
    predicted_peak_bytes: int | None
    train_loss_first: float | None
    train_loss_last: float | None
    eval_loss_before: float | None
    eval_loss_after: float | None
    verified: bool
    trainable_parameters: int | None = None
    adapter_bytes: int | None = None
    train_seconds: float | None = None
    dry_run: bool = False

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def train(
    config: TrainConfig,
    *,
    origins: Mapping[str, str] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    reporter: Reporter | None = None,
    ranks: Ranks | None = None,
) -> TrainResult:
    """Fine-tunes as configured; every durable thing lands in ``config.output``.

    Args:
        config: the run.
        origins: where each setting came from, for ``config.yaml``.
        overwrite: move an existing run aside instead of refusing.
        dry_run: stop after the plan and the data audit; nothing is written.
        reporter: receives progress.
        ranks: the processes that train together; None joins those that torchrun started.

    Raises:
        FourbitError: any documented failure, with its exit code.
    """
    if ranks is None:
        with joined() as ranks:
            return train(
                config,
                origins=origins,
                overwrite=overwrite,
                dry_run=dry_run,
                reporter=reporter,
                ranks=ranks,
            )
    origins = dict(origins or {})
    if restarts() and config.resume == "never":
        config = config.model_copy(update={"resume": "auto"})
        origins["resume"] = "restarted by torchrun"
    overwrite = overwrite and not restarts()
    run = _Run(config, origins, _reporter(ranks, reporter), ranks)
    with SignalGuard() as guard, devices.repeatable(config.deterministic):
        run.guard = guard
        if dry_run:
            run.ready.run()
            return run.result(None, dry_run=True)
        with _open_folder(config, overwrite, ranks) as folder:
            run.open(folder)
            try:
                return run.execute()
            except FourbitError as error:
                folder.log(error.line())
                if not isinstance(error, (Interrupted, Preempted, InputError)):
                    run.check_up()
                raise
            except Exception as error:
                import traceback

                folder.log(traceback.format_exc())
                if not devices.is_out_of_memory(error):
                    raise
                known = _out_of_memory(error, config.output)
                folder.log(known.line())
                run.check_up()
                raise known from error


def _reporter(ranks: Ranks, reporter: Reporter | None) -> Reporter:
    return reporter or Reporter() if ranks.first else Silent(ranks.rank)


def _open_folder(config: TrainConfig, overwrite: bool, ranks: Ranks) -> RunDir:
    if not ranks.first:
        return UnwrittenRunDir(Path(config.output))
    resume = config.resume != "never"
    return RunDir.open(Path(config.output), resume=resume, overwrite=overwrite)


def _out_of_memory(error: BaseException, where: str) -> EnvironmentFault:
    what = str(error).strip().split("\n")[0] or type(error).__name__
    return EnvironmentFault(
        "out-of-memory",
        where=where,
        what=f"memory ran out outside of a training step: {what}",
        fix="free memory, take a smaller batch_size or data.max_length; --resume auto goes on from"
        " the last checkpoint",
    )


class _Run:
    """The phases of one run, in order; state they share."""

    guard: SignalGuard
    folder: RunDir
    model: nn.Module
    objective: Objective
    loop: TrainLoop
    watch: Watch
    keeper: Keeper
    tracker: Tracker

    def __init__(
        self, config: TrainConfig, origins: dict[str, str], reporter: Reporter, ranks: Ranks
    ) -> None:
        self.ready = Preparation(config, origins, reporter, ranks)
        self.say, self.ranks = reporter, ranks
        self.sharding: Sharding | None = None
        self.rehearsed: int | None = None
        self.told_paths: dict[str, int] = {}
        self.optimizer_facts: dict[str, Any] = {}

    def open(self, folder: RunDir) -> None:
        """Takes the run directory."""
        self.folder = folder
        self.say.log = folder.log
        self.ranks.tell(folder.log)
        if self.ready.config.resume != "never":
            found = reporting.gave_way(folder) if self.ranks.first else {}
            self.ready.gave_way = self.ranks.shared(found)

    def execute(self) -> TrainResult:
        """All phases."""
        self.ready.run()
        self.ready.calibrate(self.folder.path)
        resolved = Resolved(self.ready.config, self.ready.origins)
        self.folder.write_text(self.folder.config_path, dump_settings(resolved))
        self._write_plan()
        self.load()
        resumed = self.keeper.resume()
        if not resumed:
            self.folder.truncate_metrics(-1)
            self.rehearse()
            self.before()
        elif self.ranks.shared(self.finished()):
            self.say.line("this run is already finished; nothing to do")
            return self.result(self.stored_receipt() if self.ranks.first else None)
        self.fit()
        receipt = self.conclude()
        result = self.result(receipt)
        self.tracker.close()
        receipt.require(where=str(self.folder.path))
        self.check_up()
        return result

    def check_up(self) -> None:
        """Says what went wrong, where the run's own records show it."""
        if not self.ranks.first:
            return
        try:
            found = check_up(self.folder.path)
        except FourbitError as error:  # what ended the run matters more than what can be read of it
            self.folder.log(f"no check-up: {error.line()}")
            return
        for finding in found:
            self.say.warn(finding.line())

    def _write_plan(self) -> None:
        self.folder.write_json(
            PLAN,
            {
                "plan": self.ready.plan.as_dict(),
                "rehearsed_peak_bytes": self.rehearsed,
                "audit": self.ready.data.audit.as_dict(),
                "machine": devices.machine().as_dict(),
                "arena": arena.active(),
                "origins": self.ready.origins,
            },
        )

    # The model.

    def load(self) -> None:
        """Weights, adapters, optimizer, and the proofs that need a loaded model."""
        config = self.ready.config
        self.ranks.phase("loading the model")
        self.say.line(f"loading {self.ready.source.name} ({self.ready.source.kind})")
        began = time.perf_counter()
        full = config.method == "full"
        options = LoadOptions(
            quant=config.quant if quantized_base(config.method) else None,
            dtype=torch.float32 if full else self.ready.dtype,
            # what is divided need not fit where it is used before it is
            device=torch.device("cpu") if self.ready.divides else None,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
        )
        source = self.ready.source
        with packed_once(source, config, self.folder.path, self.ranks, self.say) as packed:
            base = load_model(packed, options)
        self.say.line(f"loaded in {time.perf_counter() - began:.1f} s")
        if quantized_base(config.method):
            for tensor in unquantized_tensors(base):
                self.say.line(
                    f"not quantized: {tensor.name}, {human_bytes(tensor.bytes)}"
                    f" ({tensor.share:.0%} of the model)"
                )
        if self.ready.plan.checkpointing:
            enable_checkpointing(base, layers=self.ready.plan.recomputed_layers)
        if full:
            base.requires_grad_(True)
            self.model = base
        else:
            base.requires_grad_(False)
            self.model = self._injected(base)
        trainable, total = parameter_counts(self.model)
        self.say.line(f"trainable: {trainable:,} of {total:,} parameters")
        if self.ready.divides:
            self._divide()
        self._assemble()

    def _divide(self) -> None:
        self.sharding = sharding = Sharding(self.model, self.ranks, devices.default_device())
        devices.release_memory()
        own, every = sharding.own_bytes, sharding.all_bytes
        rest = sum(p.nbytes for p in self.model.parameters() if not is_shard(p))
        self.say.line(
            f"divided: {human_bytes(own)} of {human_bytes(every)} of the layers in each of"
            f" {self.ranks.size} processes ({own / every:.1%}); {human_bytes(rest)} of embeddings,"
            " norm and head in every one"
        )

    def _injected(self, base: PreTrainedModel) -> nn.Module:
        config = self.ready.config
        if trains_prompt(config.method):
            return inject_prompt(base, config, self.ready.tokenizer, base=self.ready.source.name)
        return inject(base, config.lora, seed=config.seed, base=self.ready.source.name)

    def _assemble(self) -> None:
        config = self.ready.config
        mixed = mixed_precision(self.model, self.ready.dtype, config.method)
        self.objective = Objective(self.model, mixed)
        if config.gradient_checkpointing == "offload":
            self.objective.offload_activations(self.folder.path)
        base = self.objective.base
        batches = self.ready.batches(self.ready.data.train, seed=config.seed)
        pad = pad_id(self.ready.tokenizer)
        first = collate(self.ready.data.train, batches.epoch(0)[0], pad_id=pad)
        if not self.objective.choose_head(first):
            self.say.warn("this architecture's head is not linear: the loss uses full logits")
        if config.data.packing:
            self.objective.require_isolation(first)
            self.say.line("packing: documents proven isolated on this model")
        optimizer = build_optimizer(
            (p for p in self.model.parameters() if p.requires_grad),
            config.optim,
            paged="always" if self.ready.plan.paged else config.optim.paged,
            folder=self.folder.path if self.folder.path.is_dir() else None,
        )
        self.ranks.phase("hashing the base")
        self.watch = Watch(self.model, optimizer, where=config.output, ranks=self.ranks)
        self.ranks.require_same(
            {"the SHA-256 of the base": combined_digest(self.watch.base_before)},
            fix="give every host the same model files; on unlike processors take a model that"
            " is quantized already (fourbit quantize)",
        )
        # which has read the whole table of words, of which a step needs the few that occur
        words, head = base.get_input_embeddings(), base.get_output_embeddings()
        if isinstance(words, nn.Embedding) and words.weight is not getattr(head, "weight", None):
            devices.page_out(words.weight)
        self.loop = TrainLoop(
            config,
            objective=self.objective,
            dataset=self.ready.data.train,
            batches=batches,
            optimizer=optimizer,
            watch=self.watch,
            pad_id=pad,
        )
        self.keeper = Keeper(self.ready, self.folder, self.model, self.loop, self.watch)
        self.loop.exchange = Exchange(self.loop.parameters, self.ranks, self.sharding)
        self.loop.note = self.say.warn_alone
        if config.grad_accum < self.ranks.size:
            self.say.warn(
                f"{self.ranks.size} processes share {config.grad_accum} micro-batches a step:"
                f" {self.ranks.size - config.grad_accum} have nothing to do; raise grad_accum and"
                " lower batch_size"
            )
        self.tracker = Tracker(
            config.report_to if self.ranks.first else "none",
            folder=self.folder.path,
            config=config.model_dump(mode="json"),
            warn=self.say.warn,
        )

    # Training.

    def rehearse(self) -> None:
        """The longest batch once, before anything is trained; a run that does not fit ends here."""
        if not self.ready.config.rehearsal:
            return
        self.say.line("rehearsing the longest batch")
        reached = self.rehearsed = self.ranks.highest(self.loop.rehearse() or 0) or None
        if reached is None:
            return
        planned = self.ready.plan.peak_bytes
        self.say.line(
            f"rehearsal: {human_bytes(reached)} at the highest, planned {human_bytes(planned)}"
            f" ({planned / reached - 1:+.1%})"
        )
        self._write_plan()
        budget = self.ready.config.budget_bytes
        if budget is not None and reached > budget:
            less = replace(self.ready.room, available=int(budget * planned / reached))
            nearest = planning.recommend(self.ready.model_config, self.ready.shape(), less)
            measured = f"measured: {human_bytes(reached)}"
            raise self.ready.does_not_fit(nearest, measured)

    def before(self) -> None:
        """Evaluation loss and samples of the untouched model."""
        with self.objective.untouched() as model:
            self.loop.state.eval_loss_before = self._evaluate("evaluating the untouched model")
            if self.loop.state.eval_loss_before is not None:
                self._record({"step": 0, "eval_loss": self.loop.state.eval_loss_before})
            self.loop.state.samples_before = self._samples("before", model)

    def _evaluate(self, title: str) -> float | None:
        held_out = self.ready.data.eval
        if held_out is None:
            return None
        batches = self.ready.batches(held_out, seed=0)
        self.ranks.phase(f"evaluation after step {self.loop.state.step}")
        self.say.line(title)
        loss = self.loop.evaluate(held_out, batches, stop=lambda: self.guard.caught is not None)
        if loss is not None:
            self.say.line(f"evaluation loss {loss:.4f} ({held_out.num_supervised:,} tokens)")
        return loss

    def _samples(self, key: str, model: nn.Module) -> list[dict[str, str]]:
        prompts = [p for e in self.ready.data.eval_examples if (p := prompt_of(e)) is not None]
        prompts = prompts[: self.ready.config.samples]
        if not prompts or not self.ranks.first:
            return []
        if self.ready.divides:
            self.say.line("no samples: divided layers do not generate; see fourbit generate")
            return []
        self.ranks.phase("generating samples")
        generator = Generator(model, self.ready.tokenizer, self.ready.data.template)
        ids = [generator.prompt_ids(p.messages) for p in prompts]
        with self.objective.autocast():
            answers = generator.answers(ids, Sampling(max_new_tokens=_SAMPLE_TOKENS))
        return [
            {
                "prompt": str(p.messages[-1]["content"]),
                "reference": p.reference,
                key: answer.text,
            }
            for p, answer in zip(prompts, answers, strict=True)
        ]

    def _record(self, values: dict[str, Any]) -> None:
        self.folder.append_metrics(values)
        self.tracker.log(values)

    def fit(self) -> None:
        """The loop, with evaluation, checkpoints and signals between its steps."""
        loop, total = self.loop, self.loop.total_steps
        devices.reset_peak_memory(self.objective.device)
        self.watch.start()
        title = "training"
        with (
            self.guard.deferred(),
            self.say.task(title, total=total, start=loop.state.step) as advance,
        ):
            self._catch_up()
            for result in loop.steps() if not self._patience_is_over() else ():
                self._tell_paths(result.paths)
                advance(
                    result.step,
                    f"loss {result.loss:.4f}  {result.tokens_per_second:.0f} tok/s",
                )
                if self._after_step(result):
                    self.say.line(f"early stopping at step {result.step}")
                    break
        loop.take_peak()
        self.watch.stop()
        self.keeper.save()
        self.optimizer_facts = self.loop.optimizer.described()
        self.loop.optimizer.forget()  # what follows needs the room
        devices.release_memory()

    def _tell_paths(self, paths: dict[str, int]) -> None:
        """Once, and again whenever it changes: how the layers are computed."""
        if paths != self.told_paths:
            self.told_paths = paths
            counted = ", ".join(f"{count} {path}" for path, count in sorted(paths.items()))
            self.say.line(f"decoder layers: {counted}")

    def _catch_up(self) -> None:
        """The evaluation that a signal broke off before the checkpoint we resumed from."""
        state = self.loop.state
        if state.pending_eval:
            state.pending_eval = False
            loss = self._evaluate(f"evaluating at step {state.step}")
            if loss is not None:
                self._judge(loss, state.step)

    def _patience_is_over(self) -> bool:
        patience = self.ready.config.early_stopping
        return patience is not None and self.loop.state.worse_evals >= patience

    def _after_step(self, result: StepResult) -> bool:
        """Metrics, evaluation, checkpoint; True to stop early."""
        config, step = self.ready.config, result.step
        values = result.as_dict()
        if not result.updated:
            self.say.warn(
                f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: no update;"
                f" rows {', '.join(self.loop.last_rows[:8])}"
            )
        last = step == self.loop.total_steps
        stop = improved = False
        if config.eval_every and step % config.eval_every == 0 and not last:
            loss = self._evaluate(f"evaluating at step {step}")
            self.loop.state.pending_eval = loss is None and self.ready.data.eval is not None
            if loss is not None:
                values["eval_loss"] = loss
                improved = self._judge(loss, step)
                stop = self._patience_is_over()
        self._record(values)
        caught = self.ranks.highest(self.guard.caught or 0) or None
        due = bool(config.save_every) and step % config.save_every == 0
        if (due or improved or caught is not None) and not last:
            saved = self.keeper.save()
            if caught is not None:
                place = checkpoint.step_name(step) if saved else None
                self.ranks.end_together()
                raise self.guard.ending(caught, saved=place)
        return stop

    def _judge(self, loss: float, step: int) -> bool:
        """Whether this evaluation is the best so far and its adapter is to be kept."""
        state = self.loop.state
        if state.best_eval is None or loss < state.best_eval:
            state.best_eval, state.best_step, state.worse_evals = loss, step, 0
            return self.ready.config.keep_best
        state.worse_evals += 1
        return False

    # The end.

    def conclude(self) -> Receipt:
        """Final evaluation, checkpoint, adapter, receipt and report."""
        loss = self._evaluate("evaluating the tuned model")
        state = self.loop.state
        if loss is not None:
            improved = self._judge(loss, state.step)
            self._append_eval(state.step, loss)
            if self.ready.config.keep_best and not improved and state.best_step:
                self.keeper.take_best(state.best_step)
                loss = state.best_eval
        self.eval_after = loss
        after = self._samples("after", self.model)
        samples = [
            {**one, **two} for one, two in zip(state.samples_before, after, strict=False)
        ] or after
        return self._receipt(samples)

    def _append_eval(self, step: int, loss: float) -> None:
        metrics = self.folder.read_metrics()
        if metrics and metrics[-1].get("step") == step:
            self.folder.truncate_metrics(step - 1)
            self.folder.append_metrics({**metrics[-1], "eval_loss": loss})
        self.tracker.log({"step": step, "eval_loss": loss})

    def _receipt(self, samples: list[dict[str, str]]) -> Receipt:
        config = self.ready.config
        facts = {
            "steps": self.loop.state.step,
            "eval_loss_before": self.loop.state.eval_loss_before,
            "eval_loss_after": self.eval_after,
            "adapter_step": self._adapter_step(),
        }
        card = model_card(config, self.ready.source, facts)
        save_dtype = SAVE_DTYPES[config.save_dtype]
        self.ranks.phase("writing the adapter and the receipt")
        place = self.folder.adapter_dir
        save_adapter(self.model, place, save_dtype=save_dtype, card=card, ranks=self.ranks)
        if config.method == "full" and self.ranks.first:
            self.ready.tokenizer.save_pretrained(place)
        self.keeper.require_same_adapter(self.keeper.adapter())
        receipt = self.watch.finish(adapter_dir=place, save_dtype=save_dtype)
        speed = self._speed()
        receipt.facts.update(
            facts,
            fourbit=__version__,
            torch=torch.__version__,
            base=self.ready.source.name,
            base_revision=self.ready.source.revision,
            data_fingerprint=self.ready.data.fingerprint,
            save_dtype=config.save_dtype,
            peak_memory_bytes=self.ranks.highest(self.loop.peak or 0) or None,
            predicted_peak_bytes=self.ready.plan.peak_bytes,
            rehearsed_peak_bytes=self.rehearsed,
            tokens_per_second=speed,
            train_seconds=round(self.loop.state.seconds, 3),
            skipped_updates=self.loop.state.nonfinite_total,
            optimizer=self.optimizer_facts,
            memory_events=self.loop.state.memory_events,
        )
        self._combine(receipt)
        self.folder.write_json(SAMPLES, samples)
        self.folder.write_json(self.folder.receipt_path, receipt.as_dict())
        self._print_receipt(receipt)
        if not self.ranks.first:
            return receipt
        if self.loop.state.seconds > _WORTH_COMPARING:
            self.ready.plan_others()
            self._write_plan()
        reporting.write_run_report(self.folder)
        return receipt

    def _combine(self, receipt: Receipt) -> None:
        """What does not hold in one process does not hold."""
        if self.ranks.alone:
            return
        own = {
            "peak_memory_bytes": self.loop.peak,
            "bytes_sent": self.loop.exchange.moved,
            "layer_bytes": None if self.sharding is None else self.sharding.own_bytes,
        }
        everybody = self.ranks.gather({"receipt": receipt.as_dict(), "own": own})
        receipt.checks = [Check(**check) for check in everybody[0]["receipt"]["checks"]]
        for rank, theirs in enumerate(everybody[1:], start=1):
            receipt.checks += [
                Check(f"{check['name']} (rank {rank})", False, check["detail"])
                for check in theirs["receipt"]["checks"]
                if not check["ok"]
            ]
        same = len({theirs["receipt"]["base_sha256"] for theirs in everybody}) == 1
        detail = f"{self.ranks.size} processes hold the same base and the same adapter"
        receipt.add("ranks_agree", same, detail if same else "the bases of processes differ")
        facts = everybody[0]["receipt"]
        receipt.facts = {k: v for k, v in facts.items() if k not in ("ok", "checks", "findings")}
        receipt.facts["processes"] = self.ranks.size
        receipt.facts["parallel"] = "fsdp" if self.ready.divides else "ddp"
        receipt.facts["ranks"] = [theirs["own"] for theirs in everybody]

    def _adapter_step(self) -> int:
        state = self.loop.state
        if self.ready.config.keep_best and state.best_step is not None:
            return state.best_step
        return state.step

    def _print_receipt(self, receipt: Receipt) -> None:
        for check in receipt.checks:
            self.say.line(f"{'ok  ' if check.ok else 'FAIL'} {check.name}: {check.detail}")
        for finding in receipt.findings:
            self.say.line(f"note {finding}")
        self.say.line(
            f"peak memory {human_bytes(self.loop.peak)}, planned"
            f" {human_bytes(self.ready.plan.peak_bytes)}; {self._speed() or math.nan:.0f} tokens/s"
        )
        for rank, one in enumerate(receipt.facts.get("ranks", ())):
            peak, sent = (human_bytes(one[key] or 0) for key in ("peak_memory_bytes", "bytes_sent"))
            layers = one["layer_bytes"]
            held = f", {human_bytes(layers)} of the layers" if layers is not None else ""
            self.say.line(f"rank {rank}: peak memory {peak}, {sent} sent{held}")
        self.say.line(f"adapter: {self.folder.adapter_dir}")
        self.say.line(f"report:  {self.folder.report_path}")

    def _speed(self) -> float | None:
        state = self.loop.state
        return round(state.tokens / state.seconds, 2) if state.seconds else None

    def finished(self) -> bool:
        """Whether the resumed run had already ended and was verified."""
        done = self.loop.state.step >= self.loop.total_steps
        return done and self.folder.receipt_path.is_file() and self.folder.adapter_dir.is_dir()

    def stored_receipt(self) -> Receipt:
        """The receipt of a finished run, as it was written."""
        return read_receipt(self.folder.receipt_path)

    def result(self, receipt: Receipt | None, *, dry_run: bool = False) -> TrainResult:
        """The figures of the run."""
        facts = receipt.facts if receipt is not None else {}
        return TrainResult(
            run_dir=self.ready.config.output,
            steps=facts.get("steps", 0),
            tokens_per_second=facts.get("tokens_per_second"),
            peak_memory_bytes=facts.get("peak_memory_bytes"),
            predicted_peak_bytes=self.ready.plan.peak_bytes,
            train_loss_first=facts.get("train_loss_first"),
            train_loss_last=facts.get("train_loss_last"),
            eval_loss_before=facts.get("eval_loss_before"),
            eval_loss_after=facts.get("eval_loss_after"),
            verified=receipt is not None and receipt.ok,
            trainable_parameters=facts.get("trainable_parameters"),
            adapter_bytes=facts.get("adapter_bytes"),
            train_seconds=facts.get("train_seconds"),
            dry_run=dry_run,
        )
