"""What was promised and what was measured, from the CSV files: a table, and a file for the README.

    python benchmarks/cpu/claims.py [--strict]

Ratios are of medians over the rounds of the newest commit in each file. They are promises for two
cores with AVX-512 BF16; elsewhere they are reported. With --strict a broken promise, or one that
was not measured, ends with exit code 1.
"""

from __future__ import annotations

import datetime
from pathlib import Path

import caps
import correct
import decode
import head
import load
import protocol
import train
from protocol import Row

from promises import Claim, Measure, Tables, ratio, smallest, value

FILE = "cpu_claims.csv"


def newest(path: Path, *, quick: bool) -> list[Row]:
    """The rows of the commit measured last."""
    rows = [row for row in protocol.read(path) if row["quick"] == str(int(quick))]
    if not rows:
        return []
    last = max(rows, key=lambda row: row["date"])
    same = ("commit", "machine", "threads", "versions")
    return [row for row in rows if all(row[key] == last[key] for key in same)]


def head_added(tables: Tables) -> float | None:
    """The larger of the head alone and of what it adds to the step."""
    alone = protocol.spread(tables[head.FILE], "head", "added_mb")
    step = protocol.spread(tables[head.FILE], "step", "peak_mb")
    bare = protocol.spread(tables[head.FILE], "step-no-head", "peak_mb")
    if alone is None or step is None or bare is None:
        return None
    return max(alone.median, step.median - bare.median)


def loss_spread(tables: Tables) -> float | None:
    """Our distance from the fp32 losses, as a share of the farthest bf16 run's."""
    column = "mean_loss_difference"
    ours = protocol.spread(tables[correct.FILE], "fourbit", column)
    runs = [protocol.spread(tables[correct.FILE], name, column) for name in correct.SPREAD]
    if ours is None or any(run is None for run in runs):
        return None
    return ours.median / max(run.median for run in runs if run is not None)


def capped(cap: str) -> Measure:
    return ratio(caps.FILE, "tokens_per_second", f"fourbit {cap}", f"lora-fp32 {cap}")


def trains(ours: str, theirs: str) -> Measure:
    return ratio(train.FILE, "tokens_per_second", ours, theirs)


def decodes(ours: str, theirs: str) -> Measure:
    return ratio(decode.FILE, "tokens_per_second", ours, theirs)


def lighter_than(theirs: str) -> Measure:
    return ratio(train.FILE, "peak_mb", theirs, "fourbit")


def slowest_quantizing() -> Measure:
    shapes = [f"quantize {rows}x{columns}" for rows, columns in load.SHAPES]
    return smallest(value(load.FILE, "ratio", shape) for shape in shapes)


def bandwidth(tables: Tables) -> float | None:
    return decode.bandwidth_share(tables[decode.FILE], "fourbit-1.1b")


GRADIENT = ratio(correct.FILE, "gradient_error", "fourbit", correct.BF16)
LOAD = value(load.FILE, "load_s", "load fourbit")
LLAMA = "llama.cpp-Q4_0"

CLAIMS = (
    Claim("training / TRL's defaults", 2.8, trains("fourbit", "trl")),
    Claim("training / bitsandbytes + PEFT defaults", 2.6, trains("fourbit", "bnb")),
    Claim("training / expert all-bf16", 1.7, trains("fourbit", "bnb-expert")),
    Claim("training / expert all-bf16, 1.1B", 1.35, trains("fourbit-1.1b", "bnb-expert-1.1b")),
    Claim("gradient error of layer 0 / transformers' bf16", 1.1, GRADIENT, most=True),
    Claim("loss over 50 steps: distance / farthest bf16 run's", 1.0, loss_spread, most=True),
    Claim("peak of bitsandbytes + PEFT defaults / ours", 3.5, lighter_than("bnb")),
    Claim("peak of expert all-bf16 / ours", 2.2, lighter_than("bnb-expert")),
    Claim("MB that head and loss add at 8,192 tokens", head.LIMIT_MB, head_added, most=True),
    Claim("quantizing / bitsandbytes, worst shape", 50.0, slowest_quantizing()),
    Claim("seconds to load and quantize the 1.1B shape", 4.0, LOAD, most=True),
    Claim("decoding / llama.cpp Q4_0", 2.0, decodes("fourbit", LLAMA)),
    Claim("decoding / llama.cpp Q4_0, 1.1B", 1.0, decodes("fourbit-1.1b", f"{LLAMA}-1.1b")),
    Claim("decoding / bitsandbytes", 4.0, decodes("fourbit", "bnb")),
    Claim("with LoRA: / llama.cpp Q4_0 without", 2.0, decodes("fourbit-lora", LLAMA)),
    Claim("with LoRA: / the same, 1.1B", 1.0, decodes("fourbit-lora-1.1b", f"{LLAMA}-1.1b")),
    Claim("with LoRA: / bitsandbytes with LoRA", 4.0, decodes("fourbit-lora", "bnb-lora")),
    Claim("decoding: share of read bandwidth, 1.1B", 0.6, bandwidth),
    Claim("training under AVX2 / plain fp32", 1.0, capped("avx2")),
    Claim("training under scalar / plain fp32", 1.0, capped("scalar")),
)


def main() -> None:
    parser = protocol.parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--strict", action="store_true", help="exit 1 when a promise is broken")
    options = protocol.settle(parser.parse_args())
    files = (train.FILE, correct.FILE, head.FILE, load.FILE, decode.FILE, caps.FILE)
    tables = {name: newest(options.results / name, quick=options.quick) for name in files}
    about = protocol.origin(options)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    open_claims = 0
    for claim in CLAIMS:
        found = claim.measured(tables)
        word = claim.verdict(found)
        open_claims += word != "kept"
        shown = "" if found is None else f"{found:.3g}"
        print(claim.line(found))
        row = {"date": now, **about, "claim": claim.text, "measured": shown}
        row |= {"sign": claim.sign, "bound": str(claim.bound), "verdict": word}
        protocol.append(options.results / FILE, row)
    if options.strict and open_claims:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
