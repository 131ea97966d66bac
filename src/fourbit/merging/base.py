"""The base's weights, one at a time: as they lie on disk, or as the run's 4 bits restore them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fourbit.bnb_format import NAMES_4BIT, NAMES_8BIT, from_disk
from fourbit.errors import ModelError
from fourbit.integrations import gguf as gguf_files
from fourbit.integrations.transformers import converts_weights, quantize_model
from fourbit.linear import QuantizedLinear
from fourbit.loading import stored_dtype
from fourbit.quantize import QuantConfig, check_finite
from fourbit.receipt import combined_digest, tensor_digest
from fourbit.sources import ModelSource, check_index, check_safetensors

_INDEX = "model.safetensors.index.json"
_PART_ENDINGS = tuple(name for name in (*NAMES_4BIT, *NAMES_8BIT) if name != "weight")


def make_skeleton(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model on meta: names and shapes, no memory. It may be changed, its configuration too."""
    own = copy.deepcopy(config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(own, trust_remote_code=trust_remote_code)


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies: read by calling it, nothing before."""

    read: Callable[[], Tensor]
    shape: tuple[int, ...]
    floating: bool


@dataclass
class Base:
    """A checkpoint under the names of its model.

    Attributes:
        source: the files.
        slots: name in the model -> tensor on disk, in the order of the files.
        tied: name -> the name whose weight it shares.
        quant: how the run held it; None for 16 or 32 bits.
        parts: weight that is quantized on disk -> its scales there.
        dequantize: give the weights that the 4 bits restore, not those on disk.
        held: dtype to which the run rounded the other weights; None rounds nothing.
        hashed: dtype in which the other weights are hashed on their way; None hashes nothing.
    """

    source: ModelSource
    slots: dict[str, Slot]
    tied: dict[str, str]
    quant: QuantConfig | None
    dequantize: bool
    held: torch.dtype | None = None
    hashed: torch.dtype | None = None
    layers: dict[str, QuantizedLinear] = field(default_factory=dict)
    parts: dict[str, dict[str, Callable[[], Tensor]]] = field(default_factory=dict)
    packed: dict[str, str] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    _stored: torch.dtype | None = None

    def weight(self, name: str) -> Tensor:
        """One weight in its stored dtype, or restored from few bits in float32; may be read-only.

        Raises:
            ModelError: NaN or Inf.
        """
        tensor = self.slots[name].read()
        layer = self.layers.get(name)
        if layer is None:
            if not tensor.is_floating_point():
                return tensor
            check_finite(tensor, name=name)
            if self.hashed is not None:
                self.others[name] = tensor_digest(tensor.to(self.hashed))
            return tensor if self.held is None else tensor.to(self.held)
        layer.replace_(self._packed(name, layer, tensor))
        prefix = name.removesuffix("weight")
        for key, part in layer.named_parameters(recurse=False):
            if key != "bias":
                self.packed[prefix + key] = tensor_digest(part)
        result = tensor
        if self.dequantize:
            matrix = layer.dequantize(torch.float32)
            result = matrix.t() if layer.transposed_source else matrix
        layer.to_empty(device="meta")
        return result

    def _packed(self, name: str, layer: QuantizedLinear, tensor: Tensor) -> dict[str, Tensor]:
        """The layer's parameters: as they lie on disk, or quantized as the run did."""
        if name in self.parts:
            own = {key: read() for key, read in self.parts[name].items()}
            return from_disk(layer, {"weight": tensor, **own}, name=name)
        # transformers casts to one dtype before it quantizes; the bytes depend on that.
        self._stored = self._stored or stored_dtype(self.source)
        tensor = tensor.to(self._stored)
        return layer.quantized(tensor.t() if layer.transposed_source else tensor, name=name)

    def packed_sha256(self) -> str:
        """Of all 4-bit weights given so far, as the receipt of a run records it."""
        return combined_digest(self.packed)

    def packed_names(self) -> set[str]:
        """Names of the 4-bit weights given so far."""
        return {name for name in self.packed if name.endswith(".weight")}

    def every_sha256(self) -> str:
        """Of all weights given so far, as the receipt of a run records it."""
        return combined_digest(self.packed | self.others)


def open_base(
    source: ModelSource,
    config: PretrainedConfig,
    *,
    quant: QuantConfig | None,
    dequantize: bool,
    held: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Base:
    """Finds every weight of the model in the files, without reading one.

    Args:
        source: a folder of safetensors or a GGUF file.
        config: of the model.
        quant: how the run held the base in 4 bits; None when it did not.
        dequantize: give what the 4 bits restore.
        held: dtype the run rounded the other weights to.
        trust_remote_code: run the repository's own model code.

    Raises:
        ModelError: damaged or missing tensors, other shapes than config.json says, or a checkpoint
            that transformers converts while loading.
    """
    skeleton = make_skeleton(config, trust_remote_code=trust_remote_code)
    if converts_weights(skeleton):
        raise ModelError(
            "converted-weights",
            where=source.name,
            what=f"transformers rebuilds the weights of {config.model_type} while loading,"
            " so they cannot be merged tensor by tensor",
            fix="keep the adapter beside the base, or merge it with PEFT",
        )
    found = (
        _gguf_slots(source, config)
        if source.kind == "gguf"
        else _folder_slots(source, skeleton.base_model_prefix, set(skeleton.state_dict()))
    )
    parts = _stored_parts(skeleton, found)
    tied = _tied(skeleton, found)
    slots = _in_model(source, skeleton, found, tied, packed=parts.keys())
    base = Base(source, slots, tied, quant, dequantize, held, parts=parts)
    if quant is not None:
        for name in quantize_model(skeleton, quant.model_copy(update={"allow_unquantized": True})):
            layer = skeleton.get_submodule(name)
            assert isinstance(layer, QuantizedLinear)
            if f"{name}.weight" in parts or not parts:
                base.layers[f"{name}.weight"] = layer
    lost = sorted(parts.keys() - base.layers.keys())
    if lost:
        raise ModelError(
            "quantized-elsewhere",
            where=source.name,
            what=f"{lost[0]} is quantized on disk, a place where no adapter's base has been tried",
            fix="start from the 16-bit checkpoint",
        )
    return base


def _gguf_slots(source: ModelSource, config: PretrainedConfig) -> dict[str, Slot]:
    lazy = gguf_files.lazy_state_dict(source.path, config)
    return {
        name: Slot(lambda tensor=tensor: tensor[...], tensor.shape, floating=True)
        for name, tensor in lazy.items()
    }


def _shards(folder: Path) -> list[Path]:
    """The files a loader would read; some repositories hold the weights twice."""
    single, index = folder / "model.safetensors", folder / _INDEX
    check_index(folder)
    if single.is_file():
        return [single]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(named))]


