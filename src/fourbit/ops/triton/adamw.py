"""One pass of AdamW over a run of elements, its state in 32 bits or in blocks of 8-bit codes.

The bits are those of `fourbit.optim.update`: divisions and roots are correctly rounded, products
and sums are not fused.
"""

# A kernel's call takes more than its definition says, and sizes become constants of Triton's.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fourbit.ops.triton.language import quotient, rounded

_BLOCK = 1024
_CODES = tl.constexpr(256)  # elements of a block of 8-bit state, and entries of a map
_TINY = tl.constexpr(1e-38)


@triton.jit
def _rule(p, g, m, v, decay, rest1, beta2, rest2, step_size, root, eps):
    m = m + (g - m) * rest1
    v = v * beta2 + (g * g) * rest2
    change = quotient(m, tl.sqrt_rn(v) * root + eps)
    return p * decay - change * step_size, m, v


@triton.jit
def update(
    p, grad, m, v, numel, decay, rest1, beta2, rest2, step_size, root, eps, BLOCK: tl.constexpr
):
    """32-bit state."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = index < numel
    new_p, new_m, new_v = _rule(
        tl.load(p + index, mask=live, other=0.0).to(tl.float32),
        tl.load(grad + index, mask=live, other=0.0).to(tl.float32),
        tl.load(m + index, mask=live, other=0.0),
        tl.load(v + index, mask=live, other=1.0),
        decay, rest1, beta2, rest2, step_size, root, eps,
    )  # fmt: skip
    tl.store(p + index, rounded(new_p, p.dtype.element_ty), mask=live)
    tl.store(m + index, new_m, mask=live)
    tl.store(v + index, new_v, mask=live)


@triton.jit
def _encode(values, live, bounds, codes, absmax, index, block):
    """The nearest of 256 values: how many midpoints lie below, by bisection."""
    largest = tl.max(tl.where(live, tl.abs(values), 0.0), axis=0)
    floor = tl.maximum(largest, tl.full((), _TINY, tl.float32))
    scaled = values * quotient(tl.full((), 1.0, tl.float32), floor)
    low = tl.zeros((_CODES,), tl.int32)
    for power in tl.static_range(8):
        step = 1 << (7 - power)
        below = tl.load(bounds + low + step - 1) < scaled
        low += tl.where(below, step, 0)
    tl.store(codes + index, low.to(tl.uint8), mask=live)
    tl.store(absmax + block, largest)


@triton.jit
def update_blocks(
    p, grad, m_codes, m_absmax, m_map, m_bounds, v_codes, v_absmax, v_map, v_bounds, numel,
    decay, rest1, beta2, rest2, step_size, root, eps,
):  # fmt: skip
    """8-bit state, a block of 256 a program."""
    block = tl.program_id(0).to(tl.int64)
    index = block * _CODES + tl.arange(0, _CODES)
    live = index < numel
    m_code = tl.load(m_codes + index, mask=live, other=0).to(tl.int32)
    v_code = tl.load(v_codes + index, mask=live, other=0).to(tl.int32)
    new_p, new_m, new_v = _rule(
        tl.load(p + index, mask=live, other=0.0).to(tl.float32),
        tl.load(grad + index, mask=live, other=0.0).to(tl.float32),
        tl.load(m_map + m_code) * tl.load(m_absmax + block),
        tl.load(v_map + v_code) * tl.load(v_absmax + block),
        decay, rest1, beta2, rest2, step_size, root, eps,
    )  # fmt: skip
    tl.store(p + index, rounded(new_p, p.dtype.element_ty), mask=live)
    _encode(new_m, live, m_bounds, m_codes, m_absmax, index, block)
    _encode(new_v, live, v_bounds, v_codes, v_absmax, index, block)


def update_32bit(p: Tensor, grad: Tensor, m: Tensor, v: Tensor, rule: tuple[float, ...]) -> None:
    """See `fourbit.optim.update.update_32bit`; ``rule`` are its coefficients in order."""
    if p.numel():
        update[(triton.cdiv(p.numel(), _BLOCK),)](
            p, grad, m, v, p.numel(), *rule, BLOCK=_BLOCK, enable_fp_fusion=False
        )


def update_8bit(
    p: Tensor,
    grad: Tensor,
    m: tuple[Tensor, Tensor, Tensor, Tensor],
    v: tuple[Tensor, Tensor, Tensor, Tensor],
    rule: tuple[float, ...],
) -> None:
    """See `fourbit.optim.update.update_8bit`; a moment is ``(codes, absmax, map, midpoints)``."""
    if p.numel():
        update_blocks[(triton.cdiv(p.numel(), _CODES.value),)](
            p, grad, *m, *v, p.numel(), *rule, num_warps=4, enable_fp_fusion=False
        )
