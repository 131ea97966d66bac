"""Every check of the receipt catches what it is there for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from commands import ENVIRONMENT
from fourbit.receipt import Receipt, Watch, frozen_digests, tensor_digest

CAUGHT_BY = {
    "base_changed": "base_unchanged",
    "foreign_parameter": "optimizer_owns_adapters",
    "forgotten_parameter": "optimizer_owns_adapters",
    "stray_trainable": "trainable_count",
    "nothing_moves": "adapters_moved",
    "gradient_cut": "no-gradient",
    "gradient_zeroed": "no-gradient",
    "lora_a_dead": "no-gradient",
    "all_masked": "labels_supervised",
    "saved_is_another": "adapter_saved",
    "nothing_saved": "adapter_saved",
}


@pytest.fixture(scope="module")
def outcomes(model_folder) -> dict[str, str]:
    script = Path(__file__).with_name("violations.py")
    done = subprocess.run(
        [sys.executable, str(script), str(model_folder("llama"))],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **ENVIRONMENT},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_an_honest_run_passes(outcomes):
    assert outcomes["honest"] == "ok"


@pytest.mark.parametrize(("scenario", "check"), CAUGHT_BY.items())
def test_a_planted_violation_is_caught(outcomes, scenario, check):
    line = outcomes[scenario]
    assert line.startswith("7 error["), line
    assert check in line


def test_an_empty_receipt_is_not_ok():
    assert not Receipt().ok


def test_digest_covers_bytes_shape_and_dtype():
    tensor = torch.arange(6, dtype=torch.float32)
    same = tensor_digest(tensor.clone())
    assert tensor_digest(tensor) == same
    assert tensor_digest(tensor.reshape(2, 3)) != same
    assert tensor_digest(tensor.to(torch.bfloat16)) != same
    assert tensor_digest(torch.zeros(1)) != tensor_digest(-torch.zeros(1)), "bits, not values"
    assert tensor_digest(torch.tensor(3.0)) != tensor_digest(torch.tensor([3.0]))


def test_digest_of_a_strided_view_is_that_of_its_values():
    tensor = torch.arange(12.0).reshape(3, 4)
    assert tensor_digest(tensor.t()) == tensor_digest(tensor.t().contiguous())


def test_frozen_digests_hold_buffers_and_no_trainable():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].weight.requires_grad_(False)
    table = frozen_digests(model)
    assert "0.weight" in table
    assert "0.bias" not in table
    assert "1.running_mean" in table


def test_evidence_survives_a_round_trip():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = Watch(model, optimizer)
    watch.start()
    for _ in range(3):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        watch.observe(loss=1.0, supervised=5)
    state = json.loads(json.dumps(watch.state()))
    again = Watch(model, optimizer)
    again.restore(state)
    assert again.state() == watch.state()
    watch.stop()


def test_the_second_step_without_a_gradient_aborts_not_the_first():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = Watch(model, optimizer)
    watch.start()
    model.weight.grad = torch.zeros_like(model.weight)
    model.bias.grad = torch.ones_like(model.bias)
    optimizer.step()
    with pytest.raises(Exception, match="no-gradient"):
        optimizer.step()
    watch.stop()


def test_steps_without_any_gradient_prove_nothing_and_do_not_abort():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = Watch(model, optimizer)
    watch.start()
    for step in range(4):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, float(step == 3))
        optimizer.step()
    assert watch.idle_steps == 3
    checks = {c.name: c.ok for c in watch.finish(save_dtype=torch.float32).checks}
    assert checks["gradients_reached"]


def test_a_run_that_never_had_a_gradient_fails():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = Watch(model, optimizer)
    watch.start()
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    checks = {c.name: c.ok for c in watch.finish(save_dtype=torch.float32).checks}
    assert not checks["gradients_reached"]


def test_absent_gradients_are_no_idle_step():
    model = nn.Linear(2, 2)
    watch = Watch(model, torch.optim.SGD(model.parameters(), lr=0.1))
    watch.start()
    watch.optimizer.step()
    with pytest.raises(Exception, match="no-gradient"):
        watch.optimizer.step()
    watch.stop()
