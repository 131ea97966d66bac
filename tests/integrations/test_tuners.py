"""Every PEFT method on a packed base: equal to itself on the dequantized weights, or refused."""

from __future__ import annotations

import copy
import itertools
import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from peft.tuners.lora.config import KasaConfig, MontecloraConfig, VeloraConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fourbit.errors import InputError, VerificationFailed
from fourbit.integrations.config import FourbitConfig
from fourbit.integrations.merging import FloatLinear
from fourbit.integrations.peft import LoraLinear4bit, add_adapter
from fourbit.integrations.starts import orthogonal_pair, principal_part
from fourbit.integrations.transformers import quantize_model
from fourbit.integrations.tuners import SUPPORTED
from fourbit.linear import Linear4bit, QuantizedLinear
from fourbit.lora import LoraSettings
from fourbit.quantize import QuantConfig
from fourbit.receipt import watch
from models import tiny_model

FP32 = {"rtol": 2e-4, "atol": 2e-5}
"""Two layers in float32 whose products are summed in another order."""

IDS = torch.tensor([[1, 5, 9, 200, 3, 17, 42], [7, 7, 250, 0, 31, 8, 2]])
TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]
PRINCIPAL = ["pissa", "pissa_niter_4", "olora"]


def quantized(
    name: str = "qwen2", dtype: torch.dtype = torch.float32, quant_type: str = "nf4"
) -> PreTrainedModel:
    model = tiny_model(name, dtype=dtype)
    quantize_model(model, QuantConfig.model_validate({"quant_type": quant_type}))
    return model


def twin_of(model: PreTrainedModel) -> PreTrainedModel:
    twin = AutoModelForCausalLM.from_config(model.config).eval()
    state = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            weight = module.dequantize(torch.float32)
            state[f"{name}.weight"] = weight.t() if module.transposed_source else weight
    twin.load_state_dict(state)
    return twin


def config(**changes: object) -> LoraConfig:
    values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**(values | changes))  # type: ignore[arg-type]


