"""One step of AdamW on a run of elements, its state in 32 bits or in blocks of 8-bit codes.

The rule is Loshchilov and Hutter's (arXiv 1711.05101) as PyTorch has it. 8-bit state is that of
Dettmers et al. (arXiv 2110.02861): blocks of 256 with a float32 scale each, the first moment in the
signed dynamic map, the second in the unsigned one; a step decodes a block, updates in float32 and
codes it again. On a CPU one native pass does it, on a GPU one of Triton; the plain PyTorch form is
the truth and serves elsewhere, with the same bits.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fourbit import codebook, native
from fourbit.ops.triton import serves

BLOCK = 256
_TINY = 1e-38


@dataclass(frozen=True)
class Coefficients:
    """The scalars of one step; each is rounded to float32 where it is used.

    Attributes:
        decay: ``1 - lr * weight_decay``.
        rest1: ``1 - beta1``.
        beta2: decay of the second moment.
        rest2: ``1 - beta2``.
        step_size: ``lr / (1 - beta1**step)``.
        root: ``1 / sqrt(1 - beta2**step)``.
        eps: added to the root of the second moment.
    """

    decay: float
    rest1: float
    beta2: float
    rest2: float
    step_size: float
    root: float
    eps: float

    @classmethod
    def of(cls, group: Mapping[str, Any], step: int) -> Coefficients:
        """For the ``step``-th update, from 1, of a parameter of ``group``."""
        beta1, beta2 = group["betas"]
        lr = float(group["lr"])
        return cls(
            decay=1 - lr * group["weight_decay"],
            rest1=1 - beta1,
            beta2=beta2,
            rest2=1 - beta2,
            step_size=lr / (1 - beta1**step),
            root=(1 - beta2**step) ** -0.5,
            eps=group["eps"],
        )


@dataclass(frozen=True)
class Moment:
    """A moment in 8 bits.

    Attributes:
        codes: uint8 ``[n]``.
        absmax: float32 ``[ceil(n / 256)]``.
        signed: which map the codes belong to.
    """

    codes: Tensor
    absmax: Tensor
    signed: bool

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """The map, float32 ``[256]``, and its midpoints, float32 ``[255]``."""
        device = self.codes.device
        if self.signed:
            return codebook.signed_dynamic_map(device), codebook.signed_thresholds(device)
        return codebook.unsigned_dynamic_map(device), codebook.unsigned_thresholds(device)

    def decode(self) -> Tensor:
        """The values, float32 ``[n]``."""
        scales = self.absmax.repeat_interleave(BLOCK)[: self.codes.numel()]
        return self.tables[0][self.codes.int()] * scales

    def encode_(self, values: Tensor) -> None:
        """Takes the nearest codes of ``values``, float32 ``[n]``."""
        short = -values.numel() % BLOCK
        blocks = torch.nn.functional.pad(values, (0, short)).view(-1, BLOCK)
        absmax = blocks.abs().amax(dim=1)
        scaled = blocks * (1.0 / absmax.clamp(min=_TINY))[:, None]
        codes = torch.searchsorted(self.tables[1], scaled).to(torch.uint8)
        self.absmax.copy_(absmax)
        self.codes.copy_(codes.view(-1)[: values.numel()])


def update_32bit(p: Tensor, grad: Tensor, m: Tensor, v: Tensor, c: Coefficients) -> None:
    """Updates ``p`` and its moments in place.

    Args:
        p: ``[n]``, contiguous, of any floating dtype.
        grad: ``[n]`` like ``p``.
        m: first moment, float32 ``[n]``.
        v: second moment, float32 ``[n]``.
        c: the step's scalars.
    """
    if _native_serves(p, grad):
        rule = _rule(c)
        native.kernel("adamw_32bit", "pppplpii")(
            *(*native.addresses(p, grad, m, v), p.numel()),
            *(ctypes.addressof(rule), native.DTYPES[p.dtype], torch.get_num_threads()),
        )
        return
    if serves(p, grad, m, v):
        from fourbit.ops.triton import adamw

        adamw.update_32bit(p, grad, m, v, astuple(c))
        return
    wide = grad.float()
    m.add_((wide - m).mul_(c.rest1))
    v.mul_(c.beta2).add_((wide * wide).mul_(c.rest2))
    # torch's float32 root of a CPU may be an ulp off; through float64 it is the right one
    change = m / v.double().sqrt_().float().mul_(c.root).add_(c.eps)
    p.copy_((p.float() * c.decay).sub_(change.mul_(c.step_size)))


def update_8bit(p: Tensor, grad: Tensor, m: Moment, v: Moment, c: Coefficients) -> None:
    """As `update_32bit` with the moments in 8 bits; ``p`` begins where a block begins."""
    if _native_serves(p, grad):
        rule, first, second = _rule(c), _fields(m), _fields(v)
        native.kernel("adamw_8bit", "pppplpii")(
            *(*native.addresses(p, grad), ctypes.addressof(first), ctypes.addressof(second)),
            *(p.numel(), ctypes.addressof(rule), native.DTYPES[p.dtype], torch.get_num_threads()),
        )
        return
    if serves(p, grad, m.absmax, v.absmax):
        from fourbit.ops.triton import adamw

        first, second = ((one.codes, one.absmax, *one.tables) for one in (m, v))
        adamw.update_8bit(p, grad, first, second, astuple(c))
        return
    first, second = m.decode(), v.decode()
    update_32bit(p, grad, first, second, c)
    m.encode_(first)
    v.encode_(second)


class Run(NamedTuple):
    """What one update takes: elements, their gradient, and two moments in 32 or in 8 bits."""

    p: Tensor
    grad: Tensor
    m: Tensor | Moment
    v: Tensor | Moment


def update_runs(runs: Sequence[Run], c: Coefficients) -> None:
    """`update_32bit` or `update_8bit` of each, with the same bits; on a GPU in one launch.

    Args:
        runs: of one dtype, on one device, their moments all in 32 bits or all in 8.
        c: the step's scalars.
    """
    together = len(runs) > 1 and not any(_native_serves(run.p, run.grad) for run in runs)
    if together and serves(*(tensor for run in runs for tensor in (run.p, run.grad))):
        from fourbit.ops.triton import adamw

        first = runs[0].m
        tables = () if isinstance(first, Tensor) else (*first.tables, *_second(runs[0]).tables)
        adamw.update_many([_tensors(run) for run in runs], tables, astuple(c))
        return
    for p, grad, m, v in runs:
        update = update_32bit if isinstance(m, Tensor) else update_8bit
        update(p, grad, m, v, c)  # type: ignore[arg-type]


def _second(run: Run) -> Moment:
    assert isinstance(run.v, Moment)
    return run.v


def _tensors(run: Run) -> list[Tensor]:
    """In the order in which the kernels take them."""
    moments = [[m] if isinstance(m, Tensor) else [m.codes, m.absmax] for m in (run.m, run.v)]
    return [run.p, run.grad, *moments[0], *moments[1]]


def _native_serves(p: Tensor, grad: Tensor) -> bool:
    ours = p.device.type == "cpu" and native.isa() is not None and p.dtype in native.DTYPES
    return ours and grad.dtype == p.dtype


def _rule(c: Coefficients) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(struct.pack("7f", *astuple(c)), 7 * 4)


def _fields(moment: Moment) -> ctypes.Array[ctypes.c_int64]:
    tables = (native.address(table) for table in moment.tables)
    return native.integers(*native.addresses(moment.codes, moment.absmax), *tables)
