"""What a machine is said to have."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fourbit import device as devices
from fourbit.errors import InputError


def group(folder: Path, *, limit: str, current: int, droppable: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {droppable}\n")


def test_a_container_has_what_its_control_groups_leave_it(tmp_path, monkeypatch):
    groups, own = tmp_path / "groups", tmp_path / "cgroup"
    own.write_text("12:cpu:/x\n0::/pod/run\n")
    group(groups / "pod", limit="8000", current=5000, droppable=1000)
    group(groups / "pod" / "run", limit="max", current=5000, droppable=1000)
    assert devices.group_limits(groups, own) == [(8000, 4000)]
    group(groups / "pod" / "run", limit="6000", current=900, droppable=0)
    assert devices.group_limits(groups, own) == [(6000, 900), (8000, 4000)]
    monkeypatch.setattr(devices, "group_limits", lambda: [(6000, 900), (8000, 4000)])
    assert devices.host_memory() == (6000, 4000)


def test_without_control_groups_the_system_is_believed(tmp_path):
    assert devices.group_limits(tmp_path, tmp_path / "none") == []
    (tmp_path / "old").write_text("4:memory:/docker\n")
    assert devices.group_limits(tmp_path, tmp_path / "old") == []
    (tmp_path / "new").write_text("0::/\n")
    assert devices.group_limits(tmp_path, tmp_path / "new") == []
    total, available = devices.host_memory()
    assert 0 < available <= total


def test_paging_out_gives_memory_back_and_keeps_the_values(tmp_path):
    if devices.resident_memory() is None:
        pytest.skip("no /proc")
    path = tmp_path / "tensor.safetensors"
    wanted = torch.arange(1 << 22, dtype=torch.int64)
    save_file({"a": wanted}, path)
    with safe_open(path, "pt") as file:
        mapped = file.get_tensor("a")
    total = int(mapped.sum())
    before = devices.resident_memory()
    devices.page_out(mapped)
    assert before - devices.resident_memory() > 0.8 * mapped.nbytes
    assert int(mapped.sum()) == total
    written = wanted.clone()
    devices.page_out(written)
    assert torch.equal(written, wanted)
    devices.page_out(torch.zeros(0))
    devices.page_out(torch.zeros(3))


def test_a_gpu_can_be_held_to_the_same_bits(monkeypatch):
    monkeypatch.setattr(devices, "default_device", lambda: torch.device("cuda"))
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with devices.repeatable(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with devices.repeatable(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    told = "kthvalue CUDA does not have a deterministic implementation, but you set\nmore"
    with pytest.raises(InputError, match="kthvalue CUDA") as caught, devices.repeatable(True):
        raise RuntimeError(told)
    assert "\n" not in caught.value.line()
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="another"), devices.repeatable(True):
        raise RuntimeError("another")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")


def test_a_cpu_gives_the_same_bits_anyway():
    with devices.repeatable(True):
        assert not torch.are_deterministic_algorithms_enabled()
