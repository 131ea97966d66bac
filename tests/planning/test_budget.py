"""What gives way to a budget, in which order, and what is said about it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fourbit.lora import LoraSettings
from fourbit.optim import OptimConfig
from fourbit.planning import Planner, Room, TrainingShape, recommend
from fourbit.quantize import QuantConfig
from models import tiny_config

ORDER = ["batch_size", "gradient_checkpointing", "optim.paged", "data.max_length", "lora.r"]
SHAPE = TrainingShape(
    method="qlora",
    quant=QuantConfig(),
    lora=LoraSettings(r=16),
    dtype=torch.float32,
    batch_size=4,
    length=256,
    grad_accum=2,
)
CONFIG = tiny_config("llama", num_hidden_layers=4)


@pytest.fixture(scope="module")
def wished():
    return Planner(CONFIG, SHAPE).plan(Room()).peak_bytes


def within(budget, shape=SHAPE):
    return recommend(CONFIG, shape, Room(int(budget)))


def given_up(plan):
    return [key for key in plan.recommended if key in ORDER]


def test_enough_changes_nothing(wished):
    plan = within(2 * wished)
    assert plan.fits
    assert plan.recommended == {}
    assert "as asked" in plan.reasons[-1]


def test_a_smaller_micro_batch_comes_first_and_keeps_the_sequences_of_a_step(wished):
    plan = within(0.7 * wished)
    assert plan.fits
    assert given_up(plan) == ORDER[:1]
    settings = plan.recommended
    assert settings["batch_size"] * settings["grad_accum"] == SHAPE.batch_size * SHAPE.grad_accum


def test_what_was_decided_by_the_user_stays(wished):
    own = replace(SHAPE, recompute=0, optim=OptimConfig(paged="off"))
    plan = within(0.15 * wished, own)
    assert given_up(plan) == ["batch_size", "data.max_length", "lora.r"][: len(given_up(plan))]
    assert len(given_up(plan)) > 1


def test_nothing_fits_names_the_least_after_all_was_tried_in_order():
    plan = within(1000, replace(SHAPE, batch_size=2))
    assert plan.fits is False
    assert given_up(plan) == ORDER
    assert "nothing fits" in plan.reasons[-1]
    assert any("nothing fits" in line for line in plan.lines())
