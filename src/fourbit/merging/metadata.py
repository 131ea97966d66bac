"""The files of a model folder that hold no weights, taken over from the base."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig

from fourbit.sources import ModelSource

_TOKENIZER = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
)
_PAPERS = ("LICENSE*", "NOTICE*", "USE_POLICY*")
_GENERATION = "generation_config.json"


def copy_metadata(
    base: ModelSource, tokenizer: ModelSource, folder: Path, *, own_code: bool
) -> None:
    """Copies the tokenizer with its chat template, and the base's licence.

    Args:
        base: the base model.
        tokenizer: where the tokenizer lies: the base's, or the adapter's own.
        folder: where they go.
        own_code: also the base's own Python code.
    """
    wanted = [(tokenizer.metadata, _TOKENIZER), (base.metadata, _PAPERS)]
    if own_code:
        wanted.append((base.metadata, ("*.py",)))
    for place, patterns in wanted:
        for path in {path for pattern in patterns for path in place.glob(pattern)}:
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def write_generation_config(source: ModelSource, config: PretrainedConfig, folder: Path) -> None:
    """The base's generation settings; those its configuration implies where it has none."""
    found = source.metadata / _GENERATION
    if found.is_file():
        shutil.copyfile(found, folder / _GENERATION)
    else:
        GenerationConfig.from_model_config(config).save_pretrained(folder)


def config_for(
    raw: Mapping[str, Any], *, architecture: str, dtype: torch.dtype, tied: bool, rows: int | None
) -> dict[str, Any]:
    """The base's config.json, true for the merged weights.

    Args:
        raw: the base's, as it lies on disk.
        architecture: class name, where the base's does not say.
        dtype: of the merged weights.
        tied: whether the head shares the embedding.
        rows: of a resized embedding; None when it kept its size.
    """
    values = dict(raw)
    values.pop("quantization_config", None)
    values["architectures"] = values.get("architectures") or [architecture]
    name = str(dtype).removeprefix("torch.")
    for key in {"dtype", *({"torch_dtype"} & values.keys())}:
        values[key] = name
    if "tie_word_embeddings" in values or not tied:
        values["tie_word_embeddings"] = tied
    if rows is not None:
        values["vocab_size"] = rows
    return values
