"""Everything that can be wrong with a quantized checkpoint ends in one line and exit code 3."""

from __future__ import annotations

import json
import random
import resource
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging

import fourbit
from commands import write_config
from fourbit.cli import main
from fourbit.errors import FourbitError, ModelError
from fourbit.integrations.transformers import FourbitConfig
from models import tiny_tokenizer

LAYER = "model.layers.0.mlp.up_proj"
STATE = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"
FORMATS = {
    "double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "single": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, model_folder) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("quantized") / kind
            names = {"bnb_4bit_compute_dtype": "float32", **FORMATS[kind]}
            if "load_in_8bit" in names:
                del names["bnb_4bit_compute_dtype"]
            AutoModelForCausalLM.from_pretrained(
                model_folder("llama"),
                dtype=torch.float32,
                quantization_config=FourbitConfig(**names),
            ).save_pretrained(made[kind])
            tiny_tokenizer().save_pretrained(made[kind])
        return made[kind]

    return folder


@pytest.fixture
def copy_of(saved, tmp_path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(saved(kind), tmp_path / "model"))


def refused(folder: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        fourbit.load(str(folder), dtype=torch.float32)
    assert caught.value.exit_code == 3
    assert "\n" not in caught.value.line()
    return caught.value


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})


def change_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def change_state(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    def rewrite(state: dict[str, Tensor]) -> None:
        facts = json.loads(bytes(state[STATE].numpy()))
        change(facts)
        state[STATE] = as_bytes(json.dumps(facts))

    change_tensors(folder, rewrite)


def as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).clone()


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(file: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("kind", FORMATS)
def test_an_undamaged_copy_loads(copy_of, kind):
    model, _ = fourbit.load(str(copy_of(kind)), dtype=torch.float32)
    assert type(model.get_submodule(LAYER)).__name__ == (
        "Linear8bit" if kind == "int8" else "Linear4bit"
    )


# The file itself.


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 0.5, -1])
def test_a_truncated_file(copy_of, keep):
    folder = copy_of("double")
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[: int(len(raw) * keep) if isinstance(keep, float) else keep])
    error = refused(folder)
    assert error.code == "damaged-file"
    assert error.where == str(file)


def test_bytes_behind_the_end(copy_of):
    folder = copy_of("double")
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"\0" * 8)
    assert "expected" in refused(folder).what


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 200 << 20])
def test_an_oversized_header(copy_of, length):
    folder = copy_of("double")
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    assert refused(folder).code == "damaged-file"


@pytest.mark.parametrize(
    "entry",
    [
        {"data_offsets": [0, 8]},
        {"data_offsets": [-8, 0]},
        {"data_offsets": [8, 0]},
        {"data_offsets": [0.0, 8.0]},
        {"data_offsets": [0]},
        {"data_offsets": None},
        {"shape": [-1, 5]},
        {"shape": [2**40, 2**40]},
        {"shape": [True]},
        {"shape": "big"},
        {"dtype": "F13"},
        {"dtype": 8},
        {"dtype": None},
    ],
    ids=str,
)
def test_entries_that_cannot_be(copy_of, entry):
    folder = copy_of("double")
    file = folder / "model.safetensors"
    header, data = header_of(file)
    header[f"{LAYER}.weight"] |= entry
    write_header(file, header, data)
    error = refused(folder)
    assert error.code == "damaged-file"
    assert LAYER in error.what or "begins at byte" in error.what


@pytest.mark.parametrize("text", [b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000, b"{}"])
def test_a_header_that_is_none(copy_of, text):
    folder = copy_of("double")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    refused(folder)


def test_a_flood_of_tensors_is_refused_in_time(copy_of):
    folder = copy_of("double")
    entry = '"a%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = ("{" + ",".join(entry % i for i in range(201_000)) + "}").encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    start = time.perf_counter()
    assert "201000 tensors" in refused(folder).what
    assert time.perf_counter() - start < 20


