"""Cross-entropy of rows of logits, which become their gradient in place; a row a program."""

# A kernel's call takes more than its definition says, and sizes become constants of Triton's.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourbit.ops.triton.language import rounded, tanh
from fourbit.ops.triton.registry import launch

_BLOCK = 4096


@triton.jit
def cross_entropy(
    logits, labels, losses, stride, scale, softcap,
    CAPPED: tl.constexpr, GRADIENT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Two passes over a row: its largest value and sum of exponentials, then the gradient."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    base = logits + row * stride
    label = tl.load(labels + row)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    wanted = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, WIDTH, BLOCK):
        place = start + column
        live = place < WIDTH
        value = tl.load(base + place, mask=live, other=0.0).to(tl.float32) * scale
        if CAPPED:
            value = softcap * tanh(value / softcap)
        wanted += tl.where(place == label, value, 0.0)
        value = tl.where(live, value, float("-inf"))
        # each lane keeps a sum of its own: one reduction a row
        higher = tl.maximum(largest, value)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(largest - shift) + tl.exp(value - shift)
        largest = higher
    top = tl.max(largest, axis=0)
    total = tl.sum(total * tl.exp(largest - top), axis=0)
    normalizer = top + tl.log(total)
    tl.store(losses + row, normalizer - tl.sum(wanted, axis=0))
    if GRADIENT:
        for start in range(0, WIDTH, BLOCK):
            place = start + column
            live = place < WIDTH
            value = tl.load(base + place, mask=live, other=0.0).to(tl.float32) * scale
            slope = tl.zeros((BLOCK,), tl.float32) + scale
            if CAPPED:
                squashed = tanh(value / softcap)
                value = softcap * squashed
                slope = (1.0 - squashed * squashed) * scale
            share = tl.exp(value - normalizer) - tl.where(place == label, 1.0, 0.0)
            result = rounded(share * slope, logits.dtype.element_ty)
            tl.store(base + place, result, mask=live)


def cross_entropy_rows_(
    logits: Tensor, labels: Tensor, scale: float, softcap: float | None, gradient: bool
) -> Tensor:
    """As `fourbit.ops.loss.cross_entropy_rows_`; the elements of a row lie side by side."""
    rows, width = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        block = min(_BLOCK, triton.next_power_of_2(width))
        launch(cross_entropy, (rows,))(
            logits, labels, losses, logits.stride(0), scale, softcap or 1.0,
            CAPPED=softcap is not None, GRADIENT=gradient, WIDTH=width, BLOCK=block, num_warps=8,
        )  # fmt: skip
    return losses
