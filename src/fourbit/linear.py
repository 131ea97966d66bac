"""Frozen linear layers in 4 and 8 bits whose whole state is plain integer parameters.

Floating scales would be cast by ``model.to(torch.bfloat16)`` and by FSDP2's mixed precision
without a word; persistent buffers break sharded loading. So the float32 scales are held as their
bits in int32, and the layers survive ``.to(dtype)``, ``state_dict``, pickling and ``deepcopy``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fourbit import ops
from fourbit.calibrated import quantize_4bit_for, quantize_int8_for
from fourbit.codebook import NESTED_BLOCKSIZE, QuantType
from fourbit.quantize import QuantConfig, QuantState, quantize_4bit, quantize_int8


class QuantizedLinear(nn.Linear):
    """``y = x · dequant(W)ᵀ + bias`` with W frozen in few bits; backward gives dX only.

    Shapes: x ``[..., in_features]``, y ``[..., out_features]``. A subclass of ``nn.Linear``
    because that is what PEFT's ``all-linear`` and type checks look for. `make` chooses the class.

    Args:
        in_features: K.
        out_features: N.
        bias: whether a bias exists; it is kept in 16 or 32 bits.
        quant: the format; each class takes what concerns it.
        compute_dtype: dtype of the product; None multiplies in the dtype of ``x``.
        device: where the empty parameters are made (``meta`` while a model is being built).
        dtype: of the bias, and what `dequantize` returns by default.
    """

    scale_names: tuple[str, ...]
    """Parameters that are scales: bytes, but no weights of the model."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        quant: QuantConfig,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # nn.Linear's own constructor would allocate the 16-bit weight this class exists to avoid.
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.compute_dtype = compute_dtype
        self.original_dtype = dtype or torch.get_default_dtype()
        self.transposed_source = False
        self._kept: Tensor | None = None
        self.adopt_format_(quant, device=device)
        self.bias = _frozen((out_features,), self.original_dtype, device) if bias else None

    @staticmethod
    def make(
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        quant: QuantConfig,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> QuantizedLinear:
        """An empty layer in the format of ``quant``."""
        kind = Linear8bit if quant.is_int8 else Linear4bit
        return kind(
            in_features,
            out_features,
            bias=bias,
            quant=quant,
            compute_dtype=compute_dtype,
            device=device,
            dtype=dtype,
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        quant: QuantConfig,
        *,
        compute_dtype: torch.dtype | None = None,
        name: str = "weight",
    ) -> QuantizedLinear:
        """Quantizes the weight of ``linear``; the bias is shared. On ``meta`` only shapes are made.

        Raises:
            ModelError: NaN or Inf in the weight.
        """
        layer = QuantizedLinear.make(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            quant=quant,
            compute_dtype=compute_dtype,
            device="meta",
            dtype=linear.weight.dtype,
        )
        if not linear.weight.is_meta:
            layer.replace_(layer.quantized(linear.weight.detach(), name=name))
            layer.bias = linear.bias
        return layer.train(linear.training)

    @abstractmethod
    def adopt_format_(self, quant: QuantConfig, *, device: torch.device | str | None) -> None:
        """Empties the layer for weights in the format of ``quant``."""

    @abstractmethod
    def quantized(self, weight: Tensor, *, name: str) -> dict[str, Tensor]:
        """The parameters that represent ``weight`` ``[out, in]`` in this layer's format."""

    @abstractmethod
    def quantized_for(
        self, weight: Tensor, moments: Tensor, *, damping: float, name: str
    ) -> dict[str, Tensor]:
        """The same for inputs with these second moments ``[in, in]``: see `fourbit.calibrated`."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight ``[out, in]`` in ``dtype`` (default: what it was before)."""

    @abstractmethod
    def _product(self, x: Tensor) -> Tensor: ...

    def replace_(self, tensors: dict[str, Tensor]) -> None:
        """Makes ``tensors`` (as `quantized` gives them) this layer's parameters."""
        for key, tensor in tensors.items():
            setattr(self, key, nn.Parameter(tensor, requires_grad=False))

    @property
    def W_q(self) -> Tensor:  # noqa: N802
        """The packed weight under the name by which PEFT knows layers with ``dequantize()``."""
        return self.weight

    @property
    def uses_other_weight(self) -> bool:
        """Whether it multiplies with a weight at hand: see `keep_dequantized`, `multiplying`."""
        return self._kept is not None and not torch.is_grad_enabled()

    def forward(self, input: Tensor) -> Tensor:
        """``input`` ``[..., in_features]`` to ``[..., out_features]`` in the dtype of ``input``."""
        input = autocast_input(input)
        x = input if self.compute_dtype is None else input.to(self.compute_dtype)
        if self._kept is not None and not torch.is_grad_enabled():
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return nn.functional.linear(x, self._kept.to(x.dtype), bias).to(input.dtype)
        return self._product(x).to(input.dtype)


class Linear4bit(QuantizedLinear):
    """A linear layer in NF4 or FP4, its scales quantized again on request.

    ``weight`` is uint8 ``[out, in/2]``, or ``[ceil(out*in/2), 1]`` when ``in_features`` is odd.
    """

    scale_names = ("weight_absmax", "weight_nested_absmax", "weight_nested_offset")
    quant_storage = torch.uint8
    """The dtype as which the packed bytes are written to disk."""

    def adopt_format_(self, quant: QuantConfig, *, device: torch.device | str | None) -> None:
        """Empties the layer for weights in the format of ``quant``."""
        assert quant.quant_type != "int8"
        self.quant_type: QuantType = quant.quant_type
        self.blocksize, self.double_quant = quant.blocksize, quant.double_quant
        blocks = -(-self.in_features * self.out_features // self.blocksize)
        nested = -(-blocks // NESTED_BLOCKSIZE)
        self.weight = _frozen(self.packed_shape, torch.uint8, device)
        absmax_dtype = torch.uint8 if self.double_quant else torch.int32
        self.weight_absmax = _frozen((blocks,), absmax_dtype, device)
        if self.double_quant:
            self.weight_nested_absmax = _frozen((nested,), torch.int32, device)
            self.weight_nested_offset = _frozen((1,), torch.int32, device)
        else:
            self.register_parameter("weight_nested_absmax", None)
            self.register_parameter("weight_nested_offset", None)

    def quantized(self, weight: Tensor, *, name: str) -> dict[str, Tensor]:
        """The parameters that represent ``weight`` ``[out, in]`` in this layer's format."""
        packed, state = quantize_4bit(
            weight,
            quant_type=self.quant_type,
            blocksize=self.blocksize,
            double_quant=self.double_quant,
            name=name,
        )
        return self._tensors(packed, state)

    def quantized_for(
        self, weight: Tensor, moments: Tensor, *, damping: float, name: str
    ) -> dict[str, Tensor]:
        """The same for inputs with these second moments ``[in, in]``: see `fourbit.calibrated`."""
        packed, state = quantize_4bit_for(
            weight,
            moments,
            quant_type=self.quant_type,
            blocksize=self.blocksize,
            double_quant=self.double_quant,
            damping=damping,
            name=name,
        )
        return self._tensors(packed, state)

    def _tensors(self, packed: Tensor, state: QuantState) -> dict[str, Tensor]:
        tensors = {"weight": packed.view(self.packed_shape), "weight_absmax": state.absmax}
        if state.nested_absmax is not None and state.nested_offset is not None:
            tensors["weight_nested_absmax"] = state.nested_absmax
            tensors["weight_nested_offset"] = state.nested_offset
        return as_bits(tensors)

    @property
    def packed_shape(self) -> tuple[int, int]:
        """Shape of the packed weight: rows stay rows unless a row ends inside a byte."""
        if self.in_features % 2 == 0:
            return self.out_features, self.in_features // 2
        return (self.in_features * self.out_features + 1) // 2, 1

    @property
    def scales(self) -> ops.Scales:
        """Packed weight and scales in the form the ops take."""
        return (
            self.weight,
            self.weight_absmax,
            self.weight_nested_absmax,
            self.weight_nested_offset,
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight ``[out, in]`` in ``dtype`` (default: what it was before)."""
        return ops.dequantize_4bit(
            self.scales,
            blocksize=self.blocksize,
            quant_type=self.quant_type,
            shape=(self.out_features, self.in_features),
            dtype=dtype or self.original_dtype,
        )

    def _product(self, x: Tensor) -> Tensor:
        return ops.linear_4bit(
            x,
            self.scales,
            self.bias,
            blocksize=self.blocksize,
            quant_type=self.quant_type,
            out_features=self.out_features,
        )

    def extra_repr(self) -> str:
        """Shape and format, for ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features},"
            f" bias={self.bias is not None}, quant_type={self.quant_type},"
            f" blocksize={self.blocksize}, double_quant={self.double_quant}"
        )


class Linear8bit(QuantizedLinear):
    """A linear layer in row-wise INT8 with LLM.int8's split of outlier activations.

    ``weight`` is int8 ``[out, in]``, ``weight_absmax`` the bits of float32 ``[out]``. Columns of
    ``x`` that reach ``threshold`` are multiplied in 16 bits (arXiv 2208.07339, section 3).
    ``compute_dtype`` is that of the outliers' product and of the result.
    """

    scale_names = ("weight_absmax",)

    def adopt_format_(self, quant: QuantConfig, *, device: torch.device | str | None) -> None:
        """Empties the layer for INT8 weights."""
        self.threshold = quant.llm_int8_threshold
        self.weight = _frozen((self.out_features, self.in_features), torch.int8, device)
        self.weight_absmax = _frozen((self.out_features,), torch.int32, device)

    def keep_fp16_weight_(self) -> None:
        """Empties the layer for a 16-bit weight that every forward quantizes anew.

        What bitsandbytes calls ``has_fp16_weights``: the arithmetic of INT8, the memory of 16 bits.
        """
        shape = (self.out_features, self.in_features)
        self.weight = _frozen(shape, self.original_dtype, self.weight.device)
        self.register_parameter("weight_absmax", None)

    @property
    def has_fp16_weight(self) -> bool:
        """Whether the weight is held in 16 bits and quantized in every forward."""
        return self.weight_absmax is None

    def quantized(self, weight: Tensor, *, name: str) -> dict[str, Tensor]:
        """The parameters that represent ``weight`` ``[out, in]`` in this layer's format."""
        if self.has_fp16_weight:
            return {"weight": weight}
        codes, absmax = quantize_int8(weight, name=name)
        return as_bits({"weight": codes, "weight_absmax": absmax})

    def quantized_for(
        self, weight: Tensor, moments: Tensor, *, damping: float, name: str
    ) -> dict[str, Tensor]:
        """The same for inputs with these second moments ``[in, in]``: see `fourbit.calibrated`."""
        codes, absmax = quantize_int8_for(weight, moments, damping=damping, name=name)
        return as_bits({"weight": codes, "weight_absmax": absmax})

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight ``[out, in]`` in ``dtype`` (default: what it was before)."""
        dtype = dtype or self.original_dtype
        if self.weight_absmax is None:
            return self.weight.detach().to(dtype)
        return ops.dequantize_int8(self.weight, self.weight_absmax, dtype=dtype)

    def _product(self, x: Tensor) -> Tensor:
        return ops.linear_int8(
            x, self.weight, self.weight_absmax, self.bias, threshold=self.threshold
        )

    def extra_repr(self) -> str:
        """Shape and format, for ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features},"
            f" bias={self.bias is not None}, quant_type=int8, threshold={self.threshold:g},"
            f" has_fp16_weight={self.has_fp16_weight}"
        )


