"""Memory that runs out in a step: the gradients stay those of the undisturbed step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from commands import ENVIRONMENT, write_config
from fourbit.data import BatchPlan, Dataset
from fourbit.data.rows import Origin
from fourbit.device import is_out_of_memory
from fourbit.errors import EnvironmentFault
from fourbit.files import sha256_of
from fourbit.fused.scratch import SCRATCH
from fourbit.integrations.peft import add_adapter
from fourbit.integrations.transformers import quantize_model
from fourbit.lora import LoraSettings
from fourbit.objective import Objective
from fourbit.optim import build_optimizer
from fourbit.quantize import QuantConfig
from fourbit.receipt import Watch
from fourbit.training.config import TrainConfig
from fourbit.training.loop import TrainLoop
from models import tiny_model, write_model

REFUSED = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory:"
    " you tried to allocate 1073741824 bytes. Error code 12 (Cannot allocate memory)"
)


class Refusing(TorchDispatchMode):
    """Refuses the allocations numbered ``numbers``, and every one above ``limit`` elements."""

    def __init__(self, numbers: frozenset[int] = frozenset(), limit: int | None = None) -> None:
        super().__init__()
        self.numbers, self.limit = numbers, limit
        self.count = self.refused = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(t) for t in args if isinstance(t, Tensor)}
        storages = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        fresh = result if isinstance(result, Tensor) and id(result) not in known else None
        if fresh is not None and fresh.untyped_storage()._cdata not in storages:
            self.count += 1
            self.largest = max(self.largest, fresh.numel())
            too_large = self.limit is not None and fresh.numel() > self.limit
            if self.count - 1 in self.numbers or too_large:
                self.refused += 1
                raise RuntimeError(REFUSED)
        return result


def dataset() -> Dataset:
    draw = np.random.default_rng(0)
    lengths = draw.integers(6, 30, 24)
    ids = draw.integers(0, 256, lengths.sum()).astype(np.int32)
    offsets = np.concatenate(([0], lengths.cumsum())).astype(np.int64)
    supervised = draw.random(len(ids)) < 0.7
    supervised[offsets[:-1]] = False
    origins = tuple(Origin("rows", number) for number in range(24))
    places = np.arange(24, dtype=np.int64)
    return Dataset(ids, supervised, offsets, places, origins, np.ones(24))


def make_loop(name: str, **optim: Any) -> TrainLoop:
    SCRATCH.release()
    torch.manual_seed(0)
    model = tiny_model(name)
    model.requires_grad_(False)
    quantize_model(model, QuantConfig())
    wrapped = add_adapter(model, LoraSettings(r=4, lora_dropout=0.2))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    config = TrainConfig.model_validate(
        {
            "data": {"train": "rows", "max_length": 64},
            "optim": {"lr": 1e-2, **optim},
            "batch_size": 4,
            "grad_accum": 2,
            "max_steps": 3,
        }
    )
    trainable = (p for p in wrapped.parameters() if p.requires_grad)
    optimizer = build_optimizer(trainable, config.optim)
    rows = dataset()
    return TrainLoop(
        config,
        objective=Objective(wrapped),
        dataset=rows,
        batches=BatchPlan(rows, max_length=64, packing=True, batch_size=4, seed=0),
        optimizer=optimizer,
        watch=Watch(wrapped, optimizer),
        pad_id=0,
    )


def run(loop: TrainLoop, mode: Any, *, step: int) -> tuple[list[Tensor], list[float], list[str]]:
    """Gradients at each update, losses and notes of two steps, ``mode`` being on in ``step``."""
    gradients: list[Tensor] = []
    notes: list[str] = []
    loop.note = notes.append
    loop.optimizer.register_step_pre_hook(
        lambda optimizer, *_: gradients.extend(p.grad.clone() for p in loop.parameters)
    )
    losses = []
    backward = loop._backward

    def disturbed(number: int, *rest: Any) -> float:
        with mode if number == step else nullcontext():
            return backward(number, *rest)

    loop._backward = disturbed  # type: ignore[method-assign]
    for result in loop.steps():
        losses.append(result.loss)
        if len(losses) == 2:
            break
    return gradients, losses, notes


def close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-6)


@pytest.fixture(params=["llama", "gpt_neox"])
def name(request: pytest.FixtureRequest) -> str:
    """A model with fused layers, and one whose layers are transformers' own."""
    return request.param


