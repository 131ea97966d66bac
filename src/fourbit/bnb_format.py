"""Quantized layers as bitsandbytes writes them: tensor names, quant_state JSON, storage dtypes.

A layer ``P`` is stored as ``P.weight`` (packed bytes), and beside it, in 4 bits,
``P.weight.absmax``, ``P.weight.quant_map``, with double quantization ``P.weight.nested_absmax``
and ``P.weight.nested_quant_map``, and ``P.weight.quant_state.bitsandbytes__nf4`` (or ``__fp4``), a
JSON text; in 8 bits ``P.SCB`` and ``P.weight_format``. `docs/formats.md` has the table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fourbit import codebook
from fourbit.errors import ModelError
from fourbit.linear import Linear4bit, Linear8bit, QuantizedLinear, as_bits
from fourbit.quantize import QuantConfig

STATE_PREFIX = "weight.quant_state.bitsandbytes__"
NAMES_4BIT = (
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    *(STATE_PREFIX + kind for kind in ("nf4", "fp4")),
)
"""Every name of a 4-bit layer on disk, without the layer's prefix."""
NAMES_8BIT = ("weight", "SCB", "weight_format")
"""Every name of an 8-bit layer on disk."""
STORAGE_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
"""What ``bnb_4bit_quant_storage`` may be: the dtype the packed bytes are written as."""

MAX_OFFSET_DIGITS = 24
"""Characters of the longest nested_offset in a quant_state, such as -1.1754943508222875e-38."""

_FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_MAP_TOLERANCE = 1e-6
"""Between tables of bitsandbytes' versions; neighbouring values differ by 5e-3."""
_MAX_STATE = 4096
_MAX_FLOAT32 = torch.finfo(torch.float32).max
_ROW_FORMAT = 0
_STATE_KEYS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED_KEYS = {"nested_blocksize", "nested_dtype", "nested_offset"}


@dataclass(frozen=True)
class StoredState:
    """The quant_state JSON of one 4-bit tensor.

    Attributes:
        nested_offset: None without double quantization.
    """

    quant_type: codebook.QuantType
    blocksize: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    nested_offset: float | None

    @property
    def double_quant(self) -> bool:
        """Whether the scales are quantized again."""
        return self.nested_offset is not None

    @property
    def quant(self) -> QuantConfig:
        """The configuration that writes such tensors."""
        return QuantConfig(
            quant_type=self.quant_type, blocksize=self.blocksize, double_quant=self.double_quant
        )

    def encode(self) -> bytes:
        """As bitsandbytes writes it: its key order, default separators."""
        facts: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        if self.nested_offset is not None:
            facts["nested_blocksize"] = codebook.NESTED_BLOCKSIZE
            facts["nested_dtype"] = "float32"
            facts["nested_offset"] = self.nested_offset
        return json.dumps(facts).encode()


def decode_state(text: bytes, *, quant_type: str, name: str) -> StoredState:
    """Reads a quant_state; ``quant_type`` is what the tensor's name says.

    Raises:
        ModelError: no JSON object, unknown or missing keys, or values that nothing can read.
    """
    try:
        facts = json.loads(text) if len(text) <= _MAX_STATE else None
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise _bad(name, "its quant_state is no JSON object")
    nested = bool(facts.keys() & _NESTED_KEYS)
    wanted = _STATE_KEYS | (_NESTED_KEYS if nested else set())
    if facts.keys() != wanted:
        odd = sorted(facts.keys() ^ wanted)
        raise _bad(name, f"its quant_state has unknown or missing keys: {', '.join(odd)}")
    shape, blocksize = facts["shape"], facts["blocksize"]
    if facts["quant_type"] != quant_type or quant_type not in ("nf4", "fp4"):
        raise _bad(name, f"quant_type {facts['quant_type']!r} in a tensor named {quant_type}")
    if type(blocksize) is not int or blocksize not in codebook.BLOCKSIZES:
        raise _bad(name, f"blocksize {blocksize!r} is not one of {codebook.BLOCKSIZES}")
    if str(facts["dtype"]) not in _FLOATS:
        raise _bad(name, f"dtype {facts['dtype']!r} is not one of {', '.join(_FLOATS)}")
    if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
        raise _bad(name, f"shape {shape!r} is no list of sizes")
    offset = _nested_offset(facts, name) if nested else None
    return StoredState(
        quant_type=quant_type,  # type: ignore[arg-type]  # checked above
        blocksize=blocksize,
        dtype=_FLOATS[facts["dtype"]],
        shape=tuple(shape),
        nested_offset=offset,
    )


