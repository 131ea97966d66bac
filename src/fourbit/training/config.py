"""`TrainConfig`: a run, composed of the settings of its parts."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, PositiveInt, field_validator, model_validator

from fourbit.data.config import DataConfig
from fourbit.device import Precision
from fourbit.errors import InputError
from fourbit.lora import LoraSettings
from fourbit.methods import READ_BY, Method, trains_prompt
from fourbit.optim import OptimConfig
from fourbit.planning import ALL_LAYERS, Kernels, TrainingShape
from fourbit.prompts import PromptSettings
from fourbit.quantize import QuantConfig
from fourbit.settings import Settings
from fourbit.shards import parse_size

SHORT_FORMS = {
    "data": "data.train",
    "lr": "optim.lr",
    "o": "output",
    "r": "lora.r",
    "max_length": "data.max_length",
    "num_virtual_tokens": "prompt.num_virtual_tokens",
    "quant_type": "quant.quant_type",
    "skip_bad_lines": "data.skip_bad_lines",
}
"""Command-line short forms: ``--data F`` means ``--data.train F``."""


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


class RunQuant(QuantConfig):
    """How a run holds its base: chosen weight by weight, or for the inputs it will see."""

    calibrate: str | None = Field(
        default=None,
        description="choose scales and codes for known inputs before training: `data`, the"
        " training texts, or a file of text or rows",
    )

    @classmethod
    def of(cls, quant: QuantConfig) -> RunQuant:
        """The same format, not calibrated by the run."""
        return cls(**{name: getattr(quant, name) for name in QuantConfig.model_fields})


class TrainConfig(Settings):
    """One fine-tuning run. The YAML keys are these fields."""

    model: str = Field(
        default="smollm2",
        min_length=1,
        description="alias, folder, GGUF file or hub id of the base",
    )
    output: str = Field(default="runs/run", min_length=1, description="run directory")
    method: Method = Field(
        default="qlora",
        description="qlora: 4-bit base; lora: 16/32-bit base; full; prompt_tuning, p_tuning:"
        " virtual tokens before a 4-bit base",
    )
    data: DataConfig = DataConfig()
    quant: RunQuant = RunQuant()
    lora: LoraSettings = LoraSettings()
    prompt: PromptSettings = PromptSettings()
    optim: OptimConfig = OptimConfig()
    batch_size: int = Field(default=4, ge=1, le=65536, description="sequences in a micro-batch")
    grad_accum: int = Field(default=4, ge=1, le=65536, description="micro-batches in a step")
    epochs: float = Field(default=1, gt=0, le=10000, description="passes over the data")
    max_steps: int | None = Field(default=None, ge=1, description="stop after so many steps")
    gradient_checkpointing: Literal["auto", "none", "all", "offload"] | PositiveInt = Field(
        default="auto",
        description="layers whose activations are recomputed in backward; auto: as memory needs;"
        " offload: all, and what lies between them waits in host memory (a CPU: in a file)",
    )
    budget: str | None = Field(
        default=None,
        description="memory of the whole process, e.g. 6GB; batch_size, checkpointing and"
        " pages give way until the run fits",
    )
    rehearsal: bool = Field(
        default=True, description="run the longest batch before step 1 and measure its memory"
    )
    precision: Precision = Field(default="auto", description="bf16, fp16 (with a scaler) or fp32")
    deterministic: bool = Field(
        default=False, description="the same bits every time on a GPU too; a CPU's always are"
    )
    save_dtype: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="dtype of the saved adapter; bf16 halves the file"
    )
    attn_implementation: str | None = Field(
        default=None, description="transformers' name: sdpa, eager"
    )
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub model")
    trust_remote_code: bool = Field(
        default=False, description="run the model repository's own code"
    )
    parallel: Literal["auto", "ddp", "fsdp"] = Field(
        default="auto",
        description="under torchrun: ddp holds the base whole in every process, fsdp divides its"
        " layers, auto takes ddp where that fits",
    )
    eval_every: int = Field(default=50, ge=0, description="steps between evaluations; 0: ends only")
    save_every: int = Field(
        default=50, ge=0, description="steps between checkpoints; 0: the last only"
    )
    save_total_limit: int | None = Field(
        default=2, ge=1, description="checkpoints kept; null keeps all"
    )
    keep_best: bool = Field(
        default=False, description="save the adapter with the best evaluation loss"
    )
    early_stopping: int | None = Field(
        default=None, ge=1, description="stop after so many evaluations without a better loss"
    )
    samples: int = Field(
        default=4, ge=0, le=64, description="evaluation rows generated before and after"
    )
    report_to: Literal["none", "tensorboard", "wandb"] = Field(
        default="none", description="tracker"
    )
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="of data order, initial values and dropout"
    )
    resume: Annotated[str, BeforeValidator(str), BeforeValidator(_lower)] = Field(
        default="never", description="never, auto (newest checkpoint that verifies) or a step"
    )

    @property
    def recomputed_layers(self) -> int | None:
        """What ``gradient_checkpointing`` says in layers; None leaves it to the plan."""
        named = {"auto": None, "none": 0, "all": ALL_LAYERS, "offload": ALL_LAYERS}
        value = self.gradient_checkpointing
        return value if isinstance(value, int) else named[value]

    @property
    def budget_bytes(self) -> int | None:
        """``budget`` in bytes."""
        return None if self.budget is None else parse_size(self.budget, where="budget")

    def shape(
        self,
        *,
        dtype: torch.dtype,
        length: int | None = None,
        kernels: Kernels = "cpu",
        processes: int = 1,
    ) -> TrainingShape:
        """What decides the run's memory.

        Args:
            dtype: of activations.
            length: of the longest sequence; None takes ``data.max_length``.
            kernels: see `TrainingShape`.
            processes: how many train together.
        """
        longest = self.data.max_length if length is None or self.data.packing else length
        return TrainingShape(
            method=self.method,
            quant=self.quant,
            lora=self.lora,
            dtype=dtype,
            batch_size=self.batch_size,
            length=longest,
            recompute=self.recomputed_layers,
            packing=self.data.packing or self.batch_size > 1,
            grad_accum=self.grad_accum,
            offload=self.gradient_checkpointing == "offload",
            prompt=self.prompt,
            optim=self.optim,
            kernels=kernels,
            processes=processes,
            divided=processes > 1 and self.parallel == "fsdp",
        )

    @field_validator("budget")
    @classmethod
    def _is_a_size(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                parse_size(value, where="budget")
            except InputError as error:
                raise ValueError(f"{error.what}; {error.fix}") from None
        return value

    @field_validator("resume")
    @classmethod
    def _resume_form(cls, value: str) -> str:
        if value not in ("never", "auto") and not re.fullmatch(r"\d+", value):
            raise ValueError(f"resume '{value}' is not never, auto or a step number")
        return value

    @model_validator(mode="after")
    def _settings_of_the_method(self) -> TrainConfig:
        unread = [
            f"{section}.{name}"
            for section, methods in READ_BY.items()
            if self.method not in methods
            for name in _changed(getattr(self, section))
        ]
        if trains_prompt(self.method):
            unread += [f"prompt.{name}" for name in self.prompt.unread(self.method)]
        if unread:
            raise ValueError(f"{', '.join(unread)}: not read by method {self.method}; remove it")
        return self

    @model_validator(mode="after")
    def _prompts_are_not_packed(self) -> TrainConfig:
        asked = self.data.packing and "packing" in self.data.model_fields_set
        if asked and trains_prompt(self.method):
            raise ValueError(
                f"data.packing: true does not go with method {self.method}, whose prompt begins"
                " every row; remove it"
            )
        return self

    @model_validator(mode="after")
    def _needs_evaluation(self) -> TrainConfig:
        for name in ("keep_best", "early_stopping"):
            if getattr(self, name) and (not self.data.eval or not self.eval_every):
                raise ValueError(f"{name} needs data.eval and eval_every above 0")
        return self

    @model_validator(mode="after")
    def _exact_start(self) -> TrainConfig:
        start = str(self.lora.init_lora_weights)
        if start.startswith(("pissa", "olora")) and self.save_dtype != "fp32":
            raise ValueError(
                f"save_dtype {self.save_dtype} would round away what {start} learned: use fp32"
            )
        return self


def _changed(section: Settings) -> list[str]:
    """Settings that differ from their default: a written-out configuration names every one."""
    fields = type(section).model_fields
    return [name for name, info in fields.items() if getattr(section, name) != info.default]
