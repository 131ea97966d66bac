"""Cross-entropy of a linear head, in chunks: the logits of a whole batch never exist.

Only supervised positions are multiplied with the head. The gradient with respect to the hidden
states is computed in the same pass, chunk by chunk, so the logits need not be made twice; all
chunks share the memory of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fourbit.ops import cross_entropy_rows_

IGNORE = -100
CHUNK_BYTES = 64 << 20
"""Logits alive at once, were they float32; smaller chunks starve the matrix product."""
_ROWS = 32
"""Products have a multiple of as many rows. Every batch has another number of supervised positions,
and oneDNN keeps compiled code for each shape it ever saw: 30 MB after a hundred steps."""


@dataclass(frozen=True)
class LogitTransform:
    """What a model does between its head and its logits, as its config declares it.

    ``logits = softcap * tanh(scale * raw / softcap)``; either part may be absent.
    """

    scale: float = 1.0
    softcap: float | None = None


def _sum_and_gradients(
    tensors: tuple[Tensor, Tensor, Tensor | None],
    labels_T: Tensor,
    transform: LogitTransform,
    *,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The float32 sum of losses, and the gradients of it that are needed.

    Args:
        tensors: hidden states ``[T, H]``, head ``[V, H]`` and its bias ``[V]``.
        labels_T: -100 is not supervised.
        transform: softcap and scale of the logits.
        needs: for which of the tensors a gradient is made.
    """
    hidden_TH, weight_VH, bias_V = tensors
    weight = weight_VH.to(hidden_TH.dtype)
    bias = None if bias_V is None else bias_V.to(hidden_TH.dtype)
    # positions that are not supervised keep the gradient 0
    grad_hidden = torch.zeros_like(hidden_TH) if needs[0] else None
    grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32) if needs[1] else None
    grad_bias = torch.zeros(weight_VH.shape[0], device=weight.device) if needs[2] else None
    total = torch.zeros((), dtype=torch.float64, device=hidden_TH.device)
    for positions, chunk, logits in _chunks(hidden_TH, labels_T, weight.shape[0]):
        if bias is None:
            torch.mm(chunk, weight.t(), out=logits)
        else:
            torch.addmm(bias, chunk, weight.t(), out=logits)
        labels = labels_T[positions]
        live = labels.shape[0]
        losses = cross_entropy_rows_(
            logits[:live],
            labels,
            scale=transform.scale,
            softcap=transform.softcap,
            gradient=any(needs),
        )
        total += losses.sum(dtype=torch.float64)
        grad = logits
        if grad_bias is not None:
            grad_bias += grad[:live].sum(0, dtype=torch.float32)
        if grad_hidden is not None and isinstance(positions, slice) and live == len(grad):
            torch.mm(grad, weight, out=grad_hidden[positions])
        elif grad_hidden is not None:
            grad_hidden[positions] = (grad @ weight)[:live]
        if grad_weight is not None:  # the rows that are none are zeros of `chunk`
            grad_weight += grad.t() @ chunk
    return total.float(), (grad_hidden, grad_weight, grad_bias)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of token losses; saves only gradients of the sum."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        labels_T: Tensor,
        transform: LogitTransform,
    ) -> Tensor:
        total, gradients = _sum_and_gradients(
            (hidden_TH, weight_VH, bias_V), labels_T, transform, needs=ctx.needs_input_grad[:3]
        )
        ctx.save_for_backward(*gradients)
        ctx.dtypes = (weight_VH.dtype, None if bias_V is None else bias_V.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        # `grad` carries 1/N and the fp16 loss scale: applied here, not in the saved fp16 values.
        return (
            None if grad_hidden is None else (grad_hidden * grad).to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad).to(weight_dtype),
            None if grad_bias is None else (grad_bias * grad).to(bias_dtype),
            None,
            None,
        )


