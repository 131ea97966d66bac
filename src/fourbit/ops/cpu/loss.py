"""The head's loss on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fourbit import native
from fourbit.ops import loss as plain
from fourbit.ops.cpu.registry import NARROW_OR_WIDE, cpu_kernel, threads


@cpu_kernel("cross_entropy_rows_")
def cross_entropy_rows_(
    logits: Tensor, labels: Tensor, scale: float, softcap: float | None, gradient: bool
) -> Tensor:
    """As `fourbit.ops.loss.cross_entropy_rows_`, in three passes over each row."""
    rows, vocab = logits.shape
    if logits.dtype not in NARROW_OR_WIDE or not logits.is_contiguous() or softcap == 0.0:
        return plain.cross_entropy_rows_(logits, labels, scale, softcap, gradient)
    labels = labels.to(torch.int64).contiguous()
    known = rows > 0 and not isinstance(labels, FakeTensor)
    if known and not 0 <= int(labels.min()) <= int(labels.max()) < vocab:
        raise IndexError(f"a label is not in [0, {vocab})")
    losses = torch.empty(rows, dtype=torch.float32)
    workers = max(1, min(threads(), rows))
    powers = torch.empty(workers, vocab, dtype=torch.float32) if gradient else None
    native.kernel("cross_entropy_rows", "ppppllffii")(
        *native.addresses(logits, labels, losses, powers),
        rows,
        vocab,
        scale,
        softcap or 0.0,
        native.DTYPES[logits.dtype],
        workers,
    )
    return losses
