"""One way to a ready model: hub id, folder, GGUF file or alias; quantized tensor by tensor."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
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
from fourbit.errors import FourbitError, InputError, ModelError
from fourbit.integrations import gguf as gguf_files
from fourbit.integrations.config import require_readable
from fourbit.integrations.fused import use_fast_paths
from fourbit.integrations.transformers import FourbitConfig
from fourbit.linear import packed_weights
from fourbit.quantize import QuantConfig, check_finite
from fourbit.sources import ModelSource, check_index, check_safetensors, resolve_source

_LISTED_SHARE = 0.01
_MAX_GIST = 300
_LIBRARY_FAULTS = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    SafetensorError,
)
"""What a library raises for files that contradict each other."""
_WIDE = {"F64": torch.float64}
_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
    _quantization_of(raw, source.name)
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(
                source.metadata, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # noqa: BLE001  # each architecture validates in its own way
        if source.kind == "gguf":
            gguf_files.read(source.path)  # names the damage, if that is the cause
        raise ModelError(
            "unknown-architecture",
            where=source.name,
            what=f"transformers cannot read its config.json: {_gist(error)}",
            fix="check config.json, or update transformers",
        ) from error
    _require_causal_lm(source.name, config, trust_remote_code)
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")  # `load_model` reads it where it loads weights
    return config


def stored_quantization(source: ModelSource) -> FourbitConfig | None:
    """How the checkpoint itself is quantized (bitsandbytes' format); None when it is not.

    Raises:
        ModelError: it is quantized in a format that is not read.
    """
    return _quantization_of(_raw_config(source), source.name)


def _quantization_of(raw: dict[str, Any], name: str) -> FourbitConfig | None:
    stored = raw.get("quantization_config")
    if not stored:
        return None
    stored = stored if isinstance(stored, dict) else {}
    where = f"{name}/config.json"
    require_readable(stored, where=where)
    try:
        return FourbitConfig.from_quant(QuantConfig(), compute_dtype=None).of_checkpoint(stored)
    except InputError as error:
        key = error.where.replace("FourbitConfig", "quantization_config")
        raise ModelError(
            "bad-config-json", where=where, what=f"{key}: {error.what}", fix=error.fix
        ) from error


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
        raw = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError(f"holds a {type(raw).__name__}, not an object")
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(
            "bad-config-json",
            where=f"{source.name}/config.json",
            what=str(error),
            fix="use the config.json that belongs to the weights",
        ) from error
    return raw


def _gist(error: BaseException) -> str:
    """An error of a library, as much of it as belongs on one line."""
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    text = text or type(error).__name__
    return text if len(text) <= _MAX_GIST else text[:_MAX_GIST] + "…"


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
        quant: quantized storage; None loads the weights as they are stored. A checkpoint that is
            quantized itself keeps its own format.
        dtype: of activations and unquantized weights; None chooses by hardware.
        device: None takes an accelerator when there is one.
        attn_implementation: transformers' name (sdpa, eager, ...); None lets it choose.
        trust_remote_code: run the model repository's own Python code.
        skip: modules left plain, all of them named; None: the output head.
    """

    quant: QuantConfig | None = None
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    skip: list[str] | None = None


def load_model(source: ModelSource, options: LoadOptions) -> PreTrainedModel:
    """Loads the weights, quantizing each as it arrives, and freezes nothing else.

    Raises:
        ModelError: damaged, incomplete or non-finite weights, or no causal LM.
    """
    device = options.device or devices.default_device()
    dtype = options.dtype or devices.resolve_precision("auto", device)
    config = load_config(source, trust_remote_code=options.trust_remote_code)
    stored = _raw_config(source).get("quantization_config")
    _check_files(source, quantized=bool(stored))
    quant = options.quant
    if stored:
        quant = quant or QuantConfig()
        config.quantization_config = stored
    keywords: dict[str, Any] = {
        "config": config,
        "dtype": dtype if quant is None or stored else stored_dtype(source),
        "device_map": {"": device},
        "trust_remote_code": options.trust_remote_code,
        "output_loading_info": True,
        # Not ignored: `_require_complete` names them, transformers would only point to a log.
        "ignore_mismatched_sizes": True,
    }
    if options.attn_implementation is not None:
        keywords["attn_implementation"] = options.attn_implementation
    if quant is not None:
        keywords["quantization_config"] = _quantization(quant, options.skip)
    where: str | None = str(source.path)
    if source.kind == "gguf":
        where, keywords["state_dict"] = None, gguf_files.lazy_state_dict(source.path, config)
    else:
        keywords["use_safetensors"] = True
    model, info = _from_pretrained(source, where, keywords)
    _require_complete(source, model, info)
    if where is None:
        # an adapter's files say by this name which base they belong to
        model.name_or_path = model.config.name_or_path = source.name
    if quant is not None:
        _cast_unquantized(model, dtype)
        # Reading a page maps some around it: what was quantized is partly in memory again.
        for parameter in model.parameters():
            if parameter.is_floating_point():
                devices.drop_file_pages(parameter, whole=True)
    if options.attn_implementation is None:
        use_fast_paths(model)
    keywords.clear()
    gguf_files.forget()
    devices.release_memory()
    return model.eval()


def _check_files(source: ModelSource, *, quantized: bool) -> None:
    check_index(source.path)
    for path in source.weight_files():
        if path.suffix == ".safetensors":
            header = check_safetensors(path)
            if not quantized:
                _require_plain(path, header)


def _require_plain(path: Path, header: dict[str, Any]) -> None:
    """Integer codes would load as if they were the weights' values."""
    for name, entry in header.items():
        if name.endswith(".weight") and entry["dtype"] not in _STORED | _WIDE:
            raise ModelError(
                "quantized-without-config",
                where=str(path),
                what=f"{name} is stored as {entry['dtype']}, but config.json has no"
                " quantization_config",
                fix="use the config.json that belongs to the weights",
            )


def stored_dtype(source: ModelSource) -> torch.dtype:
    """The dtype most weights have on disk; float32 for GGUF, which is expanded to it.

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


def _quantization(quant: QuantConfig, skip: list[str] | None) -> FourbitConfig:
    config = FourbitConfig.from_quant(quant, compute_dtype=_compute_dtype(quant))
    if skip is not None:
        config.modules_to_not_convert = list(skip)
    # later, when the parts that stay floating have the run's dtype
    config.fused_layers = False
    return config


def _compute_dtype(quant: QuantConfig) -> torch.dtype | None:
    return None if quant.compute_dtype == "auto" else getattr(torch, quant.compute_dtype)


def _from_pretrained(
    source: ModelSource, where: str | None, keywords: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    # GGUF comes as a state dict, for which transformers needs the concrete class.
    owner: Any = AutoModelForCausalLM
    if where is None:
        owner = owner._model_mapping[type(keywords["config"])]
    try:
        with _quiet():
            return owner.from_pretrained(where, **keywords)
    except FourbitError:
        raise
    except _LIBRARY_FAULTS as error:
        quantization: FourbitConfig | None = keywords.get("quantization_config")
        if quantization is not None and quantization.failures:
            raise quantization.failures[0] from None
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, FourbitError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise ModelError(
            "load-failed",
            where=source.name,
            what=f"transformers cannot load it: {_gist(error)}",
            fix="check that config.json belongs to the weights",
        ) from error


def _require_complete(source: ModelSource, model: PreTrainedModel, info: dict[str, Any]) -> None:
    fix = "use the config.json that belongs to the weights"
    wrong = sorted((name, list(got), list(want)) for name, got, want in info["mismatched_keys"])
    if wrong:
        name, got, want = wrong[0]
        raise ModelError(
            "mismatched-weights",
            where=source.name,
            what=f"{name} has shape {got}, config.json says {want} ({len(wrong)} such tensors)",
            fix=fix,
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            "missing-weights",
            where=source.name,
            what=f"{len(missing)} tensors are missing, first: {missing[0]}",
            fix="download the checkpoint again, or check that config.json belongs to it",
        )
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            check_finite(parameter.detach(), name=name)


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
    """Tensors above 1% of the model's bytes that are not quantized, largest first."""
    weights, scales = packed_weights(model)
    packed = weights.keys() | scales
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
