"""What is said of runs that went wrong, and nothing of those that went well."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from commands import fourbit as command
from commands import train_quietly
from fourbit.errors import EnvironmentFault, FourbitError, InputError, NumericStop
from fourbit.objective import Objective
from fourbit.rundir import EVALUATIONS
from fourbit.training.checkup import Records, check_up, findings
from models import write_chats

HEALTHY = {
    "qlora, packed": {"epochs": 8},
    "lora, padded": {"method": "lora", "data": {"packing": False}, "epochs": 4},
    "full": {"method": "full", "optim": {"lr": 1e-3}, "lora": {}, "epochs": 4},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_folder):
    """Trains a tiny run; a section of settings given is laid over that of the tiny run."""

    def run(name, **changes):
        folder = tmp_path_factory.mktemp("checkup") / name.replace(" ", "")
        folder.mkdir()
        if "data" in changes:
            train = str(write_chats(folder / "chats.jsonl", 60))
            changes["data"] = {"train": train, "eval": 6, "max_length": 128, **changes["data"]}
        return train_quietly(folder, model_folder("llama"), **changes)

    return run


@pytest.fixture(scope="module")
def healthy(trained):
    return Records.read(trained("healthy", **HEALTHY["qlora, packed"]))


@pytest.mark.parametrize("name", HEALTHY)
def test_a_run_that_went_well_has_no_finding(trained, name):
    assert [finding.line() for finding in check_up(trained(name, **HEALTHY[name]))] == []


def told(records: Records) -> str:
    return "\n".join(finding.line() for finding in findings(records))


def with_steps(records: Records, change) -> Records:
    """``change(step, line)`` gives the values that a step's line gets."""
    lines = [
        {**line, **change(line["step"], line)} if line.get("step", 0) > 0 else line
        for line in records.metrics
    ]
    return replace(records, metrics=lines)


def with_config(records: Records, **sections) -> Records:
    values = records.config.model_dump()
    for name, value in sections.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) else value
    return replace(records, config=type(records.config).model_validate(values))


def flat(records: Records) -> Records:
    lines = with_steps(
        records, lambda step, _: {"loss": 2.0 + 0.001 * (step % 2), "eval_loss": 2.0}
    ).steps
    return replace(records, metrics=[{"step": 0, "eval_loss": 2.001}, *lines])


def test_a_run_with_too_low_a_rate(trained):
    low = "\n".join(f.line() for f in check_up(trained("low", optim={"lr": 1e-7})))
    assert "the training loss is flat" in low
    assert "the learning rate 1e-07 is below" in low
    assert "optim.lr: 0.0002" in low


def test_a_run_that_ends_badly_is_looked_at_by_itself(tmp_path, model_folder, monkeypatch, capsys):
    real = Objective.loss_sum
    monkeypatch.setattr(
        Objective,
        "loss_sum",
        lambda self, batch: real(self, batch) * (float("nan") if torch.is_grad_enabled() else 1),
    )
    with pytest.raises(NumericStop):
        train_quietly(tmp_path, model_folder("llama"), rehearsal=False)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "2 of 2 updates were skipped for NaN or Inf, the first at step 1" in log
    assert "error[nonfinite]" in log
    assert "updates were skipped" in capsys.readouterr().err


def test_memory_that_ran_out_early(tmp_path, model_folder, monkeypatch):
    def full(self, batch):
        raise MemoryError("std::bad_alloc")

    monkeypatch.setattr(Objective, "loss_sum", full)
    with pytest.raises(EnvironmentFault):
        train_quietly(tmp_path, model_folder("llama"))
    (found,) = check_up(tmp_path / "run")
    assert "memory ran out: " in found.symptom
    assert "planned" in found.cause
    assert found.fix


PARTS = {"weights": 700, "activations": 5000, "baseline": 300}
OOM = "2026-01-01T00:00:00+00:00 error[out-of-memory] step 1: one sequence does not fit; fix: x"

