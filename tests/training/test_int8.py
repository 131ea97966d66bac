"""QLoRA on an INT8 base: trains, verifies, resumes, generates."""

from __future__ import annotations

import shutil

import torch
from safetensors.torch import load_file

import fourbit
from fourbit.generate import Sampling, open_generator
from fourbit.linear import Linear8bit
from fourbit.quantize import QuantConfig
from models import train_tiny, write_chats

INT8 = {"quant_type": "int8"}
LONG = {
    "quant": INT8,
    "precision": "fp32",
    "max_steps": 8,
    "optim": {"lr": 2e-2},
    "save_every": 4,
    "lora": {"r": 4, "lora_dropout": 0.1},
}


def test_trains_verifies_and_generates(model_folder, tmp_path):
    chats = write_chats(tmp_path / "chats.jsonl", 12)
    result, config = train_tiny(model_folder("llama"), chats, tmp_path / "run", **LONG)
    assert config.quant.is_int8
    run = tmp_path / "run"
    steps = [line for line in result_lines(run) if line["step"] > 0]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert fourbit.verify(run).ok
    quant = QuantConfig(quant_type="int8")
    generator = open_generator(str(model_folder("llama")), adapter=run, quant=quant)
    assert any(isinstance(m, Linear8bit) for m in generator.model.modules())
    with_adapter = generator.answers([[1, 2, 3]], Sampling(max_new_tokens=4))[0]
    assert with_adapter.tokens >= 0


def test_resuming_gives_the_same_bytes(model_folder, tmp_path):
    chats = write_chats(tmp_path / "chats.jsonl", 12)
    train_tiny(model_folder("llama"), chats, tmp_path / "whole", **LONG)
    whole = load_file(tmp_path / "whole" / "adapter" / "adapter_model.safetensors")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    train_tiny(model_folder("llama"), chats, tmp_path / "again", resume="4", **LONG)
    again = load_file(tmp_path / "again" / "adapter" / "adapter_model.safetensors")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def result_lines(run):
    from fourbit.rundir import RunDir

    return list(RunDir(run).read_metrics())


def test_a_saved_int8_base_is_used_as_it_is(model_folder, tmp_path):
    from models import tiny_tokenizer

    base, _ = fourbit.load(str(model_folder("llama")), quant=QuantConfig(quant_type="int8"))
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    chats = write_chats(tmp_path / "chats.jsonl", 12)
    train_tiny(tmp_path / "base", chats, tmp_path / "run", quant=INT8)
    assert fourbit.verify(tmp_path / "run").ok
