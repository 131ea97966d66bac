"""What is promised of a GPU, and what was measured against the ceilings of the same call."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gpu.floors import Ceiling, Model
from promises import Claim, Measure, Tables, largest, quotient, ratio, smallest, value
from rows import Row, spread

SPEED = "tokens_per_second"
BIG = "14336x4096"
UNSLOTH = ("unsloth", "unsloth-recompute")
BNB = ("bnb", "bnb-expert", "bnb-recompute", "bnb-expert-recompute")


def calls(tables: Tables) -> list[str]:
    """Every call whose rows are there, the newest first."""
    found = {row["call"] for rows in tables.values() for row in rows}
    return sorted(found, reverse=True)


def of_call(tables: Tables, call: str, shape: str | None) -> Tables:
    """The rows of one call, and of one shape where that is asked."""
    return {
        name: [r for r in rows if r["call"] == call and shape in (None, r["shape"])]
        for name, rows in tables.items()
    }


def of_shape(shape: str, measure: Measure) -> Measure:
    """The figure where it was measured on this shape."""

    def measured(tables: Tables) -> float | None:
        return measure({n: [r for r in rows if r["shape"] == shape] for n, rows in tables.items()})

    return measured


def trains(side: str, tokens: int) -> Measure:
    return value("gpu_train", SPEED, f"{side} T={tokens}")


def best(sides: Iterable[str], tokens: int) -> Measure:
    """The fastest of several, of those that ran."""
    return largest([trains(side, tokens) for side in sides], all_of_them=False)


def ceiling(tables: Tables) -> Ceiling | None:
    rows = tables.get("gpu_ceilings", [])
    flops, copy = (spread(rows, "ceilings", key) for key in ("gemm_tflops", "copy_gb_s"))
    if flops is None or copy is None:
        return None
    return Ceiling(flops.median * 1e12, copy.median * 1e9)


def step_floor(shape: str, tokens: int, length: int) -> Measure:
    """Tokens/s of a step at the card's measured rates."""

    def measured(tables: Tables) -> float | None:
        found = ceiling(tables)
        if found is None:
            return None
        return tokens / Model.of(shape).step_seconds(tokens, length, found)

    return measured


def decode_floor(shape: str, context: int, bytes_per_weight: float | None = None) -> Measure:
    """Tokens/s where a token does nothing but read what it must."""

    def measured(tables: Tables) -> float | None:
        found, model = ceiling(tables), Model.of(shape)
        if found is None:
            return None
        read = (
            model.decode_bytes(context)
            if bytes_per_weight is None
            else model.decode_bytes(context, bytes_per_weight)
        )
        return found.bytes_per_second / read

    return measured


def few_rows(m: int, column: str, bottom: str) -> Measure:
    case = f"few rows {BIG} M={m}"
    return quotient(value("gpu_few_rows", column, case), value("gpu_few_rows", bottom, case))


def of_copy(m: int) -> Measure:
    """A product's bytes/s as a share of the copy's."""
    made = value("gpu_few_rows", "tb_s", f"few rows {BIG} M={m}")

    def measured(tables: Tables) -> float | None:
        found, reached = ceiling(tables), made(tables)
        return None if found is None or reached is None else reached * 1e12 / found.bytes_per_second

    return measured


def memory(run: str, column: str = "reserved_gb") -> Measure:
    return value("gpu_memory", column, f"memory {run}")


def ran(run: str) -> Measure:
    """Tokens of the sequence with which a capped run went through; 0 where memory ran out."""

    def measured(tables: Tables) -> float | None:
        rows = [r for r in tables.get("gpu_memory", []) if r["case"] == f"memory {run}"]
        if not rows:
            return None
        return min(0.0 if r.get("oom") == "1" else float(r["length"]) for r in rows)

    return measured


def plan_error(tables: Tables) -> float | None:
    rows = [r for r in tables.get("gpu_memory", []) if r["case"].startswith("plan ")]
    return max((abs(float(r["error_percent"])) for r in rows), default=None)


def band(tables: Tables) -> float | None:
    from gpu import demo

    rows = tables.get("gpu_demo", [])
    pairs = [
        (a, b)
        for a in rows
        for b in rows
        if (a["case"], b["case"]) == ("demo cpu", "demo gpu") and a["round"] == b["round"]
    ]
    return max((demo.difference(a, b) for a, b in pairs), default=None)


def dequantize(column: str, bottom: str) -> Measure:
    case = f"dequantize {BIG}"
    return quotient(value("gpu_dequantize", column, case), value("gpu_dequantize", bottom, case))


def attends(which: str) -> Measure:
    """How much faster than PyTorch's: the time of its passes over that of ours."""
    case = f"attention {which}"
    return quotient(
        value("gpu_attention", "sdpa_both_us", case), value("gpu_attention", "both_us", case)
    )


def eight(measure: Measure) -> Measure:
    return of_shape("8b", measure)


def one(measure: Measure) -> Measure:
    return of_shape("1b", measure)


STEP_8B = trains("fourbit", 8192)
STEP_1B = trains("fourbit", 16384)
DECODE_8B = value("gpu_decode", SPEED, "decode fourbit")
OPTIMIZER = value("gpu_optimizer", "step_ms", "optimizer fourbit 32")


