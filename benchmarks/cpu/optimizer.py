"""One update of the adapters of a 7B model (rank 64, all linear layers): time and resident state.

    python benchmarks/cpu/optimizer.py [--rank 64]

Ours in 32 and 8 bits, resident and paged, beside torch's AdamW in its two fast forms. Before the
timing all 32-bit sides make the same updates: the parameters must agree.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from typing import Any

import protocol
from protocol import Case, Outcome

FILE = "cpu_optimizer.csv"
TOLERANCE = 1e-5
SIDES: dict[str, dict[str, Any]] = {
    "torch-foreach": {"foreach": True},
    "torch-fused": {"fused": True},
    "fourbit-32": {"optim_bits": 32, "paged": "off"},
    "fourbit-32-paged": {"optim_bits": 32, "paged": "always"},
    "fourbit-8": {"optim_bits": 8, "paged": "off"},
    "fourbit-8-paged": {"optim_bits": 8, "paged": "always"},
}
LAYERS, HIDDEN, INNER = 32, 4096, 11008


def cases(options: argparse.Namespace) -> list[Case]:
    """Every side on the same parameters."""
    work = str(options.work)
    told = {"rank": options.rank, "threads": options.threads, "repeats": 5, "work": work}
    return [Case(side, {**told, "side": side}) for side in SIDES]


def faults(outcome: Outcome) -> list[str]:
    """32 bits are 32 bits, whoever computes; pages change nothing."""
    sums = {row["case"]: float(row["checksum"]) for row in outcome.rows}
    wide = [value for case, value in sums.items() if "-8" not in case]
    found = []
    if wide and not all(math.isclose(value, wide[0], rel_tol=TOLERANCE) for value in wide):
        found.append(f"the sides do not compute the same: {sums}")
    for bits in ("32", "8"):
        pair = [sums.get(f"fourbit-{bits}"), sums.get(f"fourbit-{bits}-paged")]
        if None not in pair and pair[0] != pair[1]:
            found.append(f"paging changed the numbers in {bits} bits")
    return found


def main() -> None:
    parser = protocol.parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--rank", type=int, default=64, help="of the adapters")
    options = parser.parse_args()
    if options.child:
        child_main(json.loads(options.child))
        return
    options = protocol.settle(options)
    outcome = protocol.measure(__file__, options.results / FILE, cases(options), options)
    print(protocol.table(outcome.rows, ("step_s", "state_mb", "parameters", "checksum")))
    protocol.finish(outcome, faults(outcome))


# The child.


def child_main(spec: dict[str, Any]) -> None:
    import child

    child.begin(spec)
    import torch

    import fourbit

    torch.manual_seed(0)
    shapes = [(HIDDEN, HIDDEN)] * 4 + [(INNER, HIDDEN)] * 2 + [(HIDDEN, INNER)]
    trained = [
        torch.nn.Parameter(0.02 * torch.randn(*shape))
        for _ in range(LAYERS)
        for rows, columns in shapes
        for shape in ((spec["rank"], columns), (rows, spec["rank"]))
    ]
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    options = SIDES[spec["side"]]
    if spec["side"].startswith("torch"):
        optimizer: Any = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0, **options)
    else:
        optimizer = fourbit.AdamW(trained, lr=2e-4, folder=spec["work"], **options)
    memory = child.Memory()
    memory.start()
    times = [child.seconds(optimizer.step) for _ in range(spec["repeats"] + 1)]
    marks = memory.values()
    checksum = sum(float(p.detach().double().abs().sum()) for p in trained)
    child.emit(
        {
            "step_s": statistics.median(times[1:]),
            "state_mb": round(marks["peak_mb"] - marks["ready_mb"], 1),
            "parameters": sum(p.numel() for p in trained),
            "checksum": checksum,
        }
    )


if __name__ == "__main__":
    main()