def as_bits(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Float32 scales as their bits in int32, the form in which layers hold them."""
    return {
        key: tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor
        for key, tensor in tensors.items()
    }


def autocast_input(x: Tensor) -> Tensor:
    """``x`` in autocast's dtype where autocast is on, as ``nn.Linear`` would take it."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


@contextmanager
def keep_dequantized(model: nn.Module, dtype: torch.dtype, *, budget: int) -> Iterator[bool]:
    """Inside, every 4-bit layer keeps its 16-bit weight, so that generation expands it only once.

    The numbers are the same; memory grows by the 16-bit model, so nothing is kept when that
    exceeds ``budget`` bytes. Training never uses kept weights. INT8 layers, which multiply in
    8 bits, have none to keep.

    Yields:
        Whether the weights are kept.
    """
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    size = sum(
        layer.in_features * layer.out_features * (layer.compute_dtype or dtype).itemsize
        for layer in layers
    )
    keep = bool(layers) and size <= budget
    try:
        if keep:
            for layer in layers:
                layer._kept = layer.dequantize(layer.compute_dtype or dtype)
        yield keep
    finally:
        for layer in layers:
            layer._kept = None


@contextmanager
def multiplying(weights: Mapping[QuantizedLinear, Tensor]) -> Iterator[None]:
    """Inside, these layers multiply with the given weights ``[out, in]`` instead of their own."""
    try:
        for layer, weight in weights.items():
            layer._kept = weight
        yield
    finally:
        for layer in weights:
            layer._kept = None


@contextmanager
def row_by_row(model: nn.Module) -> Iterator[None]:
    """Inside, INT8 layers treat each row of activations on its own.

    Otherwise a large value in one row has its column multiplied in 16 bits for all rows of the
    batch, which changes the others by a rounding.
    """
    layers = [module for module in model.modules() if isinstance(module, Linear8bit)]
    before = [layer.threshold for layer in layers]
    try:
        for layer in layers:
            layer.threshold = 0.0
        yield
    finally:
        for layer, threshold in zip(layers, before, strict=True):
            layer.threshold = threshold


def _frozen(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None
) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


@dataclass(frozen=True)
class ExpertStack:
    """How a mixture's experts, one weight ``[E, out, in]``, are packed; see `fourbit.experts`.

    Attributes:
        quant: the format; every expert is quantized on its own.
        shape: ``(E, out, in)``.
        compute_dtype: dtype of the product; None multiplies in the dtype of the activations.
        original_dtype: of the weight before.
    """

    quant: QuantConfig
    shape: tuple[int, int, int]
    compute_dtype: torch.dtype | None
    original_dtype: torch.dtype


STACK_SCALES = ("_absmax", "_nested_absmax", "_nested_offset")
"""What is appended to a stack's name for its scales."""
_STACKS = "_fourbit_stacks"


def expert_stacks(module: nn.Module) -> dict[str, ExpertStack]:
    """The packed expert weights that ``module`` itself holds, by parameter name."""
    return module.__dict__.get(_STACKS, {})


def declare_stack(module: nn.Module, name: str, stack: ExpertStack) -> None:
    """Notes that parameter ``name`` of ``module`` is a packed stack."""
    module.__dict__.setdefault(_STACKS, {})[name] = stack


def packed_weights(model: nn.Module) -> tuple[dict[int, int], set[int]]:
    """``id -> unpacked count`` of packed weights, and the ids of their scales."""
    weights: dict[int, int] = {}
    scales: set[int] = set()
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            weights[id(module.weight)] = module.in_features * module.out_features
            names = list(module.scale_names)
        else:
            stacks = expert_stacks(module)
            for name, stack in stacks.items():
                weights[id(getattr(module, name))] = math.prod(stack.shape)
            names = [name + end for name in stacks for end in STACK_SCALES]
        scales |= {id(getattr(module, name, None)) for name in names} - {id(None)}
    return weights, scales


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """``(trainable, all)`` parameters: packed weights counted unpacked, scales not at all."""
    trainable = total = 0
    weights, scales = packed_weights(model)
    for parameter in model.parameters():
        if id(parameter) in scales:
            continue
        count = weights.get(id(parameter), parameter.numel())
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total
