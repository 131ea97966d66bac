"""The code tables of the 4-bit and 8-bit formats: the only place where they are written.

Sources: NF4 is Appendix E of the QLoRA paper (arXiv 2305.14314) in the float32 values that
bitsandbytes ships, which are the canonical ones for files; FP4 is bitsandbytes' E2M1 variant whose
subnormal is 0.0625 instead of 0.5 (so it is not OCP MXFP4); INT4 is the plain integer grid that the
paper compares with, ours alone as a stored format; the signed dynamic map is the 8-bit
data type of Dettmers et al., arXiv 2110.02861.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import _lru_cache_wrapper, lru_cache, wraps
from typing import Literal, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

QuantType = Literal["nf4", "fp4", "int4"]

QUANT_TYPES: tuple[QuantType, ...] = ("nf4", "fp4", "int4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
"""Scales per second-level scale; bitsandbytes' kernels refuse any other."""

NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# Magnitudes by the three low bits e|e|m; bit 3 is the sign, so code 8 is minus zero.
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4_VALUES = tuple(sign * value / 12.0 for sign in (1.0, -1.0) for value in _FP4_TWELFTHS)

# k / 7, not k / 8: the largest weight of a block is kept exactly whichever its sign, as with NF4.
# Code 0 (-8/7) lies beyond absmax and is never chosen.
INT4_VALUES = tuple(k / 7 for k in range(-8, 8))

# Codes in ascending order of value. Plus zero stands before minus zero, as in bitsandbytes' CPU
# kernel: a value that rounds to zero from above therefore gets code 8.
_ASCENDING_CODES: dict[str, tuple[int, ...]] = {
    "nf4": tuple(range(16)),
    "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3),
    "int4": tuple(range(16)),
}
_VALUES: dict[str, tuple[float, ...]] = {
    "nf4": NF4_VALUES,
    "fp4": FP4_VALUES,
    "int4": INT4_VALUES,
}


# Tables are computed on the CPU by name: under ``with torch.device("meta")`` the default device
# would leave an empty table in the cache for good.


_Table = TypeVar("_Table", bound="Tensor | tuple[Tensor, Tensor]")


def _table(make: Callable[..., _Table]) -> _lru_cache_wrapper[_Table]:
    """Makes a table once, with its values also where a plan runs on tensors that have none."""

    @wraps(make)
    def real(*arguments: object) -> _Table:
        with unset_fake_temporarily():
            return make(*arguments)

    return lru_cache(maxsize=64)(real)


@_table
def code(quant_type: str, device: torch.device) -> Tensor:
    """The 16 values by code, float32 ``[16]``."""
    return torch.tensor(_VALUES[quant_type], dtype=torch.float32, device=device)


@_table
def ascending_codes(quant_type: str, device: torch.device) -> Tensor:
    """The 16 codes ordered by value, uint8 ``[16]``."""
    return torch.tensor(_ASCENDING_CODES[quant_type], dtype=torch.uint8, device=device)


@_table
def thresholds(quant_type: str, device: torch.device) -> Tensor:
    """The 15 float32 midpoints between neighbouring values; above a threshold goes up."""
    order = torch.tensor(_ASCENDING_CODES[quant_type], device="cpu")
    values = torch.tensor(_VALUES[quant_type], dtype=torch.float32, device="cpu")[order]
    return ((values[:-1] + values[1:]) / 2).to(device)


_BINS = 512  # on each side of zero: fine enough that no bin holds two thresholds


