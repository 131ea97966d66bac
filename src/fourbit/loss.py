"""Cross-entropy of a linear head, in chunks: the logits of a whole batch never exist.

Only supervised positions are multiplied with the head. The gradient with respect to the hidden
states is computed in the same pass, chunk by chunk, so the logits need not be made twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
_CHUNK_BYTES = 64 << 20
"""float32 logits alive at once; smaller chunks starve the matrix product."""


@dataclass(frozen=True)
class LogitTransform:
    """What a model does between its head and its logits, as its config declares it.

    ``logits = softcap * tanh(scale * raw / softcap)``; either part may be absent.
    """

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits from raw logits (float32, changed in place), and d logits / d raw if not 1."""
        if self.scale != 1.0:
            raw.mul_(self.scale)
        if self.softcap is None:
            return raw, None if self.scale == 1.0 else torch.tensor(self.scale)
        squashed = raw.div_(self.softcap).tanh_()
        slope = (1 - squashed.square()).mul_(self.scale)
        return squashed.mul_(self.softcap), slope


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
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        weight = weight_VH.to(hidden_TH.dtype)
        bias = None if bias_V is None else bias_V.to(hidden_TH.dtype)
        grad_hidden = torch.empty_like(hidden_TH) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros(weight_VH.shape[0], device=weight.device) if needs_bias else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_TH.device)
        rows = max(1, _CHUNK_BYTES // (4 * weight.shape[0]))
        for start in range(0, hidden_TH.shape[0], rows):
            chunk = hidden_TH[start : start + rows]
            target = labels_T[start : start + rows, None]
            raw = torch.nn.functional.linear(chunk, weight, bias).float()
            logits, slope = transform.apply(raw)
            normalizer = logits.logsumexp(dim=1, keepdim=True)
            total += (normalizer - logits.gather(1, target)).sum()
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            # d loss / d logits = softmax - onehot, written over the logits
            grad = logits.sub_(normalizer).exp_()
            grad.scatter_add_(1, target, grad.new_full(target.shape, -1.0))
            if slope is not None:
                grad.mul_(slope.to(grad.device))
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            narrow = grad.to(hidden_TH.dtype)
            if grad_hidden is not None:
                torch.mm(narrow, weight, out=grad_hidden[start : start + rows])
            if grad_weight is not None:
                grad_weight += narrow.t() @ chunk
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
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
    flat_labels = labels.reshape(-1)
    keep = flat_labels != IGNORE
    return _ChunkedCrossEntropy.apply(
        hidden.reshape(-1, hidden.shape[-1])[keep],
        weight,
        bias,
        flat_labels[keep],
        transform or LogitTransform(),
    )


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
