"""A loaded model as the structures of ``csrc/kernels/decode_types.h``: pointers, not copies.

What is copied is small: biases and norms as float32, adapters in the dtype of the product. Weights
and their scales stay where the model holds them, so a layout is good for as long as nobody
replaces them.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fourbit import codebook, native
from fourbit.decoding.parts import Layer as LayerParts
from fourbit.decoding.parts import Linear, Parts, UnknownModel
from fourbit.fused.parts import Norm as PlainNorm
from fourbit.linear import Linear4bit, Linear8bit

_PLAIN, _TRANSPOSED, _FOUR_BIT, _EIGHT_BIT = range(4)
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
_CPU = torch.device("cpu")


def _structure(name: str, fields: list[tuple[str, Any]]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


_POINTER, _INT, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double

Matrix: Any = _structure(
    "Matrix",
    _fields(_POINTER, "weight absmax nested code_map values bias lora_a lora_b")
    + _fields(_REAL, "offset scaling threshold")
    + _fields(_INT, "rows columns format dtype blocksize rank half"),
)
Group: Any = _structure("Group", [("count", _INT), ("parts", Matrix * 3)])
Norm: Any = _structure("Norm", _fields(_POINTER, "weight bias") + _fields(_REAL, "eps"))
Layer: Any = _structure(
    "Layer",
    _fields(Group, "qkv out up down")
    + _fields(Norm, "before_attention after_attention before_mlp after_mlp query key")
    + _fields(_POINTER, "cos sin keys values")
    + _fields(_REAL, "scale softcap residual")
    + _fields(_INT, "window heads kv_heads head_dim rotary gated activation"),
)
Model: Any = _structure(
    "Model",
    _fields(_POINTER, "layers embedding positions")
    + [("last", Norm), ("head", Matrix), ("sketch", _POINTER)]
    + _fields(_REAL, "embedding_scale logit_scale logit_softcap")
    + _fields(_INT, "layer_count width embedding_dtype cache_dtype"),
)
Sketch: Any = _structure("Sketch", _fields(_POINTER, "codes scales errors sizes"))
Step: Any = _structure(
    "Step",
    _fields(_POINTER, "tokens places starts capacities states logits best workspace")
    + _fields(_INT, "rows"),
)


@dataclass
class Layout:
    """A model for the engine.

    Attributes:
        model: the structure; its layers' tables and caches are filled in for each batch.
        layers: an array of the layers' structures.
        parts: the model that it was made of.
        cache_dtype: of keys and values.
        head: weight of the output projection, where a sketch of it would find the best token.
        kept: everything that is pointed to.
    """

    model: Any
    layers: Any
    parts: Parts
    cache_dtype: torch.dtype
    head: Tensor | None
    kept: list[Tensor] = field(default_factory=list)


def lay_out(parts: Parts) -> Layout:
    """The layout of a model, its one active adapter included.

    Raises:
        UnknownModel: a weight lies elsewhere or in a form that the engine does not read.
    """
    return _Builder(parts).build()


class _Builder:
    def __init__(self, parts: Parts) -> None:
        self.parts, self.kept, self.dtype = parts, [], parts.dtype
        self.half = native.isa() == "avx512_bf16"

    def build(self) -> Layout:
        parts = self.parts
        layers = (Layer * len(parts.layers))(*map(self.layer, parts.layers))
        positions = parts.positions
        cache = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32
        model = Model(
            layers=ctypes.addressof(layers),
            embedding=self.floating(parts.table.weight),
            positions=None if positions is None else self.floating(positions.weight),
            last=self.norm(parts.last),
            head=self.matrix(parts.head),
            embedding_scale=parts.ends.embedding_scale,
            logit_scale=parts.ends.logit_scale,
            logit_softcap=parts.ends.logit_softcap,
            layer_count=len(parts.layers),
            width=parts.table.embedding_dim,
            embedding_dtype=native.DTYPES[parts.table.weight.dtype],
            cache_dtype=native.DTYPES[cache],
        )
        plain = model.head.format == _PLAIN and not model.head.rank and not model.head.bias
        # a softcap makes large scores equal, so that the first of them would have to be found
        rising = model.logit_scale > 0 and model.logit_softcap == 0
        sketched = parts.head.base.weight.detach() if plain and rising else None
        return Layout(model, layers, parts, cache, sketched, self.kept)

    def keep(self, tensor: Tensor) -> int:
        if tensor.device.type != "cpu":
            raise UnknownModel(f"it lies on {tensor.device}")
        self.kept.append(tensor)
        return tensor.data_ptr()

    def floating(self, weight: Tensor) -> int:
        if weight.dtype not in (torch.float32, torch.bfloat16) or not weight.is_contiguous():
            raise UnknownModel(f"a weight is {weight.dtype}")
        return self.keep(weight.detach())

    def floats(self, tensor: Tensor | None, *, offset: float = 0.0) -> int | None:
        if tensor is None:
            return None
        return self.keep((tensor.detach().float() + offset).contiguous())

    def norm(self, norm: PlainNorm | None) -> Any:
        if norm is None:
            return Norm()
        weight = self.floats(norm.weight, offset=norm.offset)
        return Norm(weight=weight, bias=self.floats(norm.bias), eps=norm.eps)

    def layer(self, layer: LayerParts) -> Any:
        query, key = layer.head_norms or (None, None)
        return Layer(
            qkv=self.group(layer.qkv),
            out=self.group(layer.out),
            up=self.group(layer.up),
            down=self.group(layer.down),
            before_attention=self.norm(layer.before_attention),
            after_attention=self.norm(layer.after_attention),
            before_mlp=self.norm(layer.before_mlp),
            after_mlp=self.norm(layer.after_mlp),
            query=self.norm(query),
            key=self.norm(key),
            scale=layer.heads.scale,
            softcap=layer.heads.softcap,
            residual=layer.residual,
            window=layer.heads.sliding_window or 0,
            heads=layer.heads.heads,
            kv_heads=layer.heads.kv_heads,
            head_dim=layer.heads.head_dim,
            gated=int(layer.gated),
            activation=_ACTIVATIONS[layer.activation],
        )

    def group(self, members: tuple[Linear, ...]) -> Any:
        parts = [self.matrix(member) for member in members]
        if len({part.threshold for part in parts if part.format == _EIGHT_BIT}) > 1:
            raise UnknownModel("neighbouring layers have different INT8 thresholds")
        return Group(count=len(parts), parts=tuple(parts))

    def matrix(self, linear: Linear) -> Any:
        if isinstance(linear.base, Linear4bit):
            found = self.four_bit(linear.base)
        elif isinstance(linear.base, Linear8bit):
            found = self.eight_bit(linear.base)
        else:
            found = self.plain(linear.base)
        found.bias = self.floats(linear.bias)
        if linear.adapter is not None:
            self.add_adapter(found, linear.adapter)
        return found

    def four_bit(self, layer: Linear4bit) -> Any:
        nested = layer.weight_nested_absmax is not None
        values = codebook.code(layer.quant_type, _CPU)
        found = Matrix(
            weight=self.keep(layer.weight.detach()),
            absmax=self.keep(layer.weight_absmax.detach()),
            values=self.keep(values),
            rows=layer.out_features,
            columns=layer.in_features,
            format=_FOUR_BIT,
            blocksize=layer.blocksize,
            half=int(self.half and (layer.compute_dtype or self.dtype) == torch.bfloat16),
        )
        if nested:
            found.nested = self.keep(layer.weight_nested_absmax.detach())
            found.code_map = self.keep(codebook.signed_dynamic_map(_CPU))
            found.offset = layer.weight_nested_offset.detach().view(torch.float32).item()
        return found

    def eight_bit(self, layer: Linear8bit) -> Any:
        if layer.has_fp16_weight:
            raise UnknownModel("an INT8 layer keeps its 16-bit weight")
        assert layer.weight_absmax is not None
        return Matrix(
            weight=self.keep(layer.weight.detach()),
            absmax=self.keep(layer.weight_absmax.detach()),
            rows=layer.out_features,
            columns=layer.in_features,
            format=_EIGHT_BIT,
            threshold=layer.threshold,
        )

    def plain(self, layer: nn.Module) -> Any:
        weight = getattr(layer, "weight")  # noqa: B009
        transposed = isinstance(layer, Conv1D)
        rows, columns = weight.t().shape if transposed else weight.shape
        return Matrix(
            weight=self.floating(weight),
            rows=rows,
            columns=columns,
            format=_TRANSPOSED if transposed else _PLAIN,
            dtype=native.DTYPES[weight.dtype],
            half=int(self.half and weight.dtype == self.dtype == torch.bfloat16),
        )

    def add_adapter(self, found: Any, adapter: tuple[Tensor, Tensor, float]) -> None:
        A, B, scaling = adapter
        rank, columns = A.shape
        dtype = torch.bfloat16 if found.half else torch.float32
        pad = torch.nn.functional.pad
        found.lora_a = self.keep(pad(A.to(dtype), (0, -columns % 32)).contiguous())
        found.lora_b = self.keep(pad(B.to(dtype), (0, -rank % 16)).contiguous())
        found.rank, found.scaling = rank, scaling


def check_sizes() -> None:
    """Raises: UnknownModel: the library was built for other structures."""
    sizes = (ctypes.c_int64 * 4)()
    native.kernel("decode_layout", "p")(ctypes.addressof(sizes))
    if list(sizes) != [ctypes.sizeof(kind) for kind in (Matrix, Layer, Model, Step)]:
        raise UnknownModel("the native library is of another version")
