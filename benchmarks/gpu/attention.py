"""Attention over ranges of keys beside PyTorch's, both ways: causal, and packed documents.

PyTorch gets ``is_causal`` where that says it, else the matrix of who sees whom that transformers
would give it. Errors are of the outputs and gradients against float32 on the same inputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gpu.section import Found, Spec, told
from harness import Case
from rows import Row
from sizes import SHAPES

if TYPE_CHECKING:
    from gpu.clock import Clock

COLUMNS = ("forward_us", "sdpa_forward_us", "both_us", "sdpa_both_us", "tflops", "error")
Attend = Callable[[Any, Any, Any], Any]
WORSE = 1.5
"""How much larger than PyTorch's our error may be: both round to the same dtype."""
FLOAT32 = 1e-5
"""What either may be off in float32 itself."""
DOCUMENT = 700
"""Tokens of a packed document; no multiple of any block."""


def cases(options: argparse.Namespace) -> list[Case]:
    tiny = options.shape == "tiny"
    causal = told(options, batch=2, length=40) if tiny else told(options, batch=4, length=2048)
    packed = told(options, batch=1, length=90) if tiny else told(options, batch=1, length=8192)
    document = 23 if tiny else DOCUMENT
    return [
        Case("attention causal", {**causal, "document": None}),
        Case("attention packed", {**packed, "document": document}),
    ]


def faults(rows: list[Row]) -> list[str]:
    return [
        f"{row['case']}: {kind} off by {row[kind]}, PyTorch's by {row[f'sdpa_{kind}']}"
        for row in rows
        for kind in ("error", "gradient_error")
        if not float(row[kind]) <= max(WORSE * float(row[f"sdpa_{kind}"]), FLOAT32)
    ]


def measure(spec: Spec) -> Found:
    from gpu.clock import Clock

    clock = Clock(spec["device"])
    found = {**errors(spec, clock), **times(spec, clock)}
    if spec["document"] is None:  # half of all scores; 2 products forward, 5 backward
        from gpu.floors import Model

        work = spec["batch"] * spec["length"] ** 2 * Model.of(spec["shape"]).queries * 7
        found["tflops"] = work / found["both_us"] / 1e6
    yield found


def inputs(spec: Spec, device: Any, batch: int, length: int) -> tuple[list[Any], Any]:
    """Queries, keys, values and an output's gradient; the first key of each query."""
    import torch

    from gpu.build import dtype_for
    from gpu.floors import Model

    model, heads = Model.of(spec["shape"]), SHAPES[spec["shape"]]["num_attention_heads"]
    width = model.queries // heads
    generator = torch.Generator(device).manual_seed(0)
    sizes = [(batch, length, n, width) for n in (heads, *(model.keys // width,) * 2, heads)]
    tensors = [torch.empty(s, device=device).normal_(generator=generator) for s in sizes]
    tensors = [t.to(dtype_for(device)) for t in tensors]
    if spec["document"] is None:
        return tensors, None
    at = torch.arange(length, device=device, dtype=torch.int32)
    return tensors, (at // spec["document"] * spec["document"]).expand(batch, -1).contiguous()


def ours(first: Any) -> Attend:
    from fourbit.ops.attention import attention

    return lambda q, k, v: attention(q, k, v, first=first)


def sdpa(first: Any) -> Attend:
    """PyTorch's, on the same layout, as transformers calls it; its mask is made once."""
    import torch

    attend = torch.nn.functional.scaled_dot_product_attention
    seen = None
    if first is not None:
        at = torch.arange(first.shape[1], device=first.device)
        seen = ((at <= at[:, None]) & (at >= first[:, :, None]))[:, None]

    def run(q: Any, k: Any, v: Any) -> Any:
        group = q.shape[2] // k.shape[2]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if seen is None:
            out = attend(q, k, v, is_causal=True, enable_gqa=group > 1)
        else:  # its fast kernels take no shared heads with a mask
            k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
            out = attend(q, k, v, attn_mask=seen)
        return out.transpose(1, 2)

    return run


SIDES = {"": ours, "sdpa_": sdpa}
"""By the beginning of their columns."""


def errors(spec: Spec, clock: Clock) -> dict[str, float]:
    """Relative, of the output and the worst gradient, on a short piece in which all scores fit."""
    tensors, first = inputs(spec, clock.device, 1, min(spec["length"], 1024))

    def answers(how: Attend, tensors: list[Any]) -> list[Any]:
        q, k, v = (t.clone().requires_grad_() for t in tensors[:3])
        out = how(q, k, v)
        out.backward(tensors[3])
        return [t.double() for t in (out.detach(), q.grad, k.grad, v.grad)]

    exact, found = answers(plain(first), [t.float() for t in tensors]), {}
    for prefix, how in SIDES.items():
        pairs = zip(answers(how(first), tensors), exact, strict=True)
        off = [float((a - b).norm() / b.norm()) for a, b in pairs]
        found |= {f"{prefix}error": off[0], f"{prefix}gradient_error": max(off[1:])}
    return found


def times(spec: Spec, clock: Clock) -> dict[str, float]:
    """Microseconds of a forward pass, and of one with its gradients."""
    import torch

    tensors, first = inputs(spec, clock.device, spec["batch"], spec["length"])
    trained, found = [t.requires_grad_() for t in tensors[:3]], {}

    def both(how: Attend) -> None:
        torch.autograd.grad(how(*trained), trained, tensors[3])

    for prefix, side in SIDES.items():
        how = side(first)
        with torch.no_grad():
            forward = clock.eager([lambda how=how: how(*trained)] * 4)
        found[f"{prefix}forward_us"] = forward * 1e6
        found[f"{prefix}both_us"] = clock.eager([lambda how=how: both(how)] * 4) * 1e6
    return found


def plain(first: Any) -> Attend:
    """The plain operations, which keep all scores; float32 stays float32."""
    import torch

    from fourbit.ops import attention_schema as operations

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
            out, lse = operations.attention(q, k, v, first, q.shape[-1] ** -0.5, 0.0)
            ctx.save_for_backward(q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            q, k, v, out, lse = ctx.saved_tensors
            scale = q.shape[-1] ** -0.5
            return operations.attention_backward(grads[0], q, k, v, out, lse, first, scale, 0.0)

    return Plain.apply
