"""What people switch on in transformers' Trainer, on packed bases; docs/trainers.md lists it."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fourbit
from fourbit.errors import InputError
from integrations.test_trainer import make_trainer

IDS = torch.arange(20)[None]
FOUR = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "float32",
}
EIGHT = {"load_in_8bit": True}


@pytest.fixture
def base(model_folder):
    def load(name="llama", names=FOUR):
        config = fourbit.FourbitConfig(**names)
        return AutoModelForCausalLM.from_pretrained(model_folder(name), quantization_config=config)

    return load


def adapted(model, **changes):
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **changes}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))


def logged(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained(model, folder, **changes):
    """Losses of a few steps."""
    trainer, _ = make_trainer(model, folder, logging_strategy="steps", logging_steps=1, **changes)
    trainer.train()
    return logged(trainer)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("names", [FOUR, EIGHT], ids=["nf4", "int8"])
def test_a_resumed_run_is_the_uninterrupted_one(names, base, tmp_path):
    settings = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_strategy": "steps",
        "logging_steps": 1,
    }
    models = [adapted(base(names=names), lora_dropout=0.1) for _ in range(2)]
    whole, _ = make_trainer(models[0], tmp_path, **settings)
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    again, callback = make_trainer(models[1], tmp_path, **settings)
    again.train(resume_from_checkpoint=True)
    assert len(logged(whole)) == 4
    assert logged(again) == logged(whole)
    states = [get_peft_model_state_dict(model) for model in models]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    # the receipt's figures are those of the whole run
    assert callback.receipt.facts["train_loss_first"] == logged(whole)[0]


def test_a_checkpoint_holds_the_adapter_and_loads_as_one(base, tmp_path):
    trainer, _ = make_trainer(adapted(base()), tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-3"):
        names = load_file(folder / "adapter_model.safetensors").keys()
        assert names
        assert all(".lora_A." in name or ".lora_B." in name for name in names)
        assert not (folder / "model.safetensors").exists()
    again = PeftModel.from_pretrained(base(), tmp_path)
    again.load_adapter(tmp_path / "checkpoint-3", adapter_name="other")
    for name in ("default", "other"):
        again.set_adapter(name)
        assert torch.equal(logits(again), logits(trainer.model))


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": True}, {"use_reentrant": False}])
def test_gradient_checkpointing_changes_no_loss(kwargs, base, tmp_path):
    plain = trained(adapted(base()), tmp_path)
    model = adapted(base())
    kept = trained(
        model, tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs
    )
    assert model.base_model.model.model.gradient_checkpointing
    assert kept == plain


def test_a_model_prepared_for_kbit_training_trains_the_same(base, tmp_path):
    plain = trained(adapted(base()), tmp_path)
    assert trained(adapted(prepare_model_for_kbit_training(base())), tmp_path) == plain


def test_bf16_on_the_cpu_keeps_adapters_in_float32(base, tmp_path):
    plain = trained(adapted(base()), tmp_path)
    model = adapted(base())
    assert trained(model, tmp_path, bf16=True) == pytest.approx(plain, rel=0.01)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_int8_trains_and_evaluates(base, tmp_path):
    trainer, callback = make_trainer(adapted(base(names=EIGHT)), tmp_path, max_steps=8)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert callback.receipt.ok


def test_the_best_checkpoint_is_loaded_at_the_end(base, tmp_path):
    every = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer, callback = make_trainer(
        adapted(base()),
        tmp_path,
        max_steps=6,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that it is not the last
        **every,
    )
    trainer.train()
    losses = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert trainer.evaluate()["eval_loss"] == losses[0] == max(losses)
    assert callback.receipt.ok


def test_the_receipt_has_the_loss_of_a_step_not_of_a_micro_batch(base, tmp_path):
    trainer, callback = make_trainer(
        adapted(base()),
        tmp_path,
        gradient_accumulation_steps=3,
        logging_strategy="steps",
        logging_steps=1,
    )
    trainer.train()
    facts = callback.receipt.facts
    losses = logged(trainer)
    assert (facts["train_loss_first"], facts["train_loss_last"]) == (losses[0], losses[-1])


def saved_tensors(model, folder):
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("names", [FOUR, EIGHT], ids=["nf4", "int8"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 5]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=["all-linear", "dora", "modules_to_save", "tokens", "embedding"],
)
def test_the_base_under_a_trained_adapter_saves_as_itself(changes, names, base, tmp_path):
    plain = base("qwen2", names)
    expected, before = saved_tensors(plain, tmp_path / "before"), logits(plain)
    model = adapted(plain, **changes)
    trained(model, tmp_path)
    got = saved_tensors(model.get_base_model(), tmp_path / "after")
    assert got.keys() == expected.keys()
    assert all(torch.equal(tensor, got[name]) for name, tensor in expected.items())
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "after", quantization_config=fourbit.FourbitConfig(**names)
    )
    assert torch.equal(logits(again), before)


def test_a_merged_base_is_not_saved_as_if_it_were_packed(base, tmp_path):
    model = adapted(base())
    model.merge_adapter()
    with pytest.raises(InputError, match=r"merged-base.*q_proj.*unmerge_adapter"):
        model.get_base_model().save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    model.unmerge_adapter()
    model.get_base_model().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


def test_transformers_own_adapter_trains_and_saves(base, tmp_path):
    model = base()
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=4, target_modules="all-linear"))
    trainer, callback = make_trainer(model, tmp_path)
    trainer.train()
    trainer.save_model()
    assert callback.receipt.ok
    again = base()
    again.load_adapter(str(tmp_path))
    again.requires_grad_(False)  # as training left the other: both take the same kernels
    assert torch.equal(logits(again), logits(model))
    assert not (tmp_path / "model.safetensors").exists()
