"""GGUF files as a lazy state dict, so that they stream into 4 bits like any checkpoint.

transformers itself refuses ``gguf_file=`` together with a quantizer, and its own reader holds the
whole dequantized model. The name map and tensor processors used here are its private helpers:
``tests/integrations/test_gguf.py`` fails when they move.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import EllipsisType
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from fourbit.errors import ModelError

_PIECE = 1 << 22
"""Elements that are dequantized at once."""


class LazyTensor:
    """One GGUF tensor under its transformers name; dequantized when it is indexed.

    Looks to transformers' loader like a safetensors slice: ``shape`` and ``[...]``.
    """

    def __init__(self, tensor: Any, processor: TensorProcessor) -> None:
        self._tensor, self._processor = tensor, processor
        self.shape = tuple(reversed(tensor.shape.tolist()))

    def __getitem__(self, index: EllipsisType | slice) -> Tensor:
        processed = self._processed(self._values(slice(None)))
        # what is mapped from the file must not be written to; what was dequantized is ours
        return torch.from_numpy(processed if processed.flags.writeable else np.copy(processed))[
            index
        ]

    def pieces(self) -> Iterator[Tensor]:
        """The tensor in rows, flat and in order, without ever holding all of it where possible."""
        probe = np.broadcast_to(np.float32(0), self.shape)
        if len(self.shape) < 2 or self._processed(probe) is not probe:
            yield self[...].reshape(-1)
            return
        rows = max(1, _PIECE // max(1, math.prod(self.shape[1:])))
        for start in range(0, self.shape[0], rows):
            values = self._values(slice(start, start + rows))
            yield torch.from_numpy(values if values.flags.writeable else np.copy(values)).reshape(
                -1
            )

    def _values(self, rows: slice) -> np.ndarray:
        return gguf.quants.dequantize(self._tensor.data[rows], self._tensor.tensor_type)

    def _processed(self, values: np.ndarray) -> np.ndarray:
        processed = self._processor.process(
            weights=values,
            name=self._tensor.name,
            tensor_key_mapping={},
            parsed_parameters={"tensors": {}},
        )
        return processed.weights


@lru_cache(maxsize=1)
def read(path: Path) -> gguf.GGUFReader:
    """Opens a GGUF file; the last one stays open, because parsing its vocabulary takes seconds.

    The vocabulary itself is not kept.

    Raises:
        ModelError: the file is truncated or no GGUF.
    """
    try:
        reader = gguf.GGUFReader(str(path))
    except (ValueError, OSError, LookupError, TypeError, ArithmeticError, MemoryError) as error:
        raise ModelError(
            "bad-gguf",
            where=str(path),
            what=f"cannot be read as GGUF ({error})",
            fix="download it again",
        ) from error
    # Two arrays for each word of the vocabulary: 200 MB where there are 50,000 words.
    for name in [name for name in reader.fields if name.startswith("tokenizer.")]:
        del reader.fields[name]
    return reader


def forget() -> None:
    """Closes the file that `read` keeps open."""
    read.cache_clear()


@dataclass(frozen=True)
class _FlatModel:
    """Names without submodules: transformers otherwise builds one name map per module."""

    config: PretrainedConfig
    names: dict[str, None]

    def state_dict(self) -> dict[str, None]:
        return self.names

    def named_children(self) -> list[tuple[str, Any]]:
        return []


def lazy_state_dict(path: Path, config: PretrainedConfig) -> dict[str, LazyTensor]:
    """Tensor names of transformers to lazily dequantized GGUF tensors.

    Raises:
        ModelError: the file is unreadable, or its names do not map onto the architecture.
    """
    reader = read(path)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    processor_class = TENSOR_PROCESSORS.get(config.model_type, TensorProcessor)
    processor = processor_class(config=config.to_dict())
    flat = _FlatModel(config, dict.fromkeys(skeleton.state_dict()))
    try:
        names = get_gguf_hf_weights_map(flat, processor)
        if not {tensor.name for tensor in reader.tensors} <= names.keys():
            names = get_gguf_hf_weights_map(skeleton, processor)
    except NotImplementedError as error:
        raise ModelError(
            "gguf-architecture",
            where=str(path),
            what=f"architecture {config.model_type} is not readable from GGUF ({error})",
            fix="use the safetensors version of the model",
        ) from error
    return {
        names[tensor.name]: LazyTensor(tensor, processor)
        for tensor in reader.tensors
        if tensor.name in names
    }


def metadata_folder(path: Path) -> Path:
    """A folder with ``config.json`` and the tokenizer of a GGUF file, made once and cached.

    Converting a GGUF vocabulary takes seconds, and every command needs it. The cache
    (``$XDG_CACHE_HOME/fourbit`` or ``~/.cache/fourbit``) is keyed by the file's path, size and
    time; where it cannot be written the conversion is made in a temporary folder.
    """
    facts = path.stat()
    key = hashlib.sha256(f"{path}|{facts.st_size}|{facts.st_mtime_ns}".encode()).hexdigest()[:16]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fourbit" / "gguf"
    folder = root / f"{path.stem}-{key}"
    if (folder / "config.json").is_file():
        return folder
    staging = _staging(root)
    try:
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(staging)
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        config.__dict__.pop("quantization_config", None)
        config.save_pretrained(staging)
        os.replace(staging, folder)
    except OSError:
        # Another process may have finished first; otherwise the staged copy serves this one.
        if not (folder / "config.json").is_file():
            return staging
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _staging(root: Path) -> Path:
    try:
        root.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".new-", dir=root))
    except OSError:
        return Path(tempfile.mkdtemp(prefix="fourbit-gguf-"))
