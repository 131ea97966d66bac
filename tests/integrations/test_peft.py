"""Every road by which PEFT makes, loads, switches and counts adapters leads to our layer."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import peft.tuners.lora.model as peft_lora_model
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from fourbit.errors import InputError
from fourbit.integrations.peft import (
    LoraLinear4bit,
    add_adapter,
    head_weight,
    linear_shapes,
    lora_config,
    lora_layers,
    saved_modules,
)
from fourbit.integrations.transformers import quantize_model
from fourbit.linear import Linear4bit
from fourbit.lora import LoraSettings, expected_trainable, resolve_targets
from fourbit.quantize import QuantConfig
from models import tiny_model

FP32 = {"rtol": 1e-4, "atol": 1e-5}
"""Two layers in float32 whose products are summed in another order than PEFT's."""

IDS = torch.tensor([[1, 5, 9, 200, 3, 17, 42], [7, 7, 250, 0, 31, 8, 2]])


def quantized(name: str = "qwen3", device: torch.device | None = None) -> PreTrainedModel:
    model = tiny_model(name)
    quantize_model(model, QuantConfig())
    return model.to(device)  # type: ignore[arg-type]


def plain_twin(model: PreTrainedModel) -> PreTrainedModel:
    """The same model in float32, built on the dequantized weights."""
    twin = AutoModelForCausalLM.from_config(model.config).eval().to(model.device)
    state = twin.state_dict()
    for key, value in model.state_dict().items():
        if key in state and value.is_floating_point():
            state[key] = value
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            weight = module.dequantize(torch.float32)
            state[f"{name}.weight"] = weight.t() if module.transposed_source else weight
    twin.load_state_dict(state)
    return twin


def config(**changes: object) -> LoraConfig:
    values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**(values | changes))  # type: ignore[arg-type]


