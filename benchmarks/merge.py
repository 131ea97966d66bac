"""Merging: how fast a merged model answers against adapter and base, and what a merge needs.

    python benchmarks/merge.py speed --run RUN [--tokens 64] [--rounds 5]
    python benchmarks/merge.py memory --shape llama-7b [--work DIR] [--r 16] [--dtype bf16]

`speed` merges RUN (proof included), then generates the same prompts with both models in turn,
and reports medians; the greedy texts must be equal. `memory` writes a random model of the shape
(benchmarks/shapes.py) unless DIR holds it, merges an adapter into its dequantized 4-bit weights
in a child process without a proof, and samples the child's anonymous memory (RssAnon) against
that after its imports. Appends a line to benchmarks/results/merge.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
import transformers

import fourbit
from shapes import SHAPES, write_adapter, write_model

RESULTS = Path(__file__).parent / "results" / "merge.csv"
LIMIT = 2 << 30
PROMPTS = (
    "Write two sentences about the sea.",
    "Anna wants 3 mugs and a teapot by Friday.",
    "Name the largest planet and say why it is so large.",
    "Please send 12 blue notebooks to Peter in Hamburg.",
)
CHILD = """
import json, sys, time
import fourbit
from fourbit.merging import MergeOptions, merge
from fourbit.quantize import QuantConfig
from fourbit.training.progress import Reporter
options = MergeOptions(model=sys.argv[2], quant=QuantConfig(), dtype=sys.argv[4], proof=False,
                       overwrite=True)
print("ready", flush=True)
sys.stdin.readline()
began = time.perf_counter()
result = merge(sys.argv[1], sys.argv[3], options=options, reporter=Reporter())
print(json.dumps({"seconds": time.perf_counter() - began, "bytes": result.bytes}), flush=True)
sys.stdin.readline()
"""


def anonymous(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def measure_memory(options: argparse.Namespace) -> dict:
    work = options.work or Path(tempfile.mkdtemp(prefix="fourbit-merge-"))
    base, adapter, output = work / options.shape, work / "adapter", work / "merged"
    if not (base / "tokenizer.json").is_file():
        write_model(base, options.shape)
    write_adapter(adapter, options.shape, r=options.r)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(adapter), str(base), str(output), options.dtype],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline().strip() == "ready"
    baseline = peak = anonymous(child.pid)
    child.stdin.write("go\n")
    child.stdin.flush()
    started = time.monotonic()
    # The child holds its breath after its last line, so that the end is sampled as well.
    while child.poll() is None and not _has_output(child):
        peak = max(peak, anonymous(child.pid))
        time.sleep(0.005)
    result = json.loads(child.stdout.readline())
    peak = max(peak, anonymous(child.pid))
    child.stdin.close()
    assert child.wait() == 0
    if options.work is None:
        shutil.rmtree(work)
    elif not options.keep:
        shutil.rmtree(output)
    return {
        "what": f"memory {options.shape} r={options.r} {options.dtype}",
        "seconds": round(result["seconds"], 1),
        "output_bytes": result["bytes"],
        "baseline_bytes": baseline,
        "peak_above_baseline_bytes": peak - baseline,
        "gigabytes_per_second": round(result["bytes"] / result["seconds"] / 1e9, 3),
        "sampled_seconds": round(time.monotonic() - started, 1),
    }


def _has_output(child: subprocess.Popen[str]) -> bool:
    import select

    return bool(select.select([child.stdout], [], [], 0)[0])


def measure_speed(options: argparse.Namespace) -> dict:
    from fourbit.generate import Sampling, open_generator
    from fourbit.merging.trained import find_trained

    trained = find_trained(options.run)
    work = Path(tempfile.mkdtemp(prefix="fourbit-merge-"))
    result = fourbit.merge(options.run, work / "merged")
    models = {
        "adapter": open_generator(
            trained.config.model if trained.config else trained.source.name,
            adapter=options.run,
            quant=trained.quant,
        ),
        "merged": open_generator(str(work / "merged"), quant=None),
    }
    sampling = Sampling(max_new_tokens=options.tokens)
    speeds: dict[str, list[float]] = {name: [] for name in models}
    texts: dict[str, list[str]] = {}
    for turn in range(options.rounds + 1):  # the first warms up
        order = list(models) if turn % 2 else list(reversed(models))
        for name in order:
            generator = models[name]
            ids = [generator.prompt_ids([{"role": "user", "content": p}]) for p in PROMPTS]
            began = time.perf_counter()
            answers = [generator.answers([one], sampling)[0] for one in ids]
            seconds = time.perf_counter() - began
            texts[name] = [answer.text for answer in answers]
            if turn:
                speeds[name].append(sum(answer.tokens for answer in answers) / seconds)
    shutil.rmtree(work)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    equal = sum(a == b for a, b in zip(texts["adapter"], texts["merged"], strict=True))
    assert result.proof is not None
    return {
        "what": f"speed {trained.source.name} {result.dtype} batch 1",
        "adapter_tokens_per_second": round(medians["adapter"], 2),
        "merged_tokens_per_second": round(medians["merged"], 2),
        "ratio": round(medians["merged"] / medians["adapter"], 3),
        "spread": round(max(max(v) / min(v) for v in speeds.values()), 3),
        "same_texts": f"{equal} of {len(PROMPTS)}",
        "kl": result.proof.kl,
        "seconds": result.seconds,
    }


def record(values: dict) -> None:
    row = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "commit": _commit(),
        "fourbit": fourbit.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "what": values["what"],
        "figures": json.dumps({k: v for k, v in values.items() if k != "what"}),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.is_file()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    modes = parser.add_subparsers(dest="mode", required=True)
    speed = modes.add_parser("speed")
    speed.add_argument("--run", type=Path, required=True, help="a finished run, such as the demo's")
    speed.add_argument("--tokens", type=int, default=64)
    speed.add_argument("--rounds", type=int, default=5)
    memory = modes.add_parser("memory")
    memory.add_argument("--shape", choices=sorted(SHAPES), default="llama-7b")
    memory.add_argument("--work", type=Path, default=None, help="keeps the random model here")
    memory.add_argument("--r", type=int, default=16)
    memory.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    memory.add_argument("--keep", action="store_true", help="keep the merged model too")
    options = parser.parse_args()
    values = measure_memory(options) if options.mode == "memory" else measure_speed(options)
    for key, value in values.items():
        print(f"{key}: {value}")
    record(values)
    if options.mode == "memory":
        assert values["peak_above_baseline_bytes"] < LIMIT, "a merge must stay below 2 GiB"


if __name__ == "__main__":
    main()
