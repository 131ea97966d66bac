"""Correctness before speed: gradients of layer 0 and 50 steps of loss, against float32.

    python benchmarks/cpu/correct.py [--quick]

All sides compute with the same NF4 values from the same adapters on the same real text. The
reference is transformers in float32. Passed when the error of our gradient is at most 110% of
transformers' own in bf16, and when our loss strays no further from the reference than the bf16
runs do: those differ in their attention and in the dtype of their adapters, which is the spread
that a bf16 run has anyway.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import protocol
from protocol import Case, Outcome

import models

FILE = "cpu_correct.csv"
LAYER = "layers.0.self_attn.q_proj.lora_B"
MARGIN = 1.10
REFERENCE, BF16 = "transformers-fp32", "transformers-bf16"
SIDES: dict[str, dict[str, Any]] = {
    REFERENCE: {"side": "plain", "nf4": True, "dtype": "float32"},
    BF16: {"side": "plain", "nf4": True, "dtype": "bfloat16"},
    "transformers-bf16-eager": {
        "side": "plain",
        "nf4": True,
        "dtype": "bfloat16",
        "attention": "eager",
    },  # fmt: skip
    "transformers-bf16-narrow": {
        "side": "plain",
        "nf4": True,
        "dtype": "bfloat16",
        "narrow_adapters": True,
    },  # fmt: skip
    "bnb": {"side": "bnb"},
    "bnb-expert": {"side": "bnb-expert"},
    "fourbit": {"side": "fourbit"},
}
SPREAD = (BF16, "transformers-bf16-eager", "transformers-bf16-narrow")
"""The bf16 runs that the loss is compared with: the same weights, bit for bit."""


def cases(options: argparse.Namespace) -> list[Case]:
    """Every side once; they are deterministic, so one round is enough."""
    small = models.small(options)
    shape = {"batches": 3, "rows": 2, "length": 256, "steps": 50, "train_length": 512}
    if options.quick:
        shape |= {"batches": 2, "rows": 1, "length": 256, "steps": 6, "train_length": 256}
    folder = options.work / "gradients"
    folder.mkdir(parents=True, exist_ok=True)
    return [
        Case(name, {**small, **shape, **spec, "to": str(folder / f"{name}.safetensors")})
        for name, spec in SIDES.items()
    ]


def compare(outcome: Outcome, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Errors of every side against the float32 reference."""
    by_name = {row["case"]: row for row in outcome.rows}
    if REFERENCE not in by_name:
        raise SystemExit(f"the reference {REFERENCE} was not measured")
    wanted = losses(by_name[REFERENCE])
    found = []
    for name, row in by_name.items():
        told = {
            "reference": by_name[REFERENCE]["gradients"],
            "other": row["gradients"],
            "compare": True,
        }
        errors = protocol.run_child(__file__, told, options, {})
        strays = [abs(a - b) for a, b in zip(losses(row), wanted, strict=True)]
        found.append(
            {
                "case": name,
                **errors,
                "mean_loss_difference": statistics.mean(strays),
                "largest_loss_difference": max(strays),
                "first_loss": losses(row)[0],
                "last_loss": losses(row)[-1],
                "steps": len(strays),
            }
        )
    return found


def losses(row: protocol.Row) -> list[float]:
    return json.loads(row["losses"])


def faults(found: list[dict[str, Any]]) -> list[str]:
    """The two promises, where both sides of them were measured."""
    by_name = {each["case"]: each for each in found}
    wrong = []
    ours, theirs = by_name.get("fourbit"), by_name.get(BF16)
    if ours and theirs:
        limit = MARGIN * theirs["gradient_error"]
        if ours["gradient_error"] > limit:
            wrong.append(
                f"gradient of layer 0: error {ours['gradient_error']:.4f}, bf16 has"
                f" {theirs['gradient_error']:.4f}, the limit is {limit:.4f}"
            )
    runs = [by_name[name] for name in SPREAD if name in by_name]
    if ours and runs:
        limit = max(run["mean_loss_difference"] for run in runs)
        if ours["mean_loss_difference"] > limit:
            wrong.append(
                f"loss over {ours['steps']} steps: mean difference from fp32"
                f" {ours['mean_loss_difference']:.2e}, bf16 runs reach {limit:.2e}"
            )
    return wrong


def main() -> None:
    parser = protocol.parser((__doc__ or "").splitlines()[0], rounds=1)
    options = parser.parse_args()
    if options.child:
        child_main(json.loads(options.child))
        return
    options = protocol.settle(options)
    options.rounds = 1
    path = options.results / FILE
    outcome = protocol.measure(__file__, options.work / "correct-runs.csv", cases(options), options)
    found = compare(outcome, options)
    about = protocol.origin(options)
    for each in found:
        protocol.append(path, {"date": outcome.rows[-1]["date"], **about, **each})
    columns = ("gradient_error", "gradient_cosine", "all_layers_error", "mean_loss_difference")
    rows = [{key: str(value) for key, value in each.items()} for each in found]
    print(protocol.table(rows, columns))
    protocol.finish(outcome, faults(found))


# The children.


def child_main(spec: dict[str, Any]) -> None:
    import child

    if spec.get("compare"):
        child.emit(gradient_errors(spec["reference"], spec["other"]))
        return
    child.begin(spec)
    import sides
    from safetensors.torch import save_file

    side = sides.SIDES[spec["side"]](spec)
    child.seed_adapter(side.model)
    count = spec["batches"]
    text = child.tokens(spec, count * spec["rows"], spec["length"]).chunk(count)
    gradients = {}
    for index, ids in enumerate(text):
        side.loss(ids).backward()
        for name, parameter in side.model.named_parameters():
            if "lora_B" in name and parameter.grad is not None:
                gradients[f"{index}.{name}"] = parameter.grad.float().clone()
                parameter.grad = None
    save_file(gradients, spec["to"])
    lines = child.tokens(spec, spec["steps"], spec["train_length"])
    found = [side.step(lines[i : i + 1]) for i in range(spec["steps"])]
    paths = child.paths(side.model) if spec["side"] == "fourbit" else {}
    child.emit({"first": found[0], "losses": found, "gradients": spec["to"], "paths": paths})


def gradient_errors(reference: str, other: str) -> dict[str, float]:
    """Relative errors of the gradients of lora_B: mean over batches, layer 0 and all layers."""
    from safetensors.torch import load_file
    from torch.nn.functional import cosine_similarity as cosine

    wanted, got = load_file(reference), load_file(other)
    assert wanted.keys() == got.keys()
    errors, cosines = {}, {}
    for name, exact in wanted.items():
        errors[name] = float((got[name] - exact).norm() / exact.norm())
        cosines[name] = float(cosine(got[name].flatten(), exact.flatten(), dim=0))
    first = [name for name in errors if LAYER in name]
    return {
        "gradient_error": statistics.mean(errors[name] for name in first),
        "gradient_cosine": statistics.mean(cosines[name] for name in first),
        "all_layers_error": statistics.mean(errors.values()),
    }


if __name__ == "__main__":
    main()
