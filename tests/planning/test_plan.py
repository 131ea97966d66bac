"""The plan against the model that is then really loaded, and a real forward and backward pass."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

import fourbit
from fourbit import device as devices
from fourbit.errors import InputError
from fourbit.integrations.fused import use_fast_paths
from fourbit.integrations.peft import add_adapter
from fourbit.integrations.prompts import add_prompt
from fourbit.integrations.transformers import quantize_model
from fourbit.lora import LoraSettings
from fourbit.methods import quantized_base, trains_prompt
from fourbit.optim import OptimConfig, build_optimizer
from fourbit.planning import ALL_LAYERS, Room, TrainingShape, plan_training, skeleton
from fourbit.planning import plan as planner
from fourbit.planning.skeleton import make_skeleton
from fourbit.planning.step import ImaginedSteps, observed
from fourbit.prompts import PromptSettings
from fourbit.quantize import QuantConfig
from models import tiny_config, tiny_model

CPU = torch.device("cpu")
SHAPE = TrainingShape(
    method="qlora",
    quant=QuantConfig(),
    lora=LoraSettings(r=4),
    dtype=torch.float32,
    batch_size=2,
    length=48,
    recompute=0,
)
WIDE = replace(SHAPE, batch_size=4, length=160, packing=False)
CLOSE = {"rel": 0.02, "abs": 60_000}
"""Masks and tables of positions, which a fake mode makes in other ways, are that large here."""
PROMPTS = {
    "prompt_tuning": ("prompt_tuning", PromptSettings(num_virtual_tokens=7)),
    "mlp": ("p_tuning", PromptSettings(num_virtual_tokens=7, encoder_hidden_size=20)),
    "lstm": (
        "p_tuning",
        PromptSettings(
            num_virtual_tokens=7, encoder_reparameterization_type="lstm", encoder_hidden_size=9
        ),
    ),
}
NAMES = ("llama", "qwen2", "gemma2", "gpt2", "phi3", "gpt_neox", "falcon", "mamba")


def lora_of(name):
    wanted = ["in_proj"] if name == "mamba" else "all-linear"
    return LoraSettings(r=4, target_modules=wanted)


def trained_model(name, shape=SHAPE):
    """What the run itself will build."""
    full = shape.method == "full"
    model = tiny_model(name, dtype=torch.float32 if full else shape.dtype)
    use_fast_paths(model)
    if full:
        return model.requires_grad_(True).train()
    model.requires_grad_(False)
    if quantized_base(shape.method):
        quantize_model(model, shape.quant)
    if trains_prompt(shape.method):
        return add_prompt(model, shape.prompt, method=shape.method).train()
    return add_adapter(model, shape.lora).train()


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_called_exact_is_exact(name, method):
    check_exact(name, replace(SHAPE, method=method, lora=lora_of(name)))


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
def test_prompts_are_counted_exactly(name, kind):
    method, prompt = PROMPTS[kind]
    check_exact(name, replace(SHAPE, method=method, prompt=prompt))


@pytest.mark.parametrize("optim", [{"optim_bits": 8}, {"paged": "always"}, {"paged": "off"}])
def test_optimizer_state_is_counted_exactly(optim):
    check_exact("llama", replace(SHAPE, method="full", optim=OptimConfig(**optim)))


def test_a_plan_that_does_not_fit_pages_at_last():
    shape = replace(SHAPE, method="full", recompute=None, batch_size=64)
    large = tiny_config("llama")
    large.hidden_size, large.intermediate_size, large.vocab_size = 768, 3072, 20_000
    roomy = plan_training(large, shape, Room.here(CPU))
    assert (roomy.checkpointing, roomy.paged) == (False, False)
    assert roomy.parts["optimizer"] > 3 << 24
    for available, wanted in ((roomy.peak_bytes - 1, (True, False)), (1, (True, True))):
        room = replace(Room.here(CPU), available=available)
        plan = plan_training(large, shape, room)
        assert (plan.checkpointing, plan.paged) == wanted
    assert plan.parts["optimizer"] == 3 << 24
    never = replace(shape, optim=OptimConfig(paged="off"))
    assert not plan_training(large, never, room).paged


def check_exact(name, shape):
    plan = plan_training(tiny_config(name), shape, Room.here(CPU))
    model = trained_model(name, shape)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(iter(trainable), shape.optim)
    for parameter in trainable:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    frozen = [p for p in model.parameters() if not p.requires_grad]
    weights, adapters = size(frozen), size(trainable)
    if shape.method == "full":
        weights, adapters = weights + adapters, 0
    assert plan.parts["weights"] == weights
    assert plan.parts["adapters"] == adapters
    gradients = max(parts["gradients"] for parts in plan.phases.values())
    assert gradients <= size(p.grad for p in trainable)
    assert plan.phases["later step"]["optimizer"] == optimizer.stats.resident_bytes
    assert plan.phases["first step"]["optimizer"] == 0
    assert plan.trainable == sum(p.numel() for p in trainable)
    assert plan.peak_bytes == sum(plan.parts.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_those_of_the_loaded_model(dtype, model_folder):
    folder = str(model_folder("llama"))
    model, _ = fourbit.load(folder, quant=QuantConfig(), dtype=dtype)
    plan = plan_training(tiny_config("llama"), replace(SHAPE, dtype=dtype), Room.here(CPU))
    assert plan.parts["weights"] == size(model.parameters())
    assert plan.parameters - plan.trainable == model.num_parameters()


def test_modules_to_save_are_planned_in_float32():
    shape = replace(SHAPE, lora=LoraSettings(r=4, modules_to_save=["lm_head"]))
    shape = replace(shape, dtype=torch.bfloat16)
    plan = plan_training(tiny_config("qwen2"), shape, Room.here(CPU))
    model = trained_model("qwen2", shape)
    assert plan.parts["adapters"] == size(p for p in model.parameters() if p.requires_grad)
    assert plan.parts["weights"] == size(p for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_imagined_steps_take_what_real_ones_take(name, method):
    shape = replace(WIDE, method=method, lora=lora_of(name))
    imagined = ImaginedSteps(make_skeleton(tiny_config(name), shape), shape).moments(0)
    real = observed(trained_model(name, shape), shape, 0)
    assert imagined.keys() == real.keys()
    # the masks of a sliding window are made in more steps than a plan sees
    window = {"rel": 0.02, "abs": 320_000} if name in ("phi3", "gemma2") else CLOSE
    for phase, moment in real.items():
        assert imagined[phase].total == pytest.approx(moment.total, **window), phase


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("recompute", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_so_they_do_in_every_format_and_with_recomputation(quant_type, recompute, dtype):
    quant = QuantConfig(quant_type=quant_type)
    shape = replace(WIDE, quant=quant, dtype=dtype)
    shape = replace(shape, lora=LoraSettings(r=4, lora_dropout=0.1))
    imagined = ImaginedSteps(make_skeleton(tiny_config("llama"), shape), shape).moments(recompute)
    real = observed(trained_model("llama", shape), shape, recompute)
    for phase, moment in real.items():
        assert imagined[phase].total == pytest.approx(moment.total, **CLOSE), phase


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mamba"])
def test_so_they_do_behind_a_prompt(name, kind):
    method, prompt = PROMPTS[kind]
    shape = replace(WIDE, method=method, prompt=prompt)
    imagined = ImaginedSteps(make_skeleton(tiny_config(name), shape), shape).moments(0)
    real = observed(trained_model(name, shape), shape, 0)
    # An LSTM's library keeps a workspace that is large only beside a model as small as this.
    spare = 250_000 if kind == "lstm" else 100_000 if name == "gemma2" else 0
    for phase, moment in real.items():
        assert imagined[phase].total == pytest.approx(moment.total, rel=0.02, abs=spare + 60_000), (
            phase
        )


@pytest.mark.parametrize("recompute", [0, 3, 5, 7, 8])
@pytest.mark.parametrize("method", ["qlora", "full"])
def test_few_layers_tell_of_many(method, recompute, monkeypatch):
    shape = replace(SHAPE, method=method)
    config = tiny_config("llama", num_hidden_layers=8)
    few = ImaginedSteps(make_skeleton(config, shape), shape)
    assert few.alike
    monkeypatch.setattr(skeleton, "alike", lambda model: False)
    all_of_them = ImaginedSteps(make_skeleton(config, shape), shape)
    assert not all_of_them.alike
    guess, exact = (steps.moments(recompute) for steps in (few, all_of_them))
    for phase in ("first step", "later step", "evaluation"):
        highest, wanted = (
            max(m.total for name, m in moments.items() if name.startswith(phase))
            for moments in (guess, exact)
        )
        assert highest == pytest.approx(wanted, rel=0.03), phase


def test_layers_that_differ_are_all_run():
    config = tiny_config("gemma2", num_hidden_layers=6)
    assert len(set(config.layer_types)) == 2
    assert not ImaginedSteps(make_skeleton(config, SHAPE), SHAPE).alike


def test_virtual_tokens_lengthen_every_sequence():
    shape = replace(SHAPE, method="prompt_tuning", prompt=PromptSettings(num_virtual_tokens=48))
    assert shape.positions == 2 * SHAPE.positions
    same = replace(shape, prompt=PromptSettings(num_virtual_tokens=1), length=95)
    one, other = (
        ImaginedSteps(make_skeleton(tiny_config("llama"), s), s).moments(0)["later step, 0"]
        for s in (shape, same)
    )
    assert one.total == pytest.approx(other.total, rel=0.03)


def test_activations_grow_with_the_batch_and_the_length():
    sizes = []
    for batch_size, length in ((1, 320), (2, 320), (1, 640)):
        shape = replace(WIDE, batch_size=batch_size, length=length)
        steps = ImaginedSteps(make_skeleton(tiny_config("llama"), shape), shape)
        sizes.append(steps.moments(0)["later step, 0"].parts["activations"])
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=0.05)
    assert sizes[2] == pytest.approx(2 * sizes[0], rel=0.05)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "phi3"])
def test_recomputation_keeps_less_with_every_layer(name):
    config = tiny_config(name, **({"n_layer": 6} if name == "gpt2" else {"num_hidden_layers": 6}))
    steps = ImaginedSteps(make_skeleton(config, SHAPE), SHAPE)
    kept = [steps.moments(n)["later step, 1"].parts["activations"] for n in range(7)]
    assert kept == sorted(kept, reverse=True)
    assert kept[6] < 0.3 * kept[0]
    plan = plan_training(config, replace(SHAPE, recompute=ALL_LAYERS), Room.here(CPU))
    assert (plan.recomputed_layers, plan.layers) == (6, 6)
    assert "all layers" in plan.lines()[-1]


def test_accumulation_keeps_gradients_through_the_next_forward():
    shape = replace(SHAPE, method="full")
    alone, more = (
        ImaginedSteps(make_skeleton(tiny_config("llama"), s), s).moments(0)["later step, 0"]
        for s in (shape, replace(shape, grad_accum=2))
    )
    assert alone.parts["gradients"] == 0
    model = make_skeleton(tiny_config("llama"), shape).model
    assert more.parts["gradients"] == size(model.parameters())


def test_auto_recomputes_when_memory_is_short(monkeypatch):
    auto = replace(SHAPE, recompute=None, batch_size=16)
    whole = plan_training(tiny_config("llama"), auto, Room.here(CPU))
    assert whole.fits
    assert not whole.checkpointing
    # Free memory below the plan without its baseline: too little by a part of the activations.
    need = whole.peak_bytes - whole.parts["baseline"] - whole.parts["activations"] // 4
    monkeypatch.setattr(planner, "_RESERVE", 1.0)
    monkeypatch.setattr(devices, "host_memory", lambda: (need, need))
    monkeypatch.setattr(devices, "resident_memory", lambda: whole.parts["baseline"])
    short = plan_training(tiny_config("llama"), auto, Room.here(CPU))
    assert short.checkpointing
    assert short.fits
    forced = plan_training(tiny_config("llama"), replace(auto, recompute=0), Room.here(CPU))
    assert not forced.checkpointing
    assert forced.fits is False
    assert "does NOT fit" in forced.lines()[-1]
    monkeypatch.setattr(devices, "host_memory", lambda: (10, 10))
    hopeless = plan_training(tiny_config("llama"), auto, Room.here(CPU))
    assert hopeless.checkpointing
    assert hopeless.fits is False


def test_unknown_memory_is_said_to_be_unknown(monkeypatch):
    monkeypatch.setattr(devices, "host_memory", lambda: (0, 0))
    plan = plan_training(tiny_config("llama"), SHAPE, Room.here(CPU))
    assert plan.fits is None
    assert "free memory unknown" in plan.lines()[-1]
    assert plan.as_dict()["fits"] is None


def test_seven_billion_parameters_are_planned_in_seconds_and_no_memory():
    before, began = devices.resident_memory(), time.perf_counter()
    shape = replace(SHAPE, dtype=torch.bfloat16, batch_size=1, length=1024, lora=LoraSettings())
    plan = plan_training(LlamaConfig(), shape, Room.here(CPU))
    # Generous for a machine that is busy with other work.
    assert time.perf_counter() - began < 30
    assert devices.resident_memory() - before < 400e6
    assert plan.parameters - plan.trainable == 6_738_415_616
    linear, plain = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 2 * 32000 * 4096 + 65 * 4096
    assert plan.parts["weights"] == pytest.approx(
        linear * QuantConfig().bits_per_weight / 8 + 2 * plain, rel=1e-4
    )
    assert plan.trainable == 32 * 16 * (4 * 8192 + 3 * 15104)


def test_layers_peft_refuses_are_one_line():
    with pytest.raises(InputError) as caught:
        plan_training(tiny_config("mamba"), replace(SHAPE, lora=LoraSettings(r=2)), Room.here(CPU))
    assert caught.value.where == "lora.target_modules"
    assert "out_proj" in caught.value.line()


def test_planning_twice_gives_the_same_and_leaves_no_trace():
    threads, seed = torch.get_num_threads(), torch.initial_seed()
    config = tiny_config("llama")
    first, second = (plan_training(config, SHAPE, Room.here(CPU)) for _ in range(2))
    assert {**first.parts, "baseline": 0} == {**second.parts, "baseline": 0}
    assert (torch.get_num_threads(), torch.initial_seed()) == (threads, seed)
    assert torch.zeros(1).device.type == "cpu"
