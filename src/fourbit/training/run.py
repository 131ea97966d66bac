"""A run from configuration to verified adapter: everything around the loop."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fourbit import __version__, arena, checkpoint, planning
from fourbit import device as devices
from fourbit.data import BatchPlan, PreparedData, Rows, collate, prepare, prompt_of, read_rows
from fourbit.distributed import Ranks, is_shard, joined, restarts, whole
from fourbit.errors import (
    EnvironmentFault,
    FourbitError,
    InputError,
    Interrupted,
    Preempted,
    VerificationFailed,
)
from fourbit.files import human_bytes
from fourbit.generate import Generator, Sampling, pad_id
from fourbit.integrations.transformers import enable_checkpointing
from fourbit.linear import parameter_counts
from fourbit.loading import (
    LoadOptions,
    load_config,
    load_model,
    load_tokenizer,
    stored_quantization,
    unquantized_tensors,
)
from fourbit.methods import quantized_base, trains_prompt
from fourbit.objective import Objective, mixed_precision
from fourbit.optim import build_optimizer
from fourbit.receipt import Check, Receipt, Watch, combined_digest, read_receipt, tensor_digest
from fourbit.rundir import RunDir, UnwrittenRunDir
from fourbit.settings import Resolved, dump_settings, replaced
from fourbit.sources import ModelSource, resolve_source
from fourbit.training import reporting
from fourbit.training.adapter import (
    ADAPTER_FILE,
    OPTIMIZER_FILE,
    SAVE_DTYPES,
    inject,
    restore_trainable,
    save_adapter,
    trainable_state,
)
from fourbit.training.calibrated import BASE, calibrated_base
from fourbit.training.card import model_card
from fourbit.training.checkup import check_up
from fourbit.training.config import RunQuant, TrainConfig
from fourbit.training.exchange import Exchange
from fourbit.training.loop import LoopState, StepResult, TrainLoop
from fourbit.training.progress import Reporter, Silent
from fourbit.training.prompts import inject_prompt, settle, text_context
from fourbit.training.sharding import Sharding
from fourbit.training.shared_base import packed_once
from fourbit.training.signals import SignalGuard
from fourbit.training.tracking import Tracker, require_tracker

_SAVE_FAILURES = 3
_SAMPLE_TOKENS = 96
_WORTH_COMPARING = 30.0
"""Seconds of training from which the report also shows what other methods would have taken."""
_DECIDES_THE_RESULT = {"data.max_length", "lora.r"}
"""What a budget may recommend, but not change unasked."""
_WARN_ONLY = {"versions", "settings.optim.paged"}
_FREE_TO_CHANGE = {
    "output",
    "eval_every",
    "save_every",
    "save_total_limit",
    "samples",
    "report_to",
    "resume",
    "gradient_checkpointing",
    "budget",
    "rehearsal",
    "save_dtype",
    "keep_best",
    "early_stopping",
    "model",
    "revision",
    "parallel",
    "deterministic",
}
"""Settings that may differ on resume: they decide no bit of the adapter (the base is hashed)."""


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
            run.prepare()
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


def _does_not_fit(plan: planning.Plan, budget: str | None, how: str) -> EnvironmentFault:
    """``plan`` is of the nearest settings, or of the least where nothing fits."""
    fix = f"take {plan.flags}"
    if not plan.fits:
        least = f"{plan.peak_bytes / 1e6:,.0f} MB, with {plan.flags}"
        fix = f"take a larger budget or a smaller model; the least is {least}"
    return EnvironmentFault(
        "does-not-fit",
        where="budget",
        what=f"the run does not fit into {budget} ({how})",
        fix=fix,
    )


class _Run:
    """The phases of one run, in order; state they share."""

    guard: SignalGuard
    folder: RunDir
    source: ModelSource
    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    plan: planning.Plan
    model: nn.Module
    objective: Objective
    loop: TrainLoop
    watch: Watch
    tracker: Tracker

    def __init__(
        self, config: TrainConfig, origins: dict[str, str], reporter: Reporter, ranks: Ranks
    ) -> None:
        self.config, self.origins, self.say, self.ranks = config, origins, reporter, ranks
        self.sharding: Sharding | None = None
        self.save_failures = 0
        self.gave_way: dict[str, Any] = {}
        self.rehearsed: int | None = None
        self.told_paths: dict[str, int] = {}
        self.optimizer_facts: dict[str, Any] = {}

    def open(self, folder: RunDir) -> None:
        """Takes the run directory."""
        self.folder = folder
        self.say.log = folder.log
        self.ranks.tell(folder.log)
        if self.config.resume != "never":
            found = reporting.gave_way(folder) if self.ranks.first else {}
            self.gave_way = self.ranks.shared(found)

    def execute(self) -> TrainResult:
        """All phases."""
        self.prepare()
        self._calibrate()
        resolved = Resolved(self.config, self.origins)
        self.folder.write_text(self.folder.config_path, dump_settings(resolved))
        self._write_plan()
        self.load()
        resumed = self.resume()
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
            reporting.PLAN_FILE,
            {
                "plan": self.plan.as_dict(),
                "rehearsed_peak_bytes": self.rehearsed,
                "audit": self.data.audit.as_dict(),
                "machine": devices.machine().as_dict(),
                "arena": arena.active(),
                "origins": self.origins,
            },
        )

    # Before a model is loaded: everything a user's mistake can be found in.

    def prepare(self) -> None:
        """Data, model files, tokens and the plan."""
        self.ranks.phase("reading data and settings")
        self._require_same_settings()
        require_tracker(self.config.report_to)
        if self.config.data.train is None:
            raise InputError(
                "no-data",
                where="data.train",
                what="no training data given",
                fix="--data FILE, or data: {train: FILE} in the configuration",
            )
        self._settle()
        device = devices.default_device()
        self.dtype = devices.resolve_precision(self.config.precision, device)
        self._require_divisible()
        rows = read_rows(self.config.data)
        self.source = resolve_source(self.config.model, revision=self.config.revision)
        trust = self.config.trust_remote_code
        self.model_config = load_config(self.source, trust_remote_code=trust)
        self._adopt_stored_format()
        self.tokenizer = load_tokenizer(self.source, trust_remote_code=trust)
        self.context = text_context(self.config, self.model_config)
        self._cap_length()
        self._tokenize(rows)
        self.ranks.require_same(
            {"the fingerprint of the data": self.data.fingerprint},
            fix="give every host the same files",
        )
        self._plan(device)

    def _require_divisible(self) -> None:
        """Divided layers exclude what would need whole tensors, or another reduction.

        Raises:
            InputError: naming the setting.
        """
        if not self.divides:
            return
        wrong = {
            "optim.optim_bits: 8 scales blocks of whole tensors": self.config.optim.optim_bits == 8,
            "precision: fp16 needs one scaler for all parts": self.dtype == torch.float16,
        }
        for what in (what for what, is_so in wrong.items() if is_so):
            raise InputError(
                "not-divisible",
                where="parallel",
                what=f"fsdp divides tensors, and {what}",
                fix="use optim_bits: 32 and precision: bf16 or fp32, or parallel: ddp",
            )

    def _require_same_settings(self) -> None:
        """Ranks may read their configuration from different disks."""
        settings = reporting.flatten(self.config.model_dump(mode="json"))
        self.ranks.require_same(
            {f"setting {key}": value for key, value in settings.items()},
            fix="start every process with the same configuration",
        )

    def _settle(self) -> None:
        self.config, notes = settle(self.config)
        for note in notes:
            self.origins[note.key] = note.origin
            self.say.line(note.line)

    def _adopt_stored_format(self) -> None:
        """A base that is quantized already keeps its bytes; only some methods can use it."""
        stored = stored_quantization(self.source)
        if stored is None:
            return
        kind = stored.quant.quant_type
        if self.config.method in ("lora", "full"):
            raise InputError(
                "quantized-base",
                where="method",
                what=f"{self.config.model} is already quantized ({kind}),"
                f" method {self.config.method} trains 16-bit weights",
                fix="use method: qlora, or the 16-bit model",
            )
        if self.config.quant.calibrate is not None:
            raise InputError(
                "quantized-base",
                where="quant.calibrate",
                what=f"{self.config.model} is already quantized ({kind}); calibration chooses codes"
                " for 16-bit weights",
                fix="leave it out, or name the 16-bit model",
            )
        quant = stored.quant.model_copy(update={"compute_dtype": self.config.quant.compute_dtype})
        self.config = self.config.model_copy(update={"quant": RunQuant.of(quant)})
        self.origins["quant.quant_type"] = "the checkpoint"
        self.say.line(f"the base is already quantized: {kind}, its bytes are used as they are")

    def _calibrate(self) -> None:
        """The run goes on with a base of its own, where that was asked for."""
        if self.config.quant.calibrate is None:
            return
        original = self.source.name
        self.ranks.phase("calibrating the base")
        ids, base = self.data.train.ids, self.folder.path / BASE
        if self.ranks.first:
            revision = self.source.revision
            calibrated_base(self.config, ids, self.folder.path, self.say, revision=revision)
        self.ranks.shared(None)  # the others wait for it
        quant = self.config.quant.model_copy(update={"calibrate": None})
        self.config = self.config.model_copy(
            update={"model": str(base), "revision": None, "quant": quant}
        )
        self.source = resolve_source(str(base))
        self.origins["model"] = f"calibrated from {original}"
        self._adopt_stored_format()

    def _cap_length(self) -> None:
        """A default length above the model's context is no wish: it becomes the context."""
        context = self.context
        asked = self.origins.get("data.max_length", "default") != "default"
        if asked or not context or self.config.data.max_length <= context:
            return
        data = self.config.data.model_copy(update={"max_length": context})
        self.config = self.config.model_copy(update={"data": data})
        self.origins["data.max_length"] = "the model's context"
        self.say.line(f"data.max_length: {context}, the model's context")

    def _tokenize(self, rows: Rows) -> None:
        text_config = self.model_config.get_text_config()
        count = len(rows.train) + len(rows.eval or ())
        with self.say.task("tokenizing", total=count) as advance:
            self.data = prepare(
                self.config.data,
                rows,
                self.tokenizer,
                seed=self.config.seed,
                vocab_size=text_config.vocab_size,
                context_length=self.context,
                progress=lambda done, _total: advance(done, ""),
            )
        for text in self.data.audit.lines():
            self.say.line(text)

    def _batches(self, dataset: Any, *, seed: int) -> BatchPlan:
        data = self.config.data
        return BatchPlan(
            dataset,
            max_length=data.max_length,
            packing=data.packing,
            batch_size=self.config.batch_size,
            seed=seed,
        )

    def _plan(self, device: torch.device) -> None:
        here = planning.Room.here(
            device, budget=self.config.budget_bytes, processes=self.ranks.here
        )
        # all have to come to the same plan
        rooms = self.ranks.gather([here.available, here.baseline])
        known = [available for available, _ in rooms if available is not None]
        least = min(known) if len(known) == len(rooms) else None
        self.room = replace(here, available=least, baseline=max(base for _, base in rooms))
        if self.config.budget is None:
            self.plan = planning.plan_training(self.model_config, self._shape(), self.room)
            self._choose_parallel()
        else:
            # what is resumed keeps the batches it began with
            self.config = replaced(self.config, self.gave_way)
            self.plan = planning.recommend(self.model_config, self._shape(), self.room)
            self._give_way(self.gave_way | self.plan.recommended)
        for text in self.plan.lines():
            self.say.line(text)

    def _choose_parallel(self) -> None:
        """Divides the layers where the whole base does not fit into each process."""
        possible = self.config.optim.optim_bits == 32 and self.dtype != torch.float16
        if self.ranks.alone or self.config.parallel != "auto":
            return
        if self.plan.fits is False and possible:
            divided = self.config.model_copy(update={"parallel": "fsdp"})
            plan = planning.plan_training(self.model_config, self._shape(divided), self.room)
            if plan.fits:
                self.config, self.plan = divided, plan
                self.origins["parallel"] = "the plan"
                self.say.line("parallel: fsdp, as the whole base does not fit into each process")

    def _shape(self, config: TrainConfig | None = None) -> planning.TrainingShape:
        return (config or self.config).shape(
            dtype=self.dtype,
            length=int(self.data.train.lengths.max()),
            kernels=planning.kernels_of(devices.default_device()),
            processes=self.ranks.size,
        )

    def _give_way(self, settings: Mapping[str, Any]) -> None:
        """Takes the settings that fit into the budget, unless they would train something else."""
        if self.plan.fits is False or settings.keys() & _DECIDES_THE_RESULT:
            raise _does_not_fit(self.plan, self.config.budget, "planned")
        self.plan = replace(self.plan, recommended=dict(settings))
        self.config = replaced(self.config, settings)
        self.origins |= dict.fromkeys(settings, "the budget")

    # The model.

    def load(self) -> None:
        """Weights, adapters, optimizer, and the proofs that need a loaded model."""
        config = self.config
        self.ranks.phase("loading the model")
        self.say.line(f"loading {self.source.name} ({self.source.kind})")
        began = time.perf_counter()
        full = config.method == "full"
        options = LoadOptions(
            quant=config.quant if quantized_base(config.method) else None,
            dtype=torch.float32 if full else self.dtype,
            # what is divided need not fit where it is used before it is
            device=torch.device("cpu") if self.divides else None,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
        )
        with packed_once(self.source, config, self.folder.path, self.ranks, self.say) as source:
            base = load_model(source, options)
        self.say.line(f"loaded in {time.perf_counter() - began:.1f} s")
        if quantized_base(config.method):
            for tensor in unquantized_tensors(base):
                self.say.line(
                    f"not quantized: {tensor.name}, {human_bytes(tensor.bytes)}"
                    f" ({tensor.share:.0%} of the model)"
                )
        if self.plan.checkpointing:
            enable_checkpointing(base, layers=self.plan.recomputed_layers)
        if full:
            base.requires_grad_(True)
            self.model = base
        else:
            base.requires_grad_(False)
            self.model = self._injected(base)
        trainable, total = parameter_counts(self.model)
        self.say.line(f"trainable: {trainable:,} of {total:,} parameters")
        if self.divides:
            self._divide()
        self._assemble()

    @property
    def divides(self) -> bool:
        """Whether each process holds only a part of the layers."""
        return self.config.parallel == "fsdp" and not self.ranks.alone

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
        config = self.config
        if trains_prompt(config.method):
            return inject_prompt(base, config, self.tokenizer, base=self.source.name)
        return inject(base, config.lora, seed=config.seed, base=self.source.name)

    def _assemble(self) -> None:
        config = self.config
        mixed = mixed_precision(self.model, self.dtype, config.method)
        self.objective = Objective(self.model, mixed)
        if config.gradient_checkpointing == "offload":
            self.objective.offload_activations(self.folder.path)
        base = self.objective.base
        batches = self._batches(self.data.train, seed=config.seed)
        pad = pad_id(self.tokenizer)
        first = collate(self.data.train, batches.epoch(0)[0], pad_id=pad)
        if not self.objective.choose_head(first):
            self.say.warn("this architecture's head is not linear: the loss uses full logits")
        if config.data.packing:
            self.objective.require_isolation(first)
            self.say.line("packing: documents proven isolated on this model")
        optimizer = build_optimizer(
            (p for p in self.model.parameters() if p.requires_grad),
            config.optim,
            paged="always" if self.plan.paged else config.optim.paged,
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
            dataset=self.data.train,
            batches=batches,
            optimizer=optimizer,
            watch=self.watch,
            pad_id=pad,
        )
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

    def identity(self) -> dict[str, Any]:
        """What must be equal between a checkpoint and the run that resumes it."""
        settings = self.config.model_dump(mode="json")
        settings = {k: v for k, v in settings.items() if k not in _FREE_TO_CHANGE}
        settings.pop("data")  # its fingerprint covers contents and settings
        if not trains_prompt(self.config.method):
            settings.pop("prompt")  # runs of versions that had none can be resumed
        return {
            "settings": settings,
            "data": self.data.fingerprint,
            "base": self.watch.state()["base_before"],
            "precision": str(self.dtype),
            "versions": {"fourbit": __version__, "torch": torch.__version__},
        }

    # Resume and checkpoints.

    def resume(self) -> bool:
        """Continues from a checkpoint; False when there is none to continue from."""
        if self.config.resume == "never":
            return False
        self.ranks.phase("resuming")
        saved = self._newest() if self.ranks.first else None
        step = self.ranks.shared(None if saved is None else saved.step)
        if step is None:
            return False
        self._restore(saved)
        dropped = self.folder.truncate_metrics(step)
        self.say.line(f"resumed at step {step} ({dropped} later lines of metrics dropped)")
        return True

    def _newest(self) -> checkpoint.Checkpoint | None:
        folder = self.folder.checkpoints_dir
        checkpoint.clean_staging(folder)
        if self.config.resume == "auto":
            path, skipped = checkpoint.newest(folder)
            for reason in skipped:
                self.say.warn(f"skipped a damaged checkpoint: {reason}")
        else:
            path = checkpoint.at_step(folder, step=int(self.config.resume))
        if path is None:
            self.say.line("no checkpoint to resume from: starting at step 0")
            return None
        saved = checkpoint.load(path, lazily={OPTIMIZER_FILE})
        warnings = checkpoint.require_same_identity(
            saved.identity, self.identity(), warn_only=_WARN_ONLY, where=str(path)
        )
        for text in warnings:
            self.say.warn(text)
        checkpoint.set_aside_after(folder, step=saved.step)
        return saved

    def _restore(self, saved: checkpoint.Checkpoint | None) -> None:
        """Takes over what the first process has read; the others may not see its disk."""
        documents = self.ranks.shared(None if saved is None else saved.documents)
        self._restore_adapter(saved)
        moments = None if saved is None else saved.tensors[OPTIMIZER_FILE]
        self.loop.restore_optimizer(self.ranks.shared_tensors(moments))
        self.loop.state = LoopState.from_dict(documents["state.json"])
        if self.loop.state.recompute:
            self.objective.recompute_activations()
        if self.loop.state.offload:
            self.objective.offload_to_host()
        self.loop.scaler.load_state_dict(documents["scaler.json"])
        self.watch.restore(documents["evidence.json"])

    def _restore_adapter(self, saved: checkpoint.Checkpoint | None) -> None:
        adapter = self.ranks.shared_tensors(None if saved is None else saved.tensors[ADAPTER_FILE])
        restore_trainable(self.model, dict(adapter.items()))

    def save(self) -> bool:
        """A checkpoint of this moment; a full disk does not end the run."""
        state = self.loop.state
        self.ranks.phase(f"saving step {state.step}")
        adapter = {name: whole(t) for name, t in trainable_state(self.model).items()}
        self._require_same_adapter(adapter)
        failure: EnvironmentFault | None = None
        with self.ranks.asking(self.loop.optimizer_state(), divided=self.divides) as moments:
            if self.ranks.first:
                failure = self._write_checkpoint(adapter, moments)
        told = self.ranks.shared(None if failure is None else failure.as_dict())
        if told is not None:
            self.save_failures += 1
            self.say.warn(f"checkpoint at step {state.step} not saved: {told['what']}")
            if self.save_failures >= _SAVE_FAILURES:
                raise failure or EnvironmentFault(**told)
            return False
        self.save_failures = 0
        if self.ranks.first:
            protect = {state.best_step} if self.config.keep_best and state.best_step else set()
            checkpoint.retain(
                self.folder.checkpoints_dir, limit=self.config.save_total_limit, protect=protect
            )
        return True

    def _write_checkpoint(
        self, adapter: Mapping[str, Tensor], moments: Mapping[str, Tensor]
    ) -> EnvironmentFault | None:
        """Writes and gives its name to what was written; the fault of the disk, if any."""
        try:
            checkpoint.save(
                self.folder.checkpoints_dir,
                step=self.loop.state.step,
                tensors={ADAPTER_FILE: adapter, OPTIMIZER_FILE: moments},
                documents={
                    "state.json": self.loop.state.as_dict(),
                    "scaler.json": self.loop.scaler.state_dict(),
                    "evidence.json": self.watch.state(),
                },
                identity=self.identity(),
                agree=self.ranks.require_all_there,
            )
        except EnvironmentFault as error:
            return error
        return None

    def _require_same_adapter(self, adapter: Mapping[str, Tensor]) -> None:
        """What every process has trained is the same, or one of them computes wrongly."""
        if self.ranks.alone:
            return
        digests = {name: tensor_digest(tensor) for name, tensor in adapter.items()}
        everybody = self.ranks.gather(combined_digest(digests))
        for rank, theirs in enumerate(everybody):
            if theirs != everybody[0]:
                raise VerificationFailed(
                    "ranks-diverged",
                    where=f"rank {rank}, step {self.loop.state.step}",
                    what="its adapter is not that of rank 0",
                    fix="check that host's memory and processor; --resume auto goes on from the"
                    " last checkpoint",
                )

    # Training.

    def rehearse(self) -> None:
        """The longest batch once, before anything is trained; a run that does not fit ends here."""
        if not self.config.rehearsal:
            return
        self.say.line("rehearsing the longest batch")
        reached = self.rehearsed = self.ranks.highest(self.loop.rehearse() or 0) or None
        if reached is None:
            return
        planned = self.plan.peak_bytes
        self.say.line(
            f"rehearsal: {human_bytes(reached)} at the highest, planned {human_bytes(planned)}"
            f" ({planned / reached - 1:+.1%})"
        )
        self._write_plan()
        budget = self.config.budget_bytes
        if budget is not None and reached > budget:
            less = replace(self.room, available=int(budget * planned / reached))
            nearest = planning.recommend(self.model_config, self._shape(), less)
            measured = f"measured: {human_bytes(reached)}"
            raise _does_not_fit(nearest, self.config.budget, measured)

    def before(self) -> None:
        """Evaluation loss and samples of the untouched model."""
        with self.objective.untouched() as model:
            self.loop.state.eval_loss_before = self._evaluate("evaluating the untouched model")
            if self.loop.state.eval_loss_before is not None:
                self._record({"step": 0, "eval_loss": self.loop.state.eval_loss_before})
            self.loop.state.samples_before = self._samples("before", model)

    def _evaluate(self, title: str) -> float | None:
        if self.data.eval is None:
            return None
        batches = self._batches(self.data.eval, seed=0)
        self.ranks.phase(f"evaluation after step {self.loop.state.step}")
        self.say.line(title)
        loss = self.loop.evaluate(
            self.data.eval, batches, stop=lambda: self.guard.caught is not None
        )
        if loss is not None:
            self.say.line(f"evaluation loss {loss:.4f} ({self.data.eval.num_supervised:,} tokens)")
        return loss

    def _samples(self, key: str, model: nn.Module) -> list[dict[str, str]]:
        prompts = [p for e in self.data.eval_examples if (p := prompt_of(e)) is not None]
        prompts = prompts[: self.config.samples]
        if not prompts or not self.ranks.first:
            return []
        if self.divides:
            self.say.line("no samples: divided layers do not generate; see fourbit generate")
            return []
        self.ranks.phase("generating samples")
        generator = Generator(model, self.tokenizer, self.data.template)
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
        self.save()
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
        patience = self.config.early_stopping
        return patience is not None and self.loop.state.worse_evals >= patience

    def _after_step(self, result: StepResult) -> bool:
        """Metrics, evaluation, checkpoint; True to stop early."""
        config, step = self.config, result.step
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
            self.loop.state.pending_eval = loss is None and self.data.eval is not None
            if loss is not None:
                values["eval_loss"] = loss
                improved = self._judge(loss, step)
                stop = self._patience_is_over()
        self._record(values)
        caught = self.ranks.highest(self.guard.caught or 0) or None
        due = bool(config.save_every) and step % config.save_every == 0
        if (due or improved or caught is not None) and not last:
            saved = self.save()
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
            return self.config.keep_best
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
            if self.config.keep_best and not improved and state.best_step:
                self._take_best(state.best_step)
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

    def _take_best(self, step: int) -> None:
        saved = None
        if self.ranks.first:
            path = checkpoint.at_step(self.folder.checkpoints_dir, step=step)
            saved = checkpoint.load(path, lazily={OPTIMIZER_FILE})
        self._restore_adapter(saved)
        self.say.line(f"keeping the adapter of step {step}, the best evaluation")

    def _receipt(self, samples: list[dict[str, str]]) -> Receipt:
        config = self.config
        facts = {
            "steps": self.loop.state.step,
            "eval_loss_before": self.loop.state.eval_loss_before,
            "eval_loss_after": self.eval_after,
            "adapter_step": self._adapter_step(),
        }
        card = model_card(config, self.source, facts)
        save_dtype = SAVE_DTYPES[config.save_dtype]
        self.ranks.phase("writing the adapter and the receipt")
        place = self.folder.adapter_dir
        save_adapter(self.model, place, save_dtype=save_dtype, card=card, ranks=self.ranks)
        if config.method == "full" and self.ranks.first:
            self.tokenizer.save_pretrained(place)
        self._require_same_adapter({n: whole(t) for n, t in trainable_state(self.model).items()})
        receipt = self.watch.finish(adapter_dir=place, save_dtype=save_dtype)
        speed = self._speed()
        receipt.facts.update(
            facts,
            fourbit=__version__,
            torch=torch.__version__,
            base=self.source.name,
            base_revision=self.source.revision,
            data_fingerprint=self.data.fingerprint,
            save_dtype=config.save_dtype,
            peak_memory_bytes=self.ranks.highest(self.loop.peak or 0) or None,
            predicted_peak_bytes=self.plan.peak_bytes,
            rehearsed_peak_bytes=self.rehearsed,
            tokens_per_second=speed,
            train_seconds=round(self.loop.state.seconds, 3),
            skipped_updates=self.loop.state.nonfinite_total,
            optimizer=self.optimizer_facts,
            memory_events=self.loop.state.memory_events,
        )
        self._combine(receipt)
        self.folder.write_json(reporting.SAMPLES_FILE, samples)
        self.folder.write_json(self.folder.receipt_path, receipt.as_dict())
        self._print_receipt(receipt)
        if not self.ranks.first:
            return receipt
        if self.loop.state.seconds > _WORTH_COMPARING:
            shape = self._shape()
            self.plan = planning.side_by_side(self.model_config, shape, self.room, self.plan)
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
        receipt.facts["parallel"] = "fsdp" if self.divides else "ddp"
        receipt.facts["ranks"] = [theirs["own"] for theirs in everybody]

    def _adapter_step(self) -> int:
        state = self.loop.state
        if self.config.keep_best and state.best_step is not None:
            return state.best_step
        return state.step

    def _print_receipt(self, receipt: Receipt) -> None:
        for check in receipt.checks:
            self.say.line(f"{'ok  ' if check.ok else 'FAIL'} {check.name}: {check.detail}")
        for finding in receipt.findings:
            self.say.line(f"note {finding}")
        self.say.line(
            f"peak memory {human_bytes(self.loop.peak)}, planned"
            f" {human_bytes(self.plan.peak_bytes)}; {self._speed() or math.nan:.0f} tokens/s"
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
            run_dir=self.config.output,
            steps=facts.get("steps", 0),
            tokens_per_second=facts.get("tokens_per_second"),
            peak_memory_bytes=facts.get("peak_memory_bytes"),
            predicted_peak_bytes=self.plan.peak_bytes,
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
