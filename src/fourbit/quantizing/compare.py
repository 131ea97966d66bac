"""The error of a quantized checkpoint against its original, layer by layer from the files."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from fourbit import bnb_format
from fourbit.errors import ModelError
from fourbit.integrations.names import CheckpointNames
from fourbit.integrations.transformers import plain_layout, quantized_layout
from fourbit.linear import QuantizedLinear
from fourbit.loading import load_config, stored_dtype, stored_quantization
from fourbit.quantizing.measure import Squares, relative, squares
from fourbit.quantizing.tensors import SourceTensors, open_tensors
from fourbit.sources import resolve_source

_WORST = 5


@dataclass(frozen=True)
class Comparison:
    """``|W - Ŵ| / |W|`` (Frobenius) of each quantized layer, by the name of its weight."""

    layers: dict[str, float]
    relative_error: float

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"relative_error": self.relative_error, "layer_errors": self.layers}

    def lines(self) -> list[str]:
        """The whole and the worst layers, for people."""
        worst = sorted(self.layers.items(), key=lambda item: (-item[1], item[0]))[:_WORST]
        return [
            f"relative error: {self.relative_error:.4%}",
            *(f"  {error:.4%}  {name}" for name, error in worst),
        ]


def compare(quantized: str, original: str) -> Comparison:
    """Reads both checkpoints tensor by tensor.

    Args:
        quantized: a folder or hub id in bitsandbytes' format.
        original: the 16-bit model it was made from.

    Raises:
        ModelError: one of them cannot be read, is not what it should be, or they are two models.
    """
    source = resolve_source(quantized)
    stored = stored_quantization(source)
    if stored is None:
        raise ModelError(
            "not-quantized",
            where=quantized,
            what="is not quantized, so it has no quantization error",
            fix="give the quantized folder first, its original after --error",
        )
    other = resolve_source(original)
    if stored_quantization(other) is not None:
        raise ModelError(
            "already-quantized",
            where=original,
            what="is quantized itself",
            fix="give the 16-bit original after --error",
        )
    stored.allow_unquantized = True
    config = load_config(source)
    model = quantized_layout(config, stored, dtype=stored_dtype(source))
    ours = open_tensors(source, config)
    theirs = open_tensors(other, load_config(other))
    names = CheckpointNames(plain_layout(config, dtype=stored_dtype(other)))
    originals = {names.parameter(name): name for name in theirs.shapes}
    try:
        return _compared(model, ours, theirs, originals)
    finally:
        ours.close()
        theirs.close()


def _compared(
    model: Any, ours: SourceTensors, theirs: SourceTensors, originals: dict[str | None, str]
) -> Comparison:
    names = CheckpointNames(model)
    groups: dict[str, dict[str, str]] = {}
    keys = sorted((*bnb_format.NAMES_4BIT, *bnb_format.NAMES_8BIT), key=len, reverse=True)
    for name in ours.shapes:
        for key in keys:
            if name.endswith("." + key):
                groups.setdefault(name[: -len(key)], {})[key] = name
                break
    pairs: dict[str, Squares] = {}
    for prefix, stored in groups.items():
        parameter = names.parameter(f"{prefix}weight")
        layer = None if parameter is None else model.get_submodule(parameter.rpartition(".")[0])
        if not isinstance(layer, QuantizedLinear):
            continue
        weight = _original(f"{prefix}weight", parameter, layer, theirs, originals)
        layer = copy.deepcopy(layer)
        layer.replace_(
            bnb_format.from_disk(
                layer, {k: ours.whole(n) for k, n in stored.items()}, name=f"{prefix}weight"
            )
        )
        pairs[f"{prefix}weight"] = squares(layer, weight)
    errors = {name: relative({name: pair}) for name, pair in pairs.items()}
    return Comparison(errors, relative(pairs))


def _original(
    name: str,
    parameter: str | None,
    layer: QuantizedLinear,
    theirs: SourceTensors,
    originals: dict[str | None, str],
) -> Any:
    shape = (layer.out_features, layer.in_features)
    wanted = shape[::-1] if layer.transposed_source else shape
    found = originals.get(parameter)
    if found is None or theirs.shapes[found] != wanted:
        raise ModelError(
            "another-model",
            where=name,
            what="the original has no such weight of that shape",
            fix="give the checkpoint from which this one was made",
        )
    weight = theirs.whole(found)
    return weight.t() if layer.transposed_source else weight
