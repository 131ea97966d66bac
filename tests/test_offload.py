"""Activations that wait elsewhere: the same gradients, in less memory."""

from __future__ import annotations

import errno
import gc
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from commands import train_quietly
from fourbit.errors import EnvironmentFault
from fourbit.integrations.peft import add_adapter
from fourbit.integrations.transformers import quantize_model
from fourbit.lora import LoraSettings
from fourbit.objective import Objective
from fourbit.offload import Offload
from fourbit.planning import Room, TrainingShape, plan_training, recommend
from fourbit.planning.skeleton import make_skeleton
from fourbit.planning.step import ImaginedSteps, observed
from fourbit.quantize import QuantConfig
from models import tiny_config, tiny_model, write_model

CPU = torch.device("cpu")
LAYERS, WIDTH = 6, 32


class Stack(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(lambda y, layer=layer: layer(y).tanh(), x, use_reentrant=False)
        return x


def step(model: nn.Module, x: Tensor, offload: Offload | None) -> list[Tensor]:
    model.zero_grad()
    if offload is None:
        y = model(x)
    else:
        with offload.saving():
            y = model(x)
    y.float().square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_have_the_same_bits_and_places_are_used_again(dtype, tmp_path):
    model, offload = Stack(dtype), Offload(WIDTH, CPU, folder=tmp_path)
    for seed in range(3):
        x = torch.randn(2, 5 + seed % 2, WIDTH, generator=torch.Generator().manual_seed(seed))
        x = x.to(dtype).requires_grad_()
        for ours, theirs in zip(step(model, 1 * x, offload), step(model, 1 * x, None), strict=True):
            assert torch.equal(ours, theirs)
    size = torch.empty(0, dtype=dtype).element_size() * 2 * WIDTH
    assert offload.moved_bytes == LAYERS * size * (5 + 6 + 5)
    gc.collect()
    # rows of 5 found the places of the first step
    assert offload._home._end == LAYERS * size * (5 + 6)
    assert not list(tmp_path.iterdir()), "the file has no name"


def test_what_is_strided_comes_back_and_other_tensors_stay(tmp_path):
    offload = Offload(WIDTH, CPU, folder=tmp_path)
    x = torch.randn(3, WIDTH, 2, requires_grad=True)
    other = torch.randn(3, 7, requires_grad=True)
    weight = nn.Parameter(torch.randn(1, 1, WIDTH))
    with offload.saving():
        y = (x.transpose(1, 2).sin() * weight).sum() + other.exp().sum()
    moved = offload.moved_bytes
    assert 0 < moved <= 2 * x.nbytes, "a parameter and what has another width stay"
    y.backward()
    inside = x.detach().transpose(1, 2)
    assert torch.equal(x.grad, (inside.cos() * weight.detach()).transpose(1, 2))


def test_a_graph_may_be_gone_through_twice(tmp_path):
    model, offload = Stack(torch.float32), Offload(WIDTH, CPU, folder=tmp_path)
    with offload.saving():
        loss = model(torch.randn(1, 4, WIDTH, requires_grad=True)).sum()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    again = torch.autograd.grad(loss, list(model.parameters()))
    assert all(map(torch.equal, first, again))


def test_a_full_disk_is_told_in_one_line(tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    offload = Offload(WIDTH, CPU, folder=tmp_path)
    monkeypatch.setattr(os, "pwrite", full)
    with offload.saving(), pytest.raises(EnvironmentFault, match="space"):
        Stack(torch.float32)(torch.randn(1, 4, WIDTH, requires_grad=True))


SHAPE = TrainingShape(
    method="qlora", quant=QuantConfig(), lora=LoraSettings(r=4), dtype=torch.float32,
    batch_size=4, length=160, packing=False, recompute=1 << 16, offload=True,
)  # fmt: skip


def test_a_plan_counts_what_stays():
    config = tiny_config("llama", num_hidden_layers=8)
    imagined = ImaginedSteps(make_skeleton(config, SHAPE), SHAPE).moments(8)
    model = tiny_model("llama", num_hidden_layers=8).requires_grad_(False)
    quantize_model(model, SHAPE.quant)
    real = observed(add_adapter(model, SHAPE.lora).train(), SHAPE, 8)
    for phase, moment in real.items():
        assert imagined[phase].total == pytest.approx(moment.total, rel=0.02, abs=60_000), phase
    stays = replace(SHAPE, offload=False)
    beside = ImaginedSteps(make_skeleton(config, stays), stays).moments(8)
    between = SHAPE.batch_size * SHAPE.length * config.hidden_size * 4
    most = max(m.total for m in beside.values()) - max(m.total for m in imagined.values())
    assert most >= 5 * between


def test_a_budget_for_a_gpu_sends_activations_away_before_it_shortens_sequences():
    config = tiny_config("llama", num_hidden_layers=8)
    shape = replace(SHAPE, recompute=None, offload=False, kernels="gpu", batch_size=1, length=4096)
    all_layers = plan_training(config, replace(shape, recompute=1 << 16), Room())
    found = recommend(config, shape, Room(all_layers.peak_bytes - 1))
    assert found.recommended["gradient_checkpointing"] == "offload"
    assert "data.max_length" not in found.recommended
    on_cpu = recommend(config, replace(shape, kernels="cpu"), Room(10_000_000))
    assert on_cpu.recommended["gradient_checkpointing"] == "all"


def test_a_loss_moves_what_lies_between_layers(tmp_path):
    model = tiny_model("llama").requires_grad_(False)
    quantize_model(model, QuantConfig())
    objective = Objective(add_adapter(model, LoraSettings(r=4)).train())
    ids = torch.randint(0, 256, (2, 9))
    inputs = {"input_ids": ids, "position_ids": torch.arange(9).repeat(2, 1)}

    def gradients() -> list[Tensor]:
        objective.model.zero_grad()
        torch.manual_seed(3)
        objective.loss_of(inputs, ids).backward()
        return [p.grad.clone() for p in objective.model.parameters() if p.grad is not None]

    before = gradients()
    objective.offload_activations(tmp_path)
    assert all(map(torch.equal, gradients(), before))
    assert objective.offload is not None
    moved = objective.offload.moved_bytes
    assert moved >= 2 * ids.numel() * model.config.hidden_size * 4
    with torch.no_grad():
        objective.loss_of(inputs, ids)
    assert objective.offload.moved_bytes == moved


def test_a_run_gives_the_adapter_of_a_run_without(tmp_path: Path):
    model, written = write_model(tmp_path / "model", "llama"), {}
    for policy in ("all", "offload"):
        run = train_quietly(tmp_path / policy, model, gradient_checkpointing=policy, max_steps=3)
        written[policy] = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert written["all"] == written["offload"]
