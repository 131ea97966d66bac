"""The run around the loop: what it survives, what it stops for, what it keeps."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import fourbit
from commands import train_quietly
from fourbit import checkpoint
from fourbit.errors import EnvironmentFault, NumericStop
from fourbit.files import sha256_of
from fourbit.objective import Objective
from fourbit.rundir import RunDir
from fourbit.training.loop import TrainLoop


@pytest.fixture
def train(tmp_path, model_folder):
    """Trains a tiny run in this process; returns its directory."""

    def run(name="run", **changes):
        return train_quietly(tmp_path / name, model_folder("llama"), **changes)

    return run


def digest(run) -> str:
    return sha256_of(run / "adapter" / "adapter_model.safetensors")


def metrics(run) -> list[dict]:
    return [line for line in RunDir(run).read_metrics() if line["step"] > 0]


def test_the_same_configuration_gives_the_same_bytes(train):
    assert digest(train("one")) == digest(train("two"))


def test_evaluating_and_saving_do_not_change_the_result(train):
    plain = train("plain", eval_every=0, save_every=0, samples=0)
    assert digest(plain) == digest(train("busy", eval_every=1, save_every=1, samples=2))


def test_another_seed_gives_other_bytes(train):
    assert digest(train("one")) != digest(train("two", seed=1))


def test_checkpointing_activations_changes_no_bit(train):
    # dropout is on: recomputation must draw the same masks
    kept = train("kept", gradient_checkpointing="none")
    assert digest(kept) == digest(train("recomputed", gradient_checkpointing="all"))


def test_metrics_hold_every_step_and_the_schedule(train):
    run = train(optim={"lr": 1e-2, "warmup_ratio": 0.25})
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    rates = [line["lr"] for line in lines]
    assert rates[0] > 0, "the first step of a warm-up moves already"
    assert max(rates) == pytest.approx(1e-2)
    assert rates[-1] < 2e-3, "cosine ends low"
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["updated"] and line["grad_norm"] > 0 for line in lines)


def poison(monkeypatch, calls: set[int]):
    """Makes the loss NaN at the given calls of the training loss."""
    real, count = Objective.loss_sum, [0]

    def loss_sum(self, batch):
        loss = real(self, batch)
        if torch.is_grad_enabled():
            count[0] += 1
            if count[0] in calls:
                return loss * math.nan
        return loss

    monkeypatch.setattr(Objective, "loss_sum", loss_sum)


def test_one_nan_step_is_skipped_and_told(train, monkeypatch):
    poison(monkeypatch, {3})
    run = train()
    skipped = [line for line in metrics(run) if not line["updated"]]
    assert len(skipped) == 1
    assert "no update" in (run / "log.txt").read_text()
    assert "chats.jsonl:" in (run / "log.txt").read_text(), "the step's rows are named"
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(t.isfinite().all() for t in tensors.values())
    assert json.loads((run / "receipt.json").read_text())["ok"]


def test_three_nan_steps_stop_the_run(train, monkeypatch):
    poison(monkeypatch, set(range(5, 100)))
    with pytest.raises(NumericStop, match="nonfinite") as stopped:
        train()
    assert stopped.value.exit_code == 5
    assert "chats.jsonl:" in stopped.value.what


def full_disk(monkeypatch, failures: int) -> None:
    real, count = checkpoint.save, [0]

    def save(*arguments, **keywords):
        count[0] += 1
        if count[0] <= failures:
            raise EnvironmentFault("disk-full", where="checkpoints", what="no space left")
        return real(*arguments, **keywords)

    monkeypatch.setattr(checkpoint, "save", save)


def test_a_full_disk_does_not_end_the_run(train, monkeypatch):
    undisturbed = digest(train("undisturbed"))
    full_disk(monkeypatch, 2)
    run = train("full")
    assert digest(run) == undisturbed
    assert "not saved: no space left" in (run / "log.txt").read_text()


def test_a_disk_that_stays_full_ends_it(train, monkeypatch):
    full_disk(monkeypatch, 100)
    with pytest.raises(EnvironmentFault, match="no space left"):
        train()


def evaluations(monkeypatch, losses: list[float]) -> None:
    """Prescribes the evaluation losses after the first, which is the untouched model's."""
    answers = iter([9.0, *losses, *[9.0] * 50])
    monkeypatch.setattr(TrainLoop, "evaluate", lambda *_, **__: next(answers))


def test_early_stopping_ends_after_patience(train, monkeypatch):
    evaluations(monkeypatch, [2.0, 1.0, 3.0, 3.0])
    run = train(eval_every=1, early_stopping=2, save_every=0)
    assert metrics(run)[-1]["step"] == 4
    assert json.loads((run / "receipt.json").read_text())["ok"]


def test_keep_best_saves_the_adapter_of_the_best_step(train, monkeypatch):
    evaluations(monkeypatch, [2.0, 1.0, 3.0, 3.0])
    run = train(eval_every=1, keep_best=True, save_every=0, save_total_limit=1, max_steps=5)
    best = checkpoint.load(run / "checkpoints" / "step-000002")
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    wanted = best.tensors["adapter_model.safetensors"]
    assert all(torch.equal(saved[name], wanted[name]) for name in wanted)
    assert fourbit.verify(run).ok


def test_old_checkpoints_are_removed(train):
    run = train(save_every=1, save_total_limit=2)
    assert len(list((run / "checkpoints").iterdir())) == 2


def test_max_steps_goes_on_over_epochs(train):
    run = train(max_steps=11, epochs=1)
    lines = metrics(run)
    assert lines[-1]["step"] == 11
    assert lines[-1]["epoch"] > 1


def test_part_of_an_epoch(train):
    whole = len(metrics(train("whole", epochs=2)))
    half = len(metrics(train("half", epochs=1.5)))
    assert whole / 2 < half < whole


def test_packing_can_be_switched_off(train):
    data = {"max_length": 128, "eval": 2, "packing": False}
    config = train("packed").parent / "chats.jsonl"
    run = train("unpacked", data={**data, "train": str(config)})
    assert json.loads((run / "receipt.json").read_text())["ok"]


def test_bf16_halves_the_adapter_file(train):
    single = train("single")
    half = train("half", save_dtype="bf16")
    sizes = [(r / "adapter" / "adapter_model.safetensors").stat().st_size for r in (single, half)]
    assert sizes[1] < 0.6 * sizes[0]
    assert fourbit.verify(half).ok


def test_an_untrained_adapter_gives_the_bases_own_logits(model_folder):
    import peft

    ids = torch.arange(3, 19)[None]
    base, _ = fourbit.load(str(model_folder("llama")), quant=fourbit.QuantConfig())
    with torch.no_grad():
        plain = base(ids).logits
        wrapped = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear"))
        assert torch.equal(wrapped.eval()(ids).logits, plain)