@_table
def bins(quant_type: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tables that find the code of a value by its bin, the same as a search in `thresholds`.

    Returns:
        The threshold inside each bin, float32 (infinite where there is none), and the codes at or
        below it and above it, uint8 ``[2 * bins]``, one after the other.
    """
    bounds = thresholds(quant_type, torch.device("cpu"))
    order = ascending_codes(quant_type, torch.device("cpu"))
    places = bin_of(bounds)
    assert places.unique().numel() == bounds.numel()
    inside = torch.full((2 * _BINS + 1,), float("inf"))
    inside[places] = bounds
    rank = torch.searchsorted(places, torch.arange(2 * _BINS + 1, dtype=torch.int32))
    above = (rank + 1).clamp(max=len(order) - 1)
    codes = torch.stack((order[rank], order[above]), dim=1).reshape(-1)
    return inside.to(device), codes.to(device)


def bin_of(scaled: Tensor) -> Tensor:
    """The bin, int32, of values in [-1, 1]; it never falls when a value rises."""
    return (scaled + 1.0).mul_(_BINS).to(torch.int32).clamp_(0, 2 * _BINS)


@_table
def byte_pairs(quant_type: str, device: torch.device) -> Tensor:
    """Both values of every packed byte, float32 ``[256, 2]``: high nibble first."""
    byte = torch.arange(256, device="cpu")
    values = torch.tensor(_VALUES[quant_type], dtype=torch.float32, device="cpu")
    return torch.stack((values[byte >> 4], values[byte & 15]), dim=1).contiguous().to(device)


@_table
def signed_dynamic_map(device: torch.device) -> Tensor:
    """The 8-bit signed dynamic data type, float32 ``[256]`` ascending; code 127 is exactly 0.

    For each exponent ``10**(i-6)``, ``i = 0..6``, the midpoints of ``2**i`` equal steps between
    0.1 and 1, with both signs, and besides them 0 and 1.
    """
    positive = _dynamic(0)
    values = [-value for value in positive] + [0.0, *positive, 1.0]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@_table
def unsigned_dynamic_map(device: torch.device) -> Tensor:
    """The same without a sign and with twice the steps; code 0 is exactly 0.

    For second moments of Adam (arXiv 2110.02861, section 1.3).
    """
    return torch.tensor(sorted([0.0, *_dynamic(1), 1.0]), dtype=torch.float32, device=device)


def _dynamic(finer: int) -> list[float]:
    values: list[float] = []
    for exponent in range(7):
        steps = 2 ** (exponent + finer)
        edges = torch.linspace(0.1, 1, steps + 1, dtype=torch.float32, device="cpu")
        values += (10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    return values


@_table
def signed_thresholds(device: torch.device) -> Tensor:
    """The 255 float32 midpoints between neighbours of `signed_dynamic_map`, ascending."""
    return _midpoints(signed_dynamic_map(torch.device("cpu"))).to(device)


@_table
def unsigned_thresholds(device: torch.device) -> Tensor:
    """The 255 float32 midpoints between neighbours of `unsigned_dynamic_map`, ascending."""
    return _midpoints(unsigned_dynamic_map(torch.device("cpu"))).to(device)


def _midpoints(values: Tensor) -> Tensor:
    return (values[:-1] + values[1:]) / 2


def normal_float(bits: int) -> Tensor:
    """The NormalFloat code of ``bits`` bits, derived from quantiles of the normal distribution.

    The QLoRA paper, section 3: the positive half takes ``2**(bits-1)`` quantiles, evenly spaced in
    probability from 1/2 to ``1 - tail``, the negative half one fewer from 1/2 to ``tail``; they
    share one zero, and both are divided by the outermost quantile, so that -1, 0 and 1 are codes.
    ``tail`` is the mean of half a bin of ``2**bits`` and half a bin of ``2**bits - 1`` equal bins:
    at 4 bits ``(1/32 + 1/30) / 2``, which is the 1 - 0.9677083 of the authors' code.

    For files the canonical 4-bit values are `NF4_VALUES`, which bitsandbytes ships and this module
    repeats; they were computed in narrower arithmetic and differ by up to 1.8e-7.

    Args:
        bits: 2 to 8.

    Returns:
        float32 ``[2**bits]``, ascending.

    Raises:
        ValueError: ``bits`` is no whole number from 2 to 8.
    """
    if not isinstance(bits, int) or bits not in range(2, 9):
        raise ValueError(f"bits {bits!r} is not one of 2, 3, 4, 5, 6, 7, 8")
    tail = (1 / 2**bits + 1 / (2**bits - 1)) / 4
    half = 2 ** (bits - 1)
    positive, negative = _normal_half(tail, half), -_normal_half(tail, half - 1).flip(0)
    return torch.cat((negative, positive.new_zeros(1), positive)).float()


def _normal_half(tail: float, count: int) -> Tensor:
    """``count`` quantiles above zero, float64 ascending to exactly 1."""
    probabilities = torch.linspace(0.5, tail, count + 1, dtype=torch.float64, device="cpu")
    quantiles = -torch.special.ndtri(probabilities[1:])
    return quantiles / quantiles[-1]
