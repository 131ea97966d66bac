"""Products of frozen weights and of the thin factors of adapters, into given buffers.

On a CPU each is one native call, which takes adapters as they are (float32 or bf16, lying or
standing) and adds them inside the sums of the weight's product; the plain PyTorch form beside it
is the truth and serves elsewhere. Sums are float32.

Legend: M rows, K columns of activations, N columns of the result, R rank.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from fourbit import native
from fourbit.device import instruction_sets
from fourbit.fused.scratch import SCRATCH
from fourbit.fused.weights import Weights

_FEW_ROWS = 96
"""Below this many rows packing the other side costs more than a product of our own saves."""
_FAST = {
    "avx2": (torch.float32,),
    "avx512": (torch.float32,),
    "avx512_bf16": (torch.float32, torch.bfloat16),
}
"""What our products are faster in than torch's, by instruction set; measured on x86 only."""
_DECODING = ("avx512", "avx512_bf16")
"""Where decoding inside a product beats decoding before it: panels are as wide as a block."""
_FLOAT = torch.empty(0, dtype=torch.float32, device="cpu")


def _native(x: Tensor, *factors: Tensor) -> bool:
    if not native.reads(x) or x.shape[0] < _FEW_ROWS:
        return False
    if x.dtype not in _FAST.get(native.isa() or "", ()):
        return False
    return all(factor.dtype in (torch.float32, torch.bfloat16) for factor in factors)


def multiplies(x: Tensor, *factors: Tensor) -> bool:
    """Whether products with ``x`` are ours; else they are the library's, of expanded weights."""
    if x.dtype == torch.bfloat16 and "amx_bf16" in instruction_sets():
        return False  # the matrix unit is reached through torch's product only
    return _native(x, *factors)


def multiply(
    x: Tensor,
    weight: Tensor | Weights,
    out: Tensor,
    *,
    thin: tuple[Tensor, Tensor, float] | None = None,
    bias: Tensor | None = None,
    added: Tensor | None = None,
) -> None:
    """Writes ``x · weight + bias + scale * u · factor + added`` into ``out``.

    Args:
        x: ``[M, K]``, elements of a row side by side.
        weight: ``[K, N]``; a tensor in the dtype of ``x``, any strides.
        out: ``[M, N]``, elements of a row side by side.
        thin: ``(u, factor, scale)`` of an adapter, u ``[M, R]`` like x and factor ``[R, N]``,
            any strides, rounded to the dtype of ``x``.
        bias: ``[N]`` in the dtype of ``x``.
        added: ``[M, N]`` like ``out``, and not the same memory.
    """
    fields = None
    ours = multiplies(x, *(() if thin is None else (thin[1],)))
    if isinstance(weight, Weights):
        fields = weight.packed() if ours and native.isa() in _DECODING else None
        strides = weight.strides
        plain = weight.expanded(x) if fields is None else None
    else:
        plain, strides = weight, weight.stride()
    if plain is not None and not ours:
        start = bias if added is None else added
        if start is None:
            torch.mm(x, plain, out=out)
        else:
            torch.addmm(start, x, plain, out=out)
        if added is not None and bias is not None:
            out.add_(bias)
        if thin is not None:
            add_expanded_(out, thin[0], thin[1], scale=thin[2])
        return
    u, factor, scale = thin or (x[:, :0], x[:0], 1.0)
    (rows, depth), width, rank = x.shape, out.shape[1], u.shape[1]
    stored = None if fields is None else native.integers(*fields)
    layout = native.integers(
        *(rows, depth, width, rank, x.stride(0), u.stride(0), out.stride(0)),
        *(0 if added is None else added.stride(0), *strides, *factor.stride()),
    )
    wide_bias = None if bias is None else bias.float()
    _call(
        "linear_product",
        "pppppifpppp",
        x,
        *native.addresses(x, plain),
        None if stored is None else ctypes.addressof(stored),
        *native.addresses(u, factor),
        native.DTYPES[factor.dtype],
        scale,
        *native.addresses(wide_bias, added, out),
        ctypes.addressof(layout),
        room=_room("linear_room", rows, depth, width, rank),
    )


def reduce(x: Tensor, factor: Tensor, out: Tensor, *, scale: float = 1.0) -> None:
    """Writes ``scale * x · factorᵀ`` into ``out``.

    Args:
        x: ``[M, K]``, elements of a row side by side.
        factor: ``[R, K]``, any strides; rounded to the dtype of ``x``.
        out: ``[M, R]``, elements of a row side by side.
        scale: applied to the sum.
    """
    (rows, depth), rank = x.shape, factor.shape[0]
    if not _native(x, factor):
        torch.mm(x, factor.to(x.dtype).t(), out=out)
        if scale != 1.0:
            out.mul_(scale)
        return
    _call(
        "low_rank_reduce",
        "plpllipllllf",
        x,
        *(native.address(x), x.stride(0), native.address(factor), *factor.stride()[::-1]),
        *(native.DTYPES[factor.dtype], native.address(out), out.stride(0)),
        *(rows, depth, rank, scale),
        room=_room("low_rank_reduce_room", rows, depth, 0, rank),
    )


def add_expanded_(y: Tensor, u: Tensor, factor: Tensor, *, scale: float = 1.0) -> None:
    """Adds ``scale * u · factor`` to ``y``.

    Args:
        y: ``[M, N]``, elements of a row side by side.
        u: ``[M, R]``, likewise.
        factor: ``[R, N]``, any strides; rounded to the dtype of ``y``.
        scale: applied to the sum.
    """
    y.addmm_(u, factor.to(y.dtype), alpha=scale)


def gradient(u: Tensor, x: Tensor, out: Tensor, *, scale: float = 1.0) -> None:
    """Writes ``scale * uᵀ · x`` into ``out``.

    Args:
        u: ``[M, R]``, elements of a row side by side.
        x: ``[M, K]``, likewise, in the same dtype.
        out: ``[R, K]``, any strides; float32 or the dtype of ``x``.
        scale: applied to the sum.
    """
    (rows, rank), width = u.shape, x.shape[1]
    if not _native(x) or out.dtype != torch.float32:
        out.copy_(u.t() @ x)
        if scale != 1.0:
            out.mul_(scale)
        return
    _call(
        "low_rank_gradient",
        "plplplllllf",
        x,
        *(native.address(u), u.stride(0), native.address(x), x.stride(0), native.address(out)),
        *(*out.stride(), rows, rank, width, scale),
        room=_room("low_rank_gradient_room", rows, width, 0, rank),
    )


def _room(name: str, *sizes: int) -> int:
    return _asked(native.isa(), torch.get_num_threads(), name, sizes)


@lru_cache(maxsize=1024)
def _asked(_isa: str | None, threads: int, name: str, sizes: tuple[int, ...]) -> int:
    found = ctypes.c_int64()
    native.sizes(name, "llllip")(*sizes, threads, ctypes.addressof(found))
    return found.value


def _call(name: str, arguments: str, x: Tensor, *values: object, room: int) -> None:
    buffer = SCRATCH.take("product", (room,), _FLOAT)
    code = (native.address(buffer), native.DTYPES[x.dtype], torch.get_num_threads())
    native.kernel(name, arguments + "pii")(*values, *code)
