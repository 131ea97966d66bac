"""Training: tokens/s and peak memory of one optimizer step, all sides in turn.

    python benchmarks/cpu/train.py [--quick] [--only 'fourbit*'] [--require-path fused]

Small model, 4 rows of 512 tokens; the 1.1B shape, 1 row of 512. No dropout, no packing mask, no
checkpointing unless the name says so; TRL runs with its own defaults (checkpointing, bf16
autocast). Every row carries the loss at step 0, and the command fails if the 4-bit sides do not
agree on it or if our layers took another path than --require-path.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import protocol
from protocol import Case, Outcome

import models

FILE = "cpu_train.csv"
COLUMNS = ("tokens_per_second", "peak_mb", "first_loss")
TOLERANCE = {"small": 0.01, "large": 0.02}
"""Share of the loss by which two bf16 forward passes over the same 4-bit weights may differ."""
SMALL: dict[str, dict[str, Any]] = {
    "fourbit": {"side": "fourbit"},
    "bnb": {"side": "bnb"},
    "bnb-expert": {"side": "bnb-expert"},
    "trl": {"side": "trl"},
    "lora-bf16": {"side": "plain", "dtype": "bfloat16"},
    "fourbit-transformers": {"side": "fourbit-transformers"},
    "fourbit-dropout": {"side": "fourbit", "dropout": 0.05},
    "fourbit-defaults": {"side": "fourbit", "dropout": 0.05, "packed": True},
    "fourbit-checkpointing": {"side": "fourbit", "checkpointing": True},
    "bnb-checkpointing": {"side": "bnb", "checkpointing": True},
    "trl-no-checkpointing": {"side": "trl", "checkpointing": False},
    "torchao": {"side": "torchao", "rows": 1, "steps": 1},  # minutes a step with four rows
}
LARGE = {"fourbit": {"side": "fourbit"}, "bnb-expert": {"side": "bnb-expert"}}
LIKE = {"lora-bf16": "plain weights", "fourbit-defaults": "documents are kept apart",
        "fourbit-dropout": "dropout", "torchao": "one row"}  # fmt: skip
"""Cases whose first loss is another quantity, and why."""


def cases(options: argparse.Namespace) -> list[Case]:
    """All sides of both sizes."""
    steps = options.steps or (2 if options.quick else 4)
    small, large = models.small(options), models.large(options)
    made = [
        Case(name, {**small, "rows": 4, "length": 512, "steps": steps, **spec})
        for name, spec in SMALL.items()
    ]
    return made + [
        Case(f"{name}-1.1b", {**large, "rows": 1, "length": 512, "steps": steps, **spec})
        for name, spec in LARGE.items()
    ]


def faults(outcome: Outcome, require: str | None) -> list[str]:
    """What must be true of the rows beyond their speed."""
    found = []
    for size, reference in (("", "bnb-expert"), ("-1.1b", "bnb-expert-1.1b")):
        base = protocol.spread(outcome.rows, reference, "first_loss")
        if base is None:
            continue
        limit = TOLERANCE["large" if size else "small"]
        for case in dict.fromkeys(r["case"] for r in outcome.rows):
            if case.endswith("-1.1b") != bool(size) or case in LIKE:
                continue
            loss = protocol.spread(outcome.rows, case, "first_loss")
            if loss is not None and abs(loss.median / base.median - 1) > limit:
                found.append(
                    f"{case}: first loss {loss.median:.4f}, {reference} has {base.median:.4f}"
                )
    for row in outcome.rows:
        if require and row["case"].startswith("fourbit"):
            paths, layers = json.loads(row["paths"]), int(row["layers"])
            if paths != {require: layers}:
                found.append(f"{row['case']}: {layers} layers took {paths}, not all {require}")
    return list(dict.fromkeys(found))


def main() -> None:
    parser = protocol.parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, help="timed steps a process; default 4, --quick 2")
    parser.add_argument("--require-path", help="the path that every layer of ours must report")
    options = parser.parse_args()
    if options.child:
        child_main(json.loads(options.child))
        return
    options = protocol.settle(options)
    outcome = protocol.measure(__file__, options.results / FILE, cases(options), options)
    print(protocol.table(outcome.rows, COLUMNS))
    protocol.finish(outcome, faults(outcome, options.require_path))


# The child.


def child_main(spec: dict[str, Any]) -> None:
    import child

    child.begin(spec)
    if spec["side"] == "trl":
        run_trl(spec)
        return
    import peft as _peft
    import sides
    import transformers as _transformers

    del _peft, _transformers  # every side has them in its import baseline
    if spec["side"].startswith("bnb"):
        child.peer("bitsandbytes")
    memory = child.Memory()
    began = time.perf_counter()
    side = sides.SIDES[spec["side"]](spec)
    loaded = time.perf_counter() - began
    ids = child.tokens(spec, spec["rows"], spec["length"])
    memory.start()
    times, losses = [], []
    for _ in range(1 + spec["steps"]):
        began = time.perf_counter()
        losses.append(side.step(ids))
        times.append(time.perf_counter() - began)
    told = {
        "load_s": loaded,
        "paths": child.paths(side.model) if spec["side"].startswith("fourbit") else {},
        "layers": side.model.config.get_text_config().num_hidden_layers,
    }
    child.emit(figures(spec, times, losses) | memory.values() | told)


def figures(spec: dict[str, Any], times: list[float], losses: list[float]) -> dict[str, Any]:
    """The first step is the warm-up."""
    middle = statistics.median(times[1:])
    return {
        "tokens_per_second": spec["rows"] * spec["length"] / middle,
        "step_s": middle,
        "fastest_s": min(times[1:]),
        "slowest_s": max(times[1:]),
        "first_step_s": times[0],
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "rows": spec["rows"],
        "length": spec["length"],
    }


def run_trl(spec: dict[str, Any]) -> None:
    """SFTTrainer on a bitsandbytes model, its settings left as they are."""
    import child

    trl = child.peer("trl")
    import tempfile

    import datasets
    import sides
    from transformers import AutoTokenizer, TrainerCallback

    memory = child.Memory()
    began = time.perf_counter()
    model = sides.bnb_base(spec)
    loaded = time.perf_counter() - began
    ids = child.tokens(spec, spec["rows"], spec["length"]).tolist()
    steps = 1 + spec["steps"]
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_arguments: Any, **_keywords: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_arguments: Any, **_keywords: Any) -> None:
            times.append(time.perf_counter() - self.began)

    changed = {}
    if "checkpointing" in spec:
        changed["gradient_checkpointing"] = spec["checkpointing"]
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=spec["rows"],
            max_length=spec["length"],
            max_steps=steps,
            # what a benchmark needs: the CPU, the same rows in the same order, no files, no bars
            use_cpu=True,
            train_sampling_strategy="sequential",
            report_to=[],
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **changed,
        )
        trainer = trl.SFTTrainer(
            model=model,
            args=settings,
            train_dataset=datasets.Dataset.from_dict({"input_ids": ids * steps}),
            processing_class=AutoTokenizer.from_pretrained(spec["model"]),
            callbacks=[Clock()],
            peft_config=sides.lora(),
        )
        memory.start()
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    told = {"load_s": loaded, "paths": {}, "layers": model.config.num_hidden_layers}
    child.emit(figures(spec, times, losses) | memory.values() | told)


if __name__ == "__main__":
    if not Path("/proc/self/clear_refs").exists():
        sys.exit("the memory marks of this benchmark are Linux's (/proc/self/clear_refs)")
    main()