def check_every(stride: int, name: str, *, step: int, bits: int) -> None:
    counting = Refusing()
    wanted, losses, notes = run(make_loop(name, optim_bits=bits), counting, step=step)
    assert counting.count > 100
    assert not notes
    for number in range(0, counting.count, stride):
        refusing = Refusing(frozenset([number]))
        loop = make_loop(name, optim_bits=bits)
        found, theirs, notes = run(loop, refusing, step=step)
        assert refusing.refused == 1, number
        assert len(notes) == loop.state.memory_events == 1
        assert ("paged out" in notes[0]) == (step == 2), "there is state to evict from then on"
        close(found, wanted)
        assert theirs == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("step", [1, 2])
def test_a_refused_allocation_changes_no_gradient(name: str, step: int):
    check_every(97, name, step=step, bits=8)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("step", [1, 2])
def test_every_refused_allocation_changes_no_gradient(name: str, step: int, bits: int):
    check_every(1, name, step=step, bits=bits)


def check_update(stride: int, name: str, *, paged: str) -> None:
    """Refuses the allocations of a whole step: it ends as ever, or the run ends with one line."""

    def ended(mode: Any) -> tuple[dict[str, Tensor], int]:
        loop = make_loop(name, optim_bits=8, paged=paged)
        step = loop._step

        def disturbed(number: int, *rest: Any) -> Any:
            with mode if number == 2 else nullcontext():
                return step(number, *rest)

        loop._step = disturbed  # type: ignore[method-assign]
        for _ in loop.steps():
            if loop.state.step == 2:
                break
        values = dict(loop.objective.model.named_parameters())
        return {k: p.detach() for k, p in values.items() if p.requires_grad}, loop.state.step

    counting, stopped = Refusing(), 0
    wanted, _ = ended(counting)
    last = range(counting.count - 12, counting.count)  # those of the update
    for number in sorted({*range(0, counting.count, stride), *last}):
        fault = None
        try:
            found, done = ended(Refusing(frozenset([number])))
        except EnvironmentFault as error:
            fault = error
        if fault is not None:
            stopped += 1
            assert (fault.exit_code, fault.where) == (4, "step 2")
            assert "update" in fault.what
            continue
        assert done == 2
        for key, value in found.items():
            torch.testing.assert_close(value, wanted[key], rtol=1e-3, atol=2e-4)
    assert stopped < len(last)


@pytest.mark.parametrize("paged", ["off", "always"])
def test_a_whole_step_ends_as_ever_or_with_one_line(paged: str):
    check_update(211, "llama", paged=paged)


@pytest.mark.slow
@pytest.mark.parametrize("paged", ["off", "auto", "always"])
def test_so_it_does_wherever_memory_runs_out(name: str, paged: str):
    check_update(1, name, paged=paged)


def test_an_update_that_memory_ends_is_not_tried_again(monkeypatch: pytest.MonkeyPatch):
    loop, calls = make_loop("llama"), []

    def refused(*_: Any) -> None:
        calls.append(1)
        raise RuntimeError(REFUSED)

    monkeypatch.setattr(loop.optimizer, "step", refused)
    with pytest.raises(EnvironmentFault) as caught:
        next(loop.steps())
    assert len(calls) == 1
    assert "\n" not in caught.value.line()
    assert loop.state.step == 0


def one_row(name: str) -> int:
    """The largest allocation of a step whose rows go through the model one by one."""
    loop, counting = make_loop(name), Refusing()
    loop.state.max_positions = 64
    run(loop, counting, step=1)
    SCRATCH.release()
    return counting.largest


def test_batches_are_split_until_they_fit(name: str):
    wanted, losses, _ = run(make_loop(name), nullcontext(), step=1)
    found, theirs, notes = run(loop := make_loop(name), Refusing(limit=one_row(name)), step=1)
    close(found, wanted)
    assert theirs == pytest.approx(losses, rel=1e-5)
    assert loop.state.max_positions == 64
    assert any("in parts of at most" in note for note in notes)
    assert loop.state.memory_events == len(notes), "and step 2 knew it already"
    assert not loop.state.recompute