def _chunks(
    hidden_TH: Tensor, labels_T: Tensor, vocab: int
) -> Iterator[tuple[Tensor | slice, Tensor, Tensor]]:
    """Supervised positions some at a time: which, their hidden states, room for their logits.

    The room is the same memory each time: fresh memory costs more than what is done with it. States
    and room may have more rows than there are positions; the states in them are zeros.
    """
    if isinstance(labels_T, FakeTensor):  # a plan's, of which all may count
        supervised = torch.arange(labels_T.numel())
    else:
        supervised = (labels_T != IGNORE).nonzero().squeeze(1)
    count = supervised.numel()
    chunks = -(-count // max(1, CHUNK_BYTES // (4 * vocab)))
    rows = max(1, -(-count // max(1, chunks)))  # no last chunk of a few rows: it would cost as much
    logits = hidden_TH.new_empty((_rounded(rows), vocab))
    for start in range(0, count, rows):
        stop = min(start + rows, count)
        whole = count == labels_T.numel()
        positions = slice(start, stop) if whole else supervised[start:stop]
        chunk = hidden_TH[positions]
        padded = _rounded(len(chunk))
        if padded != len(chunk):
            chunk = torch.nn.functional.pad(chunk, (0, 0, 0, padded - len(chunk)))
        yield positions, chunk, logits[:padded]


def _rounded(rows: int) -> int:
    return -(-rows // _ROWS) * _ROWS


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform | None = None,
) -> Tensor:
    """Sum of the losses of all supervised positions (divide by their number yourself).

    Args:
        hidden: ``[..., H]``, the head's input at each position.
        weight: ``[V, H]``, the head.
        labels: ``[...]`` int64, already aligned: ``labels[t]`` is what ``hidden[t]`` predicts;
            -100 is not supervised.
        bias: ``[V]``.
        transform: softcap and scale of the logits.

    Returns:
        A float32 scalar, differentiable in ``hidden``, ``weight`` and ``bias``.
    """
    flat_hidden, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    how = transform or LogitTransform()
    if not torch.is_grad_enabled():
        tensors = flat_hidden, weight, bias
        return _sum_and_gradients(tensors, flat_labels, how, needs=(False, False, False))[0]
    return _ChunkedCrossEntropy.apply(flat_hidden, weight, bias, flat_labels, how)


@torch.no_grad()
def token_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform | None = None,
) -> tuple[Tensor, Tensor]:
    """What each label costs, and whether it is the likeliest token; no gradients.

    Args:
        hidden: ``[N, H]``, the head's input.
        weight: ``[V, H]``, the head.
        labels: ``[N]`` int64, none of them -100.
        bias: ``[V]``.
        transform: softcap and scale of the logits.

    Returns:
        Losses in nats, float32 ``[N]``, and bool ``[N]``.
    """
    how = transform or LogitTransform()
    losses = torch.empty(labels.shape[0], dtype=torch.float32, device=hidden.device)
    likeliest = torch.empty(labels.shape[0], dtype=torch.bool, device=hidden.device)
    head = weight.to(hidden.dtype).t()
    for positions, chunk, logits in _chunks(hidden, labels, weight.shape[0]):
        if bias is None:
            torch.mm(chunk, head, out=logits)
        else:
            torch.addmm(bias.to(hidden.dtype), chunk, head, out=logits)
        wanted = labels[positions]
        logits = logits[: wanted.shape[0]]
        likeliest[positions] = logits.argmax(-1) == wanted
        losses[positions] = cross_entropy_rows_(
            logits, wanted, scale=how.scale, softcap=how.softcap, gradient=False
        )
    return losses, likeliest


def logits_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The same sum from materialised logits ``[..., V]``, for heads that are no plain linear."""
    flat = labels.reshape(-1)
    keep = flat != IGNORE
    return torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1])[keep].float(), flat[keep], reduction="sum"
    )


def shift_labels(labels: Tensor) -> Tensor:
    """``labels [B, T]`` moved one to the left: position t is asked for token t + 1."""
    shifted = torch.full_like(labels, IGNORE)
    shifted[:, :-1] = labels[:, 1:]
    return shifted
