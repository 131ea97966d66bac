from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from fourbit import doctor, native
from fourbit.device import machine
from fourbit.doctor import (
    Diagnosis,
    Finding,
    arena_finding,
    diagnose,
    disk_finding,
    gpu_kernels_finding,
    graphics_cards,
    hub_finding,
    kernels_missing,
    memory_finding,
    torch_finding,
)


@pytest.fixture(scope="module")
def found() -> Diagnosis:
    return diagnose()


def test_the_diagnosis_is_complete_and_json(found):
    facts = json.loads(json.dumps(found.as_dict()))
    assert facts.keys() == {"machine", "versions", "findings"}
    assert facts["versions"].keys() == {"torch", "transformers", "peft", "safetensors", "gguf"}
    assert facts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts["machine"]["cores"] == os.cpu_count()
    for finding in facts["findings"]:
        assert finding.keys() == {"level", "what", "fix"}
        assert finding["level"] in ("ok", "note", "warning")
        assert (finding["level"] == "ok") == (finding["fix"] == "")


def test_the_backend_is_named_with_its_dtype(found):
    text = "\n".join(found.lines())
    if torch.cuda.is_available():
        assert "training runs on" in text
    else:
        dtype = "bf16" if found.machine.bf16 else "fp32"
        assert f"ok: no accelerator: training runs on the CPU in {dtype} (" in text
    assert "demo model 'smollm2' is" in text
    assert "kernels: " in text


def test_the_most_serious_finding_comes_first():
    findings = (Finding("ok", "c"), Finding("note", "b", "do b"), Finding("warning", "a", "do a"))
    lines = Diagnosis(machine(), {"torch": "1", "gguf": None}, findings).lines()
    assert lines[-3:] == ["warning: a; fix: do a", "note: b; fix: do b", "ok: c"]
    assert lines[-4].endswith("torch 1, gguf missing")
    assert all("\n" not in line for line in lines)


def test_little_memory_and_disk_are_warnings(tmp_path):
    short = memory_finding(8_000_000_000, 500_000_000)
    assert short is not None
    assert short.level == "warning"
    assert short.what == "only 500.00 MB of 8.00 GB of memory are available"
    plenty = memory_finding(8_000_000_000, 4_000_000_000)
    assert plenty is not None
    assert plenty.level == "ok"
    assert memory_finding(0, 0) is None
    assert disk_finding(10, tmp_path).level == "warning"
    assert disk_finding(10**12, tmp_path).level == "ok"


def test_a_gpu_that_torch_does_not_use():
    assert torch_finding([], usable=False, cuda_build=None) is None
    assert torch_finding(["T4"], usable=True, cuda_build="12.8") is None
    wrong_build = torch_finding(["T4"], usable=False, cuda_build=None)
    assert wrong_build is not None
    assert wrong_build.what == f"T4 is present, but torch {torch.__version__} is a CPU build"
    old_driver = torch_finding(["T4"], usable=False, cuda_build="12.8")
    assert old_driver is not None
    assert "CUDA 12.8" in old_driver.fix


def fake_tool(folder: Path, script: str) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)


def test_cards_come_from_the_driver_and_its_failure_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert graphics_cards() == []
    fake_tool(tmp_path, 'echo "NVIDIA T4"; echo "NVIDIA L4"')
    assert graphics_cards() == ["NVIDIA T4", "NVIDIA L4"]
    fake_tool(tmp_path, "echo broken; exit 9")
    assert graphics_cards() == []


def test_the_hub_cache(tmp_path):
    (tmp_path / "models--a--b").mkdir()
    online = hub_finding(offline=False, cache=tmp_path)
    assert (online.level, online.what.split(" in ")[0]) == ("ok", "1 cached model")
    offline = hub_finding(offline=True, cache=tmp_path)
    assert (offline.level, "HF_HUB_OFFLINE" in offline.fix) == ("note", True)
    assert hub_finding(offline=False, cache=tmp_path / "not" / "yet").level == "ok"
    (tmp_path / "file").touch(mode=0o400)
    refused = hub_finding(offline=False, cache=tmp_path / "file" / "cache")
    assert refused.level == "warning"
    assert "HF_HOME" in refused.fix


def test_the_folder_that_is_asked_about_is_the_one_named(tmp_path):
    assert any(str(tmp_path.resolve()) in f.what for f in diagnose(tmp_path).findings)


@pytest.mark.skipif(not native.supported(), reason="no compiled kernels here")
@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of CUDA")
def test_the_kernels_are_named_with_their_instruction_set(found):
    line = next(line for line in found.lines() if "kernels: " in line)
    assert line.startswith(f"ok: kernels: {native.isa()} (csrc)")
    assert "cross_entropy_rows_" in line


def test_the_allocator_is_named_and_its_fix_where_there_is_one():
    assert arena_finding("linux", available=True).level == "ok"
    absent = arena_finding("linux", available=False)
    assert absent.level == "note"
    assert "make native" in absent.fix
    assert not arena_finding("darwin", available=False).fix


def test_missing_kernels_are_one_line_with_the_fix():
    absent = kernels_missing(native.Trouble("none were built", "install g++", expected=True))
    assert absent.level == "note"
    assert absent.what == "kernels: none, plain PyTorch serves, slower: none were built"
    assert absent.fix == "install g++"
    assert kernels_missing(native.Trouble("it is older", "make native")).level == "warning"


def test_every_op_that_exists_is_looked_at():
    names = {
        name.removeprefix("fourbit::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fourbit::")
    }
    assert names == set(doctor._OPS)


def test_kernels_of_a_graphics_card():
    assert gpu_kernels_finding("3.6.0", (9, 0)).level == "ok"
    old = gpu_kernels_finding("3.6.0", (7, 5))
    assert old.level == "note"
    assert "sm_75" in old.what
    absent = gpu_kernels_finding(None, (9, 0))
    assert absent.level == "warning"
    assert absent.fix == "pip install triton"