def test_only_pickles(copy_of):
    folder = copy_of("double")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    error = refused(folder)
    assert error.code == "no-safetensors"
    assert "never loaded" in error.what


# The tensors.


def drop(key: str) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        del state[key]

    return change


def put(key: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        state[key] = make(state[key])

    return change


def add(key: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.__setitem__(key, tensor)


def filled(value: float, at: int = 0) -> Callable[[Tensor], Tensor]:
    def make(tensor: Tensor) -> Tensor:
        flat = tensor.clone().flatten()
        flat[at] = value
        return flat.view_as(tensor)

    return make


W = f"{LAYER}.weight"
WRONG_TENSORS = [
    ("double", drop(f"{W}.absmax"), "absmax is missing"),
    ("double", drop(f"{W}.quant_map"), "quant_map is missing"),
    ("double", drop(f"{W}.nested_absmax"), "nested_absmax is missing"),
    ("double", drop(f"{W}.nested_quant_map"), "nested_quant_map is missing"),
    ("double", drop(STATE), "no quant_state"),
    ("double", drop(W), f"{LAYER}.weight"),
    ("double", put(W, lambda t: t[:-1].clone()), "packed bytes"),
    ("double", put(W, lambda t: t.float()), "packed bytes"),
    ("double", put(W, lambda t: t.to(torch.int8)), "packed bytes"),
    ("double", put(f"{W}.absmax", lambda t: t[:-1].clone()), "expected uint8 [60]"),
    ("double", put(f"{W}.absmax", lambda t: t.float()), "expected uint8 [60]"),
    ("double", put(f"{W}.absmax", lambda t: t[None]), "expected uint8 [60]"),
    ("double", put(f"{W}.nested_absmax", lambda t: t.half()), "expected float32 [1]"),
    ("double", put(f"{W}.nested_absmax", lambda t: torch.cat((t, t))), "expected float32 [1]"),
    ("double", put(f"{W}.nested_absmax", filled(float("nan"))), "nan at index 0"),
    ("double", put(f"{W}.nested_absmax", filled(float("inf"))), "inf at index 0"),
    ("double", put(f"{W}.quant_map", filled(0.5, 3)), "not those of the data type"),
    ("double", put(f"{W}.quant_map", filled(float("nan"), 3)), "not those of the data type"),
    ("double", put(f"{W}.quant_map", lambda t: t[:8].clone()), "expected float32 [16]"),
    ("double", put(f"{W}.nested_quant_map", lambda t: t.flip(0)), "not those of the data type"),
    ("double", add(f"{W}.quant_state.bitsandbytes__fp4", as_bytes("{}")), "2 quant_state"),
    ("double", put(STATE, lambda t: t.float()), "quant_state"),
    ("single", put(f"{W}.absmax", filled(float("nan"), 7)), "nan at index 7"),
    ("single", put(f"{W}.absmax", lambda t: t.to(torch.uint8)), "expected float32 [60]"),
    ("single", add(f"{W}.nested_absmax", torch.ones(1)), "nested_absmax beside"),
    ("int8", drop(f"{LAYER}.SCB"), "SCB is missing"),
    ("int8", drop(W), f"{LAYER}.weight"),
    ("int8", put(f"{LAYER}.SCB", filled(float("nan"), 5)), "nan at index 5"),
    ("int8", put(f"{LAYER}.SCB", lambda t: t[:-1].clone()), "expected float32 [80]"),
    ("int8", put(f"{LAYER}.SCB", lambda t: t.half()), "expected float32 [80]"),
    ("int8", put(f"{LAYER}.weight_format", lambda t: t + 1), "weight_format 1"),
    ("int8", put(f"{LAYER}.weight_format", lambda t: t + 2), "weight_format 2"),
    ("int8", put(f"{LAYER}.weight_format", lambda t: t + 3), "weight_format 3"),
    ("int8", put(f"{LAYER}.weight_format", lambda t: t.repeat(2)), "weight_format"),
    ("int8", put(W, lambda t: t.to(torch.uint8)), "expected int8 [80, 48]"),
    ("int8", put(W, lambda t: t.t().contiguous()), "expected int8 [80, 48]"),
    ("double", put("model.norm.weight", filled(float("nan"), 2)), "nan at flat index 2"),
    ("double", drop("model.norm.weight"), "model.norm.weight"),
    ("double", put("model.norm.weight", lambda t: t[:-1].clone()), "has shape [47]"),
    ("double", put("model.norm.weight", lambda t: t.to(torch.uint8)), "model.norm.weight"),
]


@pytest.mark.parametrize(
    ("kind", "change", "part"), WRONG_TENSORS, ids=[f"{k}-{p}" for k, _, p in WRONG_TENSORS]
)
def test_wrong_tensors(copy_of, kind, change, part):
    folder = copy_of(kind)
    change_tensors(folder, change)
    error = refused(folder)
    assert part in error.line()


def test_scales_of_a_layer_that_does_not_exist(copy_of):
    folder = copy_of("double")
    change_tensors(folder, add("model.layers.0.mlp.none.weight.absmax", torch.ones(3)))
    fourbit.load(str(folder), dtype=torch.float32)  # what nothing asks for does no harm


# The quant_state.

WRONG_STATES: list[tuple[dict[str, Any], str]] = [
    ({"colour": "red"}, "colour"),
    ({"blocksize": None}, "blocksize None"),
    ({"blocksize": True}, "blocksize True"),
    ({"blocksize": 65}, "blocksize 65"),
    ({"blocksize": 2**70}, "blocksize"),
    ({"blocksize": "64"}, "blocksize '64'"),
    ({"blocksize": [64]}, "blocksize [64]"),
    ({"blocksize": 128}, "expected uint8 [30]"),
    ({"dtype": "int8"}, "dtype 'int8'"),
    ({"dtype": ["float32"]}, "dtype"),
    ({"dtype": {}}, "dtype"),
    ({"shape": [80, 49]}, "shape [80, 49]"),
    ({"shape": [48, 80]}, "shape [48, 80]"),
    ({"shape": [80, True]}, "is no list of sizes"),
    ({"shape": [80.0, 48.0]}, "is no list of sizes"),
    ({"shape": 3840}, "is no list of sizes"),
    ({"shape": []}, "shape []"),
    ({"shape": [2**64, 48]}, "shape"),
    ({"quant_type": "fp4"}, "quant_type 'fp4'"),
    ({"quant_type": ["nf4"]}, "quant_type"),
    ({"nested_offset": float("nan")}, "no finite number"),
    ({"nested_offset": float("inf")}, "no finite number"),
    ({"nested_offset": 1e300}, "nested_offset"),
    ({"nested_offset": 10**400}, "nested_offset"),
    ({"nested_offset": True}, "no finite number"),
    ({"nested_offset": "0"}, "no finite number"),
    ({"nested_blocksize": 64}, "nested_blocksize 64"),
    ({"nested_blocksize": True}, "nested_blocksize True"),
    ({"nested_dtype": "float16"}, "nested_dtype"),
]


@pytest.mark.parametrize(("change", "part"), WRONG_STATES, ids=[str(c) for c, _ in WRONG_STATES])
def test_wrong_quant_states(copy_of, change, part):
    folder = copy_of("double")
    change_state(folder, lambda facts: facts.update(change))
    error = refused(folder)
    assert error.code == "bad-quantized-tensor"
    assert error.where.startswith(LAYER)
    assert part in error.what


@pytest.mark.parametrize("key", ["quant_type", "blocksize", "dtype", "shape", "nested_offset"])
def test_a_key_missing_from_the_quant_state(copy_of, key):
    folder = copy_of("double")
    change_state(folder, lambda facts: facts.pop(key) and None)
    assert key in refused(folder).what


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "7", "null", '{"a":' * 500, "{" + " " * 5000 + "}", "\xff"],
)
def test_a_quant_state_that_is_no_object(copy_of, text):
    folder = copy_of("double")
    change_tensors(folder, add(STATE, as_bytes(text or " ")))
    assert "no JSON object" in refused(folder).what


