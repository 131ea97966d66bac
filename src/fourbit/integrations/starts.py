"""Adapters that start from the weight itself: PiSSA, OLoRA; and the orthogonal start.

PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775) begin with ``s·B₀·A₀``, the principal part of
W, and take it out of the base, so that training moves the directions that matter most.

On packed weights the subtraction must not be stored. Q(W) is all that is left of W, and it lies on
the 4-bit grid; ``Q(W) - s·B₀·A₀`` does not, so packing it again would add a second rounding error,
independent of the first: ``|W - Q(Q(W) - s·B₀·A₀) - s·B₀·A₀|² ≈ |W - Q(W)|² + |second error|²``.
Instead the base keeps its bytes and the layer computes

    ``y = Q(W)·x + s·(B·A - B₀·A₀)·x``

with B₀, A₀ frozen beside the adapter: the same function and the same gradients as with an exact
residual, at the start exactly Q(W), for one more product of rank r. Frozen digests, other adapters
and ``disable_adapter`` see the plain base, and ``[A | A₀]``, ``[B | -B₀]`` is an ordinary LoRA of
rank 2r with the same result, which is what PEFT's conversion on saving writes.

PiSSA's gain in precision (the residual has a smaller norm, so it rounds with a smaller error) needs
the 16-bit W: make the adapter on the 16-bit model and quantize that one; see
`fourbit.integrations.transformers.quantize_model`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from fourbit.errors import InputError

_NITER = re.compile(r"pissa_niter_(\d+)")
PLAIN = (True, False, None, "gaussian", "orthogonal")
"""Starts that do not look at the weight."""

_NEEDS_MORE = {
    "eva": "measures activations on data first",
    "corda": "measures activations on data first",
    "lora_ga": "measures gradients on data first",
    "loftq": "fits its own quantization of the 16-bit weight",
    "mica": "needs the smallest directions of the weight, which 4 bits do not keep",
}


def principal(name: object) -> bool:
    """Whether ``init_lora_weights`` starts from the principal part of the weight."""
    if not isinstance(name, str):
        return False
    return name in ("pissa", "olora") or _NITER.fullmatch(name) is not None


def reproducible(name: object) -> bool:
    """Whether PEFT, loading the adapter on the 16-bit base, changes the base as it did before."""
    if any(name is known or name == known for known in PLAIN):
        return True
    return name in ("pissa", "olora", "eva", "mica")


def check_start(name: object) -> None:
    """Raises unless an adapter on packed weights can start this way.

    Raises:
        InputError: naming the reason.
    """
    if principal(name) or any(name is known or name == known for known in PLAIN):
        return
    reason = _NEEDS_MORE.get(str(name).lower())
    portable = reason is not None and reproducible(name)
    raise InputError(
        "init-needs-weights" if reason else "unknown-init",
        where="lora.init_lora_weights",
        what=f"'{name}' {reason or 'is not known'}",
        fix="make the adapter on the 16-bit model, then call fourbit.quantize_model on it"
        if portable
        else "use true, gaussian, orthogonal, pissa, pissa_niter_4 or olora",
    )


@torch.no_grad()
def principal_part(weight: Tensor, *, r: int, scaling: float, name: str) -> tuple[Tensor, Tensor]:
    """``(A₀ [r, in], B₀ [out, r])`` in float32 of ``weight`` ``[out, in]``.

    PiSSA: ``s·B₀·A₀`` is the best approximation of rank r; the square roots of the singular values
    go to both sides. ``pissa_niter_N`` finds it by N rounds of a randomized search, whose random
    numbers are fixed, so that the same weight always gives the same start. OLoRA: the first r
    columns of Q and rows of R, unscaled as its authors have it.

    Raises:
        InputError: r exceeds the smaller side of the weight.
    """
    if r > min(weight.shape):
        raise InputError(
            "rank-too-large",
            where="lora.r",
            what=f"'{name}' has {min(weight.shape)} directions here, r is {r}",
            fix=f"use r <= {min(weight.shape)}, or set lora.rank_pattern",
        )
    weight = weight.float()
    if name == "olora":
        q, upper = torch.linalg.qr(weight)
        return upper[:r].contiguous(), q[:, :r].contiguous()
    if (match := _NITER.fullmatch(name)) is not None:
        devices = [weight.device] if weight.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(weight, q=r, niter=int(match[1]))
    else:
        left, values, rows = torch.linalg.svd(weight, full_matrices=False)
        left, values, right = left[:, :r], values[:r], rows[:r].t()
    root = (values / scaling).sqrt()
    return (root[:, None] * right.t()).contiguous(), (left * root).contiguous()


@torch.no_grad()
def orthogonal_pair(in_features: int, out_features: int, *, r: int) -> tuple[Tensor, Tensor]:
    """``(A, B)``, both random and not zero, with ``B·A = 0``: their inner spaces are orthogonal.

    Raises:
        InputError: r is odd, so the two inner spaces cannot be of one size.
    """
    if r % 2:
        raise InputError(
            "odd-rank",
            where="lora.r",
            what=f"'orthogonal' needs an even rank, r is {r}",
            fix=f"use {r + 1}",
        )
    basis, _ = torch.linalg.qr(torch.randn(r, r))
    A = 0.1 * basis[0::2].t() @ torch.randn(r // 2, in_features)
    B = 0.1 * torch.randn(out_features, r // 2) @ basis[1::2]
    return A, B


class Start(LoraVariant):
    """How PEFT computes ``s·(B·A - B₀·A₀)`` wherever our fused operation does not."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """The start was made with the weights."""

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """``W + s·(B·A - B₀·A₀)`` as a new tensor."""
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """The same in place."""
        orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The inverse of merging."""
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Adds the adapter's part to the base's ``result``."""
        A, B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        start_A = module.lora_start_A[active_adapter].to(x.dtype)
        start_B = module.lora_start_B[active_adapter].to(x.dtype)
        x = module.lora_dropout[active_adapter](x)
        before = nn.functional.linear(nn.functional.linear(x, start_A), start_B)
        return result + (B(A(x)) - before) * module.scaling[active_adapter]
