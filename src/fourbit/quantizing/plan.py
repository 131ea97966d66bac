"""Which tensors are written, under which names and into which files: decided from headers alone."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from fourbit import bnb_format
from fourbit.errors import ModelError
from fourbit.integrations.names import CheckpointNames, absent, plain_dtypes
from fourbit.linear import QuantizedLinear
from fourbit.quantizing.tensors import SourceTensors
from fourbit.shards import Entry, cut, storable


@dataclass(frozen=True)
class Unit:
    """One weight of the model, and everything written for it.

    Attributes:
        source: its name in the checkpoint that is read.
        parameter: its name in the model.
        name: its name in the checkpoint that is written.
        layer: the module that is quantized, on meta; None for a tensor that is copied.
        dtype: to which the source is cast before it is quantized or copied.
        entries: the tensors written.
    """

    source: str
    parameter: str
    name: str
    layer: QuantizedLinear | None
    dtype: torch.dtype
    entries: tuple[Entry, ...]

    @property
    def bytes(self) -> int:
        """Of all its tensors."""
        return sum(entry.bytes for entry in self.entries)


@dataclass(frozen=True)
class Shard:
    """One file."""

    name: str
    units: tuple[Unit, ...]

    @property
    def entries(self) -> list[Entry]:
        """All tensors of the file."""
        return [entry for unit in self.units for entry in unit.entries]


@dataclass(frozen=True)
class Plan:
    """Everything that will be written.

    Attributes:
        unused: tensors of the source that the architecture does not know.
    """

    shards: tuple[Shard, ...]
    unused: tuple[str, ...]

    @property
    def units(self) -> list[Unit]:
        """All weights in the order in which they are written."""
        return [unit for shard in self.shards for unit in shard.units]

    @property
    def bytes(self) -> int:
        """The most that the tensors can take."""
        return sum(unit.bytes for unit in self.units)

    def digest(self) -> str:
        """Changes with every name, shape, dtype and place."""
        facts = [
            [shard.name, unit.source, [[e.name, str(e.dtype), e.shape] for e in unit.entries]]
            for shard in self.shards
            for unit in shard.units
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def make_plan(
    tensors: SourceTensors, model: PreTrainedModel, *, dtype: torch.dtype, shard_bytes: int
) -> Plan:
    """Decides what is written.

    Args:
        tensors: of the source.
        model: `quantized_layout`.
        dtype: of the source's weights.
        shard_bytes: of the largest file.

    Raises:
        ModelError: missing, misshapen or renamed tensors that cannot be written.
    """
    names = CheckpointNames(model)
    found = {source: names.parameter(source) for source in tensors.shapes}
    parameters = {source: parameter for source, parameter in found.items() if parameter is not None}
    _drop_tied_copies(parameters, tensors, model)
    missing = absent(model, set(parameters.values()))
    if missing:
        raise ModelError(
            "missing-weights",
            where=str(tensors.files[0].parent),
            what=f"{len(missing)} tensors are missing, first: {missing[0]}",
            fix="download the checkpoint again, or check that config.json belongs to it",
        )
    plain = plain_dtypes(model, dtype)
    units = [
        _unit(source, parameter, model=model, names=names, tensors=tensors, plain=plain)
        for source, parameter in sorted(parameters.items(), key=lambda item: _natural(item[1]))
    ]
    unused = tuple(source for source, parameter in found.items() if parameter is None)
    return Plan(_shards(units, shard_bytes), unused)


def _unit(  # noqa: PLR0913  # one row of the plan needs every table
    source: str,
    parameter: str,
    *,
    model: PreTrainedModel,
    names: CheckpointNames,
    tensors: SourceTensors,
    plain: dict[str, torch.dtype],
) -> Unit:
    module, _, key = parameter.rpartition(".")
    layer = model.get_submodule(module)
    shape = tensors.shapes[source]
    if isinstance(layer, QuantizedLinear) and key == "weight":
        weight = (layer.out_features, layer.in_features)
        _expect(source, shape, weight[::-1] if layer.transposed_source else weight)
        if not tensors.floating(source):
            raise ModelError(
                "cannot-quantize",
                where=source,
                what="is not stored as float16, bfloat16 or float32",
                fix="start from the 16-bit checkpoint",
            )
        name, entries = _named(names, parameter, _packed_entries(layer))
        return Unit(source, parameter, name, layer, layer.original_dtype, entries)
    wanted = plain[parameter]
    _expect(source, shape, tuple(model.state_dict()[parameter].shape))
    if not storable(wanted):
        raise ModelError(
            "cannot-store", where=source, what=f"safetensors has no dtype {wanted}", fix=""
        )
    name, entries = _named(names, parameter, [Entry("", wanted, shape)])
    return Unit(source, parameter, name, None, wanted, entries)


def _packed_entries(layer: QuantizedLinear) -> list[Entry]:
    """What `bnb_format.to_disk` will give, named by what follows the weight's name's module."""
    entries = []
    for key, tensor in bnb_format.to_disk(layer).items():
        text = key.startswith(bnb_format.STATE_PREFIX)
        shape = tuple(tensor.shape)
        if text and getattr(layer, "double_quant", False):
            shape = (shape[0] + bnb_format.MAX_OFFSET_DIGITS,)
        entries.append(Entry(key, tensor.dtype, shape, open_ended=text))
    return entries


def _named(
    names: CheckpointNames, parameter: str, entries: Sequence[Entry]
) -> tuple[str, tuple[Entry, ...]]:
    """The entries under names that a loader takes for this parameter."""
    for name in (names.stored(parameter), parameter):
        if all(names.loads_as(_full(name, e.name), _full(parameter, e.name)) for e in entries):
            renamed = [Entry(_full(name, e.name), e.dtype, e.shape, e.open_ended) for e in entries]
            return name, tuple(renamed)
    raise ModelError(
        "converted-weights",
        where=parameter,
        what="transformers renames this tensor in a way that its scales do not survive",
        fix="quantize while loading instead: fourbit train quantizes the same weights",
    )


def _full(name: str, key: str) -> str:
    return name.removesuffix("weight") + key if key else name


def _drop_tied_copies(
    parameters: dict[str, str], tensors: SourceTensors, model: PreTrainedModel
) -> None:
    """Removes tensors that repeat the one they are tied to; unequal ones are both kept.

    transformers, too, ties only what is equal when a checkpoint holds both.
    """
    sources = {parameter: source for source, parameter in parameters.items()}
    for target, origin in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target in sources and origin in sources:
            one, other = sources[target], sources[origin]
            pairs = zip(tensors.pieces(one), tensors.pieces(other), strict=False)
            same = tensors.shapes[one] == tensors.shapes[other]
            if same and all(torch.equal(a, b) for a, b in pairs):
                del parameters[one]


def _shards(units: Sequence[Unit], limit: int) -> tuple[Shard, ...]:
    """Units in their order, as many to a file as ``limit`` bytes hold; a weight is never split."""
    return tuple(Shard(name, group) for name, group in cut(units, limit))


def _expect(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        raise ModelError(
            "mismatched-weights",
            where=name,
            what=f"has shape {list(shape)}, config.json says {list(wanted)}",
            fix="use the config.json that belongs to the weights",
        )


def _natural(name: str) -> list[tuple[int, str]]:
    """``layers.2`` before ``layers.10``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"\.", name)]
