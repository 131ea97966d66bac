"""The paper's comparisons in miniature, on a real model of 135M parameters.

    python benchmarks/paper/run.py PART --data-dir DIR --model FOLDER --work DIR [--seeds 3]

PART is `datatypes` (Table 2: perplexity and choices by data type), `banking77` or `snips` (Tables 3
and 4: full, LoRA and QLoRA after fine-tuning; Figure 2: adapters on all layers or on attention;
double quantization; paging), or `table` (nothing is run; the results of WORK become
`results/paper.json` and the tables of docs/results.md on stdout). FOLDER is a plain transformers
model. What is finished in WORK is not done again. 2,000 training rows are drawn by a fixed seed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from rows import stamp

ROWS = 2000
FORMATS = {
    "bf16": ["--quant", "none"],
    "int4": ["--quant", "int4", "--no-double-quant"],
    "fp4": ["--quant", "fp4", "--no-double-quant"],
    "nf4": ["--quant", "nf4", "--no-double-quant"],
    "nf4+double": ["--quant", "nf4"],
    "int8": ["--quant", "int8"],
}
METHODS = "lora,full,qlora,qlora-single,qlora-fp4,qlora-attention,qlora-r4,qlora-paged"
SETTINGS = {
    "data": {"max_length": 128, "eval": 200, "chat_template": "plain"},
    "lora": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0},
    "optim": {"lr": 1e-3},
    "batch_size": 1,
    "grad_accum": 1,
    "epochs": 1,
    "eval_every": 0,
    "save_every": 0,
    "save_total_limit": 1,
    "samples": 2,
}
TASKS = {
    "banking77": {"train": "train.jsonl.gz", "test": "test_a.jsonl.gz", "completion": "{label}"},
    "snips": {"train": "train.jsonl.gz", "test": "val_a.jsonl.gz", "completion": "{intent}"},
}


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def general_text(options: argparse.Namespace) -> Path:
    """The beginning of wikitext-2's validation text, about 10,000 tokens."""
    path = options.work / "wikitext.txt"
    if not path.exists():
        with gzip.open(options.data_dir / "wikitext-2" / "valid.txt.gz", "rt") as file:
            path.write_text(file.read()[: options.characters], encoding="utf-8")
    return path


def fourbit(*words: object, told: bool = True) -> dict[str, Any]:
    command = [sys.executable, "-m", "fourbit", *map(str, words), *(["--json"] if told else [])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def datatypes(options: argparse.Namespace) -> None:
    """Perplexity and multiple choice of the untouched model in every data type."""
    tasks = f"perplexity={general_text(options)}"
    for name in ("hellaswag/val_a.jsonl.gz", "arc_easy/val.jsonl.gz", "mmlu"):
        path = options.data_dir / name
        if path.is_dir():
            path = sorted(path.glob("*test*.gz"))[0]
        tasks += f",{name.split('/')[0]}={path}"
    for name, quant in FORMATS.items():
        path = options.work / "datatypes" / f"{name}.json"
        if path.exists():
            continue
        words = ["eval", options.model, *quant, "--tasks", tasks, "--window", 512]
        found = fourbit(*words, "--limit", options.limit)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"stamp": stamp(), **found}))


def methods(task: str, options: argparse.Namespace) -> None:
    """The same rows through every method."""
    import yaml

    files, folder = TASKS[task], options.data_dir / task
    rows = read(folder / files["train"])
    random.Random(0).shuffle(rows)
    train = write(options.work / task / "train.jsonl", rows[: ROWS + SETTINGS["data"]["eval"]])
    held_out = read(folder / files["test"])
    step = max(1, len(held_out) // options.limit)
    test = write(options.work / task / "test.jsonl", held_out[::step])
    data = {"train": str(train), "prompt": "{text}", "completion": files["completion"]}
    config = {"model": str(options.model), **SETTINGS, "data": {**SETTINGS["data"], **data}}
    path = options.work / task / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    found = fourbit(
        "compare", path, "--methods", options.methods, "--seeds", options.seeds, "--tasks",
        f"exact_match={test}", "--text", general_text(options), "--max-new-tokens", 16,
        "-o", options.work / task / "compared",
    )  # fmt: skip
    (options.work / task / "result.json").write_text(json.dumps({"stamp": stamp(), **found}))


def table(options: argparse.Namespace) -> None:
    """What is in WORK, as one file and as tables."""
    kept: dict[str, Any] = {}
    for path in sorted((options.work / "datatypes").glob("*.json")):
        found = json.loads(path.read_text())
        kept.setdefault("datatypes", {})[path.stem] = _named(found)
    for task in TASKS:
        path = options.work / task / "compared" / "compare.json"
        if path.exists():
            found = json.loads(path.read_text())
            kept[task] = {key: found[key] for key in ("rows", "verdicts", "reference")}
    target = Path(__file__).parents[1] / "results" / "paper.json"
    target.write_text(json.dumps({**kept, "stamp": stamp()}, indent=1) + "\n")
    print(_datatypes_table(kept.get("datatypes", {})))
    for task in TASKS:
        if task in kept:
            print(f"\n{task}\n\n{_methods_table(kept[task])}")


def _named(found: dict[str, Any]) -> dict[str, Any]:
    """The same with files by their names: where they lay says nothing to others."""
    short = {key: Path(found[key]).name for key in ("model", "data") if key in found}
    inner = {key: _named(value) for key, value in found.items() if isinstance(value, dict)}
    return {**found, **inner, **short}


def _datatypes_table(found: dict[str, Any]) -> str:
    if not found:
        return ""
    names = list(next(iter(found.values()))["results"])
    lines = ["| held as | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for kind in FORMATS:
        if kind in found:
            cells = []
            for name in names:
                result = found[kind]["results"][name]
                value, error = result[next(iter(result))], result["stderr"]
                scale = 1 if name == "perplexity" else 100
                cells.append(f"{scale * value:.2f} ± {scale * error:.2f}")
            lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _methods_table(found: dict[str, Any]) -> str:
    lines = [
        "| method | seeds | exact match, % | evaluation loss, before and after"
        " | perplexity of wikitext-2 | peak memory | trained |",
        "| --- |" + " --- |" * 6,
    ]
    for row in found["rows"]:
        if not row["seeds"]:
            continue
        scores = row["scores"]
        lines.append(
            f"| {row['method']} | {len(row['seeds'])} |"
            f" {_interval(scores['exact_match'], 100, 1)} |"
            f" {row['eval_loss_before']:.3f}, {_interval(row['eval_loss'], 1, 4)} |"
            f" {_interval(scores['perplexity'], 1, 2)} (before"
            f" {scores['perplexity']['before']:.2f}) | {row['peak_memory_bytes'] / 1e9:.2f} GB |"
            f" {row['trainable_parameters']:,} |"
        )
    words = [f"- {one['verdict']}" for one in found["verdicts"]]
    return "\n".join([*lines, "", *words])


def _interval(found: dict[str, Any], scale: float, digits: int) -> str:
    half = f" ± {scale * found['half']:.{digits}f}" if found["half"] is not None else ""
    return f"{scale * found['value']:.{digits}f}{half}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["datatypes", *TASKS, "table"])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--limit", type=int, default=400, help="rows of each evaluation")
    parser.add_argument("--characters", type=int, default=40_000, help="of the general text")
    options = parser.parse_args()
    if options.part != "table" and not (options.data_dir and options.model):
        parser.error("--data-dir and --model are needed")
    if options.part == "datatypes":
        datatypes(options)
    elif options.part == "table":
        table(options)
    else:
        methods(options.part, options)


if __name__ == "__main__":
    main()
