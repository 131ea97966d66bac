"""TRL's trainers on packed bases, as they are; docs/trainers.md lists what was tried."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig
from transformers import AutoTokenizer

import fourbit

pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from trl import (  # noqa: E402
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    SFTConfig,
    SFTTrainer,
)

FOUR = fourbit.QuantConfig()
EIGHT = fourbit.QuantConfig(quant_type="int8")
COMMON = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}


def turn(role, content):
    return [{"role": role, "content": content}]


ROWS = [(f"{i} plus {i}?", f"{2 * i}", "no" + "!" * i) for i in range(6)]
PAIRS = Dataset.from_list(
    [{"prompt": turn("user", q), "completion": turn("assistant", a)} for q, a, _ in ROWS]
)
CHOICES = Dataset.from_list(
    [
        {
            "prompt": turn("user", q),
            "chosen": turn("assistant", a),
            "rejected": turn("assistant", b),
        }
        for q, a, b in ROWS
    ]
)


@pytest.fixture
def run(model_folder, tmp_path):
    """``run(SFTTrainer, SFTConfig, rows, ...)``: what was trained, its losses and its receipt."""

    def go(trainer, config, rows, *, quant=FOUR, model=None, extra=None, **changes):
        torch.manual_seed(0)
        folder = str(model_folder("llama"))
        if model is None:
            model, _ = fourbit.load(folder, quant=quant, dtype=torch.float32)
        callback = fourbit.ReceiptCallback()
        made = trainer(
            model=model,
            args=config(output_dir=str(tmp_path), **{**COMMON, "max_steps": 2, **changes}),
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
            callbacks=[callback],
            **(extra or {}),
        )
        made.train()
        losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
        return made, losses, callback.receipt

    return go


def test_sft_by_name_and_config_is_sft_of_the_loaded_model(run, model_folder):
    config = fourbit.FourbitConfig(
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="float32",
    )
    folder = str(model_folder("llama"))
    made, losses, receipt = run(SFTTrainer, SFTConfig, PAIRS)
    assert receipt.ok
    assert {p.dtype for p in made.model.parameters() if p.requires_grad} == {torch.float32}
    for given in (
        {"extra": {"quantization_config": config}},
        {"model_init_kwargs": {"quantization_config": config, "dtype": "float32"}},
    ):
        named, same, receipt = run(SFTTrainer, SFTConfig, PAIRS, model=folder, **given)
        assert any(isinstance(m, fourbit.Linear4bit) for m in named.model.modules())
        assert same == losses
        assert receipt.ok


@pytest.mark.parametrize("quant", [FOUR, EIGHT], ids=["nf4", "int8"])
def test_sft_learns(quant, run):
    made, _, receipt = run(
        SFTTrainer, SFTConfig, PAIRS, quant=quant, max_steps=8, extra={"eval_dataset": PAIRS}
    )
    after = made.evaluate()["eval_loss"]
    with made.model.disable_adapter():
        assert after < made.evaluate()["eval_loss"]
    checks = {check.name: check.ok for check in receipt.checks}
    assert checks["base_unchanged"]
    assert checks["labels_supervised"]


def test_packing_and_checkpointing_change_no_loss(run):
    # one batch holds every row, so packed or not the mean is over the same tokens
    settings = {"per_device_train_batch_size": 6, "max_steps": 1}
    _, plain, _ = run(SFTTrainer, SFTConfig, PAIRS, gradient_checkpointing=False, **settings)
    _, kept, _ = run(SFTTrainer, SFTConfig, PAIRS, gradient_checkpointing=True, **settings)
    _, packed, _ = run(SFTTrainer, SFTConfig, PAIRS, packing=True, max_length=256, **settings)
    assert kept == plain
    assert packed == pytest.approx(plain, abs=1e-4)


@pytest.mark.parametrize("quant", [FOUR, EIGHT], ids=["nf4", "int8"])
def test_dpo_takes_the_model_without_its_adapter_as_reference(quant, run):
    made, losses, receipt = run(DPOTrainer, DPOConfig, CHOICES, quant=quant, max_steps=3)
    assert made.ref_model is None
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] != losses[0]
    assert receipt.ok


def test_dpo_with_the_reference_computed_before(run):
    _, losses, _ = run(DPOTrainer, DPOConfig, CHOICES)
    _, same, receipt = run(DPOTrainer, DPOConfig, CHOICES, precompute_ref_log_probs=True)
    assert same == pytest.approx(losses, abs=1e-4)
    assert receipt.ok


def test_grpo_survives_steps_whose_rewards_are_all_equal(run):
    calls = []

    def reward(completions, **_):
        calls.append(len(completions))
        # nothing to learn in the first and the third step
        return [float(i) * (len(calls) % 2 == 0) for i in range(len(completions))]

    _, _, receipt = run(
        GRPOTrainer,
        GRPOConfig,
        CHOICES.select_columns(["prompt"]),
        extra={"reward_funcs": reward},
        max_steps=4,
        num_generations=2,
        max_completion_length=4,
    )
    assert receipt.ok
    assert receipt.facts["steps"] == 4