def _nested_offset(facts: dict[str, Any], name: str) -> float:
    if facts["nested_blocksize"] != codebook.NESTED_BLOCKSIZE:
        raise _bad(name, f"nested_blocksize {facts['nested_blocksize']!r} is not 256")
    if facts["nested_dtype"] != "float32":
        raise _bad(name, f"nested_dtype {facts['nested_dtype']!r} is not float32")
    offset = facts["nested_offset"]
    if type(offset) not in (int, float) or not abs(offset) <= _MAX_FLOAT32:
        shown = repr(offset)[:40]
        raise _bad(name, f"nested_offset {shown} is no finite number of float32")
    return float(offset)


def to_disk(layer: QuantizedLinear) -> dict[str, Tensor]:
    """The tensors of ``layer``, bias apart, under bitsandbytes' names without the layer's prefix.

    Of a layer on meta they have the shapes and dtypes of what will be written; only the length of
    the quant_state depends on the weights: it is at most `MAX_OFFSET_DIGITS` longer.

    Raises:
        ModelError: a data type the format does not have, or a storage dtype whose elements the
            packed bytes do not fill.
    """
    if isinstance(layer, Linear8bit):
        if layer.weight_absmax is None:
            return {"weight": layer.weight.detach()}
        return {
            "weight": layer.weight.detach(),
            "SCB": layer.weight_absmax.detach().view(torch.float32),
            "weight_format": torch.tensor(_ROW_FORMAT, dtype=torch.uint8),
        }
    assert isinstance(layer, Linear4bit)
    if STATE_PREFIX + layer.quant_type not in NAMES_4BIT:
        raise ModelError(
            "no-such-format",
            where="quant_type",
            what=f"bitsandbytes' format has no {layer.quant_type}, so nothing could read the file",
            fix="quantize with nf4 or fp4 to save the model",
        )
    device = layer.weight.device
    packed = layer.weight.detach().reshape(-1)
    if packed.numel() % layer.quant_storage.itemsize:
        raise ModelError(
            "storage-does-not-fit",
            where="bnb_4bit_quant_storage",
            what=f"{packed.numel()} packed bytes are no whole number of {layer.quant_storage}",
            fix="use bnb_4bit_quant_storage uint8",
        )
    absmax = layer.weight_absmax.detach()
    tensors = {
        "weight": packed.view(layer.quant_storage)[:, None],
        "weight.absmax": absmax if layer.double_quant else absmax.view(torch.float32),
        # plus zero makes fp4's minus zero the plus zero that bitsandbytes writes
        "weight.quant_map": codebook.code(layer.quant_type, device) + 0.0,
    }
    offset = None
    if layer.weight_nested_absmax is not None and layer.weight_nested_offset is not None:
        tensors["weight.nested_absmax"] = layer.weight_nested_absmax.detach().view(torch.float32)
        tensors["weight.nested_quant_map"] = codebook.signed_dynamic_map(device).clone()
        value = layer.weight_nested_offset.detach().view(torch.float32)
        offset = 0.0 if value.is_meta else float(value[0])
    state = StoredState(
        layer.quant_type,
        layer.blocksize,
        layer.original_dtype,
        (layer.out_features, layer.in_features),
        offset,
    )
    text = torch.frombuffer(bytearray(state.encode()), dtype=torch.uint8)
    tensors[STATE_PREFIX + layer.quant_type] = text
    return tensors


def from_disk(
    layer: QuantizedLinear, stored: Mapping[str, Tensor], *, name: str
) -> dict[str, Tensor]:
    """The parameters of ``layer`` from stored tensors, without a copy.

    A 4-bit layer adopts data type, block size and double quantization of what is stored.

    Args:
        layer: built from config.json, perhaps on meta.
        stored: what the checkpoint holds of this layer; names without its prefix.
        name: of the layer's weight, for errors.

    Raises:
        ModelError: missing or unknown tensors, wrong sizes, or tables that are not the format's.
    """
    if isinstance(layer, Linear8bit):
        return _read_int8(layer, stored, name)
    assert isinstance(layer, Linear4bit)
    return _read_4bit(layer, stored, name)


