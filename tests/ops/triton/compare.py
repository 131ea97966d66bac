"""Compares every Triton kernel with the plain PyTorch one: ``compare.py GROUP cpu|cuda``.

Outputs begin as NaN, so that what is not written is seen; sizes are odd on purpose.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import astuple

import torch
from torch import Tensor

from fourbit import codebook, native
from fourbit.fused import primitives
from fourbit.fused.parts import Norm
from fourbit.ops import attention_schema, reference
from fourbit.ops import loss as plain_loss
from fourbit.ops.triton import adamw, dequantize, elementwise, kernels, loss, product
from fourbit.ops.triton import attention as flash
from fourbit.ops.triton import quantize as packing
from fourbit.optim import update

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = ("nf4", "fp4", "int4")
SHAPES = ((17, 192), (5, 7), (1, 1), (3, 64))
DEVICE = torch.device("cpu")


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype).to(DEVICE)


def unwritten(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs), (ours.flatten()[:8], theirs.flatten()[:8])


def close(ours: Tensor, theirs: Tensor, *, ulps: float = 4, least: float = 1e-6) -> None:
    """Equal to a few roundings of the dtype, by norm, which counts as no less than ``least``."""
    assert ours.dtype == theirs.dtype
    assert ours.isfinite().all()
    scale = theirs.float().norm().clamp(min=least)
    error = ((ours.float() - theirs.float()).norm() / scale).item()
    assert error <= ulps * torch.finfo(ours.dtype).eps, error


def plainly(function, *arguments, **keywords):
    """The plain PyTorch form of a function that would choose a kernel."""
    before = native.reads, primitives.serves, update.serves, kernels.serves
    native.reads = primitives.serves = update.serves = kernels.serves = lambda *_: False
    update._native_serves, mine = (lambda *_: False), update._native_serves
    try:
        return function(*arguments, **keywords)
    finally:
        native.reads, primitives.serves, update.serves, kernels.serves = before
        update._native_serves = mine


def quantize() -> None:
    for kind in FORMATS:
        for blocksize in (32, 64, 4096):
            for shape in SHAPES:
                for dtype in DTYPES:
                    weight = randn(*shape, dtype=dtype)
                    weight.view(-1)[0] = 0
                    wanted = reference.quantize_4bit(weight, blocksize, kind)
                    for ours, theirs in zip(
                        packing.quantize_4bit(weight, blocksize, kind), wanted, strict=True
                    ):
                        same(ours, theirs)
    zeros = torch.zeros(130, device=DEVICE)
    for ours, theirs in zip(
        packing.quantize_4bit(zeros, 64, "nf4"), reference.quantize_4bit(zeros, 64, "nf4"),
        strict=True,
    ):  # fmt: skip
        same(ours, theirs)
    # values on the thresholds themselves, and one step to either side
    edges = codebook.thresholds("nf4", DEVICE)
    near = torch.stack(
        [edges, torch.nextafter(edges, edges + 1), torch.nextafter(edges, edges - 1)]
    ).flatten()
    near = torch.cat((torch.ones(1, device=DEVICE), near, torch.zeros(64 - near.numel() - 1)))
    same(packing.quantize_4bit(near, 64, "nf4")[0], reference.quantize_4bit(near, 64, "nf4")[0])


def dequantize_() -> None:
    for kind in FORMATS:
        for blocksize in (32, 64, 4096):
            for shape in SHAPES:
                packed, absmax = reference.quantize_4bit(randn(*shape), blocksize, kind)
                nested = reference.quantize_absmax(absmax)
                as_bits = nested[0], nested[1].view(torch.int32), nested[2].view(torch.int32)
                for scales in ((absmax, None, None), nested, as_bits):
                    for dtype in DTYPES:
                        form = packed, *scales, blocksize, kind, shape, dtype
                        same(dequantize.dequantize_4bit(*form), reference.dequantize_4bit(*form))
    # more than one second-level block, and a part of a weight
    packed, absmax = reference.quantize_4bit(randn(40, 512), 64, "nf4")
    nested = reference.quantize_absmax(absmax)
    whole = reference.dequantize_4bit(packed, *nested, 64, "nf4", (40 * 512,), torch.bfloat16)
    out = unwritten(10_000, dtype=torch.bfloat16)
    dequantize.dequantize_into(
        (packed, *nested), blocksize=64, quant_type="nf4", out=out, first=640
    )
    same(out, whole[640:10_640])
    huge = torch.tensor([3.0e38, float("inf")], device=DEVICE)
    packed = torch.full((64,), 0xF0, dtype=torch.uint8, device=DEVICE)
    form = packed, huge, None, None, 64, "nf4", (128,), torch.bfloat16
    same(dequantize.dequantize_4bit(*form), reference.dequantize_4bit(*form))


def few() -> None:
    for rows, width, depth, blocksize in (
        (1, 40, 192, 64), (3, 64, 256, 32), (16, 130, 512, 128), (33, 16, 2048, 64),
    ):  # fmt: skip
        packed, absmax = reference.quantize_4bit(randn(width, depth), blocksize, "nf4")
        nested = reference.quantize_absmax(absmax)
        for scales in ((packed, absmax, None, None), (packed, *nested)):
            for dtype in (torch.float32, torch.bfloat16):
                x, bias = randn(rows, depth, dtype=dtype), randn(width, dtype=dtype)
                form = {"blocksize": blocksize, "quant_type": "nf4", "out_features": width}
                ours = product.linear_few(x, scales, bias, **form)
                theirs = reference.linear_4bit(x, *scales, bias, blocksize, "nf4", width)
                assert ours is not None
                close(ours, theirs, ulps=8)
    assert product.step_of(75, 64) == 0, "rows that begin inside a block take the other path"
    x, (packed, absmax) = randn(2, 75), reference.quantize_4bit(randn(9, 75), 64, "nf4")
    arguments = x, packed, absmax, None, None, None, 64, "nf4", 9
    same(kernels.linear_4bit(*arguments), reference.linear_4bit(*arguments))


def rows() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, grad, added = (randn(5, 54, dtype=dtype) for _ in range(3))
        for groups, shift in ((1, 0.0), (2, 1.0)):
            norm = Norm(randn(54 // groups, dtype=dtype), None, 1e-6, shift)
            _norm(norm, x, grad, added, groups)
        _norm(Norm(randn(54, dtype=dtype), randn(54, dtype=dtype), 1e-5, 0.0), x, grad, None, 1)
        cos, sin = randn(5, 10, dtype=dtype), randn(5, 10, dtype=dtype)
        for back in (False, True):
            ours = randn(10, 60, dtype=dtype)[:, 6:]  # a view with a stride of its own
            theirs = ours.clone()
            elementwise.rotate_(ours, cos, sin, heads=3, back=back)
            plainly(primitives.rotate_, theirs, cos, sin, heads=3, back=back)
            close(ours.clone(), theirs, ulps=1)
        for kind in ("silu", "gelu_tanh"):
            for gated in (True, False):
                _activation(kind, gated, dtype)


def _norm(norm: Norm, x: Tensor, grad: Tensor, added: Tensor | None, groups: int) -> None:
    y, theirs = unwritten(*x.shape, dtype=x.dtype), torch.empty_like(x)
    statistics = unwritten(x.shape[0], groups if norm.bias is None else 2)
    kept = statistics.clone()
    primitives.normalize(x, norm, y, statistics, groups=groups)
    plainly(primitives.normalize, x, norm, theirs, kept, groups=groups)
    close(y, theirs)
    close(statistics, kept, ulps=16)
    dx, wanted = unwritten(*x.shape, dtype=x.dtype), torch.empty_like(x)
    primitives.normalize_backward(grad, x, norm, kept, dx, added=added, groups=groups)
    plainly(primitives.normalize_backward, grad, x, norm, kept, wanted, added=added, groups=groups)
    close(dx, wanted, ulps=8)
    dx.copy_(grad)  # in the gradient's own memory
    primitives.normalize_backward(dx, x, norm, kept, dx, added=added, groups=groups)
    close(dx, wanted, ulps=8)


def _activation(kind: str, gated: bool, dtype: torch.dtype) -> None:
    x = randn(3, 66 if gated else 33, dtype=dtype) * 4
    x[0, 0], x[0, 1] = 90.0, -90.0
    grad, h = randn(3, 33, dtype=dtype), unwritten(3, 33, dtype=dtype)
    theirs = torch.empty_like(h)
    primitives.activate(x, h, kind=kind, gated=gated)
    plainly(primitives.activate, x, theirs, kind=kind, gated=gated)
    close(h, theirs, ulps=8)
    dx, again, wanted = unwritten(*x.shape, dtype=dtype), unwritten(3, 33, dtype=dtype), x.clone()
    primitives.activate_backward(x, grad, dx, again, kind=kind, gated=gated)
    plainly(primitives.activate_backward, x, grad, wanted, theirs, kind=kind, gated=gated)
    close(dx, wanted, ulps=16)
    close(again, h)


def dropout() -> None:
    for seed in (0, 123456789012345678):
        number = torch.tensor([seed])
        for rate in (0.05, 0.5):
            for dtype in DTYPES:
                x = randn(7, 333, dtype=dtype)
                mask = reference.dropout_mask(x, number, rate)
                same(kernels.dropout_mask(x, number, rate), mask)
                same(kernels.dropped(x, number, rate), x * mask)
                out = randn(7, 333, dtype=dtype)
                theirs = out + x * mask
                primitives.drop(x, out, seed=seed, dropout=rate, add=True)
                same(out, theirs)


def losses() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for softcap, scale, width in ((None, 1.0, 1000), (7.0, 0.7, 1000), (None, 1.0, 5003)):
            for gradient in (True, False):
                logits = randn(6, width, dtype=dtype) * 4
                logits[0, 0] = 80.0
                labels = torch.randint(0, width, (6,)).to(DEVICE)
                theirs, before = logits.clone(), logits.clone()
                form = labels, scale, softcap, gradient
                ours = loss.cross_entropy_rows_(logits, *form)
                close(ours, plain_loss.cross_entropy_rows_(theirs, *form), ulps=16)
                close(logits, theirs, ulps=64)
                assert gradient or torch.equal(logits, before)


def adam() -> None:
    rule = update.Coefficients(0.999, 0.1, 0.999, 0.001, 1e-3, 1.5, 1e-8)
    for dtype in (torch.float32, torch.bfloat16):
        for n in (1, 255, 1000):
            state = randn(n, dtype=dtype), randn(n, dtype=dtype), randn(n), randn(n).abs()
            ours, theirs = ([t.clone() for t in state] for _ in range(2))
            adamw.update_32bit(*ours, astuple(rule))
            plainly(update.update_32bit, *theirs, rule)
            for a, b in zip(ours, theirs, strict=True):
                same(a, b)
            p, grad = state[:2]
            first, second = _moment(n, signed=True), _moment(n, signed=False)
            mine, other = copy.deepcopy((p, first, second)), copy.deepcopy((p, first, second))
            update.update_8bit(mine[0], grad, mine[1], mine[2], rule)
            plainly(update.update_8bit, other[0], grad, other[1], other[2], rule)
            same(mine[0], other[0])
            for a, b in zip(mine[1:], other[1:], strict=True):
                same(a.codes, b.codes)
                same(a.absmax, b.absmax)


def many() -> None:
    """Runs of several lengths in one launch, parts of larger tensors among them."""
    rule = update.Coefficients(0.999, 0.1, 0.999, 0.001, 1e-3, 1.5, 1e-8)
    lengths = (1, 1500, 256, 2048, 7)
    for dtype in (torch.float32, torch.bfloat16):
        wide = [
            update.Run(
                randn(n + 512, dtype=dtype)[512:], randn(n, dtype=dtype), randn(n), randn(n).abs()
            )
            for n in lengths
        ]
        narrow = [
            run._replace(m=_moment(n, signed=True), v=_moment(n, signed=False))
            for run, n in zip(wide, lengths, strict=True)
        ]
        for runs in (wide, narrow):
            ours, theirs = copy.deepcopy(runs), copy.deepcopy(runs)
            before = len(_launched)
            update.update_runs(ours, rule)
            assert len(_launched) == before + 1
            plainly(update.update_runs, theirs, rule)
            for mine, other in zip(ours, theirs, strict=True):
                for a, b in zip(update._tensors(mine), update._tensors(other), strict=True):
                    same(a, b)


_launched: list[str] = []


def _counting() -> None:
    launch = adamw.launch

    def counted(kernel, grid):
        _launched.append(kernel.__name__)
        return launch(kernel, grid)

    adamw.launch = counted


def _moment(n: int, *, signed: bool) -> update.Moment:
    codes = torch.zeros(n, dtype=torch.uint8, device=DEVICE)
    moment = update.Moment(codes, torch.zeros(-(-n // 256), device=DEVICE), signed)
    moment.encode_(randn(n) if signed else randn(n).abs())
    return moment


def int8() -> None:
    for rows_, width, depth in ((1, 9, 75), (40, 64, 128), (17, 8, 8)):
        x = torch.randint(-127, 128, (rows_, depth), dtype=torch.int8, device=DEVICE)
        weight = torch.randint(-127, 128, (width, depth), dtype=torch.int8, device=DEVICE)
        same(kernels.int8_product(x, weight), reference.int8_product(x, weight))
    weight = randn(24, 40)
    codes, absmax = reference.quantize_int8(weight)
    x = randn(5, 40)
    x[2, 3] = 20.0
    for threshold in (0.0, 6.0):
        form = x, codes, absmax, randn(24), threshold
        close(kernels.linear_int8(*form), reference.linear_int8(*form), ulps=1)


def attention() -> None:
    """All kinds of ranges, widths that are no powers of two, parts of a joint buffer."""
    shapes = (
        (1, 1, 1, 1, 16, 16, 0.0), (2, 70, 2, 1, 20, 20, 0.0), (1, 75, 3, 1, 64, 24, 9.0),
        (1, 70, 1, 1, 130, 130, 0.0),
    )  # fmt: skip
    for dtype, ulps, sizes in ((torch.float32, 64, shapes), (torch.bfloat16, 4, shapes[1:])):
        for batch, length, heads, kv, width, v_width, softcap in sizes:
            joint = randn(batch, length, heads + 2 * kv, max(width, v_width), dtype=dtype)
            q, k, v = joint.split((heads, kv, kv), dim=2)
            q, k, v = q[..., :width], k[..., :width], v[..., :v_width]
            for first, shared in _ranges(batch, length):
                _attend((q, k, v), first, shared, softcap, ulps)


def _ranges(batch: int, length: int) -> list[tuple[Tensor | None, Tensor | None]]:
    """Causal, packed, sliding, padded on the left, unordered, a shared beginning."""
    at = torch.arange(length, dtype=torch.int32).expand(batch, -1)
    packed = at // 37 * 37
    padded = torch.where(at < length // 3, length, length // 3)
    scattered = (at * 7919 % 101 % (at + 2)).to(torch.int32)
    known = [packed, (at - 20).clamp(min=0), padded, scattered]
    found = [(None, None), *((first.int().contiguous().to(DEVICE), None) for first in known)]
    shared = torch.where(at < 30, 0, 30).int().contiguous()
    own = torch.where(at < 30, 0, 30 + (at - 30) // 13 * 13).int().contiguous()
    return [*found, (own.to(DEVICE), shared.to(DEVICE))]


def _attend(
    inputs: tuple[Tensor, ...], first: Tensor | None, shared: Tensor | None, softcap: float,
    ulps: float,
) -> None:  # fmt: skip
    q, k, v = inputs
    out = unwritten(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    form = {"scale": 0.3, "softcap": softcap}
    lse = flash.run_forward(q, k, v, first, **form, out=out, shared=shared)
    wanted, sums = attention_schema.attention(q, k, v, first, 0.3, softcap, shared)
    close(out, wanted, ulps=ulps)
    assert torch.equal(lse.isinf(), sums.isinf())
    close(lse.nan_to_num(posinf=0), sums.nan_to_num(posinf=0), ulps=64)
    if shared is not None:
        return
    grad = randn(*wanted.shape, dtype=q.dtype)
    dq, dk, dv = (unwritten(*t.shape, dtype=q.dtype) for t in inputs)
    grads = dq, dk, dv
    flash.run_backward(grad, (q, k, v, wanted), sums, first, **form, grads=grads)
    theirs = attention_schema.attention_backward(grad, q, k, v, wanted, sums, first, 0.3, softcap)
    for mine, other in zip(grads, theirs, strict=True):
        close(mine, other, ulps=2 * ulps, least=1.0)  # one key alone: differences of nothing


def layers() -> None:
    """Forward and backward of the op that training calls, base and adapter."""
    weight = reference.quantize_4bit(randn(40, 192), 64, "nf4")
    scales = weight[0], *reference.quantize_absmax(weight[1])
    seed = torch.tensor([42])
    for many in (5, 130):
        x, A, B = randn(many, 192), randn(8, 192), randn(40, 8)
        form = None, A, B, seed, 64, "nf4", 0.5, 0.1
        for ours, theirs in zip(
            kernels.lora_linear_4bit(x, *scales, *form),
            reference.lora_linear_4bit(x, *scales, *form),
            strict=True,
        ):
            close(ours, theirs, ulps=8)


GROUPS = {
    "quantize": quantize,
    "dequantize": dequantize_,
    "product": few,
    "rows": rows,
    "dropout": dropout,
    "loss": losses,
    "adamw": adam,
    "adamw_many": many,
    "int8": int8,
    "layers": layers,
    "attention": attention,
}

if __name__ == "__main__":
    torch.manual_seed(0)
    DEVICE = torch.device(sys.argv[2])
    # on a CPU our native kernels must not answer for Triton's
    native.reads = lambda _: False
    update._native_serves = lambda *_: False
    _counting()
    GROUPS[sys.argv[1]]()
    print(f"{sys.argv[1]}: equal")