def test_at_last_the_run_ends_with_one_line(name: str):
    loop = make_loop(name)
    with pytest.raises(EnvironmentFault) as caught:
        run(loop, Refusing(limit=8), step=2)
    assert caught.value.exit_code == 4
    assert "\n" not in caught.value.line()
    assert "step 2" in caught.value.where
    assert loop.state.recompute
    assert loop.state.max_positions == 64
    assert loop.state.step == 1
    assert loop.optimizer._steps == [1] * len(loop.parameters)


def test_on_a_gpu_activations_wait_in_host_memory_before_the_run_ends(monkeypatch):
    loop, notes = make_loop("llama"), []
    loop.note = notes.append  # type: ignore[method-assign]
    asked: list[object] = []
    cuda = property(lambda _: torch.device("cuda"))
    monkeypatch.setattr(type(loop.objective), "device", cuda)
    monkeypatch.setattr(loop.objective, "offload_activations", lambda: asked.append(1))
    loop.state.recompute, loop.state.max_positions, loop._evicted_at = True, 1, loop.state.step
    batch = loop._collate(loop.dataset, loop.plan.batches.epoch(0)[0])
    loop._make_room("step 1", [batch])
    assert loop.state.offload
    assert asked == [1]
    assert notes == [
        "step 1: out of memory; from now on what lies between layers waits in host memory"
    ]
    monkeypatch.setattr(loop.objective, "offload", object())
    with pytest.raises(EnvironmentFault, match="does not fit"):
        loop._make_room("step 1", [batch])


def test_evaluation_is_split_too():
    loop = make_loop("llama")
    batches = BatchPlan(loop.dataset, max_length=64, packing=True, batch_size=4, seed=0)
    whole, single = loop.evaluate(loop.dataset, batches), Refusing()
    loop.state.max_positions = 64
    SCRATCH.release()
    with single:
        loop.evaluate(loop.dataset, batches)
    loop.state.max_positions = None
    SCRATCH.release()
    with Refusing(limit=single.largest):
        parts = loop.evaluate(loop.dataset, batches)
    assert parts == pytest.approx(whole, rel=1e-5)
    assert loop.state.max_positions is not None


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(RuntimeError(REFUSED))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(OSError(12, "Cannot allocate memory"))
    assert is_out_of_memory(RuntimeError("unable to mmap 9 bytes: Cannot allocate memory (12)"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(OSError(28, "No space left on device"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_other_errors_are_not_swallowed():
    loop = make_loop("llama")

    def broken(batch: Any) -> Tensor:
        raise RuntimeError("shape mismatch")

    loop.objective.loss_sum = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="shape mismatch"):
        next(loop.steps())


LIMITED = """
import resource, sys
from pathlib import Path
from fourbit.cli import main
from fourbit.training.run import _Run
limit, fit = int(sys.argv.pop(1)) or resource.RLIM_INFINITY, _Run.fit
def limited(self):
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        fit(self)
    finally:
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) for line in lines if line.startswith("VmPeak"))
        print("VmPeak", peak * 1024, file=sys.stderr)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
_Run.fit = limited
main()
"""


def limited(limit: int, config: Path) -> subprocess.CompletedProcess[str]:
    """``fourbit train`` that has ``limit`` bytes of addresses while it trains; 0 is no limit."""
    # without the arena of its own that each thread of glibc's reserves, a peak is a need
    environment = {**os.environ, **ENVIRONMENT, "MALLOC_ARENA_MAX": "1"}
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), "train", str(config)],
        env=environment,
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_a_run_below_its_need_of_memory_ends_as_the_unlimited_one(tmp_path: Path):
    sizes = {"hidden_size": 512, "intermediate_size": 1400, "num_hidden_layers": 4}
    model = write_model(tmp_path / "model", "llama", **sizes)
    changes = {"method": "full", "max_steps": 3, "samples": 0, "eval_every": 100, "lora": {}}
    digests = []
    peak = 0
    for name, cut in (("whole", 0), ("limited", 40 << 20)):
        config = write_config(tmp_path / name, model, **changes)
        done = limited(peak - cut if cut else 0, config)
        assert done.returncode == 0, done.stderr
        peak = int(done.stderr.rsplit("VmPeak", 1)[1].split()[0])
        receipt = json.loads((tmp_path / name / "run" / "receipt.json").read_text())
        paging = receipt["optimizer"]
        assert (paging["paged"], paging["evictions"] > 0) == (bool(cut), bool(cut))
        digests.append(sha256_of(tmp_path / name / "run" / "adapter" / "model.safetensors"))
    assert digests[0] == digests[1]