def _read_int8(layer: Linear8bit, stored: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    _only(stored, NAMES_8BIT, name)
    weight, scales = _need(stored, "weight", name), stored.get("SCB")
    shape = (layer.out_features, layer.in_features)
    if layer.weight_absmax is None:
        if not weight.is_floating_point() or tuple(weight.shape) != shape:
            raise _bad(name, f"{_kind(weight)} where {list(shape)} in 16 bits was expected")
        return {"weight": weight}
    if scales is None and weight.is_floating_point():
        what = "no SCB beside it, though config.json calls the checkpoint quantized"
        raise _bad(name, what, "use the config.json that belongs to the weights")
    scales = _need(stored, "SCB", name)
    _row_layout(stored.get("weight_format"), name)
    _expect(weight, torch.int8, shape, name)
    _expect(scales, torch.float32, (layer.out_features,), f"{_module(name)}.SCB")
    _finite(scales, f"{_module(name)}.SCB")
    return as_bits({"weight": weight, "weight_absmax": scales})


def _row_layout(layout: Tensor | None, name: str) -> None:
    if layout is None:
        return
    if layout.numel() != 1 or layout.is_floating_point():
        raise _bad(f"{_module(name)}.weight_format", f"{_kind(layout)}, expected uint8 []")
    if int(layout) != _ROW_FORMAT:
        raise _bad(
            name,
            f"weight_format {int(layout)} is an old GPU layout",
            "load and save it again with bitsandbytes 0.45 or later",
        )


def _read_4bit(layer: Linear4bit, stored: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    _only(stored, NAMES_4BIT, name)
    states = [key for key in stored if key.startswith(STATE_PREFIX)]
    if not states:
        what = "no quant_state beside it, though config.json calls the checkpoint quantized"
        raise _bad(name, what, "use the config.json that belongs to the weights")
    if len(states) > 1:
        raise _bad(name, f"{len(states)} quant_state tensors, one was expected")
    held = stored[states[0]]
    if held.dtype != torch.uint8 or held.dim() != 1:
        raise _bad(name, f"its quant_state is {_kind(held)}, expected uint8 text")
    text = bytes(held.cpu().numpy())
    state = decode_state(text, quant_type=states[0].removeprefix(STATE_PREFIX), name=name)
    shape = (layer.out_features, layer.in_features)
    if state.shape != shape:
        raise _bad(
            name,
            f"its quant_state says shape {list(state.shape)}, config.json says {list(shape)}",
            "use the config.json that belongs to the weights",
        )
    layer.adopt_format_(state.quant, device=layer.weight.device)
    layer.original_dtype = state.dtype
    weight = _need(stored, "weight", name)
    packed = -(-math.prod(shape) // 2)
    if weight.dtype not in STORAGE_DTYPES or weight.numel() * weight.element_size() != packed:
        raise _bad(name, f"{_kind(weight)} instead of {packed} packed bytes")
    layer.quant_storage = weight.dtype
    tensors = {"weight": weight.contiguous().view(torch.uint8).view(layer.packed_shape)}
    _same_table(stored, "weight.quant_map", codebook.code(state.quant_type, weight.device), name)
    return as_bits(tensors | _scales(stored, state, -(-math.prod(shape) // state.blocksize), name))


def _scales(
    stored: Mapping[str, Tensor], state: StoredState, blocks: int, name: str
) -> dict[str, Tensor]:
    absmax = _need(stored, "weight.absmax", name)
    if state.nested_offset is None:
        for key in ("weight.nested_absmax", "weight.nested_quant_map"):
            if key in stored:
                raise _bad(name, f"{key} beside a quant_state without nested scales")
        _expect(absmax, torch.float32, (blocks,), f"{name}.absmax")
        _finite(absmax, f"{name}.absmax")
        return {"weight_absmax": absmax}
    _expect(absmax, torch.uint8, (blocks,), f"{name}.absmax")
    nested = _need(stored, "weight.nested_absmax", name)
    groups = -(-blocks // codebook.NESTED_BLOCKSIZE)
    _expect(nested, torch.float32, (groups,), f"{name}.nested_absmax")
    _finite(nested, f"{name}.nested_absmax")
    table = codebook.signed_dynamic_map(absmax.device)
    _same_table(stored, "weight.nested_quant_map", table, name)
    offset = torch.tensor([state.nested_offset], dtype=torch.float32, device=absmax.device)
    return {
        "weight_absmax": absmax,
        "weight_nested_absmax": nested,
        "weight_nested_offset": offset,
    }


def _only(stored: Mapping[str, Tensor], known: tuple[str, ...], name: str) -> None:
    unknown = sorted(stored.keys() - set(known))
    if unknown:
        raise _bad(name, f"unknown tensor {_module(name)}.{unknown[0]} beside it")


def _need(stored: Mapping[str, Tensor], key: str, name: str) -> Tensor:
    if key not in stored:
        raise _bad(name, f"{_module(name)}.{key} is missing")
    return stored[key]


def _expect(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], name: str) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        wanted = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
        raise _bad(name, f"{_kind(tensor)}, expected {wanted}")


def _finite(scales: Tensor, name: str) -> None:
    if not torch.isfinite(scales).all():
        index = int((~torch.isfinite(scales)).nonzero()[0])
        raise _bad(name, f"{float(scales[index])} at index {index}")


def _same_table(stored: Mapping[str, Tensor], key: str, ours: Tensor, name: str) -> None:
    table = _need(stored, key, name)
    _expect(table, torch.float32, tuple(ours.shape), f"{_module(name)}.{key}")
    if not torch.allclose(table, ours, rtol=0, atol=_MAP_TOLERANCE):
        raise _bad(f"{_module(name)}.{key}", "its values are not those of the data type")


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _bad(name: str, what: str, fix: str = "download or save the checkpoint again") -> ModelError:
    return ModelError("bad-quantized-tensor", where=name, what=what, fix=fix)
