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
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fourbit import codebook, native
from fourbit.integrations import anatomy
from fourbit.integrations.peft import LoraLinear4bit, plain_adapter
from fourbit.linear import Linear4bit, Linear8bit, QuantizedLinear

_PLAIN, _TRANSPOSED, _FOUR_BIT, _EIGHT_BIT = range(4)
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
_CPU = torch.device("cpu")


class UnknownModel(Exception):
    """The engine cannot run this model; the message says why."""


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
        modules: the decoder layers, in order.
        source: the transformers model.
        cache_dtype: of keys and values.
        head: weight of the output projection, where a sketch of it would find the best token.
        kept: everything that is pointed to.
    """

    model: Any
    layers: Any
    modules: list[nn.Module]
    source: PreTrainedModel
    cache_dtype: torch.dtype
    head: Tensor | None
    kept: list[Tensor] = field(default_factory=list)


def lay_out(model: PreTrainedModel) -> Layout:
    """The layout of a loaded model, its one active adapter included.

    Raises:
        UnknownModel: the architecture, a layer or an adapter is none that the engine computes.
    """
    ends, modules = anatomy.ends_of(model), anatomy.known_layers(model)
    if ends is None or not modules:
        raise UnknownModel(f"{type(model).__name__} is no architecture that the engine knows")
    if not anatomy.positions_fixed(model):
        raise UnknownModel("its rotation depends on the length of the text")
    return _Builder(model, ends).build(modules)


class _Builder:
    def __init__(self, model: PreTrainedModel, ends: anatomy.Ends) -> None:
        self.source, self.ends, self.kept = model, ends, []
        table = self.pick(ends.embedding)
        if not isinstance(table, nn.Embedding) or isinstance(table, BaseTunerLayer):
            raise UnknownModel(f"its token table is a {type(table).__name__}")
        self.table = table
        self.dtype = table.weight.dtype
        self.half = native.isa() == "avx512_bf16"

    def build(self, modules: list[nn.Module]) -> Layout:
        layers = (Layer * len(modules))(*(self.layer(module) for module in modules))
        inner = self.source.base_model
        known = sum(1 for module in inner.modules() if anatomy.layer_names(module) is not None)
        if known != getattr(self.source.config, "num_hidden_layers", known):
            raise UnknownModel("some of its layers are of another class")
        head = self.source.get_output_embeddings()
        if head is None:
            raise UnknownModel("it has no head")
        cache = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32
        model = Model(
            layers=ctypes.addressof(layers),
            embedding=self.floating(self.table.weight),
            positions=self.positions(),
            last=self.norm(self.ends.last_norm),
            head=self.matrix(head, "the head"),
            embedding_scale=self.ends.embedding_scale,
            logit_scale=self.ends.logit_scale,
            logit_softcap=self.ends.logit_softcap,
            layer_count=len(modules),
            width=self.table.embedding_dim,
            embedding_dtype=native.DTYPES[self.table.weight.dtype],
            cache_dtype=native.DTYPES[cache],
        )
        plain = model.head.format == _PLAIN and not model.head.rank and not model.head.bias
        # a softcap makes large scores equal, so that the first of them would have to be found
        rising = model.logit_scale > 0 and model.logit_softcap == 0
        weight: Any = getattr(self.pick(head), "weight", None)
        sketched = weight.detach() if plain and rising else None
        return Layout(model, layers, modules, self.source, cache, sketched, self.kept)

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

    def positions(self) -> int | None:
        table = self.ends.positions
        if table is None:
            return None
        if type(table) is not nn.Embedding or table.weight.dtype != self.table.weight.dtype:
            raise UnknownModel(f"its positions are a {type(table).__name__}")
        return self.floating(table.weight)

    def pick(self, module: nn.Module) -> nn.Module:
        """What stands at a place: the trained copy of a module that is trained whole."""
        hooks = (module._forward_hooks, module._forward_pre_hooks)
        if any(hooks) or "forward" in module.__dict__:
            raise UnknownModel(f"a hook sits on a {type(module).__name__}")
        if not isinstance(module, ModulesToSaveWrapper):
            return module
        names = [] if module.disable_adapters else module.active_adapters
        active = [name for name in names if name in module.modules_to_save]
        return self.pick(module.modules_to_save[active[0]] if active else module.original_module)

    def norm(self, module: nn.Module | None) -> Any:
        if module is None:
            return Norm()
        found = anatomy.norm_of(self.pick(module))
        if found is None:
            raise UnknownModel(f"a norm is a {type(module).__name__}")
        weight = self.floats(found.weight, offset=found.offset)
        return Norm(weight=weight, bias=self.floats(found.bias), eps=found.eps)

    def layer(self, module: nn.Module) -> Any:
        names = anatomy.layer_names(module)
        assert names is not None
        self.pick(module)
        attention, mlp = module.get_submodule(names.attention), module.get_submodule(names.mlp)
        self.pick(attention)
        self.pick(mlp)
        heads = anatomy.heads_of(attention)
        activation = anatomy.activation_of(mlp.get_submodule(names.activation))
        if activation is None:
            raise UnknownModel(f"its activation is {mlp.get_submodule(names.activation)}")

        def part(parent: nn.Module, name: str | None) -> nn.Module | None:
            return None if name is None else parent.get_submodule(name)

        query, key = names.head_norms or (None, None)
        return Layer(
            qkv=self.group(attention, names.qkv),
            out=self.group(attention, (names.out,)),
            up=self.group(mlp, names.up),
            down=self.group(mlp, (names.down,)),
            before_attention=self.norm(part(module, names.norm_attention)),
            after_attention=self.norm(part(module, names.norm_after_attention)),
            before_mlp=self.norm(part(module, names.norm_mlp)),
            after_mlp=self.norm(part(module, names.norm_after_mlp)),
            query=self.norm(part(attention, query)),
            key=self.norm(part(attention, key)),
            scale=heads.scale,
            softcap=heads.softcap,
            residual=anatomy.residual_scale(module, names),
            window=heads.sliding_window or 0,
            heads=heads.heads,
            kv_heads=heads.kv_heads,
            head_dim=heads.head_dim,
            gated=int(names.gated),
            activation=_ACTIVATIONS[activation],
        )

    def group(self, parent: nn.Module, names: tuple[str, ...]) -> Any:
        parts = [self.matrix(parent.get_submodule(name), name) for name in names]
        if len({part.threshold for part in parts if part.format == _EIGHT_BIT}) > 1:
            raise UnknownModel("neighbouring layers have different INT8 thresholds")
        return Group(count=len(parts), parts=tuple(parts))

    def matrix(self, module: nn.Module, name: str) -> Any:
        module = self.pick(module)
        adapter = None
        if isinstance(module, BaseTunerLayer):
            module, adapter = self.adapter(module, name)
            module = self.pick(module)
        if isinstance(module, Linear4bit):
            found = self.four_bit(module)
        elif isinstance(module, Linear8bit):
            found = self.eight_bit(module)
        elif type(module) is nn.Linear or type(module) is Conv1D:
            found = self.plain(module)
        else:
            raise UnknownModel(f"{name} is a {type(module).__name__}")
        bias = getattr(module, "bias", None)
        found.bias = self.floats(bias if isinstance(bias, Tensor) else None)
        if adapter is not None:
            self.add_adapter(found, adapter)
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

    def adapter(
        self, layer: BaseTunerLayer, name: str
    ) -> tuple[nn.Module, tuple[Tensor, Tensor, float] | None]:
        """The base of a layer with adapters, and A, B and scaling of the active one."""
        if type(layer) not in (PeftLoraLinear, LoraLinear4bit):
            raise UnknownModel(f"{name} carries a {type(layer).__name__}")
        assert isinstance(layer, PeftLoraLinear)
        base = layer.get_base_layer()
        active = [found for found in layer.active_adapters if found in layer.lora_A]
        if layer.merged and isinstance(base, QuantizedLinear):
            raise UnknownModel("adapters are merged into packed weights")
        if layer.merged or layer.disable_adapters or not active:
            return base, None
        if len(active) > 1:
            raise UnknownModel("more than one adapter is active")
        parts = plain_adapter(layer)
        if parts is None:
            raise UnknownModel(f"{name} carries another kind of LoRA")
        A, B, scaling, _ = parts
        return base, (A.detach(), B.detach(), float(scaling))

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