PLANTED = {
    "out of memory, activations": (
        lambda r: replace(
            with_config(r, batch_size=8),
            receipt={},
            log=[OOM],
            plan={**r.plan, "parts": PARTS, "peak_bytes": 6000},
        ),
        ["memory ran out: step 1", "largest part is activations", "batch_size: 4"],
    ),
    "out of memory, weights": (
        lambda r: replace(
            with_config(r, method="lora"),
            receipt={},
            log=[OOM],
            plan={**r.plan, "parts": {**PARTS, "weights": 9000}, "peak_bytes": 14300},
        ),
        ["largest part is weights", "method: qlora"],
    ),
    "made room": (
        lambda r: replace(r, receipt={**r.receipt, "memory_events": 3}),
        ["memory ran out 3 times"],
    ),
    "killed by the system": (
        lambda r: replace(
            with_steps(r, lambda s, _: {"memory_bytes": 15_500_000_000}),
            receipt={},
            log=["training"],
            machine={**r.machine, "memory_total": 16_000_000_000},
        ),
        ["vanished after step", "15.50 GB of 16.00 GB"],
    ),
    "killed by someone": (
        lambda r: replace(r, receipt={}, log=["training"]),
        ["vanished after step", "--resume auto"],
    ),
    "NaN with growing gradients": (
        lambda r: with_steps(
            r,
            lambda s, _: {"grad_norm": 1.0 if s < 8 else 50.0}
            if s < 10
            else {"loss": None, "grad_norm": None, "updated": False},
        ),
        ["NaN or Inf, the first at step 10", "grown to 50 from a median of 1", "optim.lr: 0.0025"],
    ),
    "NaN in fp16": (
        lambda r: with_steps(
            with_config(r, precision="fp16"),
            lambda s, _: {"loss": None, "updated": False} if s in (4, 5) else {},
        ),
        ["2 of ", "largest number is 65504", "bf16 or fp32"],
    ),
    "NaN of a row": (
        lambda r: replace(
            with_steps(r, lambda s, _: {"loss": None, "updated": False} if s == 4 else {}),
            log=["t warning: step 4: loss nan, gradient norm nan: no update; rows chats.jsonl:7"],
        ),
        ["the first at step 4", "a row of the data", "chats.jsonl:7"],
    ),
    "adapters unattached": (
        lambda r: replace(
            r,
            receipt={
                **r.receipt,
                "checks": [
                    {"name": "gradients_reached", "ok": False, "detail": "0 of 14 tensors"},
                ],
            },
        ),
        ["gradients_reached failed: 0 of 14", "all-linear"],
    ),
    "masks": (
        lambda r: replace(flat(r), audit={**r.audit, "supervised_share": 0.004}),
        ["flat", "only 0.40% of the tokens", "data.train_on: all"],
    ),
    "alpha": (
        lambda r: with_config(flat(r), lora={"r": 64, "lora_alpha": 2}),
        ["flat", "lora_alpha 2 over r 64", "lora.lora_alpha: 128"],
    ),
    "warm-up": (
        lambda r: with_config(flat(r), optim={"warmup_ratio": 0.9}),
        ["flat", "warm-up takes 90%"],
    ),
    "nothing new": (flat, ["flat", "nothing in the settings stands out"]),
    "diverged": (
        lambda r: with_steps(r, lambda s, _: {"loss": 2.0 + 0.2 * s, "lr": 0.05}),
        ["the training loss rose", "learning rate 0.05 is too high", "optim.lr: 0.01"],
    ),
    "overfitting": (
        lambda r: replace(
            with_steps(r, lambda s, _: {"loss": 3.0 / s, "eval_loss": 1.0 + abs(s - 8) / 30}),
            receipt={**r.receipt, "eval_loss_before": 3.0},
        ),
        ["turned: 1.0000 at step 8", "8 epochs over 22 rows", "keep_best: true"],
    ),
    "worse than untouched, few rows": (
        lambda r: replace(
            with_steps(r, lambda s, _: {"loss": 3.0 / s, "eval_loss": 4.0 + s / 100}),
            metrics=[{"step": 0, "eval_loss": 3.0}, *with_steps(
                r, lambda s, _: {"loss": 3.0 / s, "eval_loss": 4.0 + s / 100}).steps],
        ),
        ["no better than the untouched model's: 3.0000 before", "22 rows are learned by heart"],
    ),
    "worse than untouched, rank": (
        lambda r: replace(
            with_config(
                with_steps(r, lambda s, _: {"loss": 3.0 / s, "lr": 2e-4}),
                lora={"r": 1, "lora_alpha": 2}, epochs=1,
            ),
            audit={**r.audit, "rows": 5000},
            scores={"exact_match_before": 0.5, "exact_match_after": 0.4},
        ),
        ["exact_match is no better", "0.5 before, 0.4 after", "lora.r is 1"],
    ),
    "looping answers": (
        lambda r: replace(
            r, samples=[{"after": "so it goes on " * 20, "reference": "yes"}] * 4
        ),
        ["4 of 4 sampled answers repeat themselves", "8 epochs"],
    ),
    "empty answers": (
        lambda r: replace(r, samples=[{"after": " ", "reference": "yes"}] * 3),
        ["3 of 3 sampled answers are empty"],
    ),
    "markers in answers": (
        lambda r: replace(r, samples=[{"after": "<|im_start|>yes", "reference": "yes"}] * 3),
        ["3 of 3 sampled answers write out markers"],
    ),
    "slower and slower": (
        lambda r: with_steps(r, lambda s, _: {"tokens_per_second": 900.0 if s < 20 else 300.0}),
        ["steps became slower: 900 tokens/s in the first third, 300"],
    ),
    "swapping": (
        lambda r: replace(
            with_steps(
                r,
                lambda s, _: {
                    "tokens_per_second": 900.0 if s < 20 else 100.0,
                    "memory_bytes": 9_700_000_000,
                },
            ),
            machine={**r.machine, "memory_total": 10_000_000_000},
        ),
        ["the system swaps", "9.70 GB of 10.00 GB"],
    ),
    "the update": (
        lambda r: replace(
            with_steps(r, lambda s, _: {"update_seconds": 2.0, "seconds": 4.0}),
            receipt={**r.receipt, "optimizer": {"paged": True, "bytes_in": 7, "bytes_out": 5}},
        ),
        ["the update takes 2.0 of a step's 4.0 s", "paged", "optim_bits: 8"],
    ),
    "padding": (
        lambda r: with_steps(
            with_config(r, data={"packing": False}), lambda s, _: {"tokens": 25, "positions": 100}
        ),
        ["75% of what is computed is padding", "data.packing: true"],
    ),
    "general path": (
        lambda r: with_steps(r, lambda s, _: {"paths": {"generic: eager attention": 2}}),
        ["2 of 2 decoder layers", "eager attention"],
    ),
    "cut rows": (
        lambda r: replace(r, audit={**r.audit, "truncated": 30, "samples": 60,
                                    "needed_length": 777}),
        ["30 of 60 samples were cut", "data.max_length: 777"],
    ),
    "lost rows": (
        lambda r: replace(r, audit={**r.audit, "dropped_masked": 40, "samples": 60,
                                    "masked_by_length": 40}),
        ["40 of 100 samples were left out", "40 lose it"],
    ),
    "leaked rows": (
        lambda r: replace(r, audit={**r.audit, "eval_duplicates": 1, "eval_rows": 2,
                                    "eval_pairs": ["a:1 = b:2"]}),
        ["1 of 2 evaluation rows are also trained on", "a:1 = b:2"],
    ),
    "fp16 beside bf16": (
        lambda r: replace(with_config(r, precision="fp16"), machine={**r.machine, "bf16": True}),
        ["computes in fp16", "has bf16"],
    ),
    "another system message": (
        lambda r: replace(
            with_config(r, data={"system": "Be brief."}),
            evaluations=[{"results": {"f1": {
                "prompting": {"template": r.audit["template"], "system": ""}}}}],
        ),
        ["f1 was asked with another system message", "'' in the evaluation, 'Be brief.'"],
    ),
    "another template": (
        lambda r: replace(
            r,
            evaluations=[{"results": {"exact_match": {
                "prompting": {"template": "alpaca", "system": ""}}}}],
        ),
        ["exact_match was asked with another chat template", "'alpaca' in the evaluation"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found_with_its_number(healthy, name):
    plant, wanted = PLANTED[name]
    assert told(healthy) == ""
    text = told(plant(healthy))
    for words in wanted:
        assert words in text


def test_a_scale_that_finds_its_level_is_no_fault(healthy):
    fp16 = with_steps(
        replace(with_config(healthy, precision="fp16"), machine={**healthy.machine, "bf16": False}),
        lambda s, _: {"grad_norm": None, "updated": False} if s < 4 else {},
    )
    assert told(fp16) == ""


def test_the_command(trained, tmp_path):
    run = trained("command")
    done = command("doctor", run, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["findings"] == []
    assert facts["machine"]["cores"]
    asked = {"results": {"f1": {"prompting": {"template": "chatml", "system": "x"}}}}
    with (run / EVALUATIONS).open("a") as file:
        file.write(json.dumps(asked) + "\n" + '{"results": {"cut sho')
    done = command("doctor", run)
    assert "seen:   f1 was asked with another system message" in done.stdout
    assert command("doctor", tmp_path).returncode == 2


def test_records_that_no_run_wrote_are_refused(trained, tmp_path):
    with pytest.raises(InputError, match="not-a-run"):
        check_up(tmp_path)
    run = trained("damaged")
    (run / "receipt.json").write_text("[1")
    with pytest.raises(FourbitError, match="damaged-record"):
        check_up(run)
