"""The receipt inside transformers' own Trainer, and violations planted into it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import fourbit
from fourbit.errors import VerificationFailed
from fourbit.integrations.peft import add_adapter, lora_layers
from fourbit.lora import LoraSettings
from fourbit.quantize import QuantConfig
from models import tiny_model


class Rows(torch.utils.data.Dataset):
    def __init__(self, *, masked=False):
        ids = torch.randint(0, 256, (6, 12), generator=torch.Generator().manual_seed(0))
        self.rows = [
            {"input_ids": row, "labels": torch.full_like(row, -100) if masked else row}
            for row in ids
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@pytest.fixture
def model():
    base = tiny_model("llama")
    base.requires_grad_(False)
    fourbit.quantize_model(base, QuantConfig())
    return add_adapter(base, LoraSettings(r=4))


def make_trainer(model, folder, *, callbacks=(), rows=None, optimizer=None, **changes):
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
        **changes,
    }
    arguments = TrainingArguments(output_dir=str(folder), **settings)
    receipt = fourbit.ReceiptCallback()
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows or Rows(),
        eval_dataset=Rows(),
        callbacks=[*callbacks, receipt],
        optimizers=(optimizer, None),
    )
    return trainer, receipt


def test_a_trainers_run_has_a_receipt(model, tmp_path):
    trainer, callback = make_trainer(model, tmp_path)
    trainer.train()
    assert callback.receipt.ok
    assert {check.name for check in callback.receipt.checks} == {
        "base_unchanged",
        "optimizer_owns_adapters",
        "trainable_count",
        "adapters_moved",
        "gradients_reached",
        "labels_supervised",
    }
    assert callback.receipt.facts["steps"] == 3
    assert json.loads((tmp_path / "receipt.json").read_text())["ok"] is True


class Meddler(TrainerCallback):
    """Does something to the model after the second step."""

    def __init__(self, change):
        self.change = change

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            with torch.no_grad():
                self.change(kwargs["model"])


def change_embedding(model):
    model.get_input_embeddings().weight[3, 3] += 1


def change_packed_weight(model):
    model.get_base_model().model.layers[0].mlp.up_proj.get_base_layer().weight[0, 0] ^= 1


def thaw_a_norm(model):
    model.get_base_model().model.norm.weight.requires_grad_(True)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (change_embedding, "base_unchanged"),
        (change_packed_weight, "base_unchanged"),
        (thaw_a_norm, "optimizer_owns_adapters"),
    ],
)
def test_a_base_changed_on_the_way_fails_the_run(change, names, model, tmp_path):
    trainer, callback = make_trainer(model, tmp_path, callbacks=[Meddler(change)])
    with pytest.raises(VerificationFailed, match=names) as caught:
        trainer.train()
    assert caught.value.exit_code == 7
    assert not callback.receipt.ok
    assert json.loads((tmp_path / "receipt.json").read_text())["ok"] is False


def test_an_optimizer_with_a_foreign_parameter_fails_the_run(model, tmp_path):
    own = [p for p in model.parameters() if p.requires_grad]
    foreign = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([*own, foreign], lr=1e-3)
    trainer, _ = make_trainer(model, tmp_path, optimizer=optimizer)
    with pytest.raises(VerificationFailed, match=r"optimizer_owns_adapters.*1 foreign"):
        trainer.train()


def test_an_optimizer_that_forgot_an_adapter_fails_the_run(model, tmp_path):
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own[1:], lr=1e-3)
    trainer, _ = make_trainer(model, tmp_path, optimizer=optimizer)
    with pytest.raises(VerificationFailed, match=r"optimizer_owns_adapters.*1 missing"):
        trainer.train()


def test_an_adapter_without_gradient_stops_at_the_second_step(model, tmp_path):
    layer = lora_layers(model)["model.layers.0.self_attn.q_proj"]
    layer.lora_B["default"].weight.register_hook(torch.zeros_like)
    trainer, _ = make_trainer(model, tmp_path)
    with pytest.raises(VerificationFailed, match=r"no-gradient.*step 2.*q_proj"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_labels_all_masked_fail_the_run(model, tmp_path):
    trainer, _ = make_trainer(model, tmp_path, rows=Rows(masked=True))
    with pytest.raises(VerificationFailed):
        trainer.train()


def test_the_model_stays_usable_after_the_watch(model, tmp_path):
    trainer, _ = make_trainer(model, tmp_path)
    trainer.train()
    hooks = [m._forward_pre_hooks for m in lora_layers(model).values()]
    assert not any(hooks)
    assert not model._forward_hooks


def test_our_optimizer_in_trainer_resumes_bit_for_bit(tmp_path):
    def run(steps, **resume):
        torch.manual_seed(0)
        base = tiny_model("llama")
        base.requires_grad_(False)
        fourbit.quantize_model(base, QuantConfig())
        tuned = add_adapter(base, LoraSettings(r=4))
        trained = [p for p in tuned.parameters() if p.requires_grad]
        optimizer = fourbit.AdamW(trained, lr=1e-2, optim_bits=8, paged="always")
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=2,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(tuned, arguments, train_dataset=Rows(), optimizers=(optimizer, None))
        trainer.train(**resume)
        assert optimizer.is_paged
        return [p.detach().clone() for p in trained]

    whole = run(4)
    resumed = run(4, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