# config.json.


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "compressed-tensors", 7, None, "gptq\n"])
def test_other_methods(copy_of, method):
    folder = copy_of("double")
    change_config(
        folder, lambda c: c.__setitem__("quantization_config", {"quant_method": method, "bits": 4})
    )
    error = refused(folder)
    assert error.code == "already-quantized"
    assert "config.json" in error.where


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"bnb_4bit_quant_type": "int3"}, "int3"),
        ({"bnb_4bit_quant_type": ["nf4"]}, "nf4"),
        ({"bnb_4bit_compute_dtype": "float99"}, "float99"),
        ({"bnb_4bit_compute_dtype": 16}, "16"),
        ({"bnb_4bit_quant_storage": "float64"}, "float64"),
        ({"bnb_4bit_quant_storage": {}}, "bnb_4bit_quant_storage"),
        ({"llm_int8_threshold": "high"}, "high"),
        ({"llm_int8_threshold": float("nan")}, "nan"),
        ({"llm_int8_skip_modules": "lm_head"}, "lm_head"),
        ({"llm_int8_skip_modules": [7]}, "7"),
        ({"llm_int8_skip_modules": {"a": 1}}, "llm_int8_skip_modules"),
        ({"load_in_4bit": "yes"}, "yes"),
        ({"blocksize": 3}, "blocksize"),
        ({"blocksize": [64]}, "blocksize"),
    ],
    ids=str,
)
def test_wrong_values_in_the_quantization_config(copy_of, change, part):
    folder = copy_of("double")
    change_config(folder, lambda c: c["quantization_config"].update(change))
    error = refused(folder)
    assert error.code == "bad-config-json"
    assert part in error.what


