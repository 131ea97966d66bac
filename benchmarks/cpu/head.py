"""What head and loss add to memory when one batch holds 8,192 tokens.

    python benchmarks/cpu/head.py [--tokens 8192]

Two questions: the step's peak with our loss less its peak with a sum over the hidden states
instead, and the head alone on given hidden states, which nothing else can hide. Beside it the full
logits that transformers makes.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import protocol
from protocol import Case, Outcome

import models

FILE = "cpu_head.csv"
LIMIT_MB = 150.0
TOLERANCE = 2e-3


def cases(options: argparse.Namespace) -> list[Case]:
    """The step with and without head, the head alone, and the full logits."""
    told = {**models.small(options), "tokens": options.tokens}
    kinds = ("step-no-head", "step", "head", "head-full-logits", "head-masked")
    return [Case(kind, {**told, "kind": kind}) for kind in kinds]


def faults(outcome: Outcome) -> list[str]:
    """The limit, for the head alone and for what it adds to the step; equal losses."""
    found = []
    peaks = {case: protocol.spread(outcome.rows, case, "peak_mb") for case in _names(outcome)}
    step, bare = peaks.get("step"), peaks.get("step-no-head")
    if step and bare:
        added = step.median - bare.median
        print(f"head and loss add {added:.0f} MB to the step")
        if added > LIMIT_MB:
            found.append(f"head and loss add {added:.0f} MB to the step, more than {LIMIT_MB:.0f}")
    alone = protocol.spread(outcome.rows, "head", "added_mb")
    if alone and alone.median > LIMIT_MB:
        found.append(f"the head alone takes {alone.median:.0f} MB, more than {LIMIT_MB:.0f}")
    ours = protocol.spread(outcome.rows, "head", "loss")
    full = protocol.spread(outcome.rows, "head-full-logits", "loss")
    if ours and full and not math.isclose(ours.median, full.median, rel_tol=TOLERANCE):
        found.append(f"loss {ours.median} of our head, {full.median} from full logits")
    return found


def _names(outcome: Outcome) -> list[str]:
    return list(dict.fromkeys(row["case"] for row in outcome.rows))


def main() -> None:
    parser = protocol.parser((__doc__ or "").splitlines()[0], rounds=2)
    parser.add_argument("--tokens", type=int, default=8192, help="in one batch of one row")
    options = parser.parse_args()
    if options.child:
        child_main(json.loads(options.child))
        return
    options = protocol.settle(options)
    outcome = protocol.measure(__file__, options.results / FILE, cases(options), options)
    print(protocol.table(outcome.rows, ("peak_mb", "ready_mb", "added_mb", "seconds", "loss")))
    protocol.finish(outcome, faults(outcome))


# The child.


def child_main(spec: dict[str, Any]) -> None:
    import child

    child.begin(spec)
    memory = child.Memory()
    if spec["kind"].startswith("step"):
        work = whole_step(spec)
    else:
        work = head_alone(spec)
    memory.start()
    losses: list[float] = []
    took = child.seconds(lambda: losses.append(work()))
    marks = memory.values()
    added = round(marks["peak_mb"] - marks["ready_mb"], 1)
    child.emit(
        {**marks, "added_mb": added, "seconds": took, "loss": losses[0], "tokens": spec["tokens"]}
    )


def whole_step(spec: dict[str, Any]) -> Any:
    """Forward and backward with recomputed activations, which leave the head nothing to hide in."""
    import child
    import sides

    from fourbit.objective import Objective

    side = sides.fourbit_native({**spec, "checkpointing": True})
    batch = sides.as_batch(child.tokens(spec, 1, spec["tokens"]), packed=False)
    objective = Objective(side.model)

    def work() -> float:
        if spec["kind"] == "step":
            loss = objective.loss_sum(batch) / batch.num_supervised
        else:
            loss = objective.hidden(batch).float().mean()
        loss.backward()
        return float(loss.detach())

    return work


def head_alone(spec: dict[str, Any]) -> Any:
    """The head's weight with hidden states of real text's size; masked: 60% carry no loss."""
    import child
    import torch

    import fourbit
    from fourbit.loss import linear_cross_entropy, logits_cross_entropy

    model, _ = fourbit.load(spec["model"])
    weight = model.get_output_embeddings().weight.detach()  # type: ignore[union-attr]
    labels = child.tokens(spec, 1, spec["tokens"])[0]
    # the states of a text are close to what predicts it: the embeddings serve
    hidden = (weight[labels] * 4).detach().requires_grad_()
    if spec["kind"] == "head-masked":
        labels = labels.clone()
        labels[: int(0.6 * labels.numel())] = -100
    del model

    def work() -> float:
        if spec["kind"] == "head-full-logits":
            loss = logits_cross_entropy(torch.nn.functional.linear(hidden, weight), labels)
        else:
            loss = linear_cross_entropy(hidden, weight, labels)
        loss = loss / int((labels != -100).sum())
        loss.backward()
        return float(loss.detach())

    return work


if __name__ == "__main__":
    main()
