"""What the machine can do: rates of the matrix products that occur, and memory bandwidth.

    python benchmarks/cpu/ceilings.py

GFLOP/s of torch's products in bf16, fp32 and int8 for the shapes of a training step, and GB/s of
reading and copying arrays that no cache holds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import protocol
from protocol import Case

FILE = "cpu_ceilings.csv"
SHAPES = {
    "q/o 135M": (2048, 576, 576),
    "k/v 135M": (2048, 576, 192),
    "gate/up 135M": (2048, 576, 1536),
    "down 135M": (2048, 1536, 576),
    "head 135M": (256, 576, 49152),
    "lora A 135M": (2048, 576, 16),
    "lora B 135M": (2048, 16, 576),
    "q/o 1.1B": (512, 2048, 2048),
    "gate/up 1.1B": (512, 2048, 5632),
    "down 1.1B": (512, 5632, 2048),
    "head 1.1B": (512, 2048, 32000),
    "k/v 1.1B": (512, 2048, 256),
    "lora A 1.1B": (512, 2048, 16),
    "lora B 1.1B": (512, 16, 2048),
}
"""Tokens, input and output features."""
LAYERS = {"q/o": 2, "k/v": 2, "gate/up": 2, "down": 1, "lora A": 7, "lora B": 7}
"""Products in a layer's forward pass; adapters are counted at the size of q."""
COUNTS = {"": ("135M", 30, 2048), "-1.1b": ("1.1B", 22, 512)}
"""Name in `SHAPES`, layers, tokens of a step, by the ending of a case's name."""
RATES = ("bf16_gflops", "bf16_back_gflops", "fp32_gflops", "fp32_back_gflops", "int8_gflops")
BANDWIDTHS = ("read_gb_s", "copy_gb_s", "fill_gb_s", "read_one_thread_gb_s")
BANDWIDTH_MB = 512


def cases(options: argparse.Namespace) -> list[Case]:
    """A process for bandwidth, one for each shape."""
    repeats = 5 if options.quick else 15
    shapes = [
        Case(f"gemm {name}", {"shape": shape, "repeats": repeats}) for name, shape in SHAPES.items()
    ]
    return [Case("bandwidth", {"repeats": repeats}), *shapes]


def main() -> None:
    options = protocol.parser((__doc__ or "").splitlines()[0]).parse_args()
    if options.child:
        child_main(json.loads(options.child))
        return
    options = protocol.settle(options)
    outcome = protocol.measure(__file__, options.results / FILE, cases(options), options)
    for kind, columns in (("gemm", RATES), ("bandwidth", BANDWIDTHS)):
        rows = [row for row in outcome.rows if row["case"].startswith(kind)]
        print(protocol.table(rows, columns))
    protocol.finish(outcome, [])


def training_limit(rows: list[protocol.Row], size: str) -> float | None:
    """Tokens/s of a step that does its bf16 matrix products, at measured rates, and nothing else.

    Each product of the frozen weights once forward and once for the gradient of its input, those of
    the adapters once more for their own gradients; attention is not counted.
    """
    name, layers, tokens = COUNTS[size]
    found = 0.0
    for kind, count in {**{k: layers * n for k, n in LAYERS.items()}, "head": 1}.items():
        shape = SHAPES[f"{kind} {name}"]
        rates = [
            protocol.spread(rows, f"gemm {kind} {name}", f"{which}_gflops")
            for which in ("bf16", "bf16_back")
        ]
        if any(rate is None for rate in rates):
            return None
        forward, back = (1 / rate.median for rate in rates if rate is not None)
        work = 2 * tokens * shape[1] * shape[2] / 1e9
        extra = forward if kind.startswith("lora") else 0.0
        found += count * work * (forward + back + extra)
    return tokens / found


# The child.


def child_main(spec: dict[str, Any]) -> None:
    import child

    child.begin(spec)
    child.emit(gemm(spec) if "shape" in spec else bandwidth(spec["repeats"], spec["threads"]))


def gemm(spec: dict[str, Any]) -> dict[str, float]:
    """``x [M, K] @ W [N, K]^T`` and the gradient's ``g [M, N] @ W``."""
    import child
    import torch

    tokens, inner, outer = spec["shape"]
    work = 2 * tokens * inner * outer / 1e9
    x, w, g = torch.randn(tokens, inner), torch.randn(outer, inner), torch.randn(tokens, outer)
    xb, wb, gb = x.bfloat16(), w.bfloat16(), g.bfloat16()
    xi = torch.randint(-127, 127, (tokens, inner), dtype=torch.int8)
    wi = torch.randint(-127, 127, (outer, inner), dtype=torch.int8)
    linear = torch.nn.functional.linear
    products: dict[str, Callable[[], Any]] = {
        "bf16": lambda: linear(xb, wb),
        "bf16_back": lambda: gb @ wb,
        "fp32": lambda: linear(x, w),
        "fp32_back": lambda: g @ w,
        "int8": lambda: torch._int_mm(xi, wi.t()),
    }
    rates = {}
    for name, product in products.items():
        took = child.median_seconds(product, repeats=spec["repeats"], warmup=3)
        rates[f"{name}_gflops"] = work / took
    return rates


def bandwidth(repeats: int, threads: int) -> dict[str, float]:
    """Reading is the best of two ways to read: what a decoder's share is compared with."""
    import child
    import torch

    source = torch.ones(BANDWIDTH_MB << 18)
    target = torch.empty_like(source).zero_()
    size = source.numel() * 4 / 1e9

    def rate(moved: float, function: Callable[[], Any]) -> float:
        return moved / child.median_seconds(function, repeats=repeats, warmup=2)

    halves = source.view(-1, 1 << 16)
    found = {
        "read_gb_s": max(rate(size, source.sum), rate(size, lambda: halves.amax(1))),
        "copy_gb_s": rate(2 * size, lambda: target.copy_(source)),
        "fill_gb_s": rate(size, lambda: target.fill_(1.0)),
    }
    torch.set_num_threads(1)
    found["read_one_thread_gb_s"] = rate(size, source.sum)
    torch.set_num_threads(threads)
    return found


if __name__ == "__main__":
    main()