@pytest.mark.parametrize("value", [[], "nf4", 7, [1]])
def test_a_quantization_config_that_is_no_object(copy_of, value):
    folder = copy_of("double")
    change_config(folder, lambda c: c.__setitem__("quantization_config", value))
    refused(folder)


def test_unknown_names_in_the_quantization_config_do_no_harm(copy_of):
    folder = copy_of("double")
    change_config(folder, lambda c: c["quantization_config"].update({"new_in_2027": 1}))
    fourbit.load(str(folder), dtype=torch.float32)


def test_the_tensors_decide_over_config_json(copy_of, saved):
    folder = copy_of("double")
    wrong = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
    change_config(folder, lambda c: c["quantization_config"].update(wrong))
    model, _ = fourbit.load(str(folder), dtype=torch.float32)
    right, _ = fourbit.load(str(saved("double")), dtype=torch.float32)
    layer = model.get_submodule(LAYER)
    assert (layer.quant_type, layer.double_quant) == ("nf4", True)
    assert torch.equal(layer.dequantize(), right.get_submodule(LAYER).dequantize())


@pytest.mark.parametrize("kind", FORMATS)
def test_quantized_weights_that_config_json_does_not_mention(copy_of, kind):
    folder = copy_of(kind)
    change_config(folder, lambda c: c.pop("quantization_config") and None)
    error = refused(folder)
    assert error.code == "quantized-without-config"


@pytest.mark.parametrize("kind", ["double", "int8"])
def test_plain_weights_that_config_json_calls_quantized(copy_of, kind, model_folder):
    folder = copy_of(kind)
    shutil.copy(model_folder("llama") / "model.safetensors", folder / "model.safetensors")
    error = refused(folder)
    assert error.code == "bad-quantized-tensor"
    assert "config.json calls" in error.what


