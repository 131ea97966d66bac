"""`fourbit eval` against lm-eval: the same likelihoods item by item, and how fast.

    python benchmarks/evaluation.py --data-dir DIR [--rows 1000] [--rounds 3] [--model FOLDER]

All sides hold the same NF4 weights with double quantization, made by `fourbit quantize`, and
compute in float32. The truth is lm-eval on the plain model with those weights dequantized; the
command fails if one likelihood differs from it by more than rounding. Speed is compared with
lm-eval on bitsandbytes, whose CPU kernels round the scales to bfloat16, so some of its choices are
others. DIR has hellaswag/val_a.jsonl.gz and arc_easy/val.jsonl.gz; FOLDER is a plain transformers
model. lm-eval's own functions prepare its rows. Sides take turns; rows go to
results/evaluation.csv.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rows import append, stamp

FILES = {"hellaswag": "hellaswag/val_a.jsonl.gz", "arc_easy": "arc_easy/val.jsonl.gz"}
CLOSE = 2e-3
"""Nats by which a log-likelihood of some 30 tokens may differ: float32 sums in another order."""
YAML = """task: {task}_local
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {rows}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{query}}}}"
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


def ours(model: str, task: str, path: Path, rows: int) -> dict[str, Any]:
    """One process of `fourbit eval`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fourbit", "eval", model, "--tasks", f"{task}={path}"]
        command += ["--precision", "fp32", "--limit", str(rows), "--items", folder, "--json"]
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        items = [json.loads(line) for line in (Path(folder) / f"{task}.jsonl").open()]
    found = json.loads(told)["results"][task]
    return {
        "seconds": found["seconds"],
        "acc": found["acc"],
        "acc_norm": found["acc_norm"],
        "likelihoods": [item["log_likelihoods"] for item in items],
    }


def plain_model(packed: str, original: str) -> Any:
    """The original model with the weights that the packed one stands for."""
    import torch
    from transformers import AutoModelForCausalLM

    import fourbit
    from fourbit.linear import Linear4bit

    source, _ = fourbit.load(packed)
    loaded = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    for name, module in source.named_modules():
        if isinstance(module, Linear4bit):
            loaded.get_submodule(name).weight.data = module.dequantize(torch.float32)
    return loaded


def bitsandbytes_model(packed: str) -> Any:
    """The packed model in bitsandbytes' layers."""
    import bitsandbytes
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32, device_map="cpu")
    for module in loaded.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype = torch.float32  # the file says bfloat16
    return loaded


def theirs(
    loaded: Any, folder_of_tokenizer: str, task: str, path: Path, rows: int, batch: int
) -> dict[str, Any]:
    """lm-eval; runs in a process of its own."""
    import gzip

    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.hellaswag.utils import preprocess
    from transformers import AutoTokenizer

    asked = HFLM(
        pretrained=loaded,
        tokenizer=AutoTokenizer.from_pretrained(folder_of_tokenizer),
        batch_size=batch,
        device="cpu",
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "rows.jsonl"
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as data, source.open("w") as out:
            for line in list(data)[:rows]:
                row = json.loads(line)
                if task == "hellaswag":
                    row = {
                        "query": preprocess(f"{row['activity_label']}: {row['ctx']}"),
                        "choices": [preprocess(text) for text in row["endings"]],
                        "gold": row["label"],
                    }
                kept = {key: row[key] for key in ("query", "choices", "gold")}
                out.write(json.dumps(kept) + "\n")
        (Path(folder) / "task.yaml").write_text(YAML.format(task=task, rows=source))
        manager = TaskManager(include_path=folder)
        began = time.perf_counter()
        found = lm_eval.simple_evaluate(
            model=asked, tasks=[f"{task}_local"], task_manager=manager, bootstrap_iters=0
        )
        seconds = time.perf_counter() - began
    assert found is not None
    values = found["results"][f"{task}_local"]
    samples = sorted(found["samples"][f"{task}_local"], key=lambda sample: sample["doc_id"])
    return {
        "seconds": seconds,
        "acc": values["acc,none"],
        "acc_norm": values["acc_norm,none"],
        "likelihoods": [[float(r[0]) for r in s["filtered_resps"]] for s in samples],
    }


def theirs_alone(options: argparse.Namespace, task: str, packed: str) -> dict[str, Any]:
    """`theirs` in a process of its own, as ours has one."""
    command = [sys.executable, __file__, "--data-dir", str(options.data_dir), "--side", task]
    command += ["--model", options.model, "--rows", str(options.rows)]
    command += ["--batch-size", str(options.batch_size), "--packed", packed]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(told.splitlines()[-1])


def compare(mine: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How far the answers are apart."""
    pairs = list(zip(mine["likelihoods"], other["likelihoods"], strict=True))
    worst = max(abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True))
    different = sum(x.index(max(x)) != y.index(max(y)) for x, y in pairs)
    return {"items": len(pairs), "worst_nats": round(worst, 6), "other_choice": different}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-bf16")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16, help="of lm-eval")
    parser.add_argument("--tasks", default=",".join(FILES))
    parser.add_argument("--side", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--packed", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is not None:
        path = options.data_dir / FILES[options.side]
        loaded = bitsandbytes_model(options.packed)
        found = theirs(loaded, options.packed, options.side, path, options.rows, options.batch_size)
        print(json.dumps(found))
        return
    stamped = stamp()
    wrong = []
    packed = tempfile.TemporaryDirectory()
    nf4 = str(Path(packed.name) / "nf4")
    command = [sys.executable, "-m", "fourbit", "quantize", options.model, "-o", nf4]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for task in options.tasks.split(","):
        path = options.data_dir / FILES[task]
        mine, other = [], []
        for _ in range(options.rounds):
            mine.append(ours(nf4, task, path, options.rows))
            other.append(theirs_alone(options, task, nf4))
        truth = theirs(
            plain_model(nf4, options.model), nf4, task, path, options.rows, options.batch_size
        )
        agreement = compare(mine[-1], truth)
        others = compare(other[-1], truth)
        row = {
            **stamped,
            "task": task,
            "rounds": options.rounds,
            **agreement,
            "acc": mine[-1]["acc"],
            "acc_lm_eval": truth["acc"],
            "acc_norm": mine[-1]["acc_norm"],
            "acc_norm_lm_eval": truth["acc_norm"],
            "bnb_worst_nats": others["worst_nats"],
            "bnb_other_choice": others["other_choice"],
            "seconds": round(statistics.median(m["seconds"] for m in mine), 1),
            "seconds_lm_eval_bnb": round(statistics.median(o["seconds"] for o in other), 1),
        }
        row["times_as_fast"] = round(row["seconds_lm_eval_bnb"] / row["seconds"], 2)
        append("evaluation", row)
        print(json.dumps(row), flush=True)
        same = row["acc"] == row["acc_lm_eval"] and row["acc_norm"] == row["acc_norm_lm_eval"]
        if agreement["worst_nats"] > CLOSE or agreement["other_choice"] or not same:
            wrong.append(task)
    if wrong:
        sys.exit(f"answers differ: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
