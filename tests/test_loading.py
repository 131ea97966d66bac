"""Every wrong model folder is one line with a place, a reason and a fix."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fourbit
from fourbit.errors import FourbitError, InputError, ModelError
from fourbit.loading import (
    LoadOptions,
    check_safetensors,
    load_config,
    load_model,
    load_tokenizer,
    resolve_source,
    unquantized_tensors,
)
from fourbit.quantize import QuantConfig
from models import (
    VOCAB,
    tiny_model,
    tiny_tokenizer,
    train_tiny,
    write_chats,
    write_model,
)

QUANT = QuantConfig()
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(model_folder, tmp_path):
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(model_folder("llama"), tmp_path / "llama"))


def refusal(model: object, quant: QuantConfig | None = QUANT) -> FourbitError:
    with pytest.raises(FourbitError) as caught:
        fourbit.load(str(model), quant=quant, dtype=torch.float32)
    line = caught.value.line()
    assert "\n" not in line
    assert caught.value.where
    return caught.value


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, change) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


# Names.


def test_a_missing_path_names_the_near_one(folder):
    error = refusal(folder.parent / "lama")
    assert (error.code, error.exit_code) == ("no-such-model", 3)
    assert error.where == str(folder.parent / "lama")
    assert error.fix == f"did you mean '{folder}'?"


def test_a_misspelt_alias_names_the_alias(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refusal("smolm2")
    assert (error.code, error.fix) == ("no-such-model", "did you mean 'smollm2'?")


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "a\0b"])
def test_names_that_are_none(name):
    error = refusal(name)
    assert (error.code, error.exit_code) == ("bad-model-name", 3)


def test_a_file_that_is_no_gguf(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"x")
    error = refusal(path)
    assert (error.code, error.exit_code) == ("not-a-model", 3)
    assert "GGUF" in error.what
    assert "folder" in error.fix


def test_an_unknown_hub_id_offline_is_the_environments_fault(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    error = refusal("nobody-at-all/no-such-model")
    assert (error.code, error.exit_code) == ("hub-unreachable", 4)
    assert error.where == "nobody-at-all/no-such-model"
    assert "offline" in error.fix


@pytest.mark.slow
def test_the_offline_variable_is_honoured(tmp_path):
    program = (
        "import sys, fourbit\n"
        "try:\n    fourbit.load('nobody-at-all/no-such-model')\n"
        "except fourbit.FourbitError as error:\n"
        "    print(error.exit_code, error.code, error.where); sys.exit(0)\n"
        "sys.exit(9)\n"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=env, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "4 hub-unreachable nobody-at-all/no-such-model"


def test_an_unknown_owner_below_an_existing_folder_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    error = refusal("models/llama")
    assert error.code == "no-such-model"


# Folders.


def test_a_folder_without_config(tmp_path):
    error = refusal(tmp_path)
    assert (error.code, error.exit_code, error.where) == ("not-a-model", 3, str(tmp_path))
    assert error.what == "no config.json in the folder"


def test_pickled_weights_are_never_loaded(folder):
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "pytorch_model.bin")
    error = refusal(folder)
    assert (error.code, error.exit_code) == ("no-safetensors", 3)
    assert "pytorch_model.bin" in error.what
    assert "safetensors" in error.fix


def test_an_adapter_is_not_a_model(model_folder, tmp_path):
    chats = write_chats(tmp_path / "chats.jsonl")
    train_tiny(model_folder("llama"), chats, tmp_path / "run", max_steps=1)
    error = refusal(tmp_path / "run" / "adapter")
    assert (error.code, error.exit_code) == ("adapter-not-model", 3)
    assert "--adapter" in error.fix


def test_two_gguf_files_are_ambiguous(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert refusal(tmp_path).what == "2 GGUF files"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "\xff"])
def test_a_config_that_is_no_json_object(folder, text):
    (folder / "config.json").write_text(text, encoding="latin-1")
    error = refusal(folder)
    assert (error.code, error.exit_code) == ("bad-config-json", 3)
    assert error.where == f"{folder}/config.json"


def test_an_unknown_architecture(folder):
    change_config(folder, model_type="nothing-like-it")
    error = refusal(folder)
    assert (error.code, error.exit_code) == ("unknown-architecture", 3)


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads"])
@pytest.mark.parametrize("value", ["many", 0, -3, None])
def test_nonsense_in_the_config_is_one_line(folder, key, value):
    change_config(folder, **{key: value})
    error = refusal(folder)
    assert error.exit_code == 3


def test_an_already_quantized_checkpoint(folder):
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    error = refusal(folder)
    assert (error.code, error.exit_code) == ("already-quantized", 3)
    assert "gptq" in error.what
    assert error.fix.startswith("start from the 16-bit checkpoint")


@pytest.mark.parametrize("value", [["x"], "gptq", 5])
def test_a_damaged_quantization_config_is_one_line(folder, value):
    change_config(folder, quantization_config=value)
    assert refusal(folder).code == "already-quantized"


def test_code_from_the_repository_needs_consent(folder):
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    error = refusal(folder)
    assert (error.code, error.exit_code) == ("remote-code", 3)
    assert "trust_remote_code" in error.fix


def test_code_of_the_tokenizer_is_not_run_either(folder):
    path = folder / "tokenizer_config.json"
    values = {**json.loads(path.read_text()), "tokenizer_class": "XTokenizer"}
    values["auto_map"] = {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}
    path.write_text(json.dumps(values))
    (folder / "tokenization_x.py").write_text("raise SystemExit(77)\n")
    with suppress(ModelError):
        load_tokenizer(resolve_source(str(folder)))


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_models_that_are_no_causal_lm(kind, tmp_path):
    from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

    if kind == "t5":
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=VOCAB, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
        )
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
        model = BertForMaskedLM(BertConfig(vocab_size=VOCAB, num_hidden_layers=1, **sizes))
    model.save_pretrained(tmp_path)
    error = refusal(tmp_path)
    assert (error.code, error.exit_code) == ("not-causal-lm", 3)
    assert type(model).__name__ in error.what


def test_a_missing_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    error = refusal(folder)
    assert (error.code, error.exit_code, error.where) == ("no-tokenizer", 3, str(folder))
    assert "tokenizer.json" in error.fix


def test_a_damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")
    assert refusal(folder).code == "no-tokenizer"


# Weight files.


def test_truncated_weights_name_both_sizes(folder):
    path = folder / WEIGHTS
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little")
    cuts = (0, 1, 7, 8, 9, 8 + header // 2, 8 + header - 1, 8 + header, len(data) // 2)
    for cut in (*cuts, len(data) - 1):
        path.write_bytes(data[:cut])
        error = refusal(folder)
        assert (error.code, error.exit_code, error.where) == ("damaged-file", 3, str(path)), cut
        assert str(cut) in error.what
    path.write_bytes(data[:-1])
    assert refusal(folder).what == f"{len(data) - 1} bytes, expected {len(data)}"


def test_bytes_after_the_last_tensor_are_damage_too(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes() + b"\0")
    assert refusal(folder).code == "damaged-file"


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "header",
    [
        b"{" * 40,
        b"[1, 2]",
        b"null",
        b"3",
        b"\xff\xfe{}",
        json.dumps({"a": 1}).encode(),
        json.dumps({"a": {"dtype": "F32", "shape": [1]}}).encode(),
        json.dumps({"a": {**ENTRY, "data_offsets": [0, "4"]}}).encode(),
        json.dumps({"a": {**ENTRY, "data_offsets": [0]}}).encode(),
        json.dumps({"a": {**ENTRY, "data_offsets": [0, 4.5]}}).encode(),
        json.dumps({"a": {**ENTRY, "data_offsets": [-4, 4]}}).encode(),
        json.dumps({"a": {**ENTRY, "data_offsets": [0, True]}}).encode(),
        json.dumps({"a": {**ENTRY, "shape": [2]}}).encode(),
        json.dumps({"a": {**ENTRY, "dtype": "F99"}}).encode(),
        json.dumps({"a": ENTRY, "b": ENTRY}).encode(),
        b"[" * 5000,
    ],
)
def test_a_garbage_header_is_one_line(folder, header):
    path = folder / WEIGHTS
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    error = refusal(folder)
    assert error.exit_code == 3
    assert error.code in ("damaged-file", "load-failed", "missing-weights")
    assert "object has no attribute" not in error.what


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 100 << 20, 1 << 40])
def test_a_header_length_beyond_the_file_is_refused_without_reading_it(folder, length):
    path = folder / WEIGHTS
    path.write_bytes(struct.pack("<Q", length) + b"{}" + b"\0" * 64)
    with pytest.raises(ModelError, match=str(length)):
        check_safetensors(path)


def test_random_damage_never_shows_a_traceback(folder):
    path = folder / WEIGHTS
    data = bytearray(path.read_bytes())
    header = int.from_bytes(data[:8], "little")
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        damaged = bytearray(data)
        for place in torch.randint(0, 8 + header, (3,), generator=generator).tolist():
            damaged[place] ^= 1 << (place % 7)
        path.write_bytes(damaged)
        with suppress(ModelError):
            load_model(resolve_source(str(folder)), LoadOptions(quant=QUANT, dtype=torch.float32))


def test_missing_tensors_are_named(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(folder, lambda state: state.pop(name))
    for quant in (QUANT, None):
        error = refusal(folder, quant)
        assert (error.code, error.exit_code) == ("missing-weights", 3)
        assert error.what == f"1 tensors are missing, first: {name}"


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
@pytest.mark.parametrize("quant", [QUANT, None])
def test_wrong_shapes_are_named(folder, name, quant):
    def shrink(state):
        state[name] = state[name][:-2].contiguous()

    change_weights(folder, shrink)
    error = refusal(folder, quant)
    assert (error.code, error.exit_code) == ("mismatched-weights", 3)
    assert name in error.what


def test_a_transposed_weight_is_a_wrong_shape(folder):
    name = "model.layers.0.mlp.up_proj.weight"

    def transpose(state):
        state[name] = state[name].t().contiguous()

    change_weights(folder, transpose)
    error = refusal(folder)
    assert (error.code, error.exit_code) == ("mismatched-weights", 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nonfinite_weight_names_tensor_and_index(folder, value):
    name = "model.layers.1.self_attn.k_proj.weight"

    def spoil(state):
        state[name][1, 5] = value

    change_weights(folder, spoil)
    error = refusal(folder)
    assert (error.code, error.exit_code, error.where) == ("nonfinite-weight", 3, name)
    assert "flat index 53 (1 non-finite" in error.what


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"]
)
@pytest.mark.parametrize("quant", [QUANT, None])
def test_a_nonfinite_value_is_found_in_plain_tensors_too(folder, name, quant):
    def spoil(state):
        state[name].view(-1)[7] = float("nan")

    change_weights(folder, spoil)
    error = refusal(folder, quant)
    assert (error.code, error.exit_code, error.where) == ("nonfinite-weight", 3, name)
    assert "flat index 7 " in error.what


def test_a_shard_the_index_names_is_missing(tmp_path):
    folder = write_model(tmp_path / "shards", "llama", max_shard_size="60KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    error = refusal(folder)
    assert error.exit_code == 3
    assert shard.name in error.line()


@pytest.mark.parametrize("entry", ["../outside.safetensors", "/etc/hostname", 5, None])
def test_an_index_points_at_files_of_its_folder_only(tmp_path, entry):
    folder = write_model(tmp_path / "shards", "llama", max_shard_size="60KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shutil.copy(next(folder.glob("*.safetensors")), tmp_path / "outside.safetensors")
    index["weight_map"]["model.norm.weight"] = entry
    path.write_text(json.dumps(index))
    error = refusal(folder)
    assert (error.code, error.exit_code) == ("bad-index", 3)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}'])
def test_a_damaged_index_is_one_line(tmp_path, text):
    folder = write_model(tmp_path / "shards", "llama", max_shard_size="60KB")
    (folder / "model.safetensors.index.json").write_text(text)
    assert refusal(folder).exit_code == 3


def test_an_integer_dtype_is_no_dtype_for_a_model(folder):
    with pytest.raises(InputError, match=r"dtype: torch\.int8 is no floating dtype"):
        fourbit.load(str(folder), dtype=torch.int8)


# What is loaded.


def test_what_stays_in_16_bits_is_listed_with_its_share(folder):
    model, _ = fourbit.load(str(folder), quant=QUANT, dtype=torch.float32)
    listed = unquantized_tensors(model)
    assert [tensor.name for tensor in listed] == ["model.embed_tokens.weight"]
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    assert listed[0].bytes == VOCAB * 48 * 4
    assert listed[0].share == pytest.approx(VOCAB * 48 * 4 / total)


def test_an_untied_head_is_listed_too(model_folder):
    model, _ = fourbit.load(str(model_folder("qwen2")), quant=QUANT, dtype=torch.float32)
    names = {tensor.name for tensor in unquantized_tensors(model)}
    assert names == {"model.embed_tokens.weight", "lm_head.weight"}


def test_without_quantization_the_weights_are_the_files(folder):
    model, _ = fourbit.load(str(folder), dtype=torch.float32)
    wanted = load_file(folder / WEIGHTS)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())
    assert not model.training


def test_loading_is_the_same_every_time(folder):
    one, two = (fourbit.load(str(folder), quant=QUANT)[0].state_dict() for _ in range(2))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_the_folder_is_not_written_to(folder):
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.iterdir()}
    fourbit.load(str(folder), quant=QUANT)
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.iterdir()}


def test_config_and_tokenizer_come_without_weights(folder):
    (folder / WEIGHTS).write_bytes(b"no weights")
    source = resolve_source(str(folder))
    assert load_config(source).model_type == "llama"
    assert load_tokenizer(source).chat_template == tiny_tokenizer().chat_template


def test_eager_attention_can_be_asked_for(folder):
    options = LoadOptions(dtype=torch.float32, attn_implementation="eager")
    model = load_model(resolve_source(str(folder)), options)
    assert model.config._attn_implementation == "eager"


def test_an_attention_that_does_not_exist_is_one_line(folder):
    options = LoadOptions(dtype=torch.float32, attn_implementation="nothing")
    with pytest.raises(ModelError, match="nothing"):
        load_model(resolve_source(str(folder)), options)


def test_a_model_without_any_linear_layer_is_not_called_4_bit():
    model = tiny_model("llama")
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(ModelError, match="nothing-to-quantize"):
        fourbit.quantize_model(model, QUANT)
