"""Settings of the training and evaluation data."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from fourbit.settings import Settings

DataFormat = Literal["auto", "messages", "prompt_completion", "instruction", "sharegpt", "text"]


class TrainFile(Settings):
    """One of several training files, with its share in every epoch."""

    path: str = Field(min_length=1, description="File or hub id, as in data.train.")
    weight: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="Copies of each row per epoch; 0.5 draws half of the rows anew each epoch.",
    )


def _number_if_it_is_one(value: Any) -> Any:
    """The command line hands over text; ``0.05`` there means the number, not a file name."""
    if not isinstance(value, str):
        return value
    if value.strip().lower() in ("none", "null", ""):
        return None
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


class DataConfig(Settings):
    """What to train and evaluate on, and how rows become tokens."""

    train: str | tuple[TrainFile, ...] | None = Field(
        default=None,
        description="Training data: a JSONL, JSON, CSV, Parquet or TXT file (plain, .gz, .zst), a "
        "hub id such as org/name or org/name:config#split, or a list of {path, weight}.",
    )
    eval: Annotated[int | float | str | None, BeforeValidator(_number_if_it_is_one)] = Field(
        default=0.05,
        description="Evaluation data: a fraction of the rows, a number of rows, a separate file "
        "or hub id; 0 for none.",
    )
    format: DataFormat = Field(
        default="auto", description="Row format; auto decides from the columns of all rows."
    )
    prompt: str | None = Field(
        default=None,
        description='Template of the user turn over any columns, such as "{question}"; a literal '
        "brace is doubled. Needs data.completion.",
    )
    completion: str | None = Field(
        default=None,
        description='Template of the assistant turn, such as "{answer}". Needs data.prompt.',
    )
    system: str | None = Field(
        default=None, description="System message put before chats that have none."
    )
    max_length: int = Field(
        default=1024, ge=8, le=2**24, description="Longest sample and pack, in tokens."
    )
    packing: bool = Field(
        default=True, description="Put several samples into one sequence, kept apart by positions."
    )
    train_on: Literal["assistant", "all"] = Field(
        default="assistant", description="Tokens that carry the loss: assistant turns, or all."
    )
    chat_template: str | None = Field(
        default=None,
        min_length=1,
        description="Chat template instead of the tokenizer's own: chatml, llama3, zephyr, alpaca, "
        "plain, or the path of a .jinja file.",
    )
    on_long: Literal["truncate", "drop"] = Field(
        default="truncate", description="What happens to a chat longer than max_length."
    )
    skip_bad_lines: int = Field(
        default=0, ge=0, description="How many unreadable or invalid rows to leave out in silence."
    )
    max_rows: int | None = Field(
        default=None, ge=1, description="Use only the first N rows of each training file."
    )
    max_masked: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="Share of samples without any supervised token above which the run is refused.",
    )

    @field_validator("eval", mode="before")
    @classmethod
    def _eval_is_no_flag(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("must be a fraction, a number of rows, a file, or 0 for none")
        return value

    @field_validator("eval")
    @classmethod
    def _eval_in_range(cls, value: float | str | None) -> float | str | None:
        if isinstance(value, float) and not (math.isfinite(value) and 0 <= value < 1):
            raise ValueError("a fraction must be at least 0 and below 1; give rows as an integer")
        if isinstance(value, int) and value < 0:
            raise ValueError("must not be negative")
        return value

    @field_validator("train")
    @classmethod
    def _train_names_a_file(
        cls, value: str | tuple[TrainFile, ...] | None
    ) -> str | tuple[TrainFile, ...] | None:
        if value is not None and not value:
            raise ValueError("must name a file, a hub id or a list of {path, weight}")
        return value

    @model_validator(mode="after")
    def _templates_together(self) -> DataConfig:
        if (self.prompt is None) != (self.completion is None):
            missing = "completion" if self.completion is None else "prompt"
            raise ValueError(f"prompt and completion are given together; {missing} is missing")
        if self.prompt is not None and self.format not in ("auto", "prompt_completion"):
            raise ValueError(f"prompt and completion do not go with format: {self.format}")
        return self

    def train_files(self) -> tuple[TrainFile, ...]:
        """The training files as a list, whatever way they were given."""
        if self.train is None:
            return ()
        return (TrainFile(path=self.train),) if isinstance(self.train, str) else self.train
