"""How tensors are called: in a checkpoint's files and in the model that transformers builds.

transformers renames some tensors while it loads and gives them their old names when it saves. The
functions of it used here are private: ``tests/integrations/test_names.py`` fails when they move.
"""

from __future__ import annotations

import re

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from fourbit.errors import ModelError
from fourbit.linear import QuantizedLinear


class CheckpointNames:
    """Names of one checkpoint for one model, in both directions.

    Args:
        model: on meta; its quantized layers have the parameter ``weight``.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        mapping = get_model_conversion_mapping(model)
        self._renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
        self._converters = [step for step in mapping if isinstance(step, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._parameters = model.state_dict()
        self._used: set[int] = set()

    def parameter(self, name: str) -> str | None:
        """The model's name of a checkpoint's tensor; None when the model has no such.

        Raises:
            ModelError: the tensor is merged with others, or reshaped, while it is loaded.
        """
        found, pattern = self._renamed(name, self._converters)
        if found not in self._parameters and name in self._parameters:
            found, pattern = name, None
        if pattern is not None:
            raise ModelError(
                "converted-weights",
                where=name,
                what="transformers merges or reshapes this tensor while it loads the model,"
                " which a file written tensor by tensor cannot hold",
                fix="quantize while loading instead: fourbit train quantizes the same weights",
            )
        if found not in self._parameters:
            return None
        key = name
        for index, step in enumerate(self._renamings):
            key, matched = step.rename_source_key(key)
            if matched is not None:
                self._used.add(index)
        return found

    def stored(self, parameter: str) -> str:
        """The name under which ``save_pretrained`` writes a parameter of this checkpoint."""
        name = parameter
        for index in sorted(self._used, reverse=True):
            name, _ = self._renamings[index].reverse_transform().rename_source_key(name)
        return name

    def loads_as(self, name: str, parameter: str) -> bool:
        """Whether transformers takes a tensor written under ``name`` for ``parameter``."""
        found, _ = self._renamed(name, [])
        prefix = f"{self._prefix}."
        return parameter in (found, prefix + found, found.removeprefix(prefix))

    def _renamed(self, name: str, converters: list[WeightConverter]) -> tuple[str, str | None]:
        return rename_source_key(name, self._renamings, converters, self._prefix, self._parameters)


def plain_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype in which ``from_pretrained(dtype=...)`` holds each tensor that is not quantized."""
    wide = {
        re.compile(pattern.replace("*", ".*")): wanted
        for pattern, wanted in model._get_dtype_plan(dtype).items()
    }
    scales = {
        f"{name}.{key}"
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLinear)
        for key in ("weight", *layer.scale_names)
    }
    return {
        name: next((wanted for regex, wanted in wide.items() if regex.search(name)), tensor.dtype)
        for name, tensor in model.state_dict().items()
        if name not in scales
    }


def absent(model: PreTrainedModel, found: set[str]) -> list[str]:
    """Tensors that the model needs and ``found`` has not, in name order."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    groups: dict[str, set[str]] = {}
    for target, source in tied.items():
        groups.setdefault(source, {source}).add(target)
    covered = set(found)
    for group in groups.values():
        if group & found:
            covered |= group
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    scales = {
        f"{name}.{key}"
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLinear)
        for key in layer.scale_names
    }
    return sorted(
        name
        for name in model.state_dict().keys() - covered - scales
        if not any(pattern.search(name) for pattern in optional)
    )
