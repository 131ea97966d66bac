"""A run within a budget, and its rehearsal: what gives way, what is measured, what is refused."""

from __future__ import annotations

import json

import pytest
import yaml

from commands import train_quietly
from fourbit import device as devices
from fourbit.errors import EnvironmentFault, InputError
from fourbit.files import sha256_of
from fourbit.optim import AdamW
from fourbit.training.loop import TrainLoop

WIDE = {"batch_size": 4, "grad_accum": 1, "max_steps": 3, "save_every": 1, "epochs": 30}


@pytest.fixture
def train(tmp_path, model_folder, monkeypatch):
    """Trains a tiny run in a process that seems to hold nothing else."""
    monkeypatch.setattr(devices, "resident_memory", lambda: 0)
    monkeypatch.setattr("fourbit.planning.plan._RUNTIME", 0)

    def run(name="run", **changes):
        return train_quietly(tmp_path / name, model_folder("llama"), **changes)

    return run


def adapter(run) -> str:
    return sha256_of(run / "adapter" / "adapter_model.safetensors")


def told(run) -> dict:
    return json.loads((run / "plan.json").read_text())


@pytest.fixture
def measured(monkeypatch):
    """The rehearsal reaches ``measured[0]`` bytes."""
    reached = [1]
    real = TrainLoop.rehearse

    def rehearse(self):
        assert real(self) is not None
        return reached[0]

    monkeypatch.setattr(TrainLoop, "rehearse", rehearse)
    return reached


def test_a_rehearsal_changes_no_bit(train):
    with_it = train("with")
    without = train("without", rehearsal=False)
    assert adapter(with_it) == adapter(without)
    assert told(without)["rehearsed_peak_bytes"] is None
    assert told(with_it)["rehearsed_peak_bytes"] > 0
    receipt = json.loads((with_it / "receipt.json").read_text())
    assert receipt["rehearsed_peak_bytes"] == told(with_it)["rehearsed_peak_bytes"]


def test_it_runs_the_longest_batch_before_the_first_step(train, monkeypatch):
    shapes, steps = [], []
    real = TrainLoop._backward

    def backward(self, step, batches, supervised):
        shapes.append(max(b.input_ids.numel() for b in batches))
        steps.append(step)
        return real(self, step, batches, supervised)

    monkeypatch.setattr(TrainLoop, "_backward", backward)
    train()
    assert steps[0] == 0
    assert steps[1] == 1
    assert shapes[0] == max(shapes)


def test_the_optimizer_has_its_memory_before_the_first_step(train, monkeypatch):
    seen = []
    real = AdamW.reserve

    def reserve(self):
        real(self)
        seen.append(self.stats.state_bytes)

    monkeypatch.setattr(AdamW, "reserve", reserve)
    run = train()
    receipt = json.loads((run / "receipt.json").read_text())
    assert seen == [receipt["optimizer"]["state_bytes"]]


def test_the_batch_gives_way_and_a_resumed_run_keeps_it(train, measured):
    whole = train("whole", **WIDE)
    budget = int(0.75 * told(whole)["plan"]["peak_bytes"])
    run = train("small", **WIDE, budget=str(budget))
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert (settings["batch_size"], settings["grad_accum"]) in ((2, 2), (1, 4))
    assert "the budget" in (run / "config.yaml").read_text()
    plan = told(run)["plan"]
    assert plan["fits"]
    assert plan["peak_bytes"] <= budget
    assert plan["recommended"]["batch_size"] == settings["batch_size"]
    # resumed with room for all it asked for at first, it still takes the batches it began with
    train("small", **{**WIDE, "max_steps": 3}, budget="10GB", resume="auto")
    assert told(run)["plan"]["recommended"] == plan["recommended"]


def test_what_would_train_something_else_is_refused_with_the_settings_that_fit(train):
    least = {"optim": {"paged": "off"}, "gradient_checkpointing": "none", "batch_size": 1}
    whole = told(train("whole", **least, max_steps=1))["plan"]["peak_bytes"]
    with pytest.raises(EnvironmentFault) as caught:
        train("small", **least, max_steps=1, budget=str(int(0.9 * whole)))
    assert caught.value.exit_code == 4
    assert "budget" in caught.value.line()


def test_a_rehearsal_above_the_budget_ends_the_run(train, measured, tmp_path):
    measured[0] = 3_000_000_000
    with pytest.raises(EnvironmentFault) as caught:
        train(budget="1GB")
    assert "measured: 3.0" in caught.value.line()
    assert not (tmp_path / "run" / "run" / "checkpoints").exists() or not list(
        (tmp_path / "run" / "run" / "checkpoints").iterdir()
    )


def test_no_size_is_refused_where_it_stands(train, tmp_path):
    with pytest.raises(InputError) as caught:
        train(budget="much")
    assert "config.yaml" in caught.value.where
    assert "5GB" in caught.value.line()
