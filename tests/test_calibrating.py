"""`fourbit quantize --calibrate`: file to file, resumable, the loss on unseen text falls."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fourbit as library
from commands import fourbit
from fourbit.errors import InputError, Interrupted, ModelError
from fourbit.linear import Linear4bit, QuantizedLinear
from fourbit.loading import load_tokenizer
from fourbit.quantize import QuantConfig
from fourbit.quantizing import QuantizeOptions, quantize_checkpoint
from fourbit.quantizing import calibrate as calibrating
from fourbit.quantizing.calibrate import Calibration
from fourbit.quantizing.walk import _Moments, calibrate_layers
from fourbit.sources import resolve_source
from models import PACKABLE, UNPACKABLE, write_model

WORDS = ("the sea is blue", "a ship sails", "on the", "waves", "under clouds", "and it rains")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(". ".join(draw.choice(WORDS) for _ in range(900)))
    return path


def options(text: Path, *, quant: QuantConfig | None = None, **changes) -> QuantizeOptions:
    chosen = Calibration(text, tokens=4096, length=64, **changes)
    return QuantizeOptions(quant=quant or QuantConfig(), calibrate=chosen)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        k: t for path in sorted(folder.glob("*.safetensors")) for k, t in load_file(path).items()
    }


@pytest.mark.parametrize("name", [*PACKABLE, *UNPACKABLE])
def test_layers_are_walked_one_by_one(name, tmp_path):
    folder = write_model(tmp_path / name, name)
    model, _ = library.load(str(folder), quant=QuantConfig())
    quantized = {n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    seen: dict[str, torch.Tensor] = {}
    tokens = torch.randint(0, 200, (5, 20))

    def keep(layer_name, layer, weight, moments):
        seen[layer_name] = moments
        return {}

    def weight(layer_name):
        return model.get_submodule(layer_name).dequantize()

    done = []
    calibrate_layers(model.eval(), tokens, weight, keep, done=lambda number, _: done.append(number))
    assert done == list(range(len(done)))
    assert seen.keys() == quantized
    inputs: dict[str, torch.Tensor] = {}

    def note(module, args, *, layer_name):
        flat = args[0].reshape(-1, args[0].shape[-1]).float()
        inputs[layer_name] = flat.t() @ flat

    for layer_name in quantized:
        module = model.get_submodule(layer_name)
        module.register_forward_pre_hook(partial(note, layer_name=layer_name))
    with torch.no_grad():
        model(tokens)
    for layer_name, wanted in inputs.items():
        torch.testing.assert_close(seen[layer_name], wanted, rtol=5e-2, atol=1e-1 * wanted.max())


@pytest.mark.parametrize(
    "quant",
    [
        QuantConfig(),
        QuantConfig(quant_type="fp4", blocksize=128),
        QuantConfig(double_quant=False),
        QuantConfig(quant_type="int8"),
    ],
    ids=lambda quant: f"{quant.quant_type}-{quant.double_quant}",
)
def test_same_names_shapes_and_dtypes_and_other_codes(quant, text, tmp_path):
    folder = write_model(tmp_path / "model", "llama")
    quantize_checkpoint(str(folder), tmp_path / "plain", options=QuantizeOptions(quant=quant))
    found = quantize_checkpoint(
        str(folder), tmp_path / "calibrated", options=options(text, quant=quant)
    )
    plain, ours = tensors(tmp_path / "plain"), tensors(tmp_path / "calibrated")
    assert plain.keys() == ours.keys()
    for name, tensor in plain.items():
        state = "quant_state" in name  # its length follows the digits of an offset
        assert ours[name].dtype == tensor.dtype
        assert state or ours[name].shape == tensor.shape
    changed = [n for n in plain if "quant_state" not in n and not torch.equal(plain[n], ours[n])]
    assert any(name.endswith("weight") for name in changed)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config == json.loads((tmp_path / "calibrated" / "config.json").read_text())
    assert found.calibration is not None
    assert found.calibration["loss_held_out_after"] > 0
    library.load(str(tmp_path / "calibrated"))


def test_an_interrupted_calibration_goes_on_and_gives_the_same_bytes(text, tmp_path, monkeypatch):
    folder = write_model(tmp_path / "model", "llama")
    quantize_checkpoint(str(folder), tmp_path / "whole", options=options(text))
    calls = []
    original = Linear4bit.quantized_for

    def cut_off(self, *args, **kwargs):
        calls.append(kwargs["name"])
        if len(calls) == 9:  # in the second layer
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Linear4bit, "quantized_for", cut_off)
    with pytest.raises(Interrupted):
        quantize_checkpoint(str(folder), tmp_path / "out", options=options(text))
    assert list((tmp_path / "out.unfinished" / "calibrated").iterdir())
    quantize_checkpoint(str(folder), tmp_path / "out", options=options(text))
    assert len(calls) < 2 * 14, "the first layer was not calibrated again"
    whole, again = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert not (tmp_path / "out.unfinished").exists()


def test_other_settings_do_not_continue_old_layers(text, tmp_path, monkeypatch):
    folder = write_model(tmp_path / "model", "llama")
    losses = []

    def stop_after_the_layers(*_):
        losses.append(1)
        if len(losses) == 2:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(calibrating, "_loss", stop_after_the_layers)
    with pytest.raises(Interrupted):
        quantize_checkpoint(str(folder), tmp_path / "out", options=options(text, damping=0.01))
    monkeypatch.undo()
    quantize_checkpoint(str(folder), tmp_path / "out", options=options(text, damping=0.5))
    quantize_checkpoint(str(folder), tmp_path / "whole", options=options(text, damping=0.5))
    a, b = tensors(tmp_path / "out"), tensors(tmp_path / "whole")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_chats_are_rendered(tmp_path):
    folder = write_model(tmp_path / "model", "llama")
    rows = [
        {
            "messages": [
                {"role": "user", "content": "hello"},
                {"role": "assistant", "content": "yes"},
            ]
        }
        for _ in range(40)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer(resolve_source(str(folder)))
    windows, sha256 = calibrating.calibration_text(path, tokenizer, length=16, key="--calibrate")
    assert windows.shape[1] == 16
    assert len(sha256) == 64
    shown = tokenizer.decode(windows.flatten())
    assert "hello" in shown
    assert "assistant" in shown


def test_little_text_and_odd_models_are_refused(text, tmp_path):
    folder = write_model(tmp_path / "model", "llama")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(InputError, match="too-little-text"):
        quantize_checkpoint(str(folder), tmp_path / "out", options=options(short))
    with pytest.raises(InputError, match="absent.txt"):
        quantize_checkpoint(str(folder), tmp_path / "out", options=options(tmp_path / "absent.txt"))
    model, _ = library.load(str(folder), quant=QuantConfig())
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]
    forward = type(model.model).forward

    def twice(self, *args, **kwargs):
        forward(self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    type(model.model).forward = twice
    tokens = torch.randint(0, 200, (2, 8))
    try:
        with pytest.raises(ModelError, match="cannot-calibrate"):
            calibrate_layers(model.eval(), tokens, lambda _: torch.zeros(0), lambda *_: {})
    finally:
        type(model.model).forward = forward


def test_command(text, tmp_path):
    folder = write_model(tmp_path / "model", "llama")
    done = fourbit(
        "quantize", folder, "-o", tmp_path / "out", "--calibrate", text,
        "--calibrate-check", text, "--calibrate-tokens", "2048", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["calibration"]
    assert set(told) >= {"tokens", "loss_held_out_before", "loss_other_after"}
    assert "loss on other text" in done.stderr


@pytest.mark.parametrize("width", [1, 255, 256, 257, 600])
def test_moments_are_the_sum_over_all_passes(width):
    passes = [torch.randn(2, 7, width) for _ in range(3)]
    moments = _Moments()
    for x in passes:
        moments.begin()
        moments.add("q", x)
        moments.add("k", x)  # the same input: summed once
    every = torch.cat(passes).view(-1, width).double()
    assert list(moments.sums) == ["q"]
    for name in ("q", "k", "q"):
        torch.testing.assert_close(moments.of(name).double(), every.t() @ every, atol=1e-4, rtol=0)
    assert moments.of("never") is None


def test_damping_that_is_no_number_is_refused(tmp_path):
    done = fourbit("quantize", "m", "-o", tmp_path / "out", "--calibrate", "t", "--damping", "nan")
    assert done.returncode == 2
    assert "is not in the range" in done.stderr.splitlines()[-1]
