"""`FourbitConfig`: every name of transformers' ``BitsAndBytesConfig``, with its meaning there."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from fourbit.bnb_format import STORAGE_DTYPES
from fourbit.codebook import BLOCKSIZES, QUANT_TYPES
from fourbit.errors import FourbitError, InputError, ModelError, nearest
from fourbit.quantize import QuantConfig

METHOD = "fourbit"
"""The name under which transformers finds our quantizer."""
_BNB_METHOD = "bitsandbytes"
_PLAIN_FLOATS = ("bfloat16", "float16", "float32")
_FLAGS = (
    "load_in_8bit",
    "load_in_4bit",
    "bnb_4bit_use_double_quant",
    "llm_int8_has_fp16_weight",
    "llm_int8_enable_fp32_cpu_offload",
    "allow_unquantized",
    "quantize_experts",
    "fused_layers",
)
_KEYWORDS = (
    *_FLAGS,
    "bnb_4bit_quant_type",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_storage",
    "llm_int8_threshold",
    "llm_int8_skip_modules",
    "llm_int8_compute_dtype",
    "blocksize",
)


@dataclass(init=False)
class FourbitConfig(QuantizationConfigMixin):
    """For ``from_pretrained(..., quantization_config=FourbitConfig(...))``.

    Takes the names of transformers' ``BitsAndBytesConfig``. A name left out keeps bitsandbytes'
    default (fp4, no double quantization, float32 products), so that swapping the class changes no
    bytes. `docs/bitsandbytes.md` has the table. Dtypes may be strings.

    Args:
        load_in_4bit: the default when neither flag is given.
        load_in_8bit: LLM.int8; with both flags 4-bit wins.
        bnb_4bit_quant_type: ``nf4`` or ``fp4``.
        bnb_4bit_compute_dtype: dtype of the products.
        bnb_4bit_use_double_quant: quantize the scales again.
        bnb_4bit_quant_storage: dtype as which packed bytes are written to disk; in memory they
            are always bytes.
        llm_int8_threshold: *activation* columns with a magnitude at or above it are multiplied in
            16 bits; 0 switches the split off.
        llm_int8_skip_modules: modules left plain, *instead of* the default (the output head); a
            name, its beginning or end, or a pattern with ``*``.
        llm_int8_has_fp16_weight: keep 16-bit weights and quantize them in every forward.
        llm_int8_enable_fp32_cpu_offload: leave plain what ``device_map`` puts on CPU or disk.
        llm_int8_compute_dtype: ours: dtype of the outliers' product and of the result.
        blocksize: ours: weights that share a scale.
        allow_unquantized: ours: accept a model of which a large part stays in 16 bits.
        quantize_experts: ours: pack a mixture's experts too (default); bitsandbytes leaves them
            in 16 bits and has no format for them.
        fused_layers: ours: compute decoder layers of known architectures with fused kernels where
            they compute the same (default); nothing is stored of it.

    Raises:
        InputError: an unknown name, or a value of the wrong type or outside the legal set.
    """

    quant: QuantConfig = field(default_factory=QuantConfig)
    compute_dtype: torch.dtype | None = None
    modules_to_not_convert: list[str] | None = None

    def __init__(  # noqa: PLR0913  # the names of BitsAndBytesConfig
        self,
        *,
        load_in_8bit: bool | None = None,
        load_in_4bit: bool | None = None,
        llm_int8_threshold: float | None = None,
        llm_int8_skip_modules: list[str] | None = None,
        llm_int8_enable_fp32_cpu_offload: bool | None = None,
        llm_int8_has_fp16_weight: bool | None = None,
        bnb_4bit_compute_dtype: torch.dtype | str | None = None,
        bnb_4bit_quant_type: str | None = None,
        bnb_4bit_use_double_quant: bool | None = None,
        bnb_4bit_quant_storage: torch.dtype | str | None = None,
        llm_int8_compute_dtype: torch.dtype | str | None = None,
        blocksize: int | None = None,
        allow_unquantized: bool | None = None,
        quantize_experts: bool | None = None,
        fused_layers: bool | None = None,
        **unknown: Any,
    ) -> None:
        given: dict[str, Any] = {
            "load_in_8bit": load_in_8bit,
            "load_in_4bit": load_in_4bit,
            "llm_int8_threshold": llm_int8_threshold,
            "llm_int8_skip_modules": llm_int8_skip_modules,
            "llm_int8_enable_fp32_cpu_offload": llm_int8_enable_fp32_cpu_offload,
            "llm_int8_has_fp16_weight": llm_int8_has_fp16_weight,
            "bnb_4bit_compute_dtype": bnb_4bit_compute_dtype,
            "bnb_4bit_quant_type": bnb_4bit_quant_type,
            "bnb_4bit_use_double_quant": bnb_4bit_use_double_quant,
            "bnb_4bit_quant_storage": bnb_4bit_quant_storage,
            "llm_int8_compute_dtype": llm_int8_compute_dtype,
            "blocksize": blocksize,
            "allow_unquantized": allow_unquantized,
            "quantize_experts": quantize_experts,
            "fused_layers": fused_layers,
            **unknown,
        }
        # transformers turns what goes wrong inside a conversion into a log entry; kept here.
        self.failures: list[FourbitError] = []
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers' enum is closed
        given.pop("quant_method", None)
        for flag in ("load_in_4bit", "load_in_8bit"):
            stored = given.pop(f"_{flag}", None)  # as BitsAndBytesConfig writes them besides
            given[flag] = stored if given[flag] is None else given[flag]
        given = {name: value for name, value in given.items() if value is not None}
        _check(given)
        self.given = frozenset(given)
        self.load_in_4bit, self.load_in_8bit = _bits(given)
        self.bnb_4bit_quant_type: str = given.get("bnb_4bit_quant_type", "fp4")
        self.bnb_4bit_use_double_quant: bool = given.get("bnb_4bit_use_double_quant", False)
        self.bnb_4bit_compute_dtype = _dtype(given, "bnb_4bit_compute_dtype") or torch.float32
        self.bnb_4bit_quant_storage = _dtype(given, "bnb_4bit_quant_storage") or torch.uint8
        self.llm_int8_threshold = float(given.get("llm_int8_threshold", 6.0))
        self.llm_int8_has_fp16_weight: bool = given.get("llm_int8_has_fp16_weight", False)
        self.llm_int8_enable_fp32_cpu_offload: bool = given.get(
            "llm_int8_enable_fp32_cpu_offload", False
        )
        self.llm_int8_compute_dtype = _dtype(given, "llm_int8_compute_dtype")
        self.allow_unquantized: bool = given.get("allow_unquantized", False)
        self.quantize_experts: bool = given.get("quantize_experts", True)
        self.fused_layers: bool = given.get("fused_layers", True)
        self.modules_to_not_convert = given.get("llm_int8_skip_modules")
        if self.load_in_8bit:
            self.quant = QuantConfig(quant_type="int8", llm_int8_threshold=self.llm_int8_threshold)
            self.compute_dtype = self.llm_int8_compute_dtype
        else:
            self.quant = QuantConfig(
                quant_type=self.bnb_4bit_quant_type,  # type: ignore[arg-type]  # checked above
                blocksize=given.get("blocksize", 64),
                double_quant=self.bnb_4bit_use_double_quant,
            )
            self.compute_dtype = self.bnb_4bit_compute_dtype
            self._hint()

    def _hint(self) -> None:
        """One line on what keeps bitsandbytes' default although hardly anyone wants it."""
        traps = {
            "bnb_4bit_quant_type": "fp4 (the paper's is nf4)",
            "bnb_4bit_compute_dtype": "float32 (bfloat16 is faster where the hardware has it)",
        }
        left = [f"{name} is {value}" for name, value in traps.items() if name not in self.given]
        if left:
            warnings.warn(
                f"FourbitConfig keeps bitsandbytes' defaults: {', '.join(left)}; "
                "name them to silence this",
                stacklevel=3,
            )

    @property
    def llm_int8_skip_modules(self) -> list[str] | None:
        """Modules left plain; None for the default."""
        return self.modules_to_not_convert

    @classmethod
    def from_bitsandbytes(cls, config: BitsAndBytesConfig | Mapping[str, Any]) -> FourbitConfig:
        """The same from transformers' object or from its dictionary (as in a config.json)."""
        facts = dict(config) if isinstance(config, Mapping) else config.to_dict()
        return cls(**facts)

    @classmethod
    def from_quant(cls, quant: QuantConfig, *, compute_dtype: torch.dtype | None) -> FourbitConfig:
        """The same from our own configuration; None multiplies in the activations' dtype."""
        names: dict[str, Any] = {"allow_unquantized": quant.allow_unquantized}
        if quant.is_int8:
            names |= {"load_in_8bit": True, "llm_int8_threshold": quant.llm_int8_threshold}
        else:
            names |= {
                "bnb_4bit_quant_type": quant.quant_type,
                "bnb_4bit_use_double_quant": quant.double_quant,
                "bnb_4bit_compute_dtype": compute_dtype or torch.bfloat16,
                "blocksize": quant.blocksize,
            }
        config = cls(**names)
        config.quant, config.compute_dtype = quant, compute_dtype
        return config

    def of_checkpoint(self, stored: Mapping[str, Any]) -> FourbitConfig:
        """This configuration for a checkpoint quantized as ``stored`` says.

        What describes the bytes is the checkpoint's; what describes the arithmetic is this one's
        where it was named.

        Raises:
            ModelError: the checkpoint is quantized in another format.
        """
        require_readable(stored, where="config.json")
        facts: dict[str, Any] = {
            "bnb_4bit_quant_type": "fp4",
            "bnb_4bit_compute_dtype": "float32",
            "quantize_experts": False,
            **{k: v for k, v in stored.items() if k in _KEYWORDS or k.startswith("_load_in")},
        }
        of_four = FourbitConfig(**facts).load_in_4bit
        arithmetic = ("llm_int8_threshold", "llm_int8_compute_dtype")
        if of_four:
            arithmetic = ("bnb_4bit_compute_dtype",)
        named = {*arithmetic, "allow_unquantized"} & self.given
        config = FourbitConfig(**facts | {name: getattr(self, name) for name in named})
        config.failures, config.fused_layers = self.failures, self.fused_layers
        if self.compute_dtype is None and config.load_in_4bit:
            config.compute_dtype = None
            config.bnb_4bit_compute_dtype = (
                _dtype(stored, "bnb_4bit_compute_dtype") or torch.float32
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        """As ``BitsAndBytesConfig`` writes itself into config.json; our own names where used."""
        facts: dict[str, Any] = {
            "quant_method": _BNB_METHOD,
            "_load_in_8bit": self.load_in_8bit,
            "_load_in_4bit": self.load_in_4bit,
            "llm_int8_threshold": self.llm_int8_threshold,
            "llm_int8_skip_modules": self.modules_to_not_convert,
            "llm_int8_enable_fp32_cpu_offload": self.llm_int8_enable_fp32_cpu_offload,
            "llm_int8_has_fp16_weight": self.llm_int8_has_fp16_weight,
            "bnb_4bit_quant_type": self.bnb_4bit_quant_type,
            "bnb_4bit_use_double_quant": self.bnb_4bit_use_double_quant,
            "bnb_4bit_compute_dtype": _name_of(self.bnb_4bit_compute_dtype),
            "bnb_4bit_quant_storage": _name_of(self.bnb_4bit_quant_storage),
            "load_in_4bit": self.load_in_4bit,
            "load_in_8bit": self.load_in_8bit,
        }
        if self.quant.blocksize != type(self.quant).model_fields["blocksize"].default:
            facts["blocksize"] = self.quant.blocksize
        if self.quantize_experts:
            facts["quantize_experts"] = True
        if self.llm_int8_compute_dtype is not None:
            facts["llm_int8_compute_dtype"] = _name_of(self.llm_int8_compute_dtype)
        return facts

    def to_diff_dict(self) -> dict[str, Any]:
        """`to_dict`: nothing is left out, so that other readers need no defaults of ours."""
        return self.to_dict()


def require_readable(stored: Mapping[str, Any], *, where: str) -> None:
    """Refuses a ``quantization_config`` that is not bitsandbytes' (or our own).

    Raises:
        ModelError: naming the format.
    """
    method = str(stored.get("quant_method", "unknown"))
    bits = any(stored.get(key) for key in ("load_in_4bit", "load_in_8bit"))
    bits = bits or any(stored.get(f"_load_in_{n}bit") for n in (4, 8))
    if method not in (_BNB_METHOD, METHOD) and not (bits and method == "unknown"):
        raise ModelError(
            "already-quantized",
            where=where,
            what=f"the checkpoint is quantized in a format that fourbit does not read ({method})",
            fix="start from the 16-bit checkpoint, or one in bitsandbytes' format",
        )


def _check(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name not in _KEYWORDS:
            raise InputError(
                "unknown-key",
                where=f"FourbitConfig.{name}",
                what="unknown name",
                fix=nearest(name, _KEYWORDS),
            )
        if name in _FLAGS and not isinstance(value, bool):
            raise _bad(name, value, "True or False")
    if given.get("bnb_4bit_quant_type", "fp4") not in QUANT_TYPES:
        raise _bad("bnb_4bit_quant_type", given["bnb_4bit_quant_type"], ", ".join(QUANT_TYPES))
    blocksize = given.get("blocksize", 64)
    if blocksize not in BLOCKSIZES or isinstance(blocksize, bool):
        raise _bad("blocksize", blocksize, f"one of {', '.join(map(str, BLOCKSIZES))}")
    threshold = given.get("llm_int8_threshold", 6.0)
    if not isinstance(threshold, (int, float)) or isinstance(threshold, bool) or not threshold >= 0:
        raise _bad("llm_int8_threshold", threshold, "a number of at least 0")
    skip = given.get("llm_int8_skip_modules", [])
    if not isinstance(skip, (list, tuple)) or not all(isinstance(name, str) for name in skip):
        raise InputError(
            "bad-value",
            where="FourbitConfig.llm_int8_skip_modules",
            what=f"{skip!r} is no list of module names",
            fix=f"use {[skip]}" if isinstance(skip, str) else "name modules, e.g. ['lm_head']",
        )


def _bits(given: Mapping[str, Any]) -> tuple[bool, bool]:
    """``(4-bit, 8-bit)``, exactly one of them."""
    four, eight = given.get("load_in_4bit"), given.get("load_in_8bit", False)
    if four and eight:
        warnings.warn(
            "FourbitConfig: load_in_4bit and load_in_8bit are both True; 4-bit wins", stacklevel=4
        )
    if four is False and not eight:
        raise InputError(
            "not-quantized",
            where="FourbitConfig.load_in_4bit",
            what="neither load_in_4bit nor load_in_8bit is True",
            fix="set one of them, or load without a quantization_config",
        )
    use_four = bool(four) or not eight
    return use_four, not use_four


def _dtype(given: Mapping[str, Any], name: str) -> torch.dtype | None:
    value = given.get(name)
    if value is None:
        return None
    storage = name == "bnb_4bit_quant_storage"
    legal = STORAGE_DTYPES if storage else tuple(getattr(torch, n) for n in _PLAIN_FLOATS)
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if dtype not in legal:
        raise _bad(name, value, ", ".join(_name_of(d) for d in legal))
    return dtype


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bad(name: str, value: Any, legal: str) -> InputError:
    listed = ", " in legal and not legal.startswith("one of ")
    return InputError(
        "bad-value",
        where=f"FourbitConfig.{name}",
        what=f"{value!r} is none of: {legal}" if listed else f"{value!r} is not {legal}",
        fix=f"use {legal}",
    )
