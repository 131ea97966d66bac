"""Slow, obvious answers that the numeric core is compared with, and the tensors to try it on."""

from __future__ import annotations

import math
import struct

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
QUANT_TYPES = ("nf4", "fp4", "int4")
BITSANDBYTES_TYPES = ("nf4", "fp4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

NF4_BITS = """
bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000
3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000
"""

SMALLEST_SCALE = np.float32(1e-38)
"""Blocks whose largest magnitude is below this count as zero: their reciprocal would overflow."""

HALF_ULP = 2.0**-24
"""Relative error of one float32 rounding."""


def table(quant_type: str) -> np.ndarray:
    """The 16 float32 values by code, from bit patterns instead of decimals."""
    if quant_type == "nf4":
        return np.array(
            [struct.unpack(">f", bytes.fromhex(h))[0] for h in NF4_BITS.split()], np.float32
        )
    if quant_type == "int4":
        return np.arange(-8, 8, dtype=np.float32) / np.float32(7)
    values = []
    for code in range(16):
        exponent, mantissa = code >> 1 & 3, code & 1
        # Not E2M1: the exponents stand for 8, 4 and 2 twelfths, the subnormal for a sixteenth.
        magnitude = {
            (0, 0): 0.0,
            (0, 1): 0.0625,
            (1, 0): 8.0,
            (1, 1): 12.0,
            (2, 0): 4.0,
            (2, 1): 6.0,
            (3, 0): 2.0,
            (3, 1): 3.0,
        }[exponent, mantissa]
        values.append(math.copysign(magnitude / 12, -1 if code >> 3 else 1))
    return np.array(values, np.float32)


def ascending(quant_type: str) -> list[int]:
    """Codes by value; the two zeros of FP4 in the order 0, 8."""
    values = table(quant_type)
    return sorted(range(16), key=lambda code: (values[code], code))


def nearest_codes(scaled: np.ndarray, quant_type: str) -> np.ndarray:
    """Float32 midpoints; above a midpoint goes up, on it goes down."""
    order = np.array(ascending(quant_type), np.uint8)
    values = table(quant_type)[order]
    midpoints = (values[:-1] + values[1:]) / np.float32(2)
    return order[(scaled[:, None] > midpoints[None, :]).sum(axis=1)]


def scaled_blocks(flat: np.ndarray, blocksize: int) -> tuple[np.ndarray, np.ndarray]:
    """Values in [-1, 1] and absmax, block by block; only the short last block is divided."""
    scaled, scales = np.empty_like(flat), []
    for start in range(0, flat.size, blocksize):
        block = flat[start : start + blocksize]
        largest = np.float32(np.abs(block).max())
        if block.size == blocksize:
            part = block * (np.float32(1) / max(largest, SMALLEST_SCALE))
        else:
            largest = max(largest, SMALLEST_SCALE)
            part = block / largest
        scaled[start : start + blocksize] = np.clip(part, -1, 1)
        scales.append(largest)
    return scaled, np.array(scales, np.float32)


def quantized(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """Packed bytes and absmax, by brute force."""
    flat = weight.detach().cpu().float().reshape(-1).numpy()
    scaled, absmax = scaled_blocks(flat, blocksize)
    if scaled.size % 2:
        scaled = np.append(scaled, np.float32(0))
    codes = nearest_codes(scaled, quant_type)
    packed = [int(codes[k]) << 4 | int(codes[k + 1]) for k in range(0, codes.size, 2)]
    return torch.tensor(packed, dtype=torch.uint8), torch.from_numpy(absmax)


def unpacked(packed: Tensor, numel: int) -> Tensor:
    """Codes uint8 ``[numel]``, one by one."""
    codes = [nibble for byte in packed.reshape(-1).tolist() for nibble in (byte >> 4, byte & 15)]
    return torch.tensor(codes[:numel], dtype=torch.uint8)


def edge_tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    """Every finite tensor that has broken a quantizer somewhere."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    info = torch.finfo(dtype)
    outlier = normal(256)
    outlier[77] = 1e4
    wide = normal(24, 40)
    return {
        "empty": torch.empty(0, dtype=dtype),
        "0-dim": normal(1)[0],
        "one element": normal(1),
        "odd": normal(9, 37),
        "below a block": normal(31),
        "a block and one": normal(65),
        "zeros": torch.zeros(3, 64, dtype=dtype),
        "zero tail": torch.cat((normal(64), torch.zeros(5, dtype=dtype))),
        "minus zeros": -torch.zeros(64, dtype=dtype),
        "constant": torch.full((130,), 0.37, dtype=dtype),
        "max finite": normal(128).sign() * info.max,
        "smallest normal": normal(128).sign() * info.smallest_normal,
        "denormals": torch.arange(-64, 64).to(dtype) * (info.smallest_normal * info.eps),
        "outlier": outlier,
        "transposed": wide.t(),
        "strided": wide[:, ::3],
        "offset": wide.reshape(-1)[13:],
        "expanded": normal(7, 1).expand(7, 19),
    }


def nested_nearest(scaled: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Codes of the nearest of all 256 values by float64 distance; the lower of two."""
    distance = np.abs(scaled.astype(np.float64)[:, None] - values.astype(np.float64)[None, :])
    return distance.argmin(axis=1)
