"""A mixture's experts in few bits: packed one by one, multiplied, trained around, saved."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import fourbit
from fourbit.errors import ModelError
from fourbit.experts import dequantize_stack, expert_linear, routes
from fourbit.generate import Sampling, open_generator
from fourbit.integrations.transformers import FourbitConfig, quantize_model
from fourbit.linear import QuantizedLinear, expert_stacks, parameter_counts
from fourbit.quantize import QuantConfig, dequantize_4bit, quantize_4bit
from models import tiny_model, train_tiny, write_chats

MIXTURES = ("mixtral", "qwen2_moe")
NF4 = {
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "float32",
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The bounds are those of one order of summation; threads split sums in another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(folder, **keywords):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=FourbitConfig(**(keywords or NF4))
    )


def twin(model, folder):
    """transformers' own model with the dequantized weights."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for (_, packed), (_, own) in zip(model.named_modules(), plain.named_modules(), strict=True):
        if isinstance(packed, QuantizedLinear):
            own.weight.data = packed.dequantize(torch.float32)
        for name in expert_stacks(packed):
            getattr(own, name).data = dequantize_stack(packed, name, torch.float32)
    return plain.requires_grad_(False)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_experts_are_packed_and_compute_what_their_weights_say(name, model_folder):
    folder = model_folder(name)
    model = load(folder)
    plain = twin(model, folder)
    ids = torch.randint(0, 256, (2, 13), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=1e-4)
    x, y = (
        torch.randn(2, 13, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
        for _ in range(2)
    )
    model(inputs_embeds=x).logits.square().sum().backward()
    plain(inputs_embeds=y).logits.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=5e-4)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_each_expert_is_quantized_on_its_own(name, double_quant, model_folder):
    folder = model_folder(name)
    model = load(folder, **{**NF4, "bnb_4bit_use_double_quant": double_quant})
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    experts = model.model.layers[1].mlp.experts
    for key in ("gate_up_proj", "down_proj"):
        source = getattr(plain.model.layers[1].mlp.experts, key).detach()
        for index, weight in enumerate(source):
            packed, state = quantize_4bit(weight, quant_type="nf4", double_quant=double_quant)
            wanted = dequantize_4bit(packed, state)
            assert torch.equal(dequantize_stack(experts, key, torch.float32)[index], wanted)


def test_bytes_and_counts_are_the_truth(model_folder):
    folder = model_folder("mixtral")
    model = load(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.num_parameters() == plain.num_parameters() == parameter_counts(model)[1]
    experts = model.model.layers[0].mlp.experts
    # 4 experts of 2*80 x 48 in halves of a byte; 120 scales each, one second-level scale, an offset
    assert experts.gate_up_proj.nbytes == 4 * 160 * 24
    assert experts.gate_up_proj_absmax.shape == (4, 120)
    assert experts.gate_up_proj_nested_absmax.shape == (4, 1)
    assert experts.gate_up_proj_nested_offset.shape == (4, 1)


@pytest.mark.parametrize("keywords", [NF4, {"load_in_8bit": True, "llm_int8_threshold": 0.0}])
def test_saved_experts_load_again_byte_for_byte(keywords, model_folder, tmp_path):
    model = load(model_folder("qwen2_moe"), **keywords)
    model.save_pretrained(tmp_path / "one")
    written = json.loads((tmp_path / "one/config.json").read_text())["quantization_config"]
    assert written["quantize_experts"] is True
    again = load(tmp_path / "one", **keywords)
    again.save_pretrained(tmp_path / "two")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    ids = torch.arange(9)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)
    direct, _ = fourbit.load(str(tmp_path / "one"), dtype=torch.float32)
    assert torch.equal(
        model.model.layers[0].mlp.experts.down_proj, direct.model.layers[0].mlp.experts.down_proj
    )


