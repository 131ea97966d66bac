"""The plan against the run: what `fourbit train` said it would need, and what it took.

    python benchmarks/memory.py --model smollm2 [--cells 20 --seed 1] [--rounds 3]
    python benchmarks/memory.py --model DIR --only 'qlora*'
    python benchmarks/memory.py --model DIR --fixed no --cells 6 --batches 1,2 --lengths 128,256
    python benchmarks/memory.py table

Each cell is a run of `fourbit train`: three steps on generated text that fills every sequence. Some
cells are fixed; `--cells N --seed S` draws N more of the whole grid, or of the part of it that is
named. Rows go to results/memory.csv: bytes above what the imports alone take. `table` prints the
cells that were measured three times, as docs/concepts/memory.md has them.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path

from rows import REPOSITORY, RESULTS, append, read, stamp

METHODS = {
    "qlora": {"method": "qlora"},
    "lora": {"method": "lora"},
    "full": {"method": "full"},
    "int8": {"method": "qlora", "quant.quant_type": "int8"},
}
FIXED = [
    ("qlora", 4, 512, "none", False),
    ("qlora", 4, 512, "all", True),
    ("qlora", 1, 512, "none", True),
    ("lora", 4, 512, "none", False),
    ("lora", 2, 1024, "all", True),
    ("int8", 2, 512, "all", False),
    ("full", 2, 512, "none", False),
    ("full", 2, 512, "all", True),
]
Cell = tuple[str, int, int, str, bool]


def drawn(
    count: int, seed: int, methods: list[str], batches: list[int], lengths: list[int]
) -> list[Cell]:
    """``count`` different cells of a grid."""
    grid = list(product(methods, batches, lengths, (0, 1), (0, 1)))
    cells = random.Random(seed).sample(grid, count)
    return [(m, b, t, "all" if c else "none", bool(p)) for m, b, t, c, p in cells]


def name_of(cell: Cell) -> str:
    method, batch, length, checkpointing, packing = cell
    return f"{method}-b{batch}-t{length}-{checkpointing}{'-packed' if packing else ''}"


def baseline() -> int:
    """Resident bytes of a process that has imported what a training imports."""
    code = (
        "import fourbit.training.run; from fourbit import device;"
        "import transformers.models.llama.modeling_llama; print(device.resident_memory())"
    )
    return int(subprocess.check_output([sys.executable, "-c", code], text=True).split()[-1])


def text(path: Path, length: int, rows: int) -> None:
    """Rows of a little more than ``length`` tokens, of words from this repository."""
    words = (REPOSITORY / "README.md").read_text().split()
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            drawn = " ".join(draw.choices(words, k=2 * length))
            file.write(json.dumps({"text": drawn[: 4 * length]}) + "\n")


def training(settings: Mapping[str, object]) -> list[str]:
    """The command of a run with these settings."""
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "fourbit", "train", *words, "--json"]


def run(cell: Cell, model: str, steps: int = 3) -> tuple[int, int]:
    """``(planned, measured)`` peak bytes of one run."""
    method, batch, length, checkpointing, packing = cell
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "text.jsonl"
        text(data, length, rows=4 * batch + 4)
        settings = {
            **METHODS[method],
            "model": model,
            "data.train": str(data),
            "data.eval": batch,
            "data.max_length": length,
            "data.packing": str(packing).lower(),
            "data.train_on": "all",
            "batch_size": batch,
            "grad_accum": 1,
            "max_steps": steps,
            "samples": 0,
            "gradient_checkpointing": checkpointing,
            "output": str(Path(folder) / "run"),
        }
        done = subprocess.run(training(settings), capture_output=True, text=True, check=False)
        if not done.stdout.strip():
            sys.exit(f"{name_of(cell)}: {done.stderr.strip().splitlines()[-1]}")
    told = json.loads(done.stdout)
    return told["predicted_peak_bytes"], told["peak_memory_bytes"]


def rows(cells: list[Cell], model: str, rounds: int, steps: int) -> Iterator[dict[str, object]]:
    stamped = stamp()
    base = statistics.median(baseline() for _ in range(3))
    for cell in cells:
        runs = [run(cell, model, steps) for _ in range(rounds)]
        planned = statistics.median(p for p, _ in runs) - base
        measured = statistics.median(m for _, m in runs) - base
        yield {
            **stamped,
            "model": Path(model).name,
            "cell": name_of(cell),
            "rounds": rounds,
            "planned_mb": round(planned / 1e6, 1),
            "measured_mb": round(measured / 1e6, 1),
            "error_percent": round(100 * (planned / measured - 1), 2),
        }


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def table() -> None:
    """Every cell that was measured three times, newest first where there are several."""
    measured = [row for row in read(RESULTS / "memory.csv") if int(row["rounds"]) >= 3]
    newest = {(row["model"], row["cell"]): row for row in measured}
    print(
        "| model | cell | planned, MB | measured, MB | error, % |\n| --- | --- | --- | --- | --- |"
    )
    for (model, cell), row in newest.items():
        figures = (row[key] for key in ("planned_mb", "measured_mb", "error_percent"))
        print("| " + " | ".join((model, cell, *figures)) + " |")
    errors = [abs(float(row["error_percent"])) for row in newest.values()]
    if errors:
        told = f"median {statistics.median(errors):.1f}%, worst {max(errors):.1f}%"
        print(f"\n{len(errors)} cells: {told}")


def main() -> None:
    if sys.argv[1:] == ["table"]:
        table()
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--only", default="*", help="cells by name, with wildcards")
    parser.add_argument("--fixed", choices=["yes", "no"], default="yes", help="the fixed cells too")
    parser.add_argument("--cells", type=int, default=0, help="cells drawn besides the fixed ones")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--methods", type=_words, default=list(METHODS))
    parser.add_argument("--batches", type=_numbers, default=[1, 2, 3, 4, 6])
    parser.add_argument("--lengths", type=_numbers, default=[256, 384, 512, 768, 1024])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    cells = drawn(options.cells, options.seed, options.methods, options.batches, options.lengths)
    print(f"cells drawn with seed {options.seed}: {options.cells}")
    cells = [*(FIXED if options.fixed == "yes" else []), *cells]
    wanted = [cell for cell in cells if fnmatch.fnmatch(name_of(cell), options.only)]
    errors = []
    for row in rows(wanted, options.model, options.rounds, options.steps):
        append("memory", row)
        errors.append(abs(float(str(row["error_percent"]))))
        print(*row.values(), flush=True)
    print(f"median error {statistics.median(errors):.1f}%, worst {max(errors):.1f}%")


if __name__ == "__main__":
    main()
