"""The tensors of a 16-bit checkpoint, read without a copy: mapped from the file, or in pieces."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig

from fourbit.integrations import gguf as gguf_files
from fourbit.sources import ModelSource, check_safetensors, shard_files

_PIECE = 1 << 22
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class SourceTensors(ABC):
    """What a checkpoint holds.

    Attributes:
        shapes: of every tensor, in the order of the files.
        files: that hold them.
    """

    shapes: dict[str, tuple[int, ...]]
    files: list[Path]

    @abstractmethod
    def floating(self, name: str) -> bool:
        """Whether it can be quantized."""

    @abstractmethod
    def whole(self, name: str) -> Tensor:
        """The tensor; of safetensors it is a view of the mapped file."""

    @abstractmethod
    def pieces(self, name: str) -> Iterator[Tensor]:
        """The tensor as flat pieces, in order."""

    def close(self) -> None:  # noqa: B027  # only some have something to close
        """Unmaps what is mapped."""


class _Safetensors(SourceTensors):
    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.shapes = {}
        self._places: dict[str, tuple[Path, str]] = {}
        self._open: tuple[Path, Any, ExitStack] | None = None
        for path in files:
            for name, entry in check_safetensors(path).items():
                if name != "__metadata__":
                    self.shapes[name] = tuple(entry["shape"])
                    self._places[name] = (path, str(entry["dtype"]))

    def floating(self, name: str) -> bool:
        return self._places[name][1] in _FLOATS

    def whole(self, name: str) -> Tensor:
        return self._handle(self._places[name][0]).get_tensor(name)

    def pieces(self, name: str) -> Iterator[Tensor]:
        flat = self.whole(name).reshape(-1)
        for start in range(0, flat.numel(), _PIECE):
            yield flat[start : start + _PIECE]

    def close(self) -> None:
        if self._open is not None:
            self._open[2].close()
            self._open = None

    def _handle(self, path: Path) -> Any:
        """One file at a time stays open: parsing a header again costs little, mappings add up."""
        if self._open is None or self._open[0] != path:
            self.close()
            stack = ExitStack()
            self._open = (path, stack.enter_context(safe_open(path, framework="pt")), stack)
        return self._open[1]


class _Gguf(SourceTensors):
    def __init__(self, path: Path, config: PretrainedConfig) -> None:
        self.files = [path]
        self._tensors = gguf_files.lazy_state_dict(path, config)
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def floating(self, name: str) -> bool:
        return name in self._tensors

    def whole(self, name: str) -> Tensor:
        return self._tensors[name][...]

    def pieces(self, name: str) -> Iterator[Tensor]:
        return self._tensors[name].pieces()


def open_tensors(source: ModelSource, config: PretrainedConfig) -> SourceTensors:
    """The tensors of a model folder or GGUF file.

    Raises:
        ModelError: damaged or incomplete files.
    """
    if source.kind == "gguf":
        return _Gguf(source.path, config)
    return _Safetensors(shard_files(source))
