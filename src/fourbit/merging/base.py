"""The base's weights, one at a time: as they lie on disk, or as the run's 4 bits restore them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fourbit import ops
from fourbit.errors import ModelError
from fourbit.integrations import gguf as gguf_files
from fourbit.integrations.transformers import converts_weights, quantize_model
from fourbit.linear import Linear4bit
from fourbit.loading import stored_dtype
from fourbit.quantize import QuantConfig, check_finite
from fourbit.receipt import combined_digest, tensor_digest
from fourbit.sources import ModelSource, check_index, check_safetensors

_INDEX = "model.safetensors.index.json"


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
    layers: dict[str, Linear4bit] = field(default_factory=dict)
    packed: dict[str, str] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    _stored: torch.dtype | None = None

    def weight(self, name: str) -> Tensor:
        """One weight in its stored dtype, or restored from 4 bits in float32; may be read-only.

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
        # transformers casts to one dtype before it quantizes; the bytes depend on that.
        self._stored = self._stored or stored_dtype(self.source)
        tensor = tensor.to(self._stored)
        restored = self._through_4bit(tensor, layer, name)
        return restored if self.dequantize else tensor

    def _through_4bit(self, tensor: Tensor, layer: Linear4bit, name: str) -> Tensor:
        matrix = tensor.t() if layer.transposed_source else tensor
        parts = layer.quantized(matrix, name=name)
        prefix = name.removesuffix("weight")
        self.packed |= {prefix + key: tensor_digest(part) for key, part in parts.items()}
        if not self.dequantize:
            return tensor
        restored = ops.dequantize_4bit(
            (
                parts["weight"],
                parts["weight_absmax"],
                parts.get("weight_nested_absmax"),
                parts.get("weight_nested_offset"),
            ),
            blocksize=layer.blocksize,
            quant_type=layer.quant_type,
            shape=matrix.shape,
            dtype=torch.float32,
        )
        return restored.t() if layer.transposed_source else restored

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
    tied = _tied(skeleton, found)
    slots = _in_model(source, skeleton, found, tied)
    base = Base(source, slots, tied, quant, dequantize, held)
    if quant is not None:
        for name in quantize_model(skeleton, quant):
            layer = skeleton.get_submodule(name)
            assert isinstance(layer, Linear4bit)
            base.layers[f"{name}.weight"] = layer
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


def _folder_slots(source: ModelSource, prefix: str, names: set[str]) -> dict[str, Slot]:
    slots: dict[str, Slot] = {}
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
        if slot.shape != shapes[name] and source.kind != "gguf":
            raise ModelError(
                "mismatched-weights",
                where=source.name,
                what=f"{name} has shape {list(slot.shape)}, config.json says {list(shapes[name])}",
                fix="use the config.json that belongs to the weights",
            )
    return slots