@pytest.mark.parametrize(("files", "called"), [("double", "int8"), ("int8", "double")])
def test_4_and_8_bits_mixed_up(copy_of, saved, files, called):
    folder = copy_of(files)
    shutil.copy(saved(called) / "config.json", folder / "config.json")
    refused(folder)


def test_layers_left_plain_by_config_json_but_quantized_in_the_files(copy_of):
    folder = copy_of("double")
    change_config(
        folder, lambda c: c["quantization_config"].update(llm_int8_skip_modules=["up_proj"])
    )
    error = refused(folder)
    assert "leaves its layer plain" in error.what
    assert "up_proj" in error.where


def test_remote_code_is_refused(copy_of):
    folder = copy_of("double")
    change_config(folder, lambda c: c.__setitem__("auto_map", {"AutoModelForCausalLM": "evil.X"}))
    assert refused(folder).code == "remote-code"


# Shards.


@pytest.fixture
def sharded(saved, tmp_path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(
        saved("double"), quantization_config=FourbitConfig(**FORMATS["double"])
    )
    model.save_pretrained(tmp_path / "model", max_shard_size="30KB")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    return tmp_path / "model"


def test_shards_load(sharded, saved):
    ids = torch.arange(9)[None]
    models = [fourbit.load(str(f), dtype=torch.float32)[0] for f in (sharded, saved("double"))]
    with torch.no_grad():
        assert torch.equal(models[0](ids).logits, models[1](ids).logits)


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/etc/passwd", "none.safetensors", "a\\b.safetensors", 7, ""]
)
def test_an_index_that_points_elsewhere(sharded, name):
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"][f"{LAYER}.weight"] = name
    file.write_text(json.dumps(index))
    assert refused(sharded).code == "bad-index"


def test_a_missing_shard(sharded):
    sorted(sharded.glob("*.safetensors"))[1].unlink()
    error = refused(sharded)
    assert error.code == "bad-index"
    assert "missing" in error.what


def test_a_damaged_shard_that_the_index_does_not_name_is_seen_too(sharded):
    (sharded / "extra.safetensors").write_bytes(b"\0" * 16)
    assert "extra" in refused(sharded).line()


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": []}', '{"weight_map": {}}', "{"])
def test_an_index_that_is_none(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    assert refused(sharded).code == "bad-index"


# The command line.


def exit_code(command: str, folder: Path, place: Path) -> int:
    words: dict[str, list[str | Path]] = {
        "generate": ["generate", folder, "--raw", "--prompt", "hello"],
        "inspect": ["inspect", folder],
        "train": ["train", write_config(place / "t", folder)],
    }
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words[command]])
    return ended.value.code


@pytest.mark.parametrize("command", ["generate", "train"])
def test_the_command_line_says_it_in_one_line(copy_of, command, capsys, tmp_path):
    folder = copy_of("double")
    change_config(folder, lambda c: c.__setitem__("quantization_config", {"quant_method": "gptq"}))
    assert exit_code(command, folder, tmp_path) == 3
    err = capsys.readouterr().err
    assert len([line for line in err.splitlines() if line.startswith("error[")]) == 1
    assert "does not read (gptq)" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["generate", "inspect", "train"])
def test_the_command_line_on_a_truncated_file(copy_of, command, capsys, tmp_path):
    folder = copy_of("double")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert exit_code(command, folder, tmp_path) == 3
    assert "error[damaged-file]" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "train"])
def test_the_command_line_on_a_wrong_tensor(copy_of, command, capsys, tmp_path):
    folder = copy_of("single")
    change_tensors(folder, put(f"{W}.absmax", filled(float("nan"), 7)))
    assert exit_code(command, folder, tmp_path) == 3
    err = capsys.readouterr().err
    assert f"error[bad-quantized-tensor] {W}.absmax: nan at index 7" in err
    assert "Traceback" not in err


# Fuzz.


