"""Before a model is loaded: everything in which a user's mistake can be found, and the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from fourbit import device as devices
from fourbit import planning
from fourbit.data import BatchPlan, Dataset, PreparedData, Rows, prepare, read_rows
from fourbit.data.files import check_regular_file
from fourbit.distributed import Ranks
from fourbit.errors import EnvironmentFault, InputError
from fourbit.loading import load_config, load_tokenizer, stored_quantization
from fourbit.rundir import BASE
from fourbit.settings import replaced
from fourbit.sources import ModelSource, resolve_source
from fourbit.training import reporting
from fourbit.training.calibrated import TRAINING_DATA, calibrated_base
from fourbit.training.config import RunQuant, TrainConfig
from fourbit.training.progress import Reporter
from fourbit.training.prompts import settle, text_context
from fourbit.training.tracking import require_tracker

_DECIDES_THE_RESULT = {"data.max_length", "lora.r"}
"""What a budget may recommend, but not change unasked."""


class Preparation:
    """Settings, data, model files and plan of a run; settings give way to what is found.

    Attributes:
        config: the run's settings as they came out.
        origins: where each setting came from.
        gave_way: settings that a budget changed, in this run or in the one it resumes.
        dtype: of what is computed.
        source: where the base is.
        data: tokens, and an audit of them.
        room: memory there is.
        plan: memory this run will take.
    """

    dtype: torch.dtype
    source: ModelSource
    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    room: planning.Room
    plan: planning.Plan

    def __init__(
        self, config: TrainConfig, origins: dict[str, str], reporter: Reporter, ranks: Ranks
    ) -> None:
        self.config, self.origins, self.say, self.ranks = config, origins, reporter, ranks
        self.gave_way: dict[str, Any] = {}

    @property
    def divides(self) -> bool:
        """Whether each process holds only a part of the layers."""
        return self.config.parallel == "fsdp" and not self.ranks.alone

    def run(self) -> None:
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
        self._find_calibration_text()
        self.tokenizer = load_tokenizer(self.source, trust_remote_code=trust)
        self.context = text_context(self.config, self.model_config)
        self._cap_length()
        self._tokenize(rows)
        self.ranks.require_same(
            {"the fingerprint of the data": self.data.fingerprint},
            fix="give every host the same files",
        )
        self._make_plan(device)

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

    def _find_calibration_text(self) -> None:
        """So that a wrong name is told before anything is computed."""
        text = self.config.quant.calibrate
        if text is not None and text != TRAINING_DATA:
            check_regular_file(text, key="quant.calibrate")

    def calibrate(self, folder: Path) -> None:
        """The run goes on with a base of its own in its folder, where that was asked for."""
        if self.config.quant.calibrate is None:
            return
        original = self.source.name
        self.ranks.phase("calibrating the base")
        ids, base = self.data.train.ids, folder / BASE
        if self.ranks.first:
            revision = self.source.revision
            calibrated_base(self.config, ids, folder, self.say, revision=revision)
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

    def batches(self, dataset: Dataset, *, seed: int) -> BatchPlan:
        """How the samples of a dataset become micro-batches."""
        data = self.config.data
        return BatchPlan(
            dataset,
            max_length=data.max_length,
            packing=data.packing,
            batch_size=self.config.batch_size,
            seed=seed,
        )

    def _make_plan(self, device: torch.device) -> None:
        here = planning.Room.here(
            device, budget=self.config.budget_bytes, processes=self.ranks.here
        )
        # all have to come to the same plan
        rooms = self.ranks.gather([here.available, here.baseline])
        known = [available for available, _ in rooms if available is not None]
        least = min(known) if len(known) == len(rooms) else None
        self.room = replace(here, available=least, baseline=max(base for _, base in rooms))
        if self.config.budget is None:
            self.plan = planning.plan_training(self.model_config, self.shape(), self.room)
            self._choose_parallel()
        else:
            # what is resumed keeps the batches it began with
            self.config = replaced(self.config, self.gave_way)
            self.plan = planning.recommend(self.model_config, self.shape(), self.room)
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
            plan = planning.plan_training(self.model_config, self.shape(divided), self.room)
            if plan.fits:
                self.config, self.plan = divided, plan
                self.origins["parallel"] = "the plan"
                self.say.line("parallel: fsdp, as the whole base does not fit into each process")

    def shape(self, config: TrainConfig | None = None) -> planning.TrainingShape:
        """What a plan is made of."""
        return (config or self.config).shape(
            dtype=self.dtype,
            length=int(self.data.train.lengths.max()),
            kernels=planning.kernels_of(devices.default_device()),
            processes=self.ranks.size,
        )

    def _give_way(self, settings: Mapping[str, Any]) -> None:
        """Takes the settings that fit into the budget, unless they would train something else."""
        if self.plan.fits is False or settings.keys() & _DECIDES_THE_RESULT:
            raise self.does_not_fit(self.plan, "planned")
        self.plan = replace(self.plan, recommended=dict(settings))
        self.config = replaced(self.config, settings)
        self.origins |= dict.fromkeys(settings, "the budget")

    def plan_others(self) -> None:
        """Adds what other methods would take to the plan."""
        self.plan = planning.side_by_side(self.model_config, self.shape(), self.room, self.plan)

    def does_not_fit(self, plan: planning.Plan, how: str) -> EnvironmentFault:
        """``plan`` is of the nearest settings, or of the least where nothing fits."""
        fix = f"take {plan.flags}"
        if not plan.fits:
            least = f"{plan.peak_bytes / 1e6:,.0f} MB, with {plan.flags}"
            fix = f"take a larger budget or a smaller model; the least is {least}"
        return EnvironmentFault(
            "does-not-fit",
            where="budget",
            what=f"the run does not fit into {self.config.budget} ({how})",
            fix=fix,
        )
