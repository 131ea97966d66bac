"""The weights of frozen layers as one matrix: packed where a product reads that, else expanded."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from fourbit import ops
from fourbit.fused.scratch import SCRATCH
from fourbit.linear import Linear4bit
from fourbit.ops.cpu.quantize import packed_fields


@dataclass(frozen=True)
class Weights:
    """The weights ``[N_i, K]`` of layers with the same input, one under another: ``[N, K]``.

    Attributes:
        layers: in the order of their rows.
        transposed: whether ``[K, N]`` is meant.
    """

    layers: tuple[Linear4bit | nn.Linear, ...]
    transposed: bool = False

    def t(self) -> Weights:
        """The same, transposed; nothing is computed."""
        return replace(self, transposed=not self.transposed)

    def packed(self) -> list[int] | None:
        """Each layer as the C struct ``Packed``; None where that cannot be."""
        fields: list[int] = []
        for layer in self.layers:
            part = None
            if isinstance(layer, Linear4bit):
                part = packed_fields(
                    layer.scales,
                    blocksize=layer.blocksize,
                    quant_type=layer.quant_type,
                    count=layer.out_features * layer.in_features,
                )
            if part is None:
                return None
            fields += part
        return fields

    @property
    def strides(self) -> tuple[int, int]:
        """Of what `expanded` gives."""
        width = self.layers[0].in_features
        return (1, width) if self.transposed else (width, 1)

    def expanded(self, like: Tensor) -> Tensor:
        """The matrix in the dtype of ``like``; valid until the next call."""
        whole = self._expanded(like)
        return whole.t() if self.transposed else whole

    def _expanded(self, like: Tensor) -> Tensor:
        if len(self.layers) == 1 and not isinstance(self.layers[0], Linear4bit):
            return self.layers[0].weight.detach().to(like.dtype)
        heights = [layer.out_features for layer in self.layers]
        whole = SCRATCH.take("weight", (sum(heights), self.layers[0].in_features), like)
        for layer, rows in zip(self.layers, whole.split(heights), strict=True):
            _expand_into(layer, rows)
        return whole


def _expand_into(layer: Linear4bit | nn.Linear, out: Tensor) -> None:
    if isinstance(layer, Linear4bit):
        ops.dequantize_into(
            layer.scales, blocksize=layer.blocksize, quant_type=layer.quant_type, out=out
        )
    else:
        out.copy_(layer.weight.detach())
