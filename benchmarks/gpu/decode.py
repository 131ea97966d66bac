"""Tokens/s of one answer after a long prompt: `fourbit.generate` beside transformers' `generate`.

The time of one token is that of N + 1 new ones less that of one, so neither the prompt nor what is
done once is in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from gpu.section import Found, Spec, told
from harness import Case
from rows import Row
from sizes import SHAPES

COLUMNS = ("tokens_per_second", "prefill_s", "peak_gb", "engine")
SIDES = ("fourbit", "bnb", "bf16")
Run = Callable[[int], int]
"""Makes so many new tokens and tells how many came."""


def cases(options: argparse.Namespace) -> list[Case]:
    prompt, new = (24, 32) if options.shape == "tiny" else (1024, 64)
    return [Case(f"decode {s}", told(options, side=s, prompt=prompt, new=new)) for s in SIDES]


def faults(rows: list[Row]) -> list[str]:
    short = [
        f"{row['case']}: {row['made']} tokens, asked for {row['new_tokens']}"
        for row in rows
        if row["made"] != row["new_tokens"]
    ]
    ours = [row for row in rows if row["case"].endswith("fourbit")]
    other = [row for row in ours if row["engine"] not in ("native", "graph")]
    return short + [f"{row['case']}: no decoder of our own: {row['engine']}" for row in other]


def measure(spec: Spec) -> Found:
    import statistics

    from fourbit.device import peak_memory, reset_peak_memory
    from gpu.clock import Clock
    from inside import random_ids

    clock = Clock(spec["device"])
    prompt = random_ids(SHAPES[spec["shape"]]["vocab_size"], 1, spec["prompt"])[0].tolist()
    run, engine = MAKERS[spec["side"]](spec, clock.device, prompt)
    for count in (4, 1):  # what is made once
        run(count)
    reset_peak_memory(clock.device)
    new, repeats = spec["new"], 1 if spec["tiny"] else 3
    first = statistics.median(clock.wall(lambda: run(1)) for _ in range(repeats))
    made: list[int] = []
    times = [clock.wall(lambda: made.append(run(new + 1))) - first for _ in range(repeats)]
    yield {
        "tokens_per_second": new / statistics.median(times),
        "prefill_s": first,
        "context": spec["prompt"],
        "new_tokens": new + 1,
        "made": made[-1],
        "peak_gb": (peak_memory(clock.device) or 0) / 1e9,
        "engine": engine,
    }


def fourbit(spec: Spec, device: Any, prompt: list[int]) -> tuple[Run, str]:
    """The generator behind `fourbit generate`."""
    from fourbit.decoding import GraphDecoder, build_decoder
    from fourbit.generate import Generator, Sampling
    from gpu import build
    from shapes import tokenizer

    model = build.fourbit_model(spec["shape"], device)
    words = tokenizer()
    # no end of text: every side makes the same number of tokens
    model.generation_config.eos_token_id = words.eos_token = None
    model.config.use_cache = True
    generator = Generator(model, words, None)

    def run(count: int) -> int:
        return generator.answers([prompt], Sampling(max_new_tokens=count))[0].tokens

    decoder, reason = build_decoder(model)
    engine = "graph" if isinstance(decoder, GraphDecoder) else "native"
    return run, reason if decoder is None else engine


def generate(model: Any, prompt: list[int]) -> Run:
    """transformers' own greedy search."""
    import torch

    model.config.use_cache = True
    ids = torch.tensor([prompt], device=model.device)

    def run(count: int) -> int:
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return out.shape[1] - len(prompt)

    return run


def bnb(spec: Spec, device: Any, prompt: list[int]) -> tuple[Run, str]:
    from gpu import build

    return generate(build.bnb_model(spec["shape"], device), prompt), "transformers"


def plain(spec: Spec, device: Any, prompt: list[int]) -> tuple[Run, str]:
    from gpu import build

    return generate(build.plain_model(spec["shape"], device), prompt), "transformers"


MAKERS = {"fourbit": fourbit, "bnb": bnb, "bf16": plain}
