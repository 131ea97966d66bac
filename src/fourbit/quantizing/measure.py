"""How far quantized weights are from the originals, without a second copy of either."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import sqrt

import torch
from torch import Tensor

from fourbit import ops
from fourbit.linear import Linear4bit, Linear8bit, QuantizedLinear
from fourbit.ops.reference import scales_float32

_CHUNK = 1 << 20

Squares = tuple[float, float]
"""``(|W - Ŵ|², |W|²)``, both Frobenius norms squared."""


def squares(layer: QuantizedLinear, weight: Tensor) -> Squares:
    """Of one layer and the weight ``[out, in]`` that it stands for."""
    error = norm = 0.0
    flat = weight.reshape(-1)
    for start, restored in _restored(layer):
        original = flat[start : start + restored.numel()].float()
        norm += _sum_of_squares(original)
        error += _sum_of_squares(restored.sub_(original))
    return error, norm


def relative(pairs: Mapping[str, Squares]) -> float:
    """``|W - Ŵ| / |W|`` of all layers together; 0 for weights that are all zero."""
    error = sum(pair[0] for pair in pairs.values())
    norm = sum(pair[1] for pair in pairs.values())
    return sqrt(error / norm) if norm else 0.0


def _sum_of_squares(values: Tensor) -> float:
    return float(torch.dot(values, values).double()) if values.numel() else 0.0


def _restored(layer: QuantizedLinear) -> Iterator[tuple[int, Tensor]]:
    """Flat float32 pieces of the dequantized weight, each with its place."""
    if isinstance(layer, Linear8bit):
        rows = max(1, _CHUNK // max(1, layer.in_features))
        assert layer.weight_absmax is not None
        for row in range(0, layer.out_features, rows):
            part = slice(row, row + rows)
            codes, absmax = layer.weight[part], layer.weight_absmax[part]
            values = ops.dequantize_int8(codes, absmax, dtype=torch.float32)
            yield row * layer.in_features, values.reshape(-1)
        return
    assert isinstance(layer, Linear4bit)
    scales = scales_float32(*layer.scales[1:])
    packed, total = layer.weight.reshape(-1), layer.in_features * layer.out_features
    for start in range(0, total, _CHUNK):
        stop = min(start + _CHUNK, total)
        blocks = scales[start // layer.blocksize : -(-stop // layer.blocksize)]
        yield (
            start,
            ops.dequantize_4bit(
                (packed[start // 2 : (stop + 1) // 2], blocks, None, None),
                blocksize=layer.blocksize,
                quant_type=layer.quant_type,
                shape=(stop - start,),
                dtype=torch.float32,
            ),
        )
