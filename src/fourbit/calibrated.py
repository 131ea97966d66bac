"""Quantizing one matrix for the inputs it will see: same codes, same scales, same bytes as ever.

The error of a layer's output is ``tr((W - Q) H (W - Q)ᵀ)``, ``H`` the inputs' second moments.
Two steps make it small where plain absmax makes the weights' own error small:

1. Each block's scale is searched near its absmax: least squared error, weighted by ``diag H``.
2. Weights are rounded column by column, and what a column's rounding did to the output is
   made up for in the columns that are still free (GPTQ, arXiv 2210.17323, on these codes). The
   columns with the largest inputs come first, while most of the others are still free; blocks and
   scales stay where they are, so the file has no order to remember. With double quantization the
   rounding already uses the scale that the file will hold.

Legend: N outputs, K inputs, b blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fourbit import codebook, ops
from fourbit.ops.reference import scales_float32
from fourbit.quantize import QuantState, check_finite

DAMPING = 0.01
"""Share of the mean second moment that is added to each: keeps feedback from following noise."""
_FACTORS = tuple(0.80 + 0.015 * step for step in range(17))
_COLUMNS = 64
_CHUNK = 1 << 22


@dataclass(frozen=True)
class _Grid:
    """What one scale is multiplied with: values ascending, thresholds between them, their codes."""

    values: Tensor
    thresholds: Tensor
    codes: Tensor

    @classmethod
    def of(cls, quant_type: str, device: torch.device) -> _Grid:
        if quant_type == "int8":
            values = torch.arange(-127, 128, device=device)
            scaled = values.float() / 127
            return cls(scaled, (scaled[:-1] + scaled[1:]) / 2, values.to(torch.int8))
        order = codebook.ascending_codes(quant_type, device)
        values = codebook.code(quant_type, device)[order.long()]
        return cls(values, codebook.thresholds(quant_type, device), order)

    def nearest(self, scaled: Tensor) -> Tensor:
        """Places, int64, of the nearest values."""
        return torch.bucketize(scaled, self.thresholds)


def quantize_4bit_for(
    weight: Tensor,
    moments: Tensor,
    *,
    quant_type: codebook.QuantType = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    damping: float = DAMPING,
    name: str = "tensor",
) -> tuple[Tensor, QuantState]:
    """`fourbit.quantize.quantize_4bit` for known inputs.

    Args:
        weight: float32, float16 or bfloat16 ``[N, K]``.
        moments: float32 ``[K, K]``, the sum (or mean) of ``x xᵀ`` over inputs x.
        quant_type: ``nf4``, ``fp4`` or ``int4``.
        blocksize: one of `fourbit.codebook.BLOCKSIZES`.
        double_quant: quantize the scales to 8 bits as well.
        damping: see `DAMPING`.
        name: how errors call the tensor.

    Returns:
        As `fourbit.quantize.quantize_4bit`.

    Raises:
        ModelError: NaN or Inf in ``weight``.
        ValueError: moments of another size, or not finite.
    """
    check_finite(weight, name=name)
    _check_moments(weight, moments, name)
    grid = _Grid.of(quant_type, weight.device)
    wanted = weight.detach().float()
    scales = _search(wanted, moments.diagonal(), grid, blocksize)
    absmax, nested_absmax, nested_offset = scales, None, None
    if double_quant:
        absmax, nested_absmax, nested_offset = ops.quantize_absmax(scales)
        scales = scales_float32(absmax, nested_absmax, nested_offset)
    spread = scales.repeat_interleave(blocksize)[: weight.numel()].view(weight.shape)
    codes = _round_with_feedback(wanted, spread, moments, grid, damping).flatten()
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=int(grid.codes[grid.nearest(_ZERO)]))
    packed = (codes[::2] << 4) | codes[1::2]
    state = QuantState(
        absmax, nested_absmax, nested_offset, quant_type, blocksize, weight.shape, weight.dtype
    )
    return packed[:, None], state


def quantize_int8_for(
    weight: Tensor, moments: Tensor, *, damping: float = DAMPING, name: str = "tensor"
) -> tuple[Tensor, Tensor]:
    """`fourbit.quantize.quantize_int8` for known inputs: codes int8 ``[N, K]`` and absmax ``[N]``.

    Raises:
        ModelError: NaN or Inf in ``weight``.
        ValueError: moments of another size, or not finite.
    """
    check_finite(weight, name=name)
    _check_moments(weight, moments, name)
    grid = _Grid.of("int8", weight.device)
    wanted = weight.detach().float()
    scales = _search(wanted, moments.diagonal(), grid, weight.shape[1])
    spread = scales[:, None].expand_as(wanted)
    return _round_with_feedback(wanted, spread, moments, grid, damping), scales


_ZERO = torch.zeros(1)


def _check_moments(weight: Tensor, moments: Tensor, name: str) -> None:
    size = (weight.shape[1], weight.shape[1])
    if weight.dim() != 2 or tuple(moments.shape) != size:
        raise ValueError(f"{name}: moments are {list(moments.shape)}, not {list(size)}")
    if not torch.isfinite(moments).all():
        raise ValueError(f"{name}: the inputs' second moments are not finite")


def _search(weight: Tensor, importance: Tensor, grid: _Grid, blocksize: int) -> Tensor:
    """Scales ``[b]`` with the least weighted squared error among `_FACTORS` times absmax."""
    rows = -(-_CHUNK // weight.shape[1])
    # whole rows at a time, such that blocks do not straddle the pieces
    while rows * weight.shape[1] % blocksize and rows < weight.shape[0]:
        rows += 1
    found = [
        _search_rows(weight[start : start + rows], importance, grid, blocksize)
        for start in range(0, weight.shape[0], rows)
    ]
    return torch.cat(found)


def _search_rows(weight: Tensor, importance: Tensor, grid: _Grid, blocksize: int) -> Tensor:
    missing = -weight.numel() % blocksize
    spread = importance.expand_as(weight).reshape(-1)
    blocks, weights = (
        torch.nn.functional.pad(flat, (0, missing)).view(-1, blocksize)
        for flat in (weight.reshape(-1), spread)
    )
    absmax = blocks.abs().amax(1)
    unit = blocks / absmax.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    best = torch.full_like(absmax, torch.inf)
    chosen = torch.ones_like(absmax)
    for factor in _FACTORS:
        restored = grid.values[grid.nearest(unit / factor)].mul_(factor)
        error = restored.sub_(unit).square_().mul_(weights).sum(1)
        better = error < best
        best = torch.where(better, error, best)
        chosen[better] = factor
    return absmax * chosen


def _round_with_feedback(
    weight: Tensor, scales: Tensor, moments: Tensor, grid: _Grid, damping: float
) -> Tensor:
    """Codes ``[N, K]``; ``scales`` is that of each weight, ``[N, K]``."""
    order = moments.diagonal().argsort(descending=True, stable=True)
    upper = _feedback(moments[order][:, order], damping)
    left, scales = weight[:, order], scales[:, order]
    codes = torch.empty(weight.shape, dtype=grid.codes.dtype, device=weight.device)
    # a scale of 0 restores 0 whatever the code is
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    for start in range(0, weight.shape[1], _COLUMNS):
        stop = min(start + _COLUMNS, weight.shape[1])
        here = left[:, start:stop].t().contiguous()
        scale, turned = scales[:, start:stop].t().contiguous(), inverse[:, start:stop].t()
        errors = torch.empty_like(here)
        for column in range(stop - start):
            places = grid.nearest(here[column] * turned[column])
            codes[:, order[start + column]] = grid.codes[places]
            row = upper[start + column, start:stop]
            error = here[column].sub(grid.values[places] * scale[column]).div_(row[column])
            errors[column] = error
            if column + 1 < stop - start:
                here[column + 1 :].addr_(row[column + 1 :], error, alpha=-1)
        left[:, stop:].addmm_(errors.t(), upper[start:stop, stop:], alpha=-1)
    return codes


def _feedback(moments: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped moments.

    More damping is tried where rounding left the moments indefinite.
    """
    moments = moments.clone()
    diagonal = moments.diagonal()
    never = diagonal <= 0  # inputs that were always 0: their weights are rounded as they are
    diagonal[never] = 1.0
    mean = diagonal[~never].mean() if not never.all() else diagonal.mean()
    for _ in range(6):
        diagonal += damping * mean
        lower, failed = torch.linalg.cholesky_ex(moments)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper
        damping = max(10 * damping, 1e-6)
    raise ValueError("the inputs' second moments cannot be inverted")
