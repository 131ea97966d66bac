"""What a checkpoint holds, read from file headers alone: no weight is loaded."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fourbit.errors import ModelError
from fourbit.files import human_bytes
from fourbit.integrations import gguf as gguf_files
from fourbit.sources import ModelSource, check_safetensors, resolve_source

_STATE = ".quant_state.bitsandbytes__"
_SCALES_4BIT = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_SCALES_8BIT = (".SCB", ".weight_format")
_PARTS = {
    ".absmax": "scales",
    ".SCB": "scales",
    ".nested_absmax": "nested",
    ".quant_map": "tables",
    ".nested_quant_map": "tables",
}
"""What a tensor beside a packed weight counts as; any other one is a state."""
_MAX_STATE = 1 << 20
_LARGEST = 5
_ADAPTER_FILE, _ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_ADAPTER_FACTS = (
    "base_model_name_or_path",
    "peft_type",
    "r",
    "lora_alpha",
    "target_modules",
    "num_virtual_tokens",
    "token_dim",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "encoder_reparameterization_type",
    "encoder_hidden_size",
)
_PLAIN_GGUF = frozenset({"F64", "F32", "F16", "BF16", "I8", "I16", "I32", "I64"})


@dataclass(frozen=True)
class Weight:
    """One weight of a checkpoint.

    Attributes:
        name: as in the file.
        dtype: of the stored elements, as the file calls it.
        shape: of the weight it stands for, unpacked; of GGUF in PyTorch's order.
        bytes: stored, its scales included.
        quant_type: ``nf4``, ``fp4``, ``int8`` or a GGUF type; None when it is stored plainly.
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

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**asdict(self), "shape": list(self.shape), "parameters": self.parameters}


