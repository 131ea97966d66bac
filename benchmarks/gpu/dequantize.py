"""NF4 with double quantization to 16 bits: ours in one launch beside bitsandbytes' path.

Bytes are what must move: the packed weight and its scales read, 16 bits written. Bits are compared
in the same process: always with the plain operations, and where bitsandbytes is there with it, both
restoring what it packed (on a GPU; its CPU kernels round the scales).
"""

from __future__ import annotations

import argparse

from gpu.floors import BYTES_4BIT
from gpu.section import Found, Spec, linears, told
from harness import Case
from rows import Row

COLUMNS = ("tb_s", "bnb_tb_s", "copy_tb_s", "launches", "bnb_launches", "equal", "bnb_equal")


def cases(options: argparse.Namespace) -> list[Case]:
    shapes = dict.fromkeys(linears(told(options)["shape"]).values())
    return [Case(f"dequantize {n}x{k}", told(options, sizes=[n, k])) for n, k in shapes]


def faults(rows: list[Row]) -> list[str]:
    found = []
    for row in rows:
        if row["equal"] != "1":
            found.append(f"{row['case']}: other bits than the plain operations")
        if row["device"] == "cuda" and row.get("bnb_equal", "1") != "1":
            found.append(f"{row['case']}: other bits than bitsandbytes")
    return found


def measure(spec: Spec) -> Found:
    import torch

    from fourbit import ops
    from gpu import packed as weights
    from gpu.build import dtype_for
    from gpu.clock import Clock

    clock = Clock(spec["device"])
    dtype = dtype_for(clock.device)
    given = weights.make(tuple(spec["sizes"]), clock.device, dtype)
    functional = weights.bitsandbytes_functional()
    outs = [torch.full(given.shape, torch.nan, device=clock.device, dtype=dtype) for _ in range(2)]

    def ours(index: int) -> None:
        ops.dequantize_into(given.ours[index], out=outs[index % 2], **weights.FORMAT)

    ours(0)
    equal = torch.equal(outs[0], weights.reference(given, 0, dtype))
    calls = [lambda i=i: ours(i) for i in range(len(given.ours))]
    moved = given.weights * (BYTES_4BIT + outs[0].element_size())
    # as many bytes as the kernel moves, from and to memory that no cache holds
    blocks = [
        torch.randint(0, 256, (int(moved) // 2,), dtype=torch.uint8, device=clock.device)
        for _ in range(4)
    ]
    copies = [lambda i=i: blocks[i].copy_(blocks[i + 1]) for i in (0, 2)]
    found = {
        "equal": int(equal),
        "tb_s": moved / clock.device_only(calls) / 1e12,
        "eager_tb_s": moved / clock.eager(calls) / 1e12,
        "copy_tb_s": moved / clock.device_only(copies) / 1e12,
        "launches": clock.launches(calls[0]),
    }
    if given.theirs:
        ops.dequantize_into(weights.scales_of(given.theirs[0]), out=outs[0], **weights.FORMAT)
        theirs = [lambda pair=pair: functional.dequantize_4bit(*pair) for pair in given.theirs]
        found |= {
            "bnb_equal": int(torch.equal(outs[0], theirs[0]())),
            "bnb_tb_s": moved / clock.device_only(theirs) / 1e12,
            "bnb_eager_tb_s": moved / clock.eager(theirs) / 1e12,
            "bnb_launches": clock.launches(theirs[0]),
        }
    found["uncaptured"] = clock.uncaptured
    yield {key: value for key, value in found.items() if value is not None}
