"""Scripts written for bitsandbytes run on our layers after one call, and on its own after undo."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import fourbit
from fourbit.errors import InputError
from fourbit.integrations.peft import LoraLinear4bit
from fourbit.linear import Linear4bit, Linear8bit, QuantizedLinear

FOUR = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
EIGHT = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=4.0)


@pytest.fixture(autouse=True)
def _taken_over():
    with fourbit.take_over_bitsandbytes():
        yield


def kinds(model: nn.Module) -> set[type]:
    return {type(m) for m in model.modules() if isinstance(m, QuantizedLinear)}


@pytest.fixture(params=[FOUR, EIGHT], ids=["4-bit", "8-bit"])
def config(request):
    return request.param


def test_from_pretrained_gives_our_layers(config, model_folder, recwarn):
    model = AutoModelForCausalLM.from_pretrained(
        model_folder("llama"), quantization_config=config, device_map={"": "cpu"}
    )
    assert kinds(model) == {Linear4bit if config is FOUR else Linear8bit}
    assert model.is_loaded_in_4bit is (config is FOUR)
    assert model.is_loaded_in_8bit is (config is EIGHT)
    layer = model.model.layers[0].mlp.up_proj
    if config is FOUR:
        assert (layer.quant_type, layer.double_quant) == ("nf4", True)
        assert layer.compute_dtype is torch.bfloat16
    else:
        assert layer.threshold == 4.0
    assert not [w for w in recwarn if "FourbitConfig" in str(w.message)]


def test_it_equals_the_swapped_class(config, model_folder):
    folder, ids = model_folder("llama"), torch.arange(20)[None]
    taken = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    swapped = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=fourbit.FourbitConfig.from_bitsandbytes(config)
    )
    with torch.no_grad():
        assert torch.equal(taken(ids).logits, swapped(ids).logits)


def test_the_peft_recipe(config, model_folder):
    model = AutoModelForCausalLM.from_pretrained(
        model_folder("llama"), quantization_config=config, dtype=torch.bfloat16
    )
    model = prepare_model_for_kbit_training(model)
    assert model.is_gradient_checkpointing
    model = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    lora = [m for m in model.modules() if isinstance(m, LoraLinear4bit)]
    assert len(lora) == 14
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(24).view(2, 12)
    losses = []
    for _ in range(4):
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trainable, everything = model.get_nb_trainable_parameters()
    assert trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert everything > 40_000


def test_trl(config, model_folder, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    folder = model_folder("llama")
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16
    )
    model = prepare_model_for_kbit_training(model)
    receipt = fourbit.ReceiptCallback()
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            learning_rate=1e-2,
            bf16=True,
            max_length=32,
        ),
        train_dataset=datasets.Dataset.from_list([{"text": f"fox {i}"} for i in range(8)]),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[receipt],
    )
    trainer.train()
    assert receipt.receipt.ok
    assert any(isinstance(m, LoraLinear4bit) for m in trainer.model.modules())


def test_saved_models_load_again_without_arguments(config, model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"), quantization_config=config)
    model.save_pretrained(tmp_path / "one")
    stored = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "bitsandbytes"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert kinds(again) == kinds(model)
    again.save_pretrained(tmp_path / "two")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_what_only_we_write_is_read_again(model_folder, tmp_path):
    config = fourbit.FourbitConfig(
        bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16", blocksize=128
    )
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"), quantization_config=config)
    model.save_pretrained(tmp_path / "one")
    for given in ({}, {"quantization_config": FOUR}):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "one", **given)
        assert again.config.quantization_config.to_dict() == (
            model.config.quantization_config.to_dict()
        )
        assert again.model.layers[0].mlp.up_proj.compute_dtype is torch.bfloat16


def test_undo_gives_bitsandbytes_back(model_folder):
    bnb = pytest.importorskip("bitsandbytes")
    mine = fourbit.take_over_bitsandbytes()
    mine.undo()
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"), quantization_config=FOUR)
    assert kinds(model) == {Linear4bit}, "the outer take-over is still in force"
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    merge = AutoHfQuantizer.merge_quantization_configs
    with fourbit.take_over_bitsandbytes():
        assert AutoHfQuantizer.merge_quantization_configs is not merge
    assert AutoHfQuantizer.merge_quantization_configs is merge
    outer = AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]
    AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = Bnb4BitHfQuantizer
    try:
        with fourbit.take_over_bitsandbytes():
            pass
        theirs = AutoModelForCausalLM.from_pretrained(
            model_folder("llama"), quantization_config=FOUR
        )
    finally:
        AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = outer
    assert kinds(theirs) == set()
    assert isinstance(theirs.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)


def test_a_config_that_we_do_not_know_is_one_line(model_folder):
    odd = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage="float64")
    with pytest.raises(InputError, match="bnb_4bit_quant_storage"):
        AutoModelForCausalLM.from_pretrained(model_folder("llama"), quantization_config=odd)


SCRIPT = """
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.split(".")[0] == "bitsandbytes"
        return None if hidden else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Without
import torch, fourbit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available
assert not is_bitsandbytes_available()
fourbit.take_over_bitsandbytes()
plain, folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
assert type(model.model.layers[0].mlp.up_proj) is fourbit.Linear4bit
model.save_pretrained(out)
four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                          bnb_4bit_compute_dtype="bfloat16")
other = AutoModelForCausalLM.from_pretrained(plain, quantization_config=four)
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
lora = LoraConfig(r=2, target_modules="all-linear")
tuned = get_peft_model(prepare_model_for_kbit_training(other), lora)
tuned.print_trainable_parameters()
ids = torch.arange(8)[None]
tuned(input_ids=ids, labels=ids).loss.backward()
print("fine", "bitsandbytes" in sys.modules)
"""


def test_without_bitsandbytes_installed(model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"), quantization_config=FOUR)
    model.save_pretrained(tmp_path / "bnb")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, model_folder("llama"), tmp_path / "bnb", tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.stdout.endswith("fine False\n"), done.stderr
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "bnb" / "model.safetensors"
    ).read_bytes()