def damaged(folder: Path, rng: random.Random, *, int8: bool) -> str:
    """One random fault in a header, a JSON file or the data; returns what was done."""
    file = folder / rng.choice(["model.safetensors"] * 5 + ["config.json"])
    raw = bytearray(file.read_bytes())
    end = len(raw)
    if file.suffix == ".safetensors" and rng.random() < 0.7:
        end = 8 + struct.unpack("<Q", raw[:8])[0]
    kinds = ["flip", "flip", "cut", "delete", "insert", "tensor", "tensor", "entry"]
    kind = rng.choice(kinds if int8 else [*kinds, "state"])
    at = rng.randrange(end)
    if kind == "flip":
        for _ in range(rng.choice([1, 1, 4])):
            raw[rng.randrange(end)] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del raw[at:]
    elif kind == "delete":
        del raw[at : at + rng.randrange(1, 40)]
    elif kind == "insert":
        raw[at:at] = rng.choice([b"\0", b"9", b'"', b"{", b"\xff" * 9, b"1e999", b"null"])
    else:
        return kind + " " + damaged_tensors(folder / "model.safetensors", kind, rng)
    file.write_bytes(raw)
    return f"{kind} {file.name} {at}"


def damaged_tensors(file: Path, kind: str, rng: random.Random) -> str:
    if kind == "entry":
        header, data = header_of(file)
        name = rng.choice([n for n in header if n != "__metadata__"])
        key = rng.choice(["dtype", "shape", "data_offsets"])
        header[name][key] = rng.choice(["F32", "I8", "U8", [], [1], [0, 0], None, 7, [2, 2], {}])
        write_header(file, header, data)
        return f"{name} {key}"
    state = load_file(file)
    name = rng.choice(sorted(n for n in state if ("quant_state" in n) == (kind == "state")))
    tensor = state[name]
    if kind == "state":
        text = bytearray(tensor.numpy().tobytes())
        text[rng.randrange(len(text))] = rng.choice(b'0129"{}[]-.eNnt, ')
        state[name] = torch.frombuffer(text, dtype=torch.uint8).clone()
    else:
        change = rng.choice(
            [
                lambda t: t.flatten()[:-1].clone(),
                lambda t: t.float(),
                lambda t: t.to(torch.uint8),
                lambda t: t.flatten(),
                lambda t: torch.cat((t.flatten(), t.flatten())),
                lambda t: t[..., None].clone(),
                lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t,
                lambda t: torch.full_like(t, float("inf")) if t.is_floating_point() else t,
                lambda t: torch.empty(0, dtype=t.dtype),
                None,
            ]
        )
        if change is None:
            del state[name]
            if rng.random() < 0.5:
                state[name + "x"] = tensor
        else:
            state[name] = change(tensor)
    save_file(state, file, metadata={"format": "pt"})
    return name


def outcome_of(folder: Path, what: str) -> str:
    caught: Exception | None = None
    try:
        fourbit.load(str(folder), dtype=torch.float32)
    except Exception as error:
        caught = error
    if caught is None:
        return "loaded"
    if not isinstance(caught, FourbitError):
        raise AssertionError(what) from caught
    assert caught.exit_code == 3, (what, caught.line())
    assert "\n" not in caught.line()
    return caught.code


@pytest.mark.parametrize("kind", FORMATS)
def test_random_damage_ends_in_one_line_or_in_a_model(saved, tmp_path, kind):
    hf_logging.set_verbosity_error()
    rng = random.Random(f"fourbit {kind}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes: dict[str, int] = {}
    for round_ in range(30):
        folder = Path(shutil.copytree(saved(kind), tmp_path / str(round_)))
        what = damaged(folder, rng, int8=kind == "int8")
        start = time.perf_counter()
        outcome = outcome_of(folder, what)
        assert time.perf_counter() - start < 20, what
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        shutil.rmtree(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024
    assert len(outcomes) >= 4, outcomes
