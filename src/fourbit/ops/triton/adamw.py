"""One pass of AdamW over a run of elements, its state in 32 bits or in blocks of 8-bit codes.

The bits are those of `fourbit.optim.update`: divisions and roots are correctly rounded, products
and sums are not fused.
"""

# A kernel's call takes more than its definition says, and sizes become constants of Triton's.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourbit.ops.triton.language import quotient, rounded
from fourbit.ops.triton.registry import launch

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


@triton.jit
def update_table(
    table, decay, rest1, beta2, rest2, step_size, root, eps,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `update` on blocks of many tensors: a row of ``table`` is four addresses and a count."""
    row = table + tl.program_id(0).to(tl.int64) * 5
    place = tl.arange(0, BLOCK)
    p = tl.load(row).to(tl.pointer_type(DTYPE)) + place
    grad = tl.load(row + 1).to(tl.pointer_type(DTYPE)) + place
    m = tl.load(row + 2).to(tl.pointer_type(tl.float32)) + place
    v = tl.load(row + 3).to(tl.pointer_type(tl.float32)) + place
    live = place < tl.load(row + 4)
    new_p, new_m, new_v = _rule(
        tl.load(p, mask=live, other=0.0).to(tl.float32),
        tl.load(grad, mask=live, other=0.0).to(tl.float32),
        tl.load(m, mask=live, other=0.0),
        tl.load(v, mask=live, other=1.0),
        decay, rest1, beta2, rest2, step_size, root, eps,
    )  # fmt: skip
    tl.store(p, rounded(new_p, DTYPE), mask=live)
    tl.store(m, new_m, mask=live)
    tl.store(v, new_v, mask=live)


@triton.jit
def update_blocks_table(
    table, m_map, m_bounds, v_map, v_bounds, decay, rest1, beta2, rest2, step_size, root, eps,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """As `update_blocks` on blocks of many tensors: a row is six addresses and a count."""
    row = table + tl.program_id(0).to(tl.int64) * 7
    place = tl.arange(0, _CODES)
    p = tl.load(row).to(tl.pointer_type(DTYPE)) + place
    grad = tl.load(row + 1).to(tl.pointer_type(DTYPE)) + place
    m_codes = tl.load(row + 2).to(tl.pointer_type(tl.uint8))
    m_absmax = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    v_codes = tl.load(row + 4).to(tl.pointer_type(tl.uint8))
    v_absmax = tl.load(row + 5).to(tl.pointer_type(tl.float32))
    live = place < tl.load(row + 6)
    m_code = tl.load(m_codes + place, mask=live, other=0).to(tl.int32)
    v_code = tl.load(v_codes + place, mask=live, other=0).to(tl.int32)
    new_p, new_m, new_v = _rule(
        tl.load(p, mask=live, other=0.0).to(tl.float32),
        tl.load(grad, mask=live, other=0.0).to(tl.float32),
        tl.load(m_map + m_code) * tl.load(m_absmax),
        tl.load(v_map + v_code) * tl.load(v_absmax),
        decay, rest1, beta2, rest2, step_size, root, eps,
    )  # fmt: skip
    tl.store(p, rounded(new_p, DTYPE), mask=live)
    _encode(new_m, live, m_bounds, m_codes, m_absmax, place, 0)
    _encode(new_v, live, v_bounds, v_codes, v_absmax, place, 0)


_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def update_many(
    runs: Sequence[Sequence[Tensor]], tables: tuple[Tensor, ...], rule: tuple[float, ...]
) -> None:
    """Many runs of elements in one launch; see `fourbit.optim.update.update_runs`.

    Args:
        runs: values, gradient, then each moment: its tensor, or its codes and absmax; contiguous.
        tables: map and midpoints of each moment in 8 bits.
        rule: the scalars.
    """
    device, dtype = runs[0][0].device, _DTYPES[runs[0][0].dtype]
    block = _CODES.value if tables else _BLOCK
    # bytes from one block to the next; one scale a block
    steps = [block * t.element_size() for t in runs[0]]
    if tables:
        steps[3] = steps[5] = 4
    table = _blocks(runs, steps, block)
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    if tables:
        form = {"DTYPE": dtype, "num_warps": 4, "enable_fp_fusion": False}
        launch(update_blocks_table, (len(table),))(table, *tables, *rule, **form)
    else:
        form = {"DTYPE": dtype, "BLOCK": _BLOCK, "enable_fp_fusion": False}
        launch(update_table, (len(table),))(table, *rule, **form)


def _blocks(runs: Sequence[Sequence[Tensor]], steps: Sequence[int], block: int) -> Tensor:
    """A row for each block: where each tensor's part begins, and how many elements there are."""
    host = {"dtype": torch.int64, "device": "cpu"}
    starts = torch.tensor([[t.data_ptr() for t in run] for run in runs], **host)
    counts = torch.tensor([run[0].numel() for run in runs], **host)
    blocks = -(-counts // block)
    owner = torch.repeat_interleave(torch.arange(len(runs), **host), blocks)
    number = torch.arange(len(owner), **host) - (blocks.cumsum(0) - blocks)[owner]
    places = starts[owner] + number[:, None] * torch.tensor(list(steps), **host)
    left = (counts[owner] - block * number).clamp(max=block)
    return torch.cat((places, left[:, None]), dim=1)


def update_32bit(p: Tensor, grad: Tensor, m: Tensor, v: Tensor, rule: tuple[float, ...]) -> None:
    """See `fourbit.optim.update.update_32bit`; ``rule`` are its coefficients in order."""
    if p.numel():
        launch(update, (triton.cdiv(p.numel(), _BLOCK),))(
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
        launch(update_blocks, (triton.cdiv(p.numel(), _CODES.value),))(
            p, grad, *m, *v, p.numel(), *rule, num_warps=4, enable_fp_fusion=False
        )
