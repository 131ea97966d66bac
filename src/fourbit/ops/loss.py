"""The op under the chunked head loss: definition, fake, and the plain PyTorch kernel.

Legend: M rows of logits, V words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourbit.ops.schema import LIBRARY, default_kernel

LIBRARY.define(
    "cross_entropy_rows_(Tensor(a!) logits, Tensor labels, float scale, float? softcap,"
    " bool gradient) -> Tensor"
)


@torch.library.register_fake("fourbit::cross_entropy_rows_", lib=LIBRARY)
def _(
    logits: Tensor, labels: Tensor, scale: float, softcap: float | None, gradient: bool
) -> Tensor:
    return logits.new_empty((logits.shape[0],), dtype=torch.float32)


@default_kernel("cross_entropy_rows_")
def cross_entropy_rows_(
    logits: Tensor, labels: Tensor, scale: float, softcap: float | None, gradient: bool
) -> Tensor:
    """Losses float32 ``[M]`` of ``softcap * tanh(scale * logits / softcap)``.

    With ``gradient`` the logits ``[M, V]`` become the gradient of the losses' sum with respect
    to them; without it they stay as they are. Arithmetic is float32.
    """
    # the float32 temporaries are worked on in place: there may be room for one, not for four
    values = logits.to(torch.float32, copy=logits.dtype == torch.float32 and not gradient)
    if scale != 1.0:
        values.mul_(scale)
    slope = None
    if softcap is not None:
        squashed = values.div_(softcap).tanh_()
        slope = (1 - squashed.square()).mul_(scale) if gradient else None
        values = squashed.mul_(softcap)
    normalizer = values.logsumexp(dim=1, keepdim=True)
    target = labels[:, None]
    losses = (normalizer - values.gather(1, target)).squeeze(1)
    if gradient:
        # d loss / d logits = softmax - onehot
        values.sub_(normalizer).exp_()
        values.scatter_add_(1, target, values.new_full(target.shape, -1.0))
        if slope is not None:
            values.mul_(slope)
        elif scale != 1.0:
            values.mul_(scale)
        if values is not logits:
            logits.copy_(values)
    return losses
