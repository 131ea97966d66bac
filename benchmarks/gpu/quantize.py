"""16 bits to NF4: the codes and scales of a weight, without and with the second quantization.

Bytes are what must move: 16 bits read, the code and a float32 scale for 64 weights written.
"""

from __future__ import annotations

import argparse

from gpu.section import Found, Spec, linears, told
from harness import Case
from rows import Row

COLUMNS = ("tb_s", "whole_tb_s", "bnb_whole_tb_s", "equal")


def cases(options: argparse.Namespace) -> list[Case]:
    shapes = dict.fromkeys(linears(told(options)["shape"]).values())
    return [Case(f"quantize {n}x{k}", told(options, sizes=[n, k])) for n, k in shapes]


def faults(rows: list[Row]) -> list[str]:
    return [
        f"{row['case']}: other codes than {row['against']}" for row in rows if row["equal"] != "1"
    ]


def measure(spec: Spec) -> Found:
    import torch

    from fourbit import ops
    from fourbit.ops import reference
    from fourbit.quantize import quantize_4bit
    from gpu.build import dtype_for
    from gpu.clock import Clock
    from gpu.packed import FORMAT, ROTATED, bitsandbytes_functional

    clock = Clock(spec["device"])
    dtype = dtype_for(clock.device)
    n, k = spec["sizes"]
    count = max(2, -(-ROTATED // (2 * n * k))) if clock.on_gpu else 2
    weights = [0.02 * torch.randn(n, k, device=clock.device).to(dtype) for _ in range(count)]
    packed, absmax = ops.quantize_4bit(weights[0], **FORMAT)
    plain = reference.quantize_4bit(weights[0], FORMAT["blocksize"], FORMAT["quant_type"])
    equal = torch.equal(packed.view(-1), plain[0].view(-1)) and torch.equal(absmax, plain[1])
    functional, against = bitsandbytes_functional(), "the plain operations"
    if functional is not None:
        theirs, _ = functional.quantize_4bit(weights[0], compress_statistics=True, **FORMAT)
        equal = equal and torch.equal(packed.view(-1), theirs.view(-1))
        against += " and bitsandbytes"
    moved = n * k * (weights[0].element_size() + 0.5 + 4 / FORMAT["blocksize"])
    kernel = [lambda w=w: ops.quantize_4bit(w, **FORMAT) for w in weights]
    whole = [lambda w=w: quantize_4bit(w, double_quant=True, name="w", **FORMAT) for w in weights]
    found = {
        "equal": int(equal),
        "against": against,
        "tb_s": moved / clock.device_only(kernel) / 1e12,
        # counts what is not finite and waits for the answer: no graph
        "whole_tb_s": moved / clock.eager(whole) / 1e12,
    }
    if functional is not None:
        quantize = functional.quantize_4bit
        peers = [lambda w=w: quantize(w, compress_statistics=True, **FORMAT) for w in weights]
        found["bnb_whole_tb_s"] = moved / clock.eager(peers) / 1e12
    yield {**found, "uncaptured": clock.uncaptured}