def test_int8_experts_are_close_to_their_weights(model_folder):
    model = load(model_folder("mixtral"), load_in_8bit=True, llm_int8_threshold=0.0)
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(0))
    weight = dequantize_stack(experts, "gate_up_proj", torch.float32)[2]
    # each factor is off by at most half a step of 1/127 of its row's largest value
    bound = 48 * (x.abs().amax(1)[:, None] / 127) * weight.abs().amax(1)
    assert ((expert_linear(experts, "gate_up_proj", 2, x) - x @ weight.t()).abs() <= bound).all()


def test_dequantized_models_are_transformers_own_again(model_folder):
    folder = model_folder("mixtral")
    model = load(folder)
    wanted = twin(model, folder)(torch.arange(9)[None]).logits
    plain = model.dequantize()
    assert not expert_stacks(plain.model.layers[0].mlp.experts)
    torch.testing.assert_close(plain(torch.arange(9)[None]).logits, wanted, rtol=0, atol=1e-5)


def test_quantizing_in_memory_equals_loading_quantized(model_folder):
    model = tiny_model("mixtral")
    quantize_model(model, QuantConfig())
    loaded = load(model_folder("mixtral"))
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("experts", [False, True])
def test_a_mixture_trains_verifies_and_generates(name, experts, model_folder, tmp_path):
    folder = model_folder(name)
    lora = {"r": 4, "lora_dropout": 0}
    if experts:
        lora["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"]
    chats = write_chats(tmp_path / "chats.jsonl")
    result, _ = train_tiny(folder, chats, tmp_path / "run", lora=lora)
    assert result.verified
    assert fourbit.verify(tmp_path / "run").ok
    generator = open_generator(str(folder), adapter=tmp_path / "run", quant=QuantConfig())
    assert generator.answers([[1, 2, 3]], Sampling(max_new_tokens=3))[0].tokens <= 3


def test_adapters_on_experts_add_their_product(model_folder):
    model = load(model_folder("mixtral"))
    plain = twin(model, model_folder("mixtral"))
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    settings = peft.LoraConfig(r=3, lora_alpha=6, target_modules=[], target_parameters=targets)
    tuned = peft.get_peft_model(model, settings)
    ids = torch.arange(11)[None]
    before = tuned(ids).logits
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    theirs = peft.get_peft_model(plain, settings)
    state = peft.get_peft_model_state_dict(tuned)
    loaded = peft.set_peft_model_state_dict(theirs, state)
    assert not loaded.unexpected_keys
    after, wanted = tuned(ids).logits, theirs(ids).logits
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(after, wanted, rtol=0, atol=1e-4)
    after.square().sum().backward()
    wanted.square().sum().backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    own = {n: p.grad for n, p in tuned.named_parameters() if p.grad is not None}
    assert own.keys() == gradients.keys()
    for name, gradient in own.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-3, atol=1e-3)


def test_routes_are_every_chosen_pair_once():
    index = torch.tensor([[0, 3], [3, 1], [4, 0]])  # 4 of 4 experts means none
    found = {
        (e, r, s)
        for e, rows, slots in routes(index, 4)
        for r, s in zip(rows.tolist(), slots.tolist(), strict=True)
    }
    assert found == {(0, 0, 0), (3, 0, 1), (3, 1, 0), (1, 1, 1), (0, 2, 1)}


def test_a_model_that_would_stay_in_16_bits_is_refused(model_folder):
    with pytest.raises(ModelError) as caught:
        load(model_folder("mixtral"), **NF4, quantize_experts=False)
    assert caught.value.code == "mostly-unquantized"
    assert "experts.gate_up_proj" in caught.value.what
    assert caught.value.fix == "set allow_unquantized: true to load it all the same"
    model = load(model_folder("mixtral"), **NF4, quantize_experts=False, allow_unquantized=True)
    assert model.model.layers[0].mlp.experts.gate_up_proj.is_floating_point()


def test_a_nonfinite_expert_is_named():
    model = tiny_model("mixtral")
    model.model.layers[1].mlp.experts.down_proj.data[2, 5, 7] = float("inf")
    with pytest.raises(ModelError) as caught:
        quantize_model(model, QuantConfig())
    assert caught.value.where == "model.layers.1.mlp.experts.down_proj[2]"
