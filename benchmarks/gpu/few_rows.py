"""Products of few rows with packed weights, as decoding needs them: beside bitsandbytes, 16 bits.

Time is of the device alone (a CUDA graph), the error that of the result against float64 on the same
4-bit weights.
"""

from __future__ import annotations

import argparse

from gpu.floors import BYTES_4BIT
from gpu.section import Found, Spec, linears, told
from harness import Case
from rows import Row

COLUMNS = ("tb_s", "bnb_tb_s", "bf16_us", "us", "bnb_us", "error", "bnb_error")
ROWS = (1, 2, 4, 8, 16, 32, 64)
ERROR = {"bfloat16": 4e-3, "float16": 1e-3, "float32": 1e-5}
"""Relative root mean square; rounding the result alone is 1.1e-3 in bfloat16."""


def cases(options: argparse.Namespace) -> list[Case]:
    shapes = dict.fromkeys(linears(told(options)["shape"]).values())
    return [Case(f"few rows {n}x{k}", told(options, sizes=[n, k])) for n, k in shapes]


def faults(rows: list[Row]) -> list[str]:
    return [
        f"{row['case']}: error {row['error']}, at most {ERROR[row['dtype']]}"
        for row in rows
        if not float(row["error"]) <= ERROR[row["dtype"]]
    ]


def measure(spec: Spec) -> Found:
    import torch
    from torch import Tensor

    from fourbit import ops
    from gpu import packed as weights
    from gpu.build import dtype_for
    from gpu.clock import Clock

    clock = Clock(spec["device"])
    dtype = dtype_for(clock.device)
    given = weights.make(tuple(spec["sizes"]), clock.device, dtype)
    n, k = given.shape
    exact = weights.reference(given, 0, dtype).double()
    plain = [given.plain, *(torch.randn_like(given.plain) for _ in given.ours[1:])]
    bnb = None
    if given.theirs:
        from inside import imported

        bnb = imported("bitsandbytes")

    def error(y: Tensor, x: Tensor) -> float:
        wanted = x.double() @ exact.t()
        return float((y.double() - wanted).norm() / wanted.norm())

    for rows in ROWS:
        x = torch.randn(rows, k, device=clock.device, dtype=dtype)

        def ours(i: int, x: Tensor = x) -> Tensor:
            return ops.linear_4bit(x, given.ours[i], None, out_features=n, **weights.FORMAT)

        def theirs(i: int, x: Tensor = x) -> Tensor:
            assert bnb is not None
            return bnb.matmul_4bit(x, given.theirs[i][0].t(), quant_state=given.theirs[i][1])

        def wide(i: int, x: Tensor = x) -> Tensor:
            return torch.nn.functional.linear(x, plain[i])

        with torch.no_grad():
            copies = range(len(given.ours))
            took = clock.device_only([lambda i=i: ours(i) for i in copies])
            found = {
                "case": f"few rows {n}x{k} M={rows}",
                "dtype": str(dtype).removeprefix("torch."),
                "error": error(ours(0), x),
                "us": took * 1e6,
                "tb_s": n * k * BYTES_4BIT / took / 1e12,
                "bf16_us": clock.device_only([lambda i=i: wide(i) for i in copies]) * 1e6,
            }
            if bnb is not None:
                took = clock.device_only([lambda i=i: theirs(i) for i in copies])
                found |= {
                    "bnb_us": took * 1e6,
                    "bnb_tb_s": n * k * BYTES_4BIT / took / 1e12,
                    "bnb_error": error(theirs(0), x),
                }
        yield {**found, "uncaptured": clock.uncaptured}
