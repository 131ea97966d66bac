"""What several kernels share: rounding that also holds in the interpreter, and exact arithmetic.

Imports Triton: only modules of kernels import this one.
"""

# A kernel's call takes more than its definition says, and sizes become constants of Triton's.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
from __future__ import annotations

import triton
import triton.language as tl

from fourbit.ops.triton.registry import interpreted

INTERPRETED = tl.constexpr(interpreted())
"""Whether kernels of this process are interpreted; decided when they are first imported."""


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 to ``dtype``, to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # the interpreter cuts float32 off instead of rounding it
        bits = x.to(tl.int32, bitcast=True)
        even = (bits >> 16) & 1
        short = ((bits + 0x7FFF + even) >> 16).to(tl.int16)
        nan = x != x
        return tl.where(nan, 0x7FC0, short).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def quotient(a, b):
    """``a / b`` in float32, correctly rounded: a GPU's own division is not."""
    return tl.math.div_rn(a, b)


@triton.jit
def tanh(x):
    """To some 1e-7 absolutely; through the exponential, because the interpreter has no other."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def sigmoid(x):
    """Without overflow on either side."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)