def randomize(model: nn.Module) -> None:
    """B starts at zero, which would hide every fault of the adapter."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.manual_seed(len(name) + sum(map(ord, name)))
            nn.init.normal_(parameter, std=0.2)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS.to(next(model.parameters()).device)).logits


def ours(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, LoraLinear4bit)]


def layers_of(model: nn.Module) -> int:
    return sum(isinstance(m, Linear4bit) for m in model.modules())


def test_get_peft_model_gives_our_layer_everywhere() -> None:
    model = get_peft_model(quantized(), config())
    assert len(ours(model)) == layers_of(model) == 14
    assert not [m for m in model.modules() if type(m) is PeftLoraLinear]


def test_the_hook_is_installed_once() -> None:
    quantized()
    first = peft_lora_model.dispatch_default, PeftModel.get_nb_trainable_parameters
    quantized()
    assert (peft_lora_model.dispatch_default, PeftModel.get_nb_trainable_parameters) == first


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 32}},
        {"init_lora_weights": "gaussian"},
        {"exclude_modules": ["q_proj"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "phi"])
def test_equal_to_peft_on_the_dequantized_weights(
    device: torch.device, name: str, changes: dict[str, object]
) -> None:
    base = quantized(name, device)
    twin = plain_twin(base)
    model, reference = (
        get_peft_model(base, config(**changes)),
        get_peft_model(twin, config(**changes)),
    )
    randomize(model)
    state = {k: v for k, v in model.state_dict().items() if "lora_" in k}
    missing = reference.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    if name == "gpt2":  # Conv1D keeps its own orientation in PEFT, the adapter's is the same
        assert ours(model)
    for m in (model, reference):
        m.train()
        for module in m.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    losses = [m(input_ids=IDS.to(device), labels=IDS.to(device)).loss for m in (model, reference)]
    torch.testing.assert_close(losses[0], losses[1], **FP32)
    grads = []
    for m, loss in zip((model, reference), losses, strict=True):
        loss.backward()
        grads.append({k: p.grad for k, p in m.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert grads[0]
    for key, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][key], **FP32, msg=key)


@pytest.mark.parametrize("sizes", [(7, 5), (33, 65), (1, 1)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_fused_equals_peft_unfused_on_odd_sizes(
    device: torch.device, sizes: tuple[int, int], with_bias: bool
) -> None:
    linear = nn.Linear(*sizes, bias=with_bias, device=device)
    base = Linear4bit.from_linear(linear, QuantConfig())
    layer = LoraLinear4bit(base, "default", config(), r=1, lora_alpha=3).to(device)
    randomize(layer)
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(2, 3, sizes[0], device=device, requires_grad=True)
    pair = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    answers = []
    for forward in (layer, lambda x: PeftLoraLinear.forward(layer, x)):
        y = forward(x)
        answers.append((y, *torch.autograd.grad(y.square().sum(), (x, *pair))))
    assert "lora_linear_4bit" in str(_graph(layer(x)))
    assert "lora_linear_4bit" not in str(_graph(PeftLoraLinear.forward(layer, x)))
    for fused, unfused in zip(*answers, strict=True):
        torch.testing.assert_close(fused, unfused, **FP32)


def _graph(y: Tensor) -> list[str]:
    """Names of the backward operations behind ``y``."""
    names, queue = [], [y.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None:
            names.append(node.name())
            queue += [parent for parent, _ in node.next_functions]
    return names


def test_training_dropout_is_on_in_train_and_off_in_eval() -> None:
    model = get_peft_model(quantized(), config(lora_dropout=0.5))
    randomize(model)
    model.eval()
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    model = get_peft_model(quantized(), config())
    randomize(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 2 * len(ours(model))
    assert all(".lora_A.weight" in key or ".lora_B.weight" in key for key in saved)

    loaded = PeftModel.from_pretrained(quantized(), tmp_path)
    assert len(ours(loaded)) == len(ours(model))
    assert torch.equal(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[key], saved[key]) for key in saved)

    base = quantized()
    twin = PeftModel.from_pretrained(plain_twin(base), tmp_path)  # PEFT reads it without us
    torch.testing.assert_close(logits(twin), expected, **FP32)


def test_two_adapters_switch_and_switch_off(tmp_path: Path) -> None:
    base = quantized()
    plain = logits(base)
    model = get_peft_model(base, config())
    model.add_adapter("second", config(r=2, target_modules=["q_proj", "down_proj"]))
    randomize(model)
    assert len(ours(model)) == layers_of(model)
    answers = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        answers[name] = logits(model)
    assert not torch.equal(answers["default"], answers["second"])
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), answers["second"])
    model.set_adapter("default")
    assert torch.equal(logits(model), answers["default"])

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(), tmp_path)
    loaded.load_adapter(tmp_path / "second", adapter_name="second")
    assert torch.equal(logits(loaded), answers["default"])
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), answers["second"])


def test_several_active_adapters_add_up() -> None:
    base = quantized()
    model = get_peft_model(base, config())
    model.add_adapter("second", config(r=2))
    randomize(model)
    model.base_model.set_adapter(["default", "second"])
    reference = get_peft_model(plain_twin(_unwrapped()), config())
    reference.add_adapter("second", config(r=2))
    reference.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "lora_" in k}, strict=False
    )
    reference.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(logits(model), logits(reference), **FP32)


def _unwrapped() -> PreTrainedModel:
    """The base again: PEFT renames the layers of the one it wrapped."""
    return quantized()


def test_mixed_batches_take_peft_own_path() -> None:
    model = get_peft_model(quantized(), config()).eval()
    model.add_adapter("second", config(r=2))
    randomize(model)
    rows = []
    for row, name in enumerate(("default", "second")):
        model.set_adapter(name)
        rows.append(logits(model)[row])
    with torch.no_grad():
        mixed = model(IDS, adapter_names=["default", "second"]).logits
    torch.testing.assert_close(mixed, torch.stack(rows), **FP32)


def test_transformers_own_adapter_api_gives_our_layer() -> None:
    base = quantized()
    base.add_adapter(config(), adapter_name="one")
    assert len(ours(base)) == layers_of(base)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3}},
        {"target_modules": ["q_proj", "v_proj"]},
        {"exclude_modules": ["down_proj"]},
        {"target_modules": r".*\.0\..*_proj"},
    ],
    ids=str,
)
def test_trainable_parameters_equal_the_formula(changes: dict[str, object]) -> None:
    settings = LoraSettings.model_validate({"r": 4, **changes})
    base = quantized()
    targets = resolve_targets(linear_shapes(base), settings, head="lm_head")
    model = add_adapter(base, settings)
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == expected_trainable(targets, settings)
    assert lora_layers(model).keys() == targets.keys()
    unquantized = sum(p.numel() for p in tiny_model("qwen3").parameters())
    assert total == unquantized + trainable


def test_targets_that_are_no_linear_layers_are_one_line() -> None:
    with pytest.raises(InputError) as caught:
        add_adapter(quantized(), LoraSettings(r=4, target_modules=r".*\.0\..*"))
    assert caught.value.line() == (
        r"error[target-not-linear] lora.target_modules: '.*\.0\..*' also matches modules that are"
        " no linear layers; fix: match whole layer names only, e.g. .*_proj"
    )


@pytest.mark.parametrize(("r", "trainable"), [(8, 8_388_608), (16, 16_777_216), (64, 67_108_864)])
def test_the_papers_7b_counts(r: int, trainable: int, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.device("meta"):
        llama = AutoModelForCausalLM.from_config(
            LlamaConfig(
                hidden_size=4096,
                intermediate_size=11008,
                num_hidden_layers=32,
                num_attention_heads=32,
                vocab_size=32000,
                tie_word_embeddings=False,
            )
        )
    quantize_model(llama, QuantConfig())
    assert llama.num_parameters() == 6_738_415_616
    settings = LoraSettings(r=r, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = add_adapter(llama, settings, low_cpu_mem_usage=True)
    assert model.get_nb_trainable_parameters() == (trainable, 6_738_415_616 + trainable)
    assert model.get_base_model().num_parameters(only_trainable=True) == trainable
    model.print_trainable_parameters()
    share = 100 * trainable / (6_738_415_616 + trainable)
    assert capsys.readouterr().out == (
        f"trainable params: {trainable:,d} || all params: {6_738_415_616 + trainable:,d}"
        f" || trainable%: {share:.4f}\n"
    )


def test_printing_a_model_shows_rank_and_alpha() -> None:
    text = repr(get_peft_model(quantized(), config(rank_pattern={"q_proj": 2})))
    assert "default: r=4, lora_alpha=8, scaling=2" in text
    assert "default: r=2, lora_alpha=8, scaling=4" in text
    assert "quant_type=nf4, blocksize=64, double_quant=True" in text


def test_plain_models_get_peft_own_layer_and_counts() -> None:
    quantized()  # installs the hooks
    model = get_peft_model(tiny_model("qwen3"), config())
    assert ours(model) == []
    assert sum(type(m) is PeftLoraLinear for m in model.modules()) == 14
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    assert model.get_nb_trainable_parameters() == (trainable, total)
    merged = model.merge_and_unload()
    assert not [m for m in merged.modules() if isinstance(m, PeftLoraLinear)]


def test_what_is_trained_is_float32() -> None:
    base = tiny_model("qwen2", dtype=torch.bfloat16)
    quantize_model(base, QuantConfig())
    model = add_adapter(base, LoraSettings(r=4, modules_to_save=["lm_head"]))
    trained = {k: p.dtype for k, p in model.named_parameters() if p.requires_grad}
    assert any("lm_head" in key for key in trained)
    assert set(trained.values()) == {torch.float32}
    assert list(saved_modules(model)) == ["lm_head"]


def test_head_weight_is_the_one_in_use() -> None:
    base = quantized("qwen2")
    head = base.get_output_embeddings()
    assert head is not None
    found = head_weight(head)
    assert found is not None
    assert found[0] is head.weight
    model = add_adapter(base, LoraSettings(r=4, modules_to_save=["lm_head"]))
    wrapper = saved_modules(model)["lm_head"]
    found = head_weight(wrapper)
    assert found is not None
    assert found[0] is wrapper.modules_to_save["default"].weight
    with model.disable_adapter():
        found = head_weight(wrapper)
        assert found is not None
        assert found[0] is wrapper.original_module.weight
    assert head_weight(Linear4bit.from_linear(nn.Linear(4, 4), QuantConfig())) is None


def test_settings_reach_peft_unchanged() -> None:
    settings = LoraSettings(
        r=4,
        lora_alpha=12,
        lora_dropout=0.1,
        target_modules=["q_proj"],
        exclude_modules=["0.self_attn.q_proj"],
        rank_pattern={"q_proj": 2},
        alpha_pattern={"q_proj": 3},
        use_rslora=True,
    )
    made = lora_config(settings)
    assert made.target_modules == {"q_proj"}
    for name in ("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora"):
        assert getattr(made, name) == getattr(settings, name), name


def test_layers_can_be_copied_and_unloaded() -> None:
    base = quantized()
    expected = logits(base)
    model = get_peft_model(base, config())
    randomize(model)
    adapted = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), adapted)
    assert torch.equal(logits(model.unload()), expected)


def test_importing_changes_nothing_in_peft() -> None:
    program = (
        "import peft.tuners.lora.model as m; before = m.dispatch_default;"
        "import fourbit.integrations.transformers; assert m.dispatch_default is before"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
