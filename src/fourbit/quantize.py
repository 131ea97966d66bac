"""Tensor to packed 4-bit and back: the public functions, their configuration and state.

QLoRA paper (arXiv 2305.14314), section 3: 4-bit NormalFloat and double quantization. Byte layout:
flat row-major, the even element in the high nibble, blocks over the flat tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from fourbit import codebook, ops
from fourbit.errors import ModelError
from fourbit.settings import Settings

ComputeDtype = Literal["auto", "bfloat16", "float16", "float32"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


WeightType = Literal["nf4", "fp4", "int4", "int8"]


class QuantConfig(Settings):
    """How frozen weights are stored. The defaults are the paper's."""

    quant_type: WeightType = Field(
        default="nf4", description="data type: 4-bit nf4, fp4 or int4, or row-wise int8"
    )
    blocksize: int = Field(default=64, description="weights that share one scale (absmax)")
    double_quant: bool = Field(default=True, description="quantize the scales again, to 8 bits")
    compute_dtype: ComputeDtype = Field(
        default="auto", description="arithmetic of the matrix product; auto follows `precision`"
    )
    llm_int8_threshold: float = Field(
        default=6.0,
        ge=0,
        description="int8: activation columns that reach it are multiplied in 16 bits; 0: none",
    )
    allow_unquantized: bool = Field(
        default=False, description="accept a model of which a large part stays in 16 bits"
    )

    @field_validator("blocksize")
    @classmethod
    def _legal_blocksize(cls, value: int) -> int:
        if value not in codebook.BLOCKSIZES:
            legal = ", ".join(map(str, codebook.BLOCKSIZES))
            raise ValueError(f"blocksize {value} is not one of {legal}")
        return value

    @model_validator(mode="after")
    def _fits_the_type(self) -> QuantConfig:
        foreign = ("blocksize", "double_quant") if self.is_int8 else ("llm_int8_threshold",)
        for name in foreign:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} means nothing for quant_type {self.quant_type}")
        return self

    @property
    def is_int8(self) -> bool:
        """Whether weights take 8 bits with one scale a row."""
        return self.quant_type == "int8"

    @property
    def bits_per_weight(self) -> float:
        """Code plus the share of the scales: 4.127 with double quantization at block 64.

        INT8's one scale a row depends on the row's length and is not counted.
        """
        if self.is_int8:
            return 8.0
        if not self.double_quant:
            return 4 + 32 / self.blocksize
        return 4 + 8 / self.blocksize + 32 / (self.blocksize * codebook.NESTED_BLOCKSIZE)


@dataclass(frozen=True)
class QuantState:
    """What is needed besides the packed bytes to restore a tensor.

    Attributes:
        absmax: float32 ``[b]``, or uint8 ``[b]`` codes with double quantization.
        nested_absmax: float32 ``[ceil(b/256)]`` with double quantization.
        nested_offset: float32 ``[1]`` with double quantization.
        shape: of the original tensor.
        dtype: of the original tensor.
    """

    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    quant_type: codebook.QuantType
    blocksize: int
    shape: torch.Size
    dtype: torch.dtype


def check_finite(weight: Tensor, *, name: str) -> None:
    """Raises when ``weight`` holds NaN or Inf.

    Raises:
        ModelError: naming the tensor, the first flat index and the count.
    """
    flat = weight.reshape(-1)
    first, count = ops.count_nonfinite(flat)
    if count == 0:
        return
    raise ModelError(
        "nonfinite-weight",
        where=name,
        what=f"{flat[first].item()} at flat index {first}"
        f" ({count} non-finite of {flat.numel()} values)",
        fix="use an undamaged copy of the checkpoint",
    )


def quantize_4bit(
    weight: Tensor,
    *,
    quant_type: codebook.QuantType = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    name: str = "tensor",
) -> tuple[Tensor, QuantState]:
    """Quantizes a tensor of any shape, strides included.

    Args:
        weight: float32, float16 or bfloat16.
        quant_type: ``nf4``, ``fp4`` or ``int4``.
        blocksize: one of `fourbit.codebook.BLOCKSIZES`.
        double_quant: quantize the scales to 8 bits as well.
        name: how errors call the tensor.

    Returns:
        Packed codes uint8 ``[ceil(numel/2), 1]`` and the state that restores them.

    Raises:
        ModelError: NaN or Inf in ``weight``, naming tensor and flat index.
        ValueError: an unsupported dtype, data type or block size.
    """
    if weight.dtype not in _FLOATS:
        raise ValueError(
            f"{name}: cannot quantize {weight.dtype}; use float32, float16 or bfloat16"
        )
    if quant_type not in codebook.QUANT_TYPES:
        raise ValueError(f"quant_type {quant_type!r} is not one of {codebook.QUANT_TYPES}")
    if blocksize not in codebook.BLOCKSIZES:
        raise ValueError(f"blocksize {blocksize} is not one of {codebook.BLOCKSIZES}")
    packed, absmax = ops.quantize_4bit(weight, blocksize=blocksize, quant_type=quant_type)
    # the largest magnitude of a block shows what is in it: the weight need not be read again
    if ops.count_nonfinite(absmax)[1]:
        check_finite(weight, name=name)
    nested_absmax = nested_offset = None
    if double_quant:
        absmax, nested_absmax, nested_offset = ops.quantize_absmax(absmax)
    state = QuantState(
        absmax, nested_absmax, nested_offset, quant_type, blocksize, weight.shape, weight.dtype
    )
    return packed[:, None], state


def quantize_int8(weight: Tensor, *, name: str = "tensor") -> tuple[Tensor, Tensor]:
    """Row-wise INT8 as LLM.int8 stores it (arXiv 2208.07339): from float16, half to even.

    Args:
        weight: float32, float16 or bfloat16 ``[N, K]``.
        name: how errors call the tensor.

    Returns:
        Codes int8 ``[N, K]`` and float32 absmax ``[N]``.

    Raises:
        ModelError: NaN or Inf in ``weight``, or a value beyond float16's 65,504.
        ValueError: an unsupported dtype or shape.
    """
    if weight.dtype not in _FLOATS or weight.dim() != 2:
        raise ValueError(f"{name}: INT8 takes float matrices, not {weight.dtype} {weight.dim()}-D")
    codes, absmax = ops.quantize_int8(weight)
    if not torch.isfinite(absmax).all():
        check_finite(weight, name=name)
        raise ModelError(
            "beyond-float16",
            where=name,
            what=f"row {int((~torch.isfinite(absmax)).nonzero()[0])} holds a value above 65504,"
            " which INT8's float16 step cannot hold",
            fix="use quant_type nf4",
        )
    return codes, absmax


def dequantize_int8(codes: Tensor, absmax: Tensor, *, dtype: torch.dtype) -> Tensor:
    """``code * absmax / 127`` as ``[N, K]`` in ``dtype``."""
    return ops.dequantize_int8(codes, absmax, dtype=dtype)


def dequantize_4bit(
    packed: Tensor, state: QuantState, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Restores a tensor of ``state.shape`` in ``dtype`` (default: the original's)."""
    return ops.dequantize_4bit(
        (packed, state.absmax, state.nested_absmax, state.nested_offset),
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        shape=state.shape,
        dtype=dtype or state.dtype,
    )