def shake(model: nn.Module, *, std: float = 0.1) -> None:
    """Moves whatever is trained off its first value, which would hide faults."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.manual_seed(sum(map(ord, name)))
            parameter.data += std * torch.randn_like(parameter)


def logits(model: nn.Module, **kwargs: object) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **kwargs).logits.float()


def packed_bytes(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": p.clone()
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
        for key, p in module.named_parameters()
    }


def equal_tables(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(left[k].equal(right[k]) for k in left)


METHODS = {
    "ADALORA": lambda: peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, target_modules=TARGETS
    ),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=TARGETS),
    "FOURIERFT": lambda: peft.FourierFTConfig(n_frequency=20, target_modules=TARGETS),
    "GRALORA": lambda: peft.GraloraConfig(r=4, gralora_k=2, target_modules=TARGETS),
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "LN_TUNING": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4, r=0, target_modules=TARGETS),
    "RANDLORA": lambda: peft.RandLoraConfig(r=4, target_modules=TARGETS),
    "ROAD": lambda: peft.RoadConfig(group_size=4, target_modules=TARGETS),
    "TRAINABLE_TOKENS": lambda: peft.TrainableTokensConfig(token_indices=[1, 7]),
    "VBLORA": lambda: peft.VBLoRAConfig(
        r=4, num_vectors=20, vector_length=4, topk=2, target_modules=TARGETS
    ),
    "VERA": lambda: peft.VeraConfig(r=4, target_modules=TARGETS),
    "WAVEFT": lambda: peft.WaveFTConfig(n_frequency=20, target_modules=TARGETS),
}
UNMERGEABLE = {"LN_TUNING", "TRAINABLE_TOKENS"}
"""They put no layer on packed weights."""


def pair(make) -> tuple[PeftModel, PeftModel]:
    """The same adapter on a packed base and on the float weights it stands for."""
    base = quantized()
    twin = twin_of(base)
    models = []
    for model in (base, twin):
        torch.manual_seed(0)
        models.append(get_peft_model(model, make()))
        shake(models[-1])
    ours, theirs = models
    state = {k: v for k, v in ours.state_dict().items() if k in theirs.state_dict()}
    theirs.load_state_dict(
        {k: v for k, v in state.items() if v.shape == theirs.state_dict()[k].shape}, strict=False
    )
    return ours, theirs


def test_the_table_is_tested() -> None:
    assert METHODS.keys() | {"LORA"} == SUPPORTED


@pytest.mark.parametrize("method", METHODS)
def test_a_method_computes_what_it_computes_on_the_float_weights(
    method: str, tmp_path: Path
) -> None:
    ours, theirs = pair(METHODS[method])
    before = packed_bytes(ours)
    losses = [m(input_ids=IDS, labels=IDS).loss for m in (ours, theirs)]
    torch.testing.assert_close(*losses, **FP32)
    for loss in losses:
        loss.backward()
    grads = [
        {k: p.grad for k, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs)
    ]
    assert grads[0].keys() == grads[1].keys()
    assert grads[0]
    for key, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][key], **FP32, msg=key)

    adapted = logits(ours.eval())
    ours.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), adapted, **FP32)
    if method in UNMERGEABLE:
        return
    ours.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(ours), adapted, rtol=1e-3, atol=1e-4)
    ours.unmerge_adapter()
    assert equal_tables(packed_bytes(ours), before)
    torch.testing.assert_close(logits(ours), adapted, **FP32)
    merged = ours.merge_and_unload()
    assert not [m for m in merged.modules() if isinstance(m, (QuantizedLinear, FloatLinear))]
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-3, atol=1e-4)


OTHERS = {
    "LOHA": lambda: peft.LoHaConfig(r=2, target_modules=TARGETS),
    "LOKR": lambda: peft.LoKrConfig(r=2, target_modules=TARGETS),
    "HRA": lambda: peft.HRAConfig(r=2, target_modules=TARGETS),
    "SHIRA": lambda: peft.ShiraConfig(r=1, target_modules=TARGETS),
    "MISS": lambda: peft.MissConfig(r=2, target_modules=TARGETS),
    "C3A": lambda: peft.C3AConfig(block_size=4, target_modules=TARGETS),
    "DELORA": lambda: peft.DeloraConfig(r=2, target_modules=TARGETS),
}


@pytest.mark.parametrize("method", OTHERS)
def test_a_method_that_was_not_shown_is_refused_before_it_changes_anything(method: str) -> None:
    base = quantized()
    plain = logits(base)
    with pytest.raises(InputError) as caught:
        get_peft_model(base, OTHERS[method]())
    assert caught.value.line() == (
        f"error[peft-method] peft_type: {method} has not been shown to compute right on packed"
        " weights; fix: use LORA, or one of " + ", ".join(sorted(SUPPORTED - {"LORA"}))
    )
    assert not [m for m in base.modules() if isinstance(m, BaseTunerLayer)]
    assert torch.equal(logits(base), plain)
    get_peft_model(tiny_model("qwen2"), OTHERS[method]())  # a plain model keeps all of PEFT


def test_a_refused_method_may_still_use_layers_that_are_not_packed() -> None:
    model = get_peft_model(quantized(), peft.LoHaConfig(r=2, target_modules=["lm_head"]))
    assert model(input_ids=IDS, labels=IDS).loss.requires_grad


@pytest.mark.parametrize(
    "changes",
    [
        {"alora_invocation_tokens": [17, 42]},
        {"velora_config": VeloraConfig()},
        {"monteclora_config": MontecloraConfig()},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_variants_of_lora_compute_what_they_compute_on_the_float_weights(
    changes: dict[str, object],
) -> None:
    ours, theirs = pair(lambda: config(target_modules=TARGETS, **changes))
    losses = []
    for model in (ours.eval(), theirs.eval()):
        torch.manual_seed(0)
        losses.append(model(input_ids=IDS, labels=IDS).loss)
    torch.testing.assert_close(*losses, **FP32)
    for loss in losses:
        loss.backward()
    others = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, others[name].grad, **FP32, msg=name)


def test_the_hooks_are_installed_once() -> None:
    quantized()
    names = "inject_adapter", "_unload_and_optionally_merge"
    first = [getattr(BaseTuner, name) for name in names]
    prepare = peft.prepare_model_for_kbit_training
    quantized()
    assert [getattr(BaseTuner, name) for name in names] == first
    assert peft.prepare_model_for_kbit_training is prepare


# ---- merging


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "pissa"}],
    ids=str,
)
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_merging_is_exact_and_gives_the_bytes_back(name: str, changes: dict[str, object]) -> None:
    base = quantized(name)
    plain, before = logits(base), packed_bytes(base).values()
    model = get_peft_model(base, config(**changes)).eval()
    shake(model)
    adapted = logits(model)
    assert not torch.allclose(adapted, plain, atol=1e-2)
    with pytest.warns(UserWarning, match="four times the packed bytes"):
        model.merge_adapter()
    torch.testing.assert_close(logits(model), adapted, rtol=1e-3, atol=1e-4)
    assert [m for m in model.modules() if isinstance(m, FloatLinear)]
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-4)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-3, atol=1e-4)
    model.unmerge_adapter()
    after = packed_bytes(model).values()
    assert all(x.equal(y) for x, y in zip(before, after, strict=True))
    assert torch.equal(logits(model), adapted)


def test_merging_beats_rounding_into_four_bits() -> None:
    model = get_peft_model(quantized("qwen3"), config(lora_alpha=1)).eval()
    shake(model, std=0.02)
    layer = next(m for m in model.modules() if isinstance(m, LoraLinear4bit))
    packed = layer.get_base_layer()
    assert isinstance(packed, Linear4bit)
    wanted = packed.dequantize(torch.float32) + layer.get_delta_weight("default")
    rounded = Linear4bit.from_linear(_linear(wanted), QuantConfig()).dequantize(torch.float32)
    layer.merge()
    merged = layer.get_base_layer().weight
    assert torch.equal(merged, wanted)
    assert (rounded - wanted).norm() > (wanted - packed.dequantize(torch.float32)).norm()


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.detach().clone()
    return linear


@pytest.mark.parametrize("dora", [False, True])
def test_several_adapters_merge_together_and_one_after_the_other(dora: bool) -> None:
    model = get_peft_model(quantized(), config(use_dora=dora)).eval()
    model.add_adapter("second", config(r=2, use_dora=dora))
    shake(model)
    model.base_model.set_adapter(["default", "second"])
    shake(model)
    if not dora:
        both = logits(model)
    model.merge_adapter()
    together = logits(model)
    if not dora:  # DoRA's factors multiply when merged and add up when not, in PEFT too
        torch.testing.assert_close(together, both, rtol=1e-3, atol=1e-4)
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    torch.testing.assert_close(logits(model), together, rtol=1e-3, atol=1e-4)
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match="unmerge"):
        twin(IDS, adapter_names=["default", "second"])
    model.unmerge_adapter()
    assert not [m for m in model.modules() if isinstance(m, FloatLinear)]


def test_a_broken_adapter_is_found_and_changes_nothing() -> None:
    model = get_peft_model(quantized(), config()).eval()
    shake(model)
    layer = next(m for m in model.modules() if isinstance(m, LoraLinear4bit))
    before = packed_bytes(model)
    layer.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert not layer.merged
    assert equal_tables(packed_bytes(model), before)


def test_a_bias_of_the_adapter_is_merged_where_the_base_has_one() -> None:
    base = quantized("phi")
    model = get_peft_model(base, config(lora_bias=True)).eval()
    shake(model)
    adapted = logits(model)
    biases = [m.bias.clone() for m in model.modules() if isinstance(m, Linear4bit)]
    model.merge_adapter()
    torch.testing.assert_close(logits(model), adapted, rtol=1e-3, atol=1e-4)
    model.unmerge_adapter()
    after = [m.bias for m in model.modules() if isinstance(m, Linear4bit)]
    assert all(x.equal(y) for x, y in zip(biases, after, strict=True))


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_and_unload_leaves_a_plain_model_that_saves(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    kind = type(tiny_model(name).get_submodule(_some_layer(name)))
    targets = ["q_proj"] if name == "qwen2" else ["c_attn"]
    model = get_peft_model(quantized(name, dtype), config(target_modules=targets)).eval()
    shake(model)
    adapted = logits(model)
    merged = model.merge_and_unload()
    assert type(merged.get_submodule(_some_layer(name))) is kind
    assert {p.dtype for p in merged.parameters()} == {dtype}
    result = logits(merged)
    close = FP32 if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.15}
    torch.testing.assert_close(result, adapted, **close)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert equal_tables(again.state_dict(), merged.state_dict())
    torch.testing.assert_close(logits(again), result, **close)


@pytest.mark.parametrize("quant", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=str)
def test_a_loaded_model_merges_into_a_plain_folder(
    quant: dict[str, bool], model_folder, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(
        model_folder("qwen2"), quantization_config=FourbitConfig(**quant)
    )
    model = get_peft_model(base, config()).eval()
    shake(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert {type(m) for m in again.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert equal_tables(again.state_dict(), merged.state_dict())


def _some_layer(name: str) -> str:
    return "model.layers.0.mlp.up_proj" if name == "qwen2" else "transformer.h.0.attn.c_attn"


def test_unload_leaves_the_packed_model() -> None:
    base = quantized()
    plain = logits(base)
    model = get_peft_model(base, config())
    shake(model)
    bare = model.unload()
    assert sum(isinstance(m, Linear4bit) for m in bare.modules()) == 14
    assert torch.equal(logits(bare), plain)


def test_a_merged_model_can_be_copied_and_cast() -> None:
    model = get_peft_model(quantized(), config()).eval()
    shake(model)
    before = packed_bytes(model)
    model.merge_adapter()
    merged = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), merged)
    twin.to(torch.bfloat16)
    torch.testing.assert_close(logits(twin), merged, rtol=0.1, atol=0.15)
    twin.unmerge_adapter()
    integers = {k: v for k, v in before.items() if not v.is_floating_point()}
    after = {k: v for k, v in packed_bytes(twin).items() if not v.is_floating_point()}
    assert equal_tables(integers, after)


@pytest.mark.parametrize("kind", ["plain", "dora", "pissa", "IA3", "VERA", "ADALORA", "BOFT"])
def test_int8_layers_take_the_same_methods(kind: str, tmp_path: Path) -> None:
    made = {
        "plain": lambda: config(),
        "dora": lambda: config(use_dora=True),
        "pissa": lambda: config(init_lora_weights="pissa"),
    } | METHODS
    base = quantized(quant_type="int8")
    before, plain = list(packed_bytes(base).values()), logits(base)
    model = get_peft_model(base, made[kind]())
    if kind == "pissa":
        torch.testing.assert_close(logits(model.eval()), plain, **FP32)
    shake(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    adapted = logits(model.eval())
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(quantized(quant_type="int8"), str(tmp_path)).eval()
    torch.testing.assert_close(logits(loaded), adapted, **FP32)
    model.merge_adapter()  # in float the inputs are not rounded to 8 bits either
    assert (logits(model) - adapted).norm() < 0.05 * adapted.norm()
    model.unmerge_adapter()
    assert all(x.equal(y) for x, y in zip(before, packed_bytes(model).values(), strict=True))
    merged = model.merge_and_unload()
    assert not [m for m in merged.modules() if isinstance(m, QuantizedLinear)]


# ---- starts from the weight


@pytest.mark.parametrize("start", PRINCIPAL)
@pytest.mark.parametrize("rslora", [False, True])
def test_the_principal_part_is_taken_out_and_put_back(start: str, rslora: bool) -> None:
    base = quantized()
    plain, before = logits(base), list(packed_bytes(base).values())
    model = get_peft_model(base, config(init_lora_weights=start, use_rslora=rslora)).eval()
    torch.testing.assert_close(logits(model), plain, **FP32)
    assert all(x.equal(y) for x, y in zip(before, packed_bytes(model).values(), strict=True))
    layer = next(m for m in model.modules() if isinstance(m, LoraLinear4bit))
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert bool(A.any())
    assert bool(B.any())
    assert layer.get_delta_weight("default").abs().max() < 1e-5
    assert {n.rsplit(".", 3)[1] for n, p in model.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-4)


def test_pissa_takes_the_best_part_and_olora_the_first_columns() -> None:
    left, values, right = torch.linalg.svd(torch.randn(24, 40), full_matrices=False)
    values = values * 0.7 ** torch.arange(24)
    weight = left * values @ right
    best = left[:, :3] * values[:3] @ right[:3]
    A, B = principal_part(weight, r=3, scaling=2.0, name="pissa")
    torch.testing.assert_close(2.0 * B @ A, best)
    A, B = principal_part(weight, r=3, scaling=2.0, name="pissa_niter_16")
    torch.testing.assert_close(2.0 * B @ A, best, rtol=0, atol=0.05)
    again = principal_part(weight, r=3, scaling=2.0, name="pissa_niter_16")
    assert A.equal(again[0])
    assert B.equal(again[1])
    A, B = principal_part(weight, r=24, scaling=2.0, name="olora")
    torch.testing.assert_close(B @ A, weight)
    torch.testing.assert_close(B.t() @ B, torch.eye(24))
    with pytest.raises(InputError, match="r <= 24"):
        principal_part(weight, r=25, scaling=1.0, name="pissa")


def test_orthogonal_products_are_zero_and_need_an_even_rank() -> None:
    A, B = orthogonal_pair(40, 24, r=6)
    assert A.shape == (6, 40)
    assert B.shape == (24, 6)
    assert (B @ A).abs().max() < 1e-6
    assert A.norm() > 1
    base = quantized()
    plain = logits(base)
    model = get_peft_model(base, config(init_lora_weights="orthogonal")).eval()
    torch.testing.assert_close(logits(model), plain, **FP32)
    with pytest.raises(InputError, match="'orthogonal' needs an even rank, r is 3; fix: use 4"):
        get_peft_model(quantized(), config(r=3, init_lora_weights="orthogonal"))


@pytest.mark.parametrize("start", PRINCIPAL)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_training_from_a_start_equals_peft_on_an_exact_residual(start: str, dropout: float) -> None:
    base = quantized()
    twin = twin_of(base)
    ours = get_peft_model(base, config(init_lora_weights=start, lora_dropout=dropout)).eval()
    theirs = get_peft_model(twin, config(init_lora_weights=start, lora_dropout=dropout)).eval()
    # a randomized search finds another basis: both get ours, the residual to go with it
    for name, layer in ours.named_modules():
        if isinstance(layer, LoraLinear4bit):
            other = theirs.get_submodule(name)
            A, B = layer.lora_start_A["default"], layer.lora_start_B["default"]
            packed = layer.get_base_layer()
            assert isinstance(packed, Linear4bit)
            residual = packed.dequantize(torch.float32) - layer.scaling["default"] * B @ A
            other.base_layer.weight.data = residual
            other.lora_A["default"].weight.data = A.clone()
            other.lora_B["default"].weight.data = B.clone()
    shake(ours)
    shake(theirs)
    losses = [m(input_ids=IDS, labels=IDS).loss for m in (ours, theirs)]
    torch.testing.assert_close(*losses, **FP32)
    for loss in losses:
        loss.backward()
    others = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, others[name].grad, **FP32, msg=name)


@pytest.mark.parametrize("start", PRINCIPAL)
@pytest.mark.parametrize("low_memory", [False, True])
def test_reloading_reproduces_the_model_exactly(
    start: str, low_memory: bool, tmp_path: Path
) -> None:
    model = get_peft_model(quantized(), config(init_lora_weights=start)).eval()
    model.save_pretrained(tmp_path / "initial")
    shake(model)
    adapted = logits(model)
    model.save_pretrained(tmp_path / "trained")
    loaded = PeftModel.from_pretrained(
        quantized(), tmp_path / "trained", low_cpu_mem_usage=low_memory
    )
    assert torch.equal(logits(loaded.eval()), adapted)

    # the conversion users know: an ordinary LoRA of twice the rank, the same model
    model.save_pretrained(
        tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    converted = PeftModel.from_pretrained(quantized(), tmp_path / "lora").eval()
    assert converted.peft_config["default"].r == 8
    assert converted.peft_config["default"].init_lora_weights is True
    torch.testing.assert_close(logits(converted), adapted, **FP32)
    assert "lora_start" not in " ".join(converted.state_dict())


def test_adapters_with_and_without_a_start_share_a_base() -> None:
    base = quantized()
    model = get_peft_model(base, config(init_lora_weights="pissa")).eval()
    model.add_adapter("plain", config(r=2))
    shake(model)
    first = logits(model)
    model.set_adapter("plain")
    shake(model)
    second = logits(model)
    with torch.no_grad():
        mixed = model(IDS, adapter_names=["default", "plain"]).logits
    torch.testing.assert_close(mixed, torch.stack([first[0], second[1]]), **FP32)
    with pytest.raises(InputError) as caught:
        model.add_weighted_adapter(["default", "plain"], [0.5, 0.5], "sum", "cat")
    assert caught.value.line() == (
        "error[start-not-mixable] add_weighted_adapter: adapter 'default' starts from the weights"
        " (PiSSA, OLoRA); fix: save it with path_initial_model_for_weight_conversion, which makes"
        " it an ordinary LoRA, and mix that"
    )
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    assert not [n for n in model.state_dict() if "default" in n]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"init_lora_weights": "eva"},
            "error[init-needs-weights] lora.init_lora_weights: 'eva' measures activations on data"
            " first; fix: make the adapter on the 16-bit model, then call fourbit.quantize_model"
            " on it",
        ),
        (
            {"init_lora_weights": "pissa", "use_dora": True},
            "error[init-needs-weights] use_dora: DoRA and a start from the weights exclude each"
            " other; fix: leave it out",
        ),
        (
            {"kasa_config": KasaConfig()},
            "error[init-needs-weights] kasa_config: KaSA cuts directions out of the stored weight,"
            " which 4 bits cannot hold; fix: leave it out",
        ),
    ],
)
def test_what_cannot_start_here_is_one_line(changes: dict[str, object], line: str) -> None:
    with pytest.raises(InputError) as caught:
        get_peft_model(quantized(), config(**changes))
    assert caught.value.line() == line
    model = get_peft_model(quantized(), config())
    with pytest.raises((InputError, ValueError)):  # a second adapter takes another road inside PEFT
        model.add_adapter("second", config(**changes))


@pytest.mark.parametrize("start", ["loftq", "corda", "lora_ga", "mica"])
def test_starts_that_need_more_are_refused(start: str) -> None:
    layer = Linear4bit.from_linear(nn.Linear(16, 16), QuantConfig())
    made = config()
    made.init_lora_weights = start  # type: ignore[assignment]
    with pytest.raises(InputError, match=rf"\[init-needs-weights\].*'{start}'"):
        LoraLinear4bit(layer, "default", made, r=2, lora_alpha=4)


def test_settings_refuse_a_start_that_would_change_a_plain_base() -> None:
    settings = LoraSettings(r=4, init_lora_weights="pissa")
    with pytest.raises(
        InputError, match=r"error\[init-changes-base\].*'pissa' changes the weights"
    ):
        add_adapter(tiny_model("qwen2"), settings)
    assert add_adapter(quantized(), settings)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_pissa_made_on_float_weights_then_quantized_is_closer_than_quantizing(start: str) -> None:
    weights = {n: p.clone() for n, p in tiny_model("qwen2").named_parameters()}
    plain = quantized()
    model = get_peft_model(tiny_model("qwen2"), config(r=8, init_lora_weights=start)).eval()
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    names = quantize_model(model, QuantConfig())
    assert len(names) == 14
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    errors = []
    for name, layer in plain.named_modules():
        if isinstance(layer, Linear4bit):
            weight = weights[f"{name}.weight"]
            adapted = model.base_model.model.get_submodule(name)
            assert type(adapted) is LoraLinear4bit
            base = adapted.get_base_layer()
            assert isinstance(base, Linear4bit)
            mine = base.dequantize(torch.float32) + adapted.get_delta_weight("default")
            errors.append(
                [(layer.dequantize(torch.float32) - weight).norm(), (mine - weight).norm()]
            )
    quantizing, starting = torch.tensor(errors).square().sum(0).sqrt()
    print(f"{start}: |W - Q(W)| {quantizing:.3f}, |W - Q(R) - sBA| {starting:.3f}")
    if start == "pissa":
        assert starting < 0.95 * quantizing
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("start", ["pissa", True])
def test_an_adapter_of_a_quantized_residual_reloads_the_way_it_was_made(
    start: object, tmp_path: Path
) -> None:
    def make(path: Path | None) -> PeftModel:
        base = tiny_model("qwen2")
        model = (
            get_peft_model(base, config(init_lora_weights=start))
            if path is None
            else PeftModel.from_pretrained(base, path)
        )
        quantize_model(model, QuantConfig())
        return model.eval()

    model = make(None)
    shake(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(make(tmp_path)), logits(model))


def test_a_start_that_is_not_in_the_file_is_refused(tmp_path: Path) -> None:
    get_peft_model(tiny_model("qwen2"), config(init_lora_weights="pissa")).save_pretrained(
        str(tmp_path)
    )
    with pytest.raises(InputError) as caught:
        PeftModel.from_pretrained(quantized(), str(tmp_path))
    assert caught.value.line() == (
        f"error[start-not-saved] {tmp_path}: the adapter started from 16-bit weights, and the file"
        " does not say from where; fix: load it on the 16-bit base and call"
        " fourbit.quantize_model, or convert it to an ordinary LoRA"
        " (path_initial_model_for_weight_conversion)"
    )


def test_a_residual_that_reloading_would_not_find_is_refused() -> None:
    model = get_peft_model(tiny_model("qwen2"), config(init_lora_weights="pissa_niter_2"))
    with pytest.raises(InputError) as caught:
        quantize_model(model, QuantConfig())
    assert caught.value.line() == (
        "error[start-not-reproducible] init_lora_weights: 'pissa_niter_2' changed the base in a way"
        " that reloading does not repeat; fix: use pissa or olora, or quantize first and start from"
        " the packed weights"
    )


def test_requantizing_a_residual_of_packed_weights_would_only_add_error() -> None:
    """Why a start on packed weights leaves the bytes alone."""
    weight = torch.randn(96, 96)
    packed = Linear4bit.from_linear(_linear(weight), QuantConfig())
    held = packed.dequantize(torch.float32)
    A, B = principal_part(held, r=8, scaling=1.0, name="pissa")
    again = Linear4bit.from_linear(_linear(held - B @ A), QuantConfig()).dequantize(torch.float32)
    assert (weight - again - B @ A).norm() > 1.2 * (weight - held).norm()


def test_other_adapters_keep_their_base_from_being_quantized() -> None:
    model = get_peft_model(tiny_model("qwen2"), METHODS["IA3"]())
    with pytest.raises(InputError, match=r"error\[adapter-before-quantization\] model\.layers\.0"):
        quantize_model(model, QuantConfig())
    model = get_peft_model(tiny_model("qwen2"), config())
    model.merge_adapter()
    with pytest.raises(InputError, match="or unmerge it"):
        quantize_model(model, QuantConfig())


def test_conv1d_adapters_survive_quantization() -> None:
    model = get_peft_model(tiny_model("gpt2"), config(fan_in_fan_out=True)).eval()
    assert any(isinstance(m, Conv1D) for m in model.modules())
    shake(model)
    quantize_model(model, QuantConfig())
    fresh = get_peft_model(quantized("gpt2"), config()).eval()
    state = {k: v for k, v in model.state_dict().items() if "lora_" in k}
    assert not fresh.load_state_dict(state, strict=False).unexpected_keys
    assert torch.equal(logits(model), logits(fresh))


# ---- adapters as PEFT's users handle them


def test_weighted_sums_and_deletion() -> None:
    model = get_peft_model(quantized(), config()).eval()
    model.add_adapter("second", config(r=4))
    model.base_model.set_adapter(["default", "second"])
    shake(model)
    layers = [m for m in model.modules() if isinstance(m, LoraLinear4bit)]
    for kind in ("cat", "linear", "svd"):
        model.add_weighted_adapter(["default", "second"], [0.7, 0.2], f"sum_{kind}", kind)
        if kind != "linear":  # which mixes factors, not products
            for layer in layers:
                wanted = 0.7 * layer.get_delta_weight("default")
                wanted = wanted + 0.2 * layer.get_delta_weight("second")
                got = layer.get_delta_weight(f"sum_{kind}")
                close = FP32 if kind == "cat" else {"rtol": 1, "atol": 0.2}
                torch.testing.assert_close(got, wanted, **close)
    model.delete_adapter("second")
    assert "second" not in layers[0].lora_A
    model.set_adapter("sum_cat")
    assert logits(model).isfinite().all()


def test_hotswap_replaces_an_adapter_in_place(tmp_path: Path) -> None:
    from peft.utils.hotswap import hotswap_adapter

    answers = []
    for seed in range(2):
        model = get_peft_model(quantized(), config()).eval()
        shake(model, std=0.1 * (seed + 1))
        answers.append(logits(model))
        model.save_pretrained(tmp_path / str(seed))
    model = PeftModel.from_pretrained(quantized(), tmp_path / "0").eval()
    assert torch.equal(logits(model), answers[0])
    hotswap_adapter(model, str(tmp_path / "1"), adapter_name="default")
    torch.testing.assert_close(logits(model), answers[1], **FP32)


def is_checkpointing(model: nn.Module) -> bool:
    return any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


@pytest.mark.parametrize("checkpointing", [True, False])
def test_prepare_model_for_kbit_training(checkpointing: bool) -> None:
    base = quantized("qwen2", torch.bfloat16)
    before = {k: v for k, v in packed_bytes(base).items() if not v.is_floating_point()}
    # imported by name before any model was quantized, as scripts do
    model = prepare_model_for_kbit_training(base, use_gradient_checkpointing=checkpointing)
    assert model is base
    assert is_checkpointing(model) is checkpointing
    assert not [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}
    after = {k: v for k, v in packed_bytes(base).items() if not v.is_floating_point()}
    assert equal_tables(before, after)
    trained = get_peft_model(model, config()).train()
    assert {p.dtype for p in trained.parameters() if p.requires_grad} == {torch.float32}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none of the inputs requires grad
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        trained(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in trained.parameters() if p.requires_grad)
    plain = peft.prepare_model_for_kbit_training(tiny_model("qwen2"))
    assert not is_checkpointing(plain)  # PEFT's own rule for models that are not ours


PROMPTS: dict[str, PeftConfig] = {
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p_tuning": PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16
    ),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_train_save_and_reload(kind: str, tmp_path: Path) -> None:
    base = quantized()
    twin = twin_of(base)
    before = packed_bytes(base)
    model = get_peft_model(base, copy.deepcopy(PROMPTS[kind]))
    reference = get_peft_model(twin, copy.deepcopy(PROMPTS[kind]))
    state = {k: v for k, v in model.state_dict().items() if "prompt_encoder" in k}
    assert state
    assert not reference.load_state_dict(state, strict=False).unexpected_keys
    losses = [m(input_ids=IDS, labels=IDS).loss for m in (model, reference)]
    torch.testing.assert_close(*losses, **FP32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    values = []
    for _ in range(6):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(float(loss.detach()))
    assert values[-1] < values[0]
    assert equal_tables(packed_bytes(model.base_model), before)
    trainable, total = model.get_nb_trainable_parameters()
    assert 0 < trainable < total / 10
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("method", ["ADALORA", "IA3", "VERA", "pissa", "dora", "prompt"])
def test_the_three_usual_checks_and_the_receipt_in_an_own_loop(
    method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {
        "pissa": lambda: config(init_lora_weights="pissa"),
        "dora": lambda: config(use_dora=True),
        "prompt": lambda: copy.deepcopy(PROMPTS["prompt"]),
    } | METHODS
    model = get_peft_model(quantized(), made[method]()).train()
    # 1: few parameters are trained
    model.print_trainable_parameters()
    share = float(capsys.readouterr().out.rsplit("trainable%: ", 1)[1])
    assert 0 < share < 20
    # 2: the optimizer holds these and nothing else
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    # 3: the base is what it was
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    with watch(model, optimizer) as receipt:
        for _ in range(3):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    after = dict(model.named_parameters())
    assert base
    assert all(torch.allclose(after[n], p) for n, p in base.items())
    assert receipt.ok
    assert {check.name for check in receipt.checks} >= {"base_unchanged", "adapters_moved"}


def test_a_merge_inside_the_loop_shows_in_the_receipt() -> None:
    model = get_peft_model(quantized(), config()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)

    def loop(*, unmerge: bool) -> None:
        with watch(model, optimizer):
            for _ in range(2):
                model(input_ids=IDS, labels=IDS).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            model.merge_adapter()
            if unmerge:
                model.unmerge_adapter()

    loop(unmerge=True)
    with pytest.raises(VerificationFailed, match="base_unchanged"):
        loop(unmerge=False)


def test_a_packed_parameter_is_no_target() -> None:
    wanted = config(target_modules=["o_proj"], target_parameters=["q_proj.weight"])
    with pytest.raises(InputError, match=r"target_parameters: the parameter of this layer is pack"):
        get_peft_model(quantized(), wanted)


def test_switching_adapters_in_every_order() -> None:
    model = get_peft_model(quantized(), config()).eval()
    kinds = {"default": {}, "dora": {"use_dora": True}, "start": {"init_lora_weights": "pissa"}}
    for name, changes in list(kinds.items())[1:]:
        model.add_adapter(name, config(**changes))
    answers = {}
    for name in kinds:
        model.set_adapter(name)
        shake(model)
        answers[name] = logits(model)
    for order in itertools.permutations(kinds):
        for name in order:
            model.set_adapter(name)
            assert torch.equal(logits(model), answers[name])
