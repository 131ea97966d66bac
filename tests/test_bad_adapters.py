"""Adapters that do not fit are refused whole: PEFT alone would fill the gaps at random."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fourbit
from fourbit.errors import ModelError
from fourbit.generate import Sampling, open_generator
from fourbit.integrations.peft import add_adapter
from fourbit.lora import LoraSettings
from fourbit.quantize import QuantConfig

QUANT = QuantConfig(compute_dtype="float32")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, model_folder) -> Path:
    """An adapter whose lora_B is not zero."""
    base, _ = fourbit.load(str(model_folder("llama")), quant=QUANT, dtype=torch.float32)
    model = add_adapter(base, LoraSettings(r=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def answer(model_folder: Callable[[str], Path], adapter: Path | None, name: str = "llama") -> str:
    generator = open_generator(str(model_folder(name)), adapter=adapter, quant=QUANT)
    return generator.answers([[1, 2, 3]], Sampling(max_new_tokens=8))[0].text


def refused(model_folder, adapter: Path, name: str = "llama") -> ModelError:
    with pytest.raises(ModelError) as caught:
        answer(model_folder, adapter, name)
    assert caught.value.exit_code == 3
    assert "\n" not in caught.value.line()
    return caught.value


def change(adapter: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    file = adapter / "adapter_model.safetensors"
    state = load_file(file)
    edit(state)
    save_file(state, file, metadata={"format": "pt"})


def configure(adapter: Path, **changes: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


KEY = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"


def test_a_whole_adapter_changes_the_answer(model_folder, adapter, recwarn):
    assert answer(model_folder, adapter) != answer(model_folder, None)
    assert not [w for w in recwarn if "changes nothing" in str(w.message)]


def test_an_adapter_of_another_base(model_folder, adapter):
    assert refused(model_folder, adapter, "gpt2").code == "adapter-mismatch"


def test_an_adapter_that_changes_nothing_is_told(model_folder, adapter):
    def zero(state: dict[str, Tensor]) -> None:
        for name in state:
            if "lora_B" in name:
                state[name] = torch.zeros_like(state[name])

    change(adapter, zero)
    with pytest.warns(UserWarning, match="changes nothing, every lora_B is zero"):
        told = answer(model_folder, adapter)
    assert told == answer(model_folder, None)


def test_missing_tensors(model_folder, adapter):
    change(adapter, lambda state: state.__delitem__(KEY))
    error = refused(model_folder, adapter)
    assert error.code == "adapter-mismatch"
    assert "1 tensors of the adapter are missing" in error.what
    assert KEY in error.what


def test_tensors_of_no_layer(model_folder, adapter):
    change(adapter, lambda state: state.update({KEY.replace("up_proj", "none"): torch.ones(3)}))
    error = refused(model_folder, adapter)
    assert "belong to no layer" in error.what
    assert "none" in error.what


def test_tensors_under_another_prefix(model_folder, adapter):
    def rename(state: dict[str, Tensor]) -> None:
        for name in list(state):
            state[name.replace("base_model.model.", "")] = state.pop(name)

    change(adapter, rename)
    assert refused(model_folder, adapter).code == "adapter-mismatch"


def test_embeddings_saved_beside_the_adapter_are_no_mistake(model_folder, adapter):
    def add(state: dict[str, Tensor]) -> None:
        state["base_model.model.model.embed_tokens.weight"] = torch.randn(264, 48)

    change(adapter, add)
    answer(model_folder, adapter)


@pytest.mark.parametrize(
    "make",
    [lambda t: t[:-1].clone(), lambda t: t.t().contiguous(), lambda t: t[:, :2].clone()],
    ids=["short", "transposed", "rank"],
)
def test_wrong_shapes(model_folder, adapter, make):
    change(adapter, lambda state: state.__setitem__(KEY, make(state[KEY])))
    error = refused(model_folder, adapter)
    assert error.code == "adapter-mismatch"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_values(model_folder, adapter, value):
    def poison(state: dict[str, Tensor]) -> None:
        state[KEY][1, 2] = value

    change(adapter, poison)
    error = refused(model_folder, adapter)
    assert error.code == "nonfinite-weight"
    assert KEY in error.where


@pytest.mark.parametrize("keep", [0, 8, 0.5])
def test_a_truncated_file(model_folder, adapter, keep):
    file = adapter / "adapter_model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[: int(len(raw) * keep) if isinstance(keep, float) else keep])
    assert refused(model_folder, adapter).code == "damaged-file"


@pytest.mark.parametrize("name", ["evil/repo", "../../etc", "https://evil.example/x", "/etc"])
def test_the_base_it_names_is_never_followed(model_folder, adapter, name, monkeypatch):
    asked: list[Any] = []

    def getaddrinfo(*args: Any, **kwargs: Any) -> None:
        asked.append(args)
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    before = answer(model_folder, adapter)
    configure(adapter, base_model_name_or_path=name)
    assert answer(model_folder, adapter) == before
    assert asked == []


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "EVIL"},
        {"peft_type": None},
        {"r": "four"},
        {"r": 5},
        {"r": 0},
        {"r": -1},
        {"target_modules": ["none_of_these"]},
        {"target_modules": 7},
        {"lora_alpha": None},
        {"rank_pattern": []},
    ],
    ids=str,
)
def test_wrong_configurations(model_folder, adapter, changes):
    configure(adapter, **changes)
    refused(model_folder, adapter)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", "[" * 100_000])
def test_a_configuration_that_is_none(model_folder, adapter, text):
    (adapter / "adapter_config.json").write_text(text)
    refused(model_folder, adapter)


@pytest.mark.parametrize(
    "extra", [{"auto_mapping": {"base_model_class": "Evil", "parent_library": "os"}}, {"new": 1}]
)
def test_what_a_configuration_adds_is_not_imported(model_folder, adapter, extra):
    before = answer(model_folder, adapter)
    configure(adapter, **extra)
    assert answer(model_folder, adapter) == before


def test_pickled_adapters_are_never_loaded(model_folder, adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    error = refused(model_folder, adapter)
    assert error.code == "adapter-without-weights"
    assert "never loaded" in error.fix