@dataclass(frozen=True)
class Promise:
    """A claim, and what `run.py` is told to measure it."""

    arguments: str
    claim: Claim

    def line(self, value: float | None) -> str:
        """For people; what is not measured names its command."""
        told = f"  (run.py {self.arguments})" if value is None else ""
        return self.claim.line(value) + told


def group(arguments: str, *claims: Claim) -> tuple[Promise, ...]:
    """Claims that one command measures."""
    return tuple(Promise(arguments, claim) for claim in claims)


PROMISES = (
    *group(
        "train --shape 8b --tokens 8192 --paged",
        Claim(
            "8B step, 8k tokens: share of the floor", 0.80,
            eight(quotient(STEP_8B, step_floor("llama-8b", 8192, 2048))),
        ),
        Claim(
            "8B step / bitsandbytes + PEFT's best", 2.0, eight(quotient(STEP_8B, best(BNB, 8192)))
        ),
        Claim("8B step / Unsloth's best", 1.3, eight(quotient(STEP_8B, best(UNSLOTH, 8192)))),
        Claim(
            "8B step: QLoRA / our LoRA on 16 bits", 0.97,
            eight(quotient(STEP_8B, trains("fourbit-bf16", 8192))),
        ),
        Claim(
            "8B step: state paged / resident", 0.98,
            eight(quotient(trains("fourbit-paged", 8192), STEP_8B)),
        ),
    ),
    *group(
        "train --shape 1b --tokens 16384",
        Claim(
            "1B step, 16k tokens: share of the floor", 0.76,
            one(quotient(STEP_1B, step_floor("llama-1b", 16384, 2048))),
        ),
        Claim(
            "1B step / bitsandbytes + PEFT's best", 2.5, one(quotient(STEP_1B, best(BNB, 16384)))
        ),
    ),
    *group(
        "decode --shape 8b",
        Claim(
            "8B decoding / bitsandbytes + generate", 10.0,
            eight(ratio("gpu_decode", SPEED, "decode fourbit", "decode bnb")),
        ),
        Claim(
            "8B decoding / the most that 16-bit weights allow", 1.5,
            eight(quotient(DECODE_8B, decode_floor("llama-8b", 1024, 2.0))),
        ),
        Claim(
            "8B decoding: share of the floor", 0.5,
            eight(quotient(DECODE_8B, decode_floor("llama-8b", 1024))),
        ),
    ),
    *group(
        "dequantize --shape 8b",
        Claim("dequantize: share of a copy", 0.84, eight(dequantize("tb_s", "copy_tb_s"))),
        Claim("dequantize / bitsandbytes", 1.6, eight(dequantize("tb_s", "bnb_tb_s"))),
        Claim(
            "dequantize: launches", 1,
            eight(value("gpu_dequantize", "launches", f"dequantize {BIG}")), most=True,
        ),
    ),
    *group(
        "quantize --shape 8b",
        Claim("quantize: TB/s", 1.5, eight(value("gpu_quantize", "tb_s", f"quantize {BIG}"))),
    ),
    *group(
        "few_rows --shape 8b",
        Claim(
            "few rows: share of a copy, worst of 1 to 16", 0.55,
            eight(smallest(of_copy(m) for m in (1, 2, 4, 8, 16))),
        ),
        Claim("few rows / bitsandbytes, 1 row", 1.2, eight(few_rows(1, "tb_s", "bnb_tb_s"))),
        Claim("few rows / bitsandbytes, 16 rows", 1.5, eight(few_rows(16, "tb_s", "bnb_tb_s"))),
    ),
    *group(
        "attention --shape 8b",
        Claim("attention, causal, both ways / PyTorch's", 1.0, eight(attends("causal"))),
        Claim("attention, packed, both ways / PyTorch's", 1.0, eight(attends("packed"))),
    ),
    *group(
        "optimizer --shape 8b",
        Claim("optimizer: ms for the adapters of 8B", 1.0, eight(OPTIMIZER), most=True),
    ),
    *group(
        "start --shape 8b",
        Claim(
            "seconds to the first step, nothing compiled", 15.0,
            eight(value("gpu_start", "first_step_s", "start fourbit")), most=True,
        ),
    ),
    *group(
        "memory",
        Claim("7B, rank 64, 512 tokens: GB", 6.0, memory("7b"), most=True),
        Claim("8B, 2,048 tokens, offloaded: GB", 6.6, memory("8b 2k"), most=True),
        Claim("65B, rank 64, 512 tokens, under 48 GB: GB", 46.0, memory("65b"), most=True),
        Claim("8B under 16 GB: tokens of one sequence", 60000, ran("8b 60k")),
        Claim("plan against measured, worst cell: per cent", 5.0, plan_error, most=True),
    ),
    *group(
        "demo",
        Claim("demo: loss curve against the CPU's, in bands", 1.0, band, most=True),
    ),
)  # fmt: skip


def newest(claim: Claim, tables: Tables) -> float | None:
    """The figure of the newest call that has it."""
    for call in calls(tables):
        found = claim.measured(of_call(tables, call, None))
        if found is not None:
            return found
    return None


def lines(tables: Tables) -> list[str]:
    """Every claim and what became of it."""
    on_gpu = {name: [row for row in rows if counts(row)] for name, rows in tables.items()}
    return [promise.line(newest(promise.claim, on_gpu)) for promise in PROMISES]


def counts(row: Row) -> bool:
    """Whether a row can be evidence: a GPU measured code that is committed."""
    return row["device"] == "cuda" and not row["commit"].endswith("-dirty")
