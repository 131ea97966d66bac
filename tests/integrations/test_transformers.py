"""Our quantizer seen from transformers: the swapped configuration class, counts, refusals."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import fourbit
from fourbit.errors import InputError, ModelError
from fourbit.integrations.transformers import (
    FourbitConfig,
    disable_checkpointing,
    enable_checkpointing,
    quantize_model,
)
from fourbit.linear import Linear4bit
from fourbit.quantize import QuantConfig, dequantize_4bit, quantize_4bit
from models import linears, plain_twin, tiny_model

EIGHT = FourbitConfig(load_in_8bit=True)


def from_folder(folder, **keywords):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=FourbitConfig(**keywords)
    )


# The configuration.


def test_names_and_defaults_are_those_of_bitsandbytes():
    config = FourbitConfig()
    assert (config.quant.quant_type, config.quant.blocksize) == ("fp4", 64)
    assert config.quant.double_quant is False
    assert config.compute_dtype is torch.float32
    assert config.modules_to_not_convert is None


def test_the_4_bit_names_agree_with_transformers_own_class():
    from transformers import BitsAndBytesConfig

    theirs = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16").to_dict()
    ours = FourbitConfig(load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16").to_dict()
    shared = ours.keys() & theirs.keys() - {"quant_method"}
    assert shared >= {"bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"}
    assert {key: ours[key] for key in shared} == {key: theirs[key] for key in shared}


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_the_dictionary_gives_the_configuration_back(dtype):
    config = FourbitConfig(
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        blocksize=128,
        llm_int8_skip_modules=["v_proj"],
    )
    values = json.loads(json.dumps(config.to_dict()))
    again = FourbitConfig(**values)
    assert again.to_dict() == values
    assert again.quant == config.quant
    assert again.compute_dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("keywords", "line"),
    [
        (
            {"bnb_4bit_quant_typ": "nf4"},
            "error[unknown-key] FourbitConfig.bnb_4bit_quant_typ: unknown name;"
            " fix: did you mean 'bnb_4bit_quant_type'?",
        ),
        (
            {"bnb_4bit_compute_type": "bfloat16"},
            "error[unknown-key] FourbitConfig.bnb_4bit_compute_type: unknown name;"
            " fix: did you mean 'bnb_4bit_compute_dtype'?",
        ),
        (
            {"bnb_4bit_quant_storage": "float64"},
            "error[bad-value] FourbitConfig.bnb_4bit_quant_storage: 'float64' is none of: uint8,"
            " float16, bfloat16, float32; fix: use uint8, float16, bfloat16, float32",
        ),
        (
            {"load_in_4bit": False},
            "error[not-quantized] FourbitConfig.load_in_4bit: neither load_in_4bit nor"
            " load_in_8bit is True; fix: set one of them, or load without a quantization_config",
        ),
        (
            {"load_in_8bit": "yes"},
            "error[bad-value] FourbitConfig.load_in_8bit: 'yes' is not True or False;"
            " fix: use True or False",
        ),
        (
            {"llm_int8_threshold": "6"},
            "error[bad-value] FourbitConfig.llm_int8_threshold: '6' is not a number of at least 0;"
            " fix: use a number of at least 0",
        ),
        (
            {"llm_int8_skip_modules": "lm_head"},
            "error[bad-value] FourbitConfig.llm_int8_skip_modules: 'lm_head' is no list of module"
            " names; fix: use ['lm_head']",
        ),
        (
            {"bnb_4bit_quant_type": "int3"},
            "error[bad-value] FourbitConfig.bnb_4bit_quant_type: 'int3' is none of:"
            " nf4, fp4, int4; fix: use nf4, fp4, int4",
        ),
        (
            {"bnb_4bit_compute_dtype": "float99"},
            "error[bad-value] FourbitConfig.bnb_4bit_compute_dtype: 'float99' is none of:"
            " bfloat16, float16, float32; fix: use bfloat16, float16, float32",
        ),
    ],
)
def test_wrong_settings_are_one_line(keywords, line):
    with pytest.raises(InputError) as caught:
        FourbitConfig(**keywords)
    assert caught.value.line() == line


def test_everything_bitsandbytes_writes_into_its_own_dictionary_is_understood():
    from transformers import BitsAndBytesConfig

    values = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4").to_dict()
    config = FourbitConfig(**values)
    assert config.quant.quant_type == "nf4"


@pytest.mark.parametrize("blocksize", [65, 0, -64, "many", True])
def test_a_wrong_blocksize_is_one_line(blocksize):
    with pytest.raises(InputError) as caught:
        FourbitConfig(blocksize=blocksize)
    assert caught.value.where == "FourbitConfig.blocksize"
    assert caught.value.fix.startswith("use one of 32, 64, 128")


# from_pretrained.


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_from_pretrained_quantizes_each_weight_of_the_file(
    name, quant_type, double_quant, model_folder
):
    folder = model_folder(name)
    model = from_folder(
        folder, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant
    )
    plain = linears(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    for key, layer in linears(model).items():
        if isinstance(layer, Linear4bit):
            weight = plain[key].weight.detach()
            weight = weight.t() if isinstance(plain[key], Conv1D) else weight
            packed, state = quantize_4bit(weight, quant_type=quant_type, double_quant=double_quant)
            assert torch.equal(layer.weight.flatten(), packed.flatten()), key
            assert torch.equal(layer.dequantize(), dequantize_4bit(packed, state)), key


def test_int4_is_for_comparison_and_is_not_saved(tmp_path, model_folder):
    model = from_folder(model_folder("llama"), bnb_4bit_quant_type="int4")
    with pytest.raises(ModelError) as caught:
        model.save_pretrained(tmp_path / "saved")
    assert caught.value.line() == (
        "error[no-such-format] quant_type: bitsandbytes' format has no int4, so nothing could read"
        " the file; fix: quantize with nf4 or fp4 to save the model"
    )
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_model_says_that_it_is_quantized(model_folder):
    model = from_folder(model_folder("llama"), bnb_4bit_quant_type="nf4")
    assert model.is_quantized
    assert model.config.quantization_config.quant_method == "fourbit"
    assert model.hf_quantizer.is_trainable
    assert not any(
        p.requires_grad
        for m in model.modules()
        if isinstance(m, Linear4bit)
        for p in m.parameters()
    )


def test_named_modules_can_be_left_plain(model_folder):
    model = from_folder(model_folder("llama"), llm_int8_skip_modules=["v_proj"])
    kinds = {key.rsplit(".", 1)[-1]: type(layer) for key, layer in linears(model).items()}
    assert kinds["v_proj"] is nn.Linear
    assert kinds["q_proj"] is Linear4bit
    assert kinds["lm_head"] is nn.Linear


def test_bfloat16_compute_multiplies_in_bfloat16(model_folder):
    model = from_folder(model_folder("llama"), bnb_4bit_compute_dtype="bfloat16")
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 48)
    wanted = nn.functional.linear(x.bfloat16(), layer.dequantize(torch.bfloat16)).float()
    torch.testing.assert_close(layer(x), wanted, rtol=1e-2, atol=1e-2)
    assert layer(x).dtype == torch.float32


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_device_maps(device_map, model_folder):
    model = AutoModelForCausalLM.from_pretrained(
        model_folder("llama"),
        dtype=torch.float32,
        device_map=device_map,
        quantization_config=FourbitConfig(),
    )
    with torch.no_grad():
        assert model(torch.ones((1, 4), dtype=torch.long).to(model.device)).logits.isfinite().all()


def test_a_device_map_layer_by_layer(model_folder):
    plain = {"": "cpu"}
    layers = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    ids = torch.arange(9)[None]
    logits = []
    for device_map in (plain, layers):
        model = AutoModelForCausalLM.from_pretrained(
            model_folder("llama"),
            dtype=torch.float32,
            device_map=device_map,
            quantization_config=FourbitConfig(load_in_8bit=True),
        )
        with torch.no_grad():
            logits.append(model(ids).logits)
    assert torch.equal(*logits)


def test_modules_on_the_cpu_stay_plain_on_request(model_folder):
    names = {"model.layers.1.mlp": "cpu", "": "cpu"}
    for asked, kind in ((True, nn.Linear), (False, Linear4bit)):
        model = AutoModelForCausalLM.from_pretrained(
            model_folder("llama"),
            device_map=names,
            quantization_config=FourbitConfig(llm_int8_enable_fp32_cpu_offload=asked),
        )
        assert type(model.model.layers[1].mlp.up_proj) is kind
        assert type(model.model.layers[0].mlp.up_proj) is Linear4bit


@pytest.mark.parametrize(
    "device_map", ["auto", "balanced", "sequential", {"model": 0, "lm_head": 1}], ids=str
)
def test_several_processes_refuse_a_map_that_spreads(device_map, model_folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError) as caught:
        AutoModelForCausalLM.from_pretrained(
            model_folder("llama"), device_map=device_map, quantization_config=FourbitConfig()
        )
    assert caught.value.line() == (
        "error[device-map-in-processes] device_map: 2 processes, and a device_map that spreads"
        " the model: each process would take every device; fix: one process, one device:"
        " device_map={'': local_rank}"
    )


@pytest.mark.parametrize("world", ["1", "2"])
def test_several_processes_take_a_map_of_one_device(world, model_folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", world)
    model = AutoModelForCausalLM.from_pretrained(
        model_folder("llama"), device_map={"": "cpu"}, quantization_config=FourbitConfig()
    )
    assert isinstance(model.model.layers[0].mlp.up_proj, Linear4bit)


def test_prepare_model_for_kbit_training_knows_the_model(model_folder):
    from peft import prepare_model_for_kbit_training

    for config in (FourbitConfig(), EIGHT):
        model = AutoModelForCausalLM.from_pretrained(
            model_folder("llama"), dtype=torch.bfloat16, quantization_config=config
        )
        # with it accelerate and TRL would treat the layers as bitsandbytes'
        assert not getattr(model, "is_loaded_in_4bit", False)
        prepared = prepare_model_for_kbit_training(model)
        assert prepared.model.layers[0].gradient_checkpointing
        floating = {p.dtype for p in prepared.parameters() if p.is_floating_point()}
        assert floating == {torch.float32}


def test_the_number_of_parameters_is_the_truth(model_folder):
    folder = model_folder("qwen2")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    model = from_folder(folder)
    model.requires_grad_(False)
    assert model.num_parameters() == plain.num_parameters()
    assert model.num_parameters(only_trainable=True) == 0
    embedding = plain.get_input_embeddings().weight.numel()
    assert model.num_parameters(exclude_embeddings=True) == plain.num_parameters() - embedding
    model.lm_head.weight.requires_grad_(True)
    assert model.num_parameters(only_trainable=True) == embedding


def test_plain_models_are_counted_as_before(model_folder):
    from_folder(model_folder("llama"))
    plain = tiny_model("qwen2")
    assert plain.num_parameters() == sum(p.numel() for p in plain.parameters())
    assert plain.num_parameters(exclude_embeddings=True) == plain.num_parameters() - 264 * 48


def test_a_saved_model_loads_again_with_the_same_bytes(model_folder, tmp_path):
    model = from_folder(model_folder("llama"), bnb_4bit_quant_type="nf4")
    model.save_pretrained(tmp_path / "one")
    again = from_folder(tmp_path / "one", bnb_4bit_quant_type="fp4")
    again.save_pretrained(tmp_path / "two")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert again.model.layers[0].mlp.up_proj.quant_type == "nf4", "the checkpoint's bytes decide"


def test_16_bit_weights_called_quantized_are_one_line(model_folder, tmp_path):
    folder = shutil.copytree(model_folder("llama"), tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = FourbitConfig().to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as caught:
        fourbit.load(str(folder))
    assert caught.value.code == "bad-quantized-tensor"
    assert "no quant_state" in caught.value.what


def test_a_missing_quantized_weight_is_an_error_not_random_numbers(model_folder, tmp_path):
    folder = shutil.copytree(model_folder("llama"), tmp_path / "llama")
    state = load_file(folder / "model.safetensors")
    del state["model.layers.0.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        from_folder(folder)
    assert caught.value.line() == (
        f"error[missing-weights] {folder}: 1 tensors are missing, first:"
        " model.layers.0.mlp.up_proj.weight; fix: download the checkpoint again,"
        " or check that config.json belongs to it"
    )


# In place.


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "phi3"])
def test_quantizing_in_memory_equals_loading_quantized(name, model_folder):
    folder = model_folder(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    replaced = quantize_model(model, QuantConfig())
    loaded, _ = fourbit.load(str(folder), quant=QuantConfig(), dtype=torch.float32)
    assert set(replaced) == {k for k, m in linears(loaded).items() if isinstance(m, Linear4bit)}
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, loaded(ids).logits)
        wanted = plain_twin(model, folder)(ids).logits
        torch.testing.assert_close(model(ids).logits, wanted, rtol=0, atol=1e-4)


def test_a_nonfinite_weight_in_memory_names_its_layer():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[0, 3] = float("inf")
    with pytest.raises(ModelError) as caught:
        quantize_model(model, QuantConfig())
    assert "layers.1.self_attn.o_proj" in caught.value.where
    assert "flat index 3" in caught.value.what


def test_checkpointing_is_switched_on_and_off():
    model = tiny_model("llama").train()
    enable_checkpointing(model)
    assert model.model.layers[0].gradient_checkpointing
    disable_checkpointing(model)
    assert not model.model.layers[0].gradient_checkpointing