@dataclass(frozen=True)
class Inspection:
    """Facts about a checkpoint.

    Attributes:
        name: as the user gave it.
        kind: ``safetensors``, ``gguf`` or ``adapter``.
        architecture: class or GGUF architecture; None when the files do not say.
        weights: what the model computes with; scales of packed weights are part of theirs.
        stored: ``(dtype, bytes)`` of every tensor in the files, scales included.
        shards: files that hold tensors.
        tied_embeddings: whether output and input embeddings share a weight; None for an adapter.
        adapter: base, kind, rank, alpha and targets of an adapter; None for a model.
        parts: bytes of the quantized weights by kind: ``codes``, ``scales``, ``nested`` (scales of
            the scales), ``tables`` (values of the codes), ``states``; None when it has none.
    """

    name: str
    kind: str
    architecture: str | None
    weights: tuple[Weight, ...]
    stored: tuple[tuple[str, int], ...]
    shards: int
    tied_embeddings: bool | None = None
    adapter: dict[str, Any] | None = None
    parts: dict[str, int] | None = None

    @property
    def tensors(self) -> int:
        """Tensors in the files, scales included."""
        return len(self.stored)

    @property
    def parameters(self) -> int:
        """Elements of the weights: packed ones counted unpacked, scales not at all."""
        return sum(weight.parameters for weight in self.weights)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(size for _, size in self.stored)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each parameter; 0 without parameters."""
        return 8 * self.bytes / self.parameters if self.parameters else 0.0

    @property
    def quantized_bits_per_weight(self) -> float | None:
        """Stored bits for each quantized parameter, scales and tables counted."""
        held = sum(weight.parameters for weight in self.weights if weight.quant_type is not None)
        stored = sum(weight.bytes for weight in self.weights if weight.quant_type is not None)
        return 8 * stored / held if held else None

    @property
    def quant_type(self) -> str | None:
        """The quantized format that holds most parameters; None when nothing is quantized."""
        held: Counter[str] = Counter()
        for weight in self.weights:
            if weight.quant_type is not None:
                held[weight.quant_type] += weight.parameters
        return held.most_common(1)[0][0] if held else None

    @property
    def dtypes(self) -> dict[str, dict[str, int]]:
        """``{"count", "bytes"}`` of the stored tensors by dtype, most bytes first."""
        table: dict[str, dict[str, int]] = {}
        for dtype, size in self.stored:
            row = table.setdefault(dtype, {"count": 0, "bytes": 0})
            row["count"] += 1
            row["bytes"] += size
        return dict(sorted(table.items(), key=lambda item: (-item[1]["bytes"], item[0])))

    @property
    def largest(self) -> list[Weight]:
        """The five weights that take most bytes."""
        return sorted(self.weights, key=lambda weight: (-weight.bytes, weight.name))[:_LARGEST]

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "name": self.name,
            "kind": self.kind,
            "architecture": self.architecture,
            "tensors": self.tensors,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "quant_type": self.quant_type,
            "bits_per_weight": self.bits_per_weight,
            "quantized_bits_per_weight": self.quantized_bits_per_weight,
            "quantized_bytes": self.parts,
            "dtypes": self.dtypes,
            "largest": [weight.as_dict() for weight in self.largest],
            "shards": self.shards,
            "tied_embeddings": self.tied_embeddings,
            "adapter": self.adapter,
        }

    def lines(self) -> list[str]:
        """The facts for people."""
        files = f"{self.shards} file{'s' if self.shards != 1 else ''}"
        architecture = f" of {self.architecture}" if self.architecture else ""
        lines = [
            f"{self.kind}{architecture}, {files}",
            f"parameters: {self.parameters:,} in {self.tensors:,} tensors",
            f"size: {human_bytes(self.bytes)}, {self.bits_per_weight:.3f} bits per weight",
            f"quantized: {self.quant_type or 'no'}",
        ]
        if self.quantized_bits_per_weight is not None:
            lines[-1] += f", {self.quantized_bits_per_weight:.3f} bits per quantized weight"
        if self.parts is not None:
            sizes = (f"{part} {human_bytes(size)}" for part, size in self.parts.items() if size)
            lines.append(f"  {', '.join(sizes)}")
        if self.tied_embeddings is not None:
            lines.append(f"tied embeddings: {'yes' if self.tied_embeddings else 'no'}")
        for key, value in (self.adapter or {}).items():
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            lines.append(f"{key.replace('_', ' ')}: {shown}")
        lines.append("stored as:")
        for dtype, row in self.dtypes.items():
            count = f"{row['count']:,} tensor{'s' if row['count'] != 1 else ''}"
            lines.append(f"  {dtype}: {count}, {human_bytes(row['bytes'])}")
        lines.append("largest:")
        for weight in self.largest:
            shape = " x ".join(map(str, weight.shape)) or "scalar"
            form = weight.quant_type or weight.dtype
            lines.append(f"  {weight.name}: {shape}, {form}, {human_bytes(weight.bytes)}")
        return lines


def inspect(name: str) -> Inspection:
    """Reads the headers of a model folder, GGUF file, hub id, adapter folder or run directory.

    Args:
        name: as on the command line; of a run directory its ``adapter`` folder is read.

    Raises:
        ModelError: no such file, truncated or damaged, or no model.
        EnvironmentFault: a hub id that cannot be fetched.
    """
    try:
        adapter = _adapter_folder(name)
        if adapter is not None:
            return _inspect_adapter(name, adapter)
        source = resolve_source(name)
        return _inspect_gguf(source) if source.kind == "gguf" else _inspect_folder(source)
    except OSError as error:
        raise ModelError(
            "unreadable",
            where=str(error.filename or name),
            what=error.strerror or str(error),
            fix="check the path and its permissions",
        ) from error


def _adapter_folder(name: str) -> Path | None:
    if "\0" in name:
        return None
    path = Path(name).expanduser()
    for folder in (path, path / "adapter"):
        if (folder / _ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file():
            return folder
    return None


def _inspect_folder(source: ModelSource) -> Inspection:
    config = _json_object(source.path / "config.json")
    files = _shards(source)
    entries = _entries(files)
    declared = config.get("architectures")
    architecture = declared[0] if isinstance(declared, list) and declared else None
    tied = config.get("tie_word_embeddings")
    weights, parts = _weights(entries)
    return Inspection(
        name=source.name,
        kind="safetensors",
        architecture=architecture or config.get("model_type"),
        weights=tuple(weights),
        parts=parts,
        stored=tuple((entry.dtype, entry.size) for entry in entries.values()),
        shards=len(files),
        tied_embeddings=tied if isinstance(tied, bool) else "lm_head.weight" not in entries,
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
    return Inspection(
        name=name,
        kind="adapter",
        architecture=None,
        weights=tuple(_weights(entries)[0]),
        stored=tuple((entry.dtype, entry.size) for entry in entries.values()),
        shards=1,
        adapter={key: config[key] for key in _ADAPTER_FACTS if config.get(key) is not None},
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
        quant_type = None if dtype in _PLAIN_GGUF else dtype
        weights.append(Weight(tensor.name, dtype, shape, int(tensor.n_bytes), quant_type))
    architecture = reader.get_field("general.architecture")
    names = {weight.name for weight in weights}
    return Inspection(
        name=source.name,
        kind="gguf",
        architecture=None if architecture is None else str(architecture.contents()),
        weights=tuple(weights),
        stored=tuple((weight.dtype, weight.bytes) for weight in weights),
        shards=1,
        tied_embeddings="token_embd.weight" in names and "output.weight" not in names,
    )


@dataclass(frozen=True)
class _Entry:
    """A tensor of a safetensors header; ``start`` is its place in ``file``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def _shards(source: ModelSource) -> list[Path]:
    """The files a loader would read; some repositories hold a second copy under other names."""
    single, index = source.path / "model.safetensors", source.path / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return source.weight_files()
    named = _json_object(index).get("weight_map")
    if not isinstance(named, dict):
        raise _damaged(index, "no weight_map")
    files = [source.path / file for file in sorted(set(map(str, named.values())))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(
            "missing-shard",
            where=source.name,
            what=f"{len(missing)} of {len(files)} files are missing, first: {missing[0]}",
            fix="download the checkpoint again",
        )
    return files


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
                dtype = str(entry["dtype"])
            except (KeyError, TypeError, ValueError) as error:
                raise _damaged(file, f"the entry of {name} in the header is not valid") from error
            entries[name] = _Entry(file, dtype, shape, data + begin, end - begin)
    return entries


def _weights(entries: Mapping[str, _Entry]) -> tuple[list[Weight], dict[str, int] | None]:
    """The weights behind the stored tensors, and the bytes of the quantized ones by kind.

    Weights have their unpacked shapes, and the bytes of their scales are joined to theirs.
    """
    formats: dict[str, tuple[str, tuple[int, ...]]] = {}
    scales: dict[str, str] = {}
    for name, entry in entries.items():
        weight, found, quant_type = name.partition(_STATE)
        if found and weight in entries:
            formats[weight] = (quant_type, _packed_shape(entries[weight], entry, weight))
            scales |= {f"{weight}{end}": weight for end in (*_SCALES_4BIT, _STATE + quant_type)}
        module = name.removesuffix(".weight")
        if entry.dtype == "I8" and f"{module}.SCB" in entries:
            formats[name] = ("int8", entry.shape)
            scales |= {f"{module}{end}": name for end in _SCALES_8BIT}
    sizes: Counter[str] = Counter()
    for name, entry in entries.items():
        sizes[scales.get(name, name)] += entry.size
    weights = [
        Weight(name, entry.dtype, shape, sizes[name], quant_type)
        for name, entry in entries.items()
        if name not in scales
        for quant_type, shape in [formats.get(name, (None, entry.shape))]
    ]
    if not formats:
        return weights, None
    parts: dict[str, int] = dict.fromkeys(("codes", "scales", "nested", "tables", "states"), 0)
    parts["codes"] = sum(entries[name].size for name in formats)
    for name in scales.keys() & entries.keys():
        weight = scales[name]
        module = weight if name.startswith(f"{weight}.") else weight.removesuffix(".weight")
        parts[_PARTS.get(name.removeprefix(module), "states")] += entries[name].size
    return weights, parts


def _packed_shape(packed: _Entry, state: _Entry, name: str) -> tuple[int, ...]:
    with state.file.open("rb") as stream:
        stream.seek(state.start)
        text = stream.read(min(state.size, _MAX_STATE))
    try:
        shape = tuple(int(size) for size in json.loads(text)["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(state.file, f"the quant_state of {name} is no valid JSON") from error
    if packed.size != (math.prod(shape) + 1) // 2:
        raise _damaged(
            packed.file, f"{name} has {packed.size} packed bytes for the shape {list(shape)}"
        )
    return shape


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"no valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise _damaged(path, "no JSON object")
    return found


def _damaged(path: Path, what: str) -> ModelError:
    return ModelError("damaged-file", where=str(path), what=what, fix="download the file again")
