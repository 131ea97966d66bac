"""`fourbit train` with adapters that start from the weights: verified, resumed, used again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file

import fourbit
from fourbit.training.config import TrainConfig
from models import train_tiny, write_chats

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "start",
    [
        "pissa",
        "olora",
        pytest.param("pissa_niter_4", marks=SLOW),
        pytest.param("orthogonal", marks=SLOW),
    ],
)
def test_a_run_with_a_start_verifies_resumes_and_reloads(
    start: str, model_folder, tmp_path: Path
) -> None:
    model, chats = model_folder("qwen2"), write_chats(tmp_path / "chats.jsonl")
    adapter = {"r": 4, "init_lora_weights": start}
    values = {"lora": adapter, "max_steps": 4, "save_every": 1, "save_total_limit": None}
    result, _ = train_tiny(model, chats, tmp_path / "run", **values)
    run = Path(result.run_dir)
    assert result.verified
    assert fourbit.verify(run).ok

    file = run / "adapter" / "adapter_model.safetensors"
    saved = load_file(file)
    shutil.rmtree(run / "adapter")
    for path in sorted((run / "checkpoints").iterdir())[2:]:
        shutil.rmtree(path)
    train_tiny(model, chats, run, resume="auto", **values)
    assert fourbit.verify(run).ok
    again = load_file(file)
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[name], saved[name]) for name in saved)

    assert any("lora_start_" in name for name in saved) is (start != "orthogonal")
    base, _ = fourbit.load(str(model), quant=fourbit.QuantConfig())
    loaded = PeftModel.from_pretrained(base, str(run / "adapter"))
    state = loaded.state_dict()
    for name, tensor in saved.items():
        own = [k for k in state if k.replace(".default", "") == name]
        assert len(own) == 1, name
        assert torch.equal(state[own[0]], tensor), name


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_is_not_saved_in_half_precision(start: str) -> None:
    with pytest.raises(ValidationError, match=f"would round away what {start} learned: use fp32"):
        TrainConfig(save_dtype="bf16", lora={"init_lora_weights": start})


def test_a_start_needs_a_quantized_base(model_folder, tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "chats.jsonl")
    with pytest.raises(fourbit.FourbitError) as caught:
        train_tiny(
            model_folder("qwen2"),
            chats,
            tmp_path / "run",
            method="lora",
            lora={"r": 4, "init_lora_weights": "pissa"},
        )
    assert caught.value.line() == (
        "error[init-changes-base] lora.init_lora_weights: 'pissa' changes the weights of"
        " model.layers.0.self_attn.q_proj, which is not quantized; fix: use method: qlora and"
        " quantized targets only, or true"
    )
