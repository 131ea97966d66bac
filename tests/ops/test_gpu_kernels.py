"""The GPU's kernels without a GPU: equal to the reference in Triton's interpreter, within budget.

Whether kernels are interpreted is decided when Triton's modules are first imported, so both kinds
of tests run in processes of their own. With a GPU the same comparisons run on it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

HERE = Path(__file__).parent / "triton"


def child(script: str, *arguments: str, interpret: bool) -> str:
    tests = HERE.parents[1]
    paths = [
        str(tests),
        *(str(tests / name) for name in ("integrations", "planning")),
        os.environ.get("PYTHONPATH", ""),
    ]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }  # fmt: skip
    environment.pop("TRITON_INTERPRET", None)
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, HERE / script, *arguments],
        capture_output=True, text=True, env=environment, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


GROUPS = (
    "quantize", "dequantize", "product", "rows", "dropout", "loss", "adamw",
    "adamw_many", "int8", "layers",
    "attention",
)  # fmt: skip


# a norm of its own, capped scores with a window, norms of heads, layer norms
MODELS = ("llama", "gemma2", "qwen3", "gpt2")


@pytest.mark.parametrize("group", GROUPS)
def test_kernels_equal_the_reference_in_the_interpreter(group):
    assert f"{group}: equal" in child("compare.py", group, "cpu", interpret=True)


@pytest.mark.parametrize(
    "name", [*MODELS[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS[2:])]
)
def test_fused_layers_equal_transformers_in_the_interpreter(name):
    assert f"{name}: equal" in child("fused.py", name, "cpu", interpret=True)


def test_a_plan_for_a_gpu_counts_what_its_kernels_allocate():
    assert "llama: planned" in child("planned.py", "llama", interpret=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", MODELS)
def test_fused_layers_equal_transformers_on_a_gpu(name):
    assert f"{name}: equal" in child("fused.py", name, "cuda", interpret=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("group", GROUPS)
def test_kernels_equal_the_reference_on_a_gpu(group):
    assert f"{group}: equal" in child("compare.py", group, "cuda", interpret=False)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "89", "90"])
def test_kernels_stay_within_their_budget(arch, tmp_path):
    """Compiled by ptxas for a card that is not here: registers, spills, instructions a weight."""
    out = child("budget.py", arch, str(tmp_path), interpret=False)
    assert f"sm_{arch}: within budget" in out
