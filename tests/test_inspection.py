from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fourbit.errors import FourbitError, ModelError
from fourbit.inspection import Inspection, inspect

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def plain() -> dict[str, torch.Tensor]:
    return {
        "embed.weight": torch.zeros(10, 4, dtype=torch.bfloat16),
        "layer.weight": torch.zeros(4, 4, dtype=torch.bfloat16),
        "norm.weight": torch.zeros(4),
    }


def folder(path: Path, tensors: dict[str, torch.Tensor], **config) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(tensors, path / "model.safetensors")
    return path


def packed(name: str, shape: tuple[int, ...], quant_type: str = "nf4", *, double: bool = True):
    numel = int(np.prod(shape))
    blocks = -(-numel // 64)
    state = json.dumps({"quant_type": quant_type, "blocksize": 64, "shape": list(shape)}).encode()
    tensors = {
        name: torch.zeros((numel + 1) // 2, 1, dtype=torch.uint8),
        f"{name}.absmax": torch.zeros(blocks, dtype=torch.uint8 if double else torch.float32),
        f"{name}.quant_map": torch.zeros(16),
        f"{name}.quant_state.bitsandbytes__{quant_type}": torch.tensor(
            list(state), dtype=torch.uint8
        ),
    }
    if double:
        tensors[f"{name}.nested_absmax"] = torch.zeros(-(-blocks // 256))
        tensors[f"{name}.nested_quant_map"] = torch.zeros(256)
    return tensors


def refused(path: Path | str) -> ModelError:
    with pytest.raises(ModelError) as caught:
        inspect(str(path))
    assert "\n" not in caught.value.line()
    return caught.value


def test_a_plain_folder(tmp_path):
    found = inspect(str(folder(tmp_path / "m", plain(), tie_word_embeddings=False)))
    assert found.as_dict() | {"largest": None} == {
        "name": str(tmp_path / "m"),
        "kind": "safetensors",
        "architecture": "LlamaForCausalLM",
        "tensors": 3,
        "parameters": 60,
        "bytes": 128,
        "quant_type": None,
        "bits_per_weight": 8 * 128 / 60,
        "quantized_bits_per_weight": None,
        "quantized_bytes": None,
        "dtypes": {"BF16": {"count": 2, "bytes": 112}, "F32": {"count": 1, "bytes": 16}},
        "largest": None,
        "shards": 1,
        "tied_embeddings": False,
        "adapter": None,
    }
    assert [w.name for w in found.largest] == ["embed.weight", "layer.weight", "norm.weight"]
    assert found.lines()[:4] == [
        "safetensors of LlamaForCausalLM, 1 file",
        "parameters: 60 in 3 tensors",
        "size: 128 B, 17.067 bits per weight",
        "quantized: no",
    ]
    json.dumps(found.as_dict())


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_packed_weights_count_unpacked_and_their_scales_not(tmp_path, quant_type, double):
    tensors = packed("a.weight", (3, 43), quant_type, double=double) | {
        "a.bias": torch.zeros(3, dtype=torch.float16)
    }
    found = inspect(str(folder(tmp_path / "m", tensors)))
    assert (found.parameters, found.quant_type) == (3 * 43 + 3, quant_type)
    assert found.tensors == len(tensors)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert found.bytes == size
    assert found.bits_per_weight == 8 * size / 132
    first = found.largest[0]
    assert (first.name, first.shape, first.quant_type) == ("a.weight", (3, 43), quant_type)
    assert first.bytes == size - 6
    state = len(tensors[f"a.weight.quant_state.bitsandbytes__{quant_type}"])
    assert found.parts == {
        "codes": 65,
        "scales": 3 if double else 12,
        "nested": 4 if double else 0,
        "tables": 64 + (1024 if double else 0),
        "states": state,
    }
    assert sum(found.parts.values()) == first.bytes
    assert found.quantized_bits_per_weight == 8 * first.bytes / (3 * 43)
    assert any(line.startswith("  codes 65 B, scales ") for line in found.lines())


def test_a_real_bitsandbytes_state_is_read(tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, state = functional.quantize_4bit(
        torch.randn(64, 65), quant_type="nf4", compress_statistics=True
    )
    tensors = {"q.weight": codes} | {
        f"q.weight.{key}": value.contiguous() for key, value in state.as_dict(packed=True).items()
    }
    found = inspect(str(folder(tmp_path / "m", tensors)))
    assert (found.parameters, found.quant_type, len(found.weights)) == (64 * 65, "nf4", 1)


def test_int8_is_told_from_plain_integers(tmp_path):
    tensors = {
        "a.weight": torch.zeros(8, 4, dtype=torch.int8),
        "a.SCB": torch.zeros(8),
        "a.weight_format": torch.zeros((), dtype=torch.uint8),
        "b.weight": torch.zeros(5, dtype=torch.int8),
    }
    found = inspect(str(folder(tmp_path / "m", tensors)))
    assert (found.parameters, found.quant_type) == (37, "int8")
    assert {w.name: (w.bytes, w.quant_type) for w in found.weights} == {
        "a.weight": (8 * 4 + 32 + 1, "int8"),
        "b.weight": (5, None),
    }
    assert found.parts == {"codes": 32, "scales": 32, "nested": 0, "tables": 0, "states": 1}


def test_a_name_that_looks_like_a_scale_is_a_weight(tmp_path):
    tensors = {"odd.absmax": torch.zeros(7), "x.SCB": torch.zeros(2)}
    assert inspect(str(folder(tmp_path / "m", tensors))).parameters == 9


def test_tied_embeddings_by_config_else_by_the_missing_head(tmp_path):
    assert inspect(str(folder(tmp_path / "a", plain()))).tied_embeddings is True
    head = plain() | {"lm_head.weight": torch.zeros(10, 4)}
    assert inspect(str(folder(tmp_path / "b", head))).tied_embeddings is False
    assert inspect(str(folder(tmp_path / "c", head, tie_word_embeddings=True))).tied_embeddings


def test_shards_are_those_of_the_index_and_must_be_there(tmp_path):
    path = tmp_path / "m"
    folder(path, {"a": torch.zeros(3)})
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(4)}, path / "model-00002-of-00002.safetensors")
    save_file({"b": torch.zeros(4)}, path / "consolidated.safetensors")
    parts = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    found = inspect(str(path))
    assert (found.shards, found.parameters, found.bytes) == (2, 7, 28)
    (path / parts["b"]).unlink()
    assert refused(path).what == f"1 of 2 files are missing, first: {parts['b']}"


def adapter(path: Path, **config) -> Path:
    path.mkdir(parents=True)
    facts = {
        "base_model_name_or_path": "org/base", "peft_type": "LORA", "r": 2, "lora_alpha": 4,
        "target_modules": ["v_proj", "q_proj"],
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps({**facts, **config}))
    save_file(
        {"q.lora_A.weight": torch.zeros(2, 8), "q.lora_B.weight": torch.zeros(8, 2)},
        path / "adapter_model.safetensors",
    )
    return path


def test_an_adapter_and_a_run_that_holds_one(tmp_path):
    adapter(tmp_path / "run" / "adapter")
    for path in (tmp_path / "run" / "adapter", tmp_path / "run"):
        found = inspect(str(path))
        assert (found.kind, found.tensors, found.parameters, found.bytes) == ("adapter", 2, 32, 128)
        assert found.adapter is not None
        assert found.adapter["r"] == 2
        assert found.tied_embeddings is None
        assert "target modules: v_proj, q_proj" in found.lines()
    (tmp_path / "run" / "adapter" / "adapter_model.safetensors").unlink()
    assert refused(tmp_path / "run").code == "no-adapter-weights"


def test_a_model_folder_that_also_holds_an_adapter_is_the_model(tmp_path):
    folder(tmp_path / "m", plain())
    adapter(tmp_path / "m" / "adapter")
    assert inspect(str(tmp_path / "m")).kind == "safetensors"


def gguf_file(path: Path, *, head: bool = False) -> Path:
    writer = gguf.GGUFWriter(str(path), "llama")
    values = np.linspace(-1, 1, 6 * 64, dtype=np.float32).reshape(6, 64)
    kind = gguf.GGMLQuantizationType.Q4_1
    writer.add_tensor("token_embd.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.ones(64, dtype=np.float32))
    if head:
        writer.add_tensor("output.weight", values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file(tmp_path):
    found = inspect(str(gguf_file(tmp_path / "a.gguf")))
    # Q4_1: blocks of 32 weights in 16 bytes, with scale and minimum in 2 each.
    packed_bytes = 6 * 64 // 32 * 20
    assert (found.kind, found.architecture, found.quant_type) == ("gguf", "llama", "Q4_1")
    assert (found.tensors, found.parameters) == (2, 6 * 64 + 64)
    assert found.bytes == packed_bytes + 256
    assert found.dtypes == {
        "F32": {"count": 1, "bytes": 256},
        "Q4_1": {"count": 1, "bytes": packed_bytes},
    }
    assert {w.name: w.shape for w in found.weights}["token_embd.weight"] == (6, 64)
    assert found.tied_embeddings is True
    with_head = inspect(str(gguf_file(tmp_path / "b.gguf", head=True)))
    assert (with_head.tied_embeddings, with_head.quant_type) == (False, "Q4_1")


def test_every_truncation_is_one_line(tmp_path):
    whole = folder(tmp_path / "m", packed("a.weight", (4, 4)))
    data = (whole / "model.safetensors").read_bytes()
    for length in (0, 5, 8, 60, len(data) - 1):
        (whole / "model.safetensors").write_bytes(data[:length])
        assert refused(whole).code == "damaged-file"
    data = gguf_file(tmp_path / "w.gguf").read_bytes()
    for length in (0, 3, 4, 10, 30, 100, 200, len(data) - 300, len(data) - 64):
        (tmp_path / f"t{length}.gguf").write_bytes(data[:length])
        assert refused(tmp_path / f"t{length}.gguf").code == "bad-gguf"


def test_damaged_quant_states_are_one_line(tmp_path):
    good = packed("a.weight", (4, 4))
    key = "a.weight.quant_state.bitsandbytes__nf4"
    for text in (b"", b"{", b"[]", b'{"shape": 3}', b'{"shape": ["x"]}', b"\xff"):
        bad = good | {key: torch.tensor(list(text), dtype=torch.uint8)}
        assert "quant_state of a.weight" in refused(folder(tmp_path / "m", bad)).what
    bad = good | {key: torch.tensor(list(b'{"shape": [5, 5]}'), dtype=torch.uint8)}
    error = refused(folder(tmp_path / "m", bad))
    assert error.what == "a.weight has 8 packed bytes for the shape [5, 5]"


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", '"x"', "[" * 100_000])
def test_a_config_that_is_no_object_is_one_line(tmp_path, text):
    path = folder(tmp_path / "m", plain())
    (path / "config.json").write_text(text)
    assert refused(path).code == "damaged-file"


def test_what_is_no_model(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    assert refused(tmp_path / "empty").code == "not-a-model"
    assert refused(tmp_path / "notes.txt").code == "not-a-model"
    assert refused(tmp_path / "nowhere").code == "no-such-model"
    for name in ("", "\0", "a\nb", "x" * 5000):
        with pytest.raises(FourbitError):
            inspect(name)


def test_lines_of_an_empty_checkpoint(tmp_path):
    path = folder(tmp_path / "m", {"a": torch.zeros(0, 4)})
    found: Inspection = inspect(str(path))
    assert (found.parameters, found.bits_per_weight) == (0, 0.0)
    assert found.lines()
    shutil.rmtree(path)
