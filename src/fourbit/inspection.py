"""What a checkpoint holds, read from file headers alone: no weight is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fourbit.errors import ModelError
from fourbit.integrations import gguf as gguf_files
from fourbit.loading import ModelSource, check_safetensors, resolve_source
from fourbit.training.progress import human_bytes

_STATE_KEY = ".quant_state.bitsandbytes__"
_SCALE_KEYS = (
    ".weight.absmax",
    ".weight.quant_map",
    ".weight.nested_absmax",
    ".weight.nested_quant_map",
    ".SCB",
    ".weight_format",
)
_LARGEST = 5
_MAX_STATE = 1 << 20
_ADAPTER_FILE, _ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_UNQUANTIZED = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class TensorInfo:
    """One weight of a checkpoint.

    Attributes:
        name: as in the file.
        dtype: of the stored elements, as the file calls it.
        shape: of the weight it stands for, unpacked; GGUF shapes in PyTorch's order.
        bytes: stored, scales included.
        quant_type: its 4-bit or 8-bit format; None when it is stored plainly.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    quant_type: str | None = None

    @property
    def parameters(self) -> int:
        """Elements of the weight."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class DtypeShare:
    """The tensors stored with one dtype."""

    count: int
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """Facts about a checkpoint.

    Attributes:
        name: as the user gave it.
        kind: ``safetensors``, ``gguf`` or ``adapter``.
        architecture: the model's class or GGUF architecture; for an adapter its base; None when
            the file does not say.
        tensors: stored tensors, scales of packed weights included.
        parameters: elements of the weights, packed ones counted unpacked, scales not at all.
        bytes: of all tensors.
        bits_per_weight: ``8 * bytes / parameters``.
        quant_type: the format that holds most parameters, None when nothing is quantized.
        dtypes: stored tensors by dtype.
        largest: the largest weights by bytes.
        shards: files.
        tied_embeddings: whether output and input embeddings share a weight; None for an adapter.
        adapter: r, lora_alpha, target_modules and base of an adapter, else None.
    """

    name: str
    kind: str
    architecture: str | None
    tensors: int
    parameters: int
    bytes: int
    bits_per_weight: float
    quant_type: str | None
    dtypes: dict[str, DtypeShare]
    largest: tuple[TensorInfo, ...]
    shards: int
    tied_embeddings: bool | None
    adapter: dict[str, Any] | None = field(default=None)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        facts = asdict(self)
        facts["largest"] = [
            {**asdict(tensor), "shape": list(tensor.shape), "parameters": tensor.parameters}
            for tensor in self.largest
        ]
        return facts

    def lines(self) -> list[str]:
        """The facts for people."""
        files = f"{self.shards} file{'s' if self.shards != 1 else ''}"
        lines = [
            f"{self.kind}: {self.architecture or 'unknown architecture'}, {files}",
            f"parameters: {self.parameters:,} in {self.tensors:,} tensors",
            f"bytes: {human_bytes(self.bytes)}, {self.bits_per_weight:.3f} bits per weight",
            f"quantized: {self.quant_type or 'no'}",
        ]
        if self.tied_embeddings is not None:
            lines.append(f"tied embeddings: {'yes' if self.tied_embeddings else 'no'}")
        if self.adapter is not None:
            lines += [f"{key}: {_shown(value)}" for key, value in self.adapter.items()]
        for dtype, share in self.dtypes.items():
            lines.append(f"  {dtype}: {share.count:,} tensors, {human_bytes(share.bytes)}")
        lines.append("largest:")
        for tensor in self.largest:
            shape = " x ".join(map(str, tensor.shape)) or "scalar"
            form = tensor.quant_type or tensor.dtype
            lines.append(f"  {tensor.name}: {shape}, {form}, {human_bytes(tensor.bytes)}")
        return lines


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def inspect(name: str) -> Inspection:
    """Reads the headers of a model folder, GGUF file, hub id, adapter folder or run directory.

    Args:
        name: as on the command line; of a run directory its ``adapter`` folder is read.

    Raises:
        ModelError: no such file, truncated or damaged, or no model.
        EnvironmentFault: a hub id that cannot be fetched.
    """
    if "\0" not in name:
        path = Path(name).expanduser()
        for folder in (path, path / "adapter"):
            if (folder / _ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
                return _inspect_adapter(name, folder)
    source = resolve_source(name)
    return _inspect_gguf(source) if source.kind == "gguf" else _inspect_folder(source)


def _inspect_folder(source: ModelSource) -> Inspection:
    config = _json_object(source.path / "config.json")
    files = source.weight_files()
    _require_shards(source, files)
    entries = _entries(files)
    architectures = config.get("architectures")
    declared = architectures[0] if isinstance(architectures, list) and architectures else None
    return _summary(
        Inspection(
            name=source.name,
            kind="safetensors",
            architecture=declared or config.get("model_type"),
            tensors=len(entries),
            parameters=0,
            bytes=sum(entry.size for entry in entries.values()),
            bits_per_weight=0.0,
            quant_type=None,
            dtypes=_by_dtype((entry.dtype, entry.size) for entry in entries.values()),
            largest=(),
            shards=len(files),
            tied_embeddings=_tied(config, entries),
        ),
        _weights(entries),
    )


def _inspect_gguf(source: ModelSource) -> Inspection:
    with source.path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(
            "bad-gguf",
            where=str(source.path),
            what=f"begins with {magic!r}, not GGUF",
            fix="give a .gguf file",
        )
    reader = gguf_files.read(source.path)
    weights = []
    for tensor in reader.tensors:
        dtype = tensor.tensor_type.name
        shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
        quant_type = None if dtype in _UNQUANTIZED else dtype
        weights.append(TensorInfo(tensor.name, dtype, shape, int(tensor.n_bytes), quant_type))
    architecture = reader.get_field("general.architecture")
    names = {weight.name for weight in weights}
    return _summary(
        Inspection(
            name=source.name,
            kind="gguf",
            architecture=None if architecture is None else str(architecture.contents()),
            tensors=len(weights),
            parameters=0,
            bytes=sum(weight.bytes for weight in weights),
            bits_per_weight=0.0,
            quant_type=None,
            dtypes=_by_dtype((weight.dtype, weight.bytes) for weight in weights),
            largest=(),
            shards=1,
            tied_embeddings="token_embd.weight" in names and "output.weight" not in names,
        ),
        weights,
    )


def _inspect_adapter(name: str, folder: Path) -> Inspection:
    config = _json_object(folder / _ADAPTER_CONFIG)
    file = folder / _ADAPTER_FILE
    if not file.is_file():
        raise ModelError(
            "no-adapter-weights",
            where=str(folder),
            what=f"{_ADAPTER_CONFIG} without {_ADAPTER_FILE}",
            fix="save the adapter again with safetensors",
        )
    entries = _entries([file])
    targets = config.get("target_modules")
    return _summary(
        Inspection(
            name=name,
            kind="adapter",
            architecture=config.get("base_model_name_or_path"),
            tensors=len(entries),
            parameters=0,
            bytes=sum(entry.size for entry in entries.values()),
            bits_per_weight=0.0,
            quant_type=None,
            dtypes=_by_dtype((entry.dtype, entry.size) for entry in entries.values()),
            largest=(),
            shards=1,
            tied_embeddings=None,
            adapter={
                "peft_type": config.get("peft_type"),
                "r": config.get("r"),
                "lora_alpha": config.get("lora_alpha"),
                "target_modules": sorted(targets) if isinstance(targets, list) else targets,
            },
        ),
        _weights(entries),
    )


@dataclass(frozen=True)
class _Entry:
    """A tensor of a safetensors header; ``start`` is its place in ``file``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def _entries(files: Iterable[Path]) -> dict[str, _Entry]:
    entries = {}
    for file in files:
        header = check_safetensors(file)
        with file.open("rb") as stream:
            data = 8 + int.from_bytes(stream.read(8), "little")
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            try:
                begin, end = map(int, entry["data_offsets"])
                shape = tuple(map(int, entry["shape"]))
                entries[name] = _Entry(file, str(entry["dtype"]), shape, data + begin, end - begin)
            except (KeyError, TypeError, ValueError) as error:
                raise _damaged(file, f"the header's entry {name!r} is not valid") from error
    return entries


def _weights(entries: Mapping[str, _Entry]) -> list[TensorInfo]:
    """The weights behind the stored tensors: packed ones get their shape, scales join theirs."""
    states = {}
    for name in entries:
        weight, found, quant_type = name.partition(_STATE_KEY)
        if found:
            states[weight] = (quant_type, _state_shape(entries[name], name))
    weights = []
    for name, entry in entries.items():
        if _is_scale(name, entries, states):
            continue
        shape, quant_type = entry.shape, None
        if name in states:
            quant_type, shape = states[name]
        elif entry.dtype == "I8" and f"{name.removesuffix('.weight')}.SCB" in entries:
            quant_type = "int8"
        size = entry.size
        if quant_type is not None:
            size += sum(e.size for n, e in entries.items() if _belongs(n, name))
        weights.append(TensorInfo(name, entry.dtype, shape, size, quant_type))
    return weights
