"""Names in files and in the model: transformers' private functions do what we use them for."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fourbit.errors import ModelError
from fourbit.integrations.config import FourbitConfig
from fourbit.integrations.names import CheckpointNames, absent, plain_dtypes
from fourbit.integrations.transformers import plain_layout, quantized_layout
from fourbit.linear import QuantizedLinear
from models import tiny_config

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 264,
}


def layout(name, **changes):
    return plain_layout(AutoConfig.for_model(name, **SMALL, **changes), dtype=torch.bfloat16)


def test_the_names_that_save_pretrained_writes_come_back(tmp_path):
    from safetensors.torch import load_file

    for name in ("llama", "gpt2", "gpt_neox", "falcon"):
        config = tiny_config(name)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        stored = load_file(tmp_path / name / "model.safetensors")
        model = plain_layout(config, dtype=torch.float32)
        names = CheckpointNames(model)
        parameters = {file: names.parameter(file) for file in stored}
        assert None not in parameters.values()
        assert absent(model, set(parameters.values())) == []
        for file, parameter in parameters.items():
            assert names.stored(parameter) == file
            assert names.loads_as(file, parameter)


def test_a_renamed_head_and_a_missing_prefix():
    neox = CheckpointNames(plain_layout(tiny_config("gpt_neox"), dtype=torch.float32))
    assert neox.parameter("embed_out.weight") == "lm_head.weight"
    assert neox.stored("lm_head.weight") == "embed_out.weight"
    llama = CheckpointNames(plain_layout(tiny_config("llama"), dtype=torch.float32))
    assert llama.parameter("norm.weight") == "model.norm.weight"
    assert llama.stored("model.norm.weight") == "model.norm.weight"
    assert llama.parameter("vision.weight") is None
    assert not llama.loads_as("vision.weight", "model.norm.weight")


def test_a_dropped_prefix_is_put_back_only_where_it_was():
    shape = {"linear_num_value_heads": 2, "linear_num_key_heads": 1, "head_dim": 16}
    model = layout("qwen3_5_text", layer_types=["full_attention"], **shape)
    with_prefix, without = CheckpointNames(model), CheckpointNames(model)
    assert with_prefix.parameter("model.language_model.norm.weight") == "model.norm.weight"
    assert with_prefix.stored("model.norm.weight") == "model.language_model.norm.weight"
    assert without.parameter("model.norm.weight") == "model.norm.weight"
    assert without.stored("model.norm.weight") == "model.norm.weight"


def test_tensors_that_are_stacked_while_loading_are_refused():
    names = CheckpointNames(layout("qwen2_moe", num_experts=2, moe_intermediate_size=16))
    with pytest.raises(ModelError) as caught:
        names.parameter("model.layers.0.mlp.experts.1.up_proj.weight")
    assert caught.value.code == "converted-weights"
    assert names.parameter("model.norm.weight") == "model.norm.weight"


def test_what_is_absent_knows_ties_and_scales():
    model = quantized_layout(
        tiny_config("llama"),
        FourbitConfig(bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16"),
        dtype=torch.bfloat16,
    )
    names = {name for name in model.state_dict() if not re.search("weight_", name)}
    assert absent(model, names) == []
    assert absent(model, names - {"lm_head.weight"}) == []
    assert absent(model, names - {"model.embed_tokens.weight"}) == []
    both = names - {"lm_head.weight", "model.embed_tokens.weight"}
    assert absent(model, both) == ["lm_head.weight", "model.embed_tokens.weight"]
    gone = "model.layers.1.mlp.up_proj.weight"
    assert absent(model, names - {gone}) == [gone]


def test_plain_dtypes_are_those_of_from_pretrained(tmp_path):
    config = tiny_config("llama")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    asked = FourbitConfig(bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
    for dtype in (torch.bfloat16, torch.float16):
        model = quantized_layout(config, asked, dtype=dtype)
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=dtype, quantization_config=asked
        )
        layers = {n for n, m in loaded.named_modules() if isinstance(m, QuantizedLinear)}
        expected = {
            name: tensor.dtype
            for name, tensor in loaded.state_dict().items()
            if name.rpartition(".")[0] not in layers
        }
        assert plain_dtypes(model, dtype) == expected
