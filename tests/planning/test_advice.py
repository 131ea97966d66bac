"""What is said about methods and devices: the orders of magnitude everyone knows."""

from __future__ import annotations

import json

import pytest
import torch

import fourbit
from fourbit.errors import InputError
from fourbit.lora import LoraSettings
from fourbit.planning import PRESETS, Room, TrainingShape, preset_of, side_by_side
from fourbit.planning.advice import METHODS, advice
from fourbit.planning.plan import Plan, plan_training
from fourbit.quantize import QuantConfig
from fourbit.training.config import TrainConfig
from models import tiny_config

LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def shapes_only(tmp_path_factory):
    """A folder with a configuration and no weights."""
    folder = tmp_path_factory.mktemp("7b")
    (folder / "config.json").write_text(json.dumps(LLAMA_7B))
    return folder


@pytest.mark.parametrize(
    ("device", "wanted"), [("T4", "qlora: "), ("a100-40", "qlora or lora: "), ("H100", "lora is")]
)
def test_a_7b_model_on_known_cards(shapes_only, device, wanted):
    run = TrainConfig.model_validate({"data": {"max_length": 512}})
    plan = fourbit.plan(str(shapes_only), config=run, device=device, compare=True)
    assert plan.fits
    assert plan.advice.startswith(wanted)
    assert list(plan.methods) == list(METHODS)
    full, lora, qlora = (plan.methods[name] for name in METHODS)
    assert qlora.parts["weights"] < 0.3 * lora.parts["weights"] < 0.3 * full.parts["weights"]
    assert plan.as_dict()["methods"]["qlora"]["peak_bytes"] == plan.peak_bytes


def test_a_preset_is_where_to_start_and_no_more(shapes_only):
    path = str(shapes_only / "config.json")
    start = fourbit.plan(path, device="T4", config=TrainConfig())
    own = TrainConfig.model_validate({"lora": {"r": 64, "target_modules": "all-linear"}})
    more = fourbit.plan(path, device="T4", config=own)
    # rank 8 on attention: 32 layers x 4 x 8 x 2 x 4096; rank 64 on all: PAPER
    assert start.trainable == 8_388_608
    assert more.trainable == 159_907_840


def test_attention_is_found_under_its_names(model_folder):
    for name in ("llama", "gpt2", "phi"):
        plan = fourbit.plan(str(model_folder(name)), device="L4")
        assert 0 < plan.trainable < plan.parameters


def test_advice_follows_the_share_of_memory():
    def taking(size):
        return Plan({"weights": size}, {}, 100, 0, 2, False, 1, 2)

    def said(full, lora, qlora):
        sizes = zip(METHODS, (full, lora, qlora), strict=True)
        return advice({name: taking(size) for name, size in sizes})

    assert said(500, 200, 120).startswith("no method fits")
    assert said(500, 200, 50) == "qlora: nothing else fits"
    assert said(500, 70, 50).startswith("qlora: lora would take 70%")
    assert said(500, 50, 30).startswith("qlora or lora: lora takes 50%")
    assert said(90, 20, 10) == (
        "lora is possible: it takes 20% of the memory, qlora less; full fits too"
    )


def test_the_own_method_is_compared_too():
    shape = TrainingShape(
        "prompt_tuning", QuantConfig(), LoraSettings(), torch.float32, batch_size=1, length=64
    )
    config, room = tiny_config("llama"), Room(1 << 30)
    plan = plan_training(config, shape, room)
    compared = side_by_side(config, shape, room, plan)
    assert list(compared.methods) == [*METHODS, "prompt_tuning"]
    assert sum("MB  fits" in line for line in compared.lines()) == 4


def test_a_card_nobody_knows_is_one_line():
    assert preset_of("h200") is PRESETS["H200"]
    assert preset_of("cpu") is None
    with pytest.raises(InputError) as caught:
        preset_of("A100-4")
    assert "A100-40" in caught.value.line()