def _stored_parts(
    skeleton: PreTrainedModel, found: dict[str, Slot]
) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """Takes the scales of weights that are quantized on disk out of ``found``."""
    names = skeleton.state_dict().keys()
    parts: dict[str, dict[str, Callable[[], Tensor]]] = {}
    for key in [key for key in found if key not in names]:
        slot = found.pop(key)
        for ending in _PART_ENDINGS:
            module = key.removesuffix(f".{ending}")
            if key != module and f"{module}.weight" in names:
                parts.setdefault(f"{module}.weight", {})[ending] = slot.read
    return parts


def _folder_slots(source: ModelSource, prefix: str, names: set[str]) -> dict[str, Slot]:
    slots: dict[str, Slot] = {}
    ends = tuple(f".{ending}" for ending in _PART_ENDINGS)
    for path in _shards(source.path):
        header = check_safetensors(path)
        entries = [(key, entry) for key, entry in header.items() if key != "__metadata__"]
        for key, entry in sorted(entries, key=lambda item: item[1]["data_offsets"]):
            slot = Slot(
                lambda path=path, key=key: _read(path, key),
                tuple(entry["shape"]),
                floating=entry["dtype"].startswith(("F", "BF")),
            )
            # A backbone saved by itself lacks its prefix, and a whole model may be read as one.
            for name in (key, f"{prefix}.{key}", key.removeprefix(f"{prefix}.")):
                if name in names:
                    slots[name] = slot
                    break
            else:
                if key.endswith(ends):
                    slots[key] = slot
    return slots


def _read(path: Path, key: str) -> Tensor:
    # Opened anew for each tensor: the mapping, and with it the pages, goes when the tensor does.
    with safe_open(path, framework="pt") as tensors:
        return tensors.get_tensor(key)


def _tied(skeleton: PreTrainedModel, found: Mapping[str, Slot]) -> dict[str, str]:
    """Names that share another's weight, as transformers decides while loading.

    Two tensors on disk with different values are not tied, whatever the configuration says.
    """
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    groups: dict[str, list[str]] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        groups.setdefault(first.setdefault(id(parameter), name), []).append(name)
    for names in groups.values():
        present = [name for name in names if name in found] or names
        source = present[0]
        for name in names:
            if name == source:
                continue
            if name in found and not torch.equal(found[name].read(), found[source].read()):
                continue
            tied[name] = source
    return tied


def _in_model(
    source: ModelSource,
    skeleton: PreTrainedModel,
    found: Mapping[str, Slot],
    tied: Mapping[str, str],
    *,
    packed: Collection[str],
) -> dict[str, Slot]:
    """Every weight of the model exactly once, in the order of the files."""
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    needed = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)} - tied.keys()
    missing = sorted(needed - found.keys())
    if missing:
        raise ModelError(
            "missing-weights",
            where=source.name,
            what=f"{len(missing)} tensors are missing, first: {missing[0]}",
            fix="download the checkpoint again, or check that config.json belongs to it",
        )
    slots = {name: slot for name, slot in found.items() if name not in tied}
    for name, slot in slots.items():
        # GGUF drops dimensions of one element; its reader puts them back.
        if slot.shape != shapes[name] and source.kind != "gguf" and name not in packed:
            raise ModelError(
                "mismatched-weights",
                where=source.name,
                what=f"{name} has shape {list(slot.shape)}, config.json says {list(shapes[name])}",
                fix="use the config.json that belongs to the weights",
            )
    return slots
