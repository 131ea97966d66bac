"""`fourbit quantize`: the tensors of loading and saving, resumable, and never half finished."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import time
import warnings
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fourbit
from commands import fourbit as run
from commands import start
from fourbit.cli import main
from fourbit.errors import EnvironmentFault, FourbitError, InputError, Interrupted, ModelError
from fourbit.inspection import inspect
from fourbit.integrations.transformers import FourbitConfig
from fourbit.linear import Linear8bit, QuantizedLinear
from fourbit.quantize import QuantConfig
from fourbit.quantizing import QuantizeOptions, quantize_checkpoint
from fourbit.quantizing import run as run_module
from fourbit.quantizing.calibrate import Calibration
from fourbit.quantizing.compare import compare
from fourbit.shards import Entry, ShardWriter
from fourbit.sources import check_safetensors
from fourbit.training.progress import Reporter
from models import tiny_tokenizer, train_tiny, write_chats, write_model

NESTED = {"quant_type": "nf4"}
FLAT = {"quant_type": "fp4", "double_quant": False, "blocksize": 128}
INT8 = {"quant_type": "int8"}


def options(max_shard_size="60kB", quant=None, **changes) -> QuantizeOptions:
    return QuantizeOptions(
        quant=QuantConfig(**(quant or NESTED)), max_shard_size=max_shard_size, **changes
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert tensor.shape == other[name].shape, name
        # packed bytes declared as floats hold NaN
        one_bytes, other_bytes = (x.reshape(-1).view(torch.uint8) for x in (tensor, other[name]))
        assert torch.equal(one_bytes, other_bytes), name


def refusal(model: Path, output: Path, *, kind=FourbitError, **changes) -> FourbitError:
    with pytest.raises(kind) as caught:
        quantize_checkpoint(str(model), output, options=options(**changes))
    assert "\n" not in caught.value.line()
    return caught.value


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A bfloat16 Llama in several shards."""
    folder = tmp_path_factory.mktemp("source") / "llama"
    return write_model(
        folder, "llama", dtype=torch.bfloat16, max_shard_size="40kB", tie_word_embeddings=False
    )


@pytest.fixture
def copied(source, tmp_path):
    return Path(shutil.copytree(source, tmp_path / "copied"))


# The same as loading and saving.


@pytest.mark.parametrize(
    ("name", "quant", "storage"),
    [
        ("llama", NESTED, "uint8"),
        pytest.param("llama", FLAT, "bfloat16", marks=pytest.mark.slow),
        ("llama", INT8, "uint8"),
        ("gpt2", NESTED, "uint8"),
        pytest.param("gpt2", INT8, "uint8", marks=pytest.mark.slow),
        ("qwen2", NESTED, "float32"),
        pytest.param("qwen3", FLAT, "uint8", marks=pytest.mark.slow),
        pytest.param("gpt_neox", NESTED, "uint8", marks=pytest.mark.slow),
        ("opt", NESTED, "uint8"),
    ],
)
def test_the_tensors_are_those_of_from_pretrained_and_save_pretrained(
    name, quant, storage, tmp_path
):
    folder = write_model(tmp_path / "source", name, dtype=torch.bfloat16)
    out = tmp_path / "out"
    asked = options("20kB", quant=quant, storage=storage)
    result = quantize_checkpoint(str(folder), out, options=asked)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        asked = FourbitConfig(**config(out)["quantization_config"])
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=asked
    )
    model.save_pretrained(tmp_path / "saved")
    same(tensors(out), tensors(tmp_path / "saved"))
    assert config(out) == config(tmp_path / "saved")
    seen = inspect(str(out))
    assert seen.bits_per_weight == result.bits_per_weight
    assert seen.parameters == result.parameters
    assert seen.shards > 1
    again, tokenizer = fourbit.load(str(out), dtype=torch.bfloat16)
    ids = torch.tensor([tokenizer("A tall llama")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("quant", "calibrated"),
    [
        (NESTED, False),
        ({"quant_type": "fp4", "double_quant": False}, False),
        (INT8, False),
        (NESTED, True),
    ],
)
def test_bitsandbytes_reads_it_with_the_same_weights(quant, calibrated, tmp_path):
    bnb = pytest.importorskip("bitsandbytes.functional")
    # rows of whole blocks: their CPU kernel is wrong for others
    folder = write_model(
        tmp_path / "source", "llama", dtype=torch.bfloat16, hidden_size=64, intermediate_size=128
    )
    chosen = options(quant=quant)
    if calibrated:
        text = tmp_path / "book.txt"
        text.write_text("A tall llama and a small one. " * 200)
        chosen = replace(chosen, calibrate=Calibration(text, tokens=2048, length=64))
    quantize_checkpoint(str(folder), tmp_path / "out", options=chosen)
    ours, _ = fourbit.load(str(tmp_path / "out"), dtype=torch.bfloat16)
    ids = torch.arange(24)[None]
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"), torch.no_grad():
        warnings.simplefilter("ignore")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
        modules = dict(theirs.named_modules())
        compared = 0
        # before the first product, which repacks their weights in place
        for name, layer in ours.named_modules():
            if isinstance(layer, Linear8bit):
                assert torch.equal(modules[name].weight.data, layer.weight)
                scales = modules[name].weight.SCB
                assert torch.equal(scales.flatten(), layer.weight_absmax.view(torch.float32))
                compared += 1
            elif isinstance(layer, QuantizedLinear):
                weight = modules[name].weight
                restored = bnb.dequantize_4bit(weight.data, weight.quant_state)
                assert torch.equal(restored, layer.dequantize())
                compared += 1
        assert compared == 14
        expected = theirs(ids).logits.float()
        got = ours(ids).logits.float()
    # their products round differently, in bfloat16 or float16
    assert torch.cosine_similarity(got, expected, dim=-1).min() > 0.995


def test_tied_heads_are_written_once_and_untied_ones_twice(tmp_path):
    tied = write_model(tmp_path / "tied", "qwen2", tie_word_embeddings=True)
    state = load_file(tied / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tied / "model.safetensors", metadata={"format": "pt"})
    quantize_checkpoint(str(tied), tmp_path / "once", options=options())
    assert "lm_head.weight" not in tensors(tmp_path / "once")
    state["lm_head.weight"] += 1
    save_file(state, tied / "model.safetensors", metadata={"format": "pt"})
    quantize_checkpoint(str(tied), tmp_path / "twice", options=options())
    assert "lm_head.weight" in tensors(tmp_path / "twice")


def test_names_without_the_models_prefix_and_unused_tensors(source, copied, tmp_path):
    state = {k.removeprefix("model."): v for k, v in tensors(copied).items()}
    for path in copied.glob("*.safetensors*"):
        path.unlink()
    save_file(state | {"rotary.inv_freq": torch.ones(4)}, copied / "model.safetensors")
    result = quantize_checkpoint(str(copied), tmp_path / "out", options=options())
    quantize_checkpoint(str(source), tmp_path / "plain", options=options())
    same(tensors(tmp_path / "out"), tensors(tmp_path / "plain"))
    assert result.unused == ("rotary.inv_freq",)


def test_skipped_modules_stay_plain_besides_the_head(source, tmp_path):
    out = tmp_path / "out"
    quantize_checkpoint(str(source), out, options=options(skip=("v_proj", "model.layers.0.mlp")))
    written = tensors(out)
    assert written["model.layers.0.self_attn.v_proj.weight"].dtype == torch.bfloat16
    assert written["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert written["model.layers.1.mlp.up_proj.weight"].dtype == torch.uint8
    assert written["lm_head.weight"].dtype == torch.bfloat16
    skipped = config(out)["quantization_config"]["llm_int8_skip_modules"]
    assert skipped == ["lm_head", "v_proj", "model.layers.0.mlp"]
    model, _ = fourbit.load(str(out))
    assert not isinstance(model.model.layers[0].mlp.up_proj, QuantizedLinear)


# The file.


def test_every_tensor_lies_aligned(tmp_path):
    sizes = [(3,), (64,), (7, 5), (128, 2), (1,), (96,)]
    entries = [
        Entry(f"{n}{dtype}", dtype, size)
        for n, size in enumerate(sizes)
        for dtype in (torch.uint8, torch.float32, torch.bfloat16)
    ]
    entries.append(Entry("text", torch.uint8, (100,), open_ended=True))
    path = tmp_path / "a.safetensors"
    writer = ShardWriter(path, entries)
    for entry in reversed(entries):
        size = (41,) if entry.open_ended else entry.shape
        writer.put(entry.name, torch.ones(size, dtype=entry.dtype))
    assert writer.finish() == path.stat().st_size
    header = check_safetensors(path)
    data = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert data % 64 == 0
    for entry in entries[:-1]:
        at = data + header[entry.name]["data_offsets"][0]
        assert at % entry.dtype.itemsize == 0
        assert at % 64 == 0 or entry.bytes % 64
    assert all(bool((tensor == 1).all()) for tensor in load_file(path).values())
    assert header["text"]["shape"] == [41]


def test_a_loaded_folder_is_the_mapped_file(source, tmp_path):
    """No copy: two processes that load it share its pages, and nothing is read in advance."""
    out = tmp_path / "out"
    quantize_checkpoint(str(source), out, options=options())
    model, _ = fourbit.load(str(out), dtype=torch.bfloat16)
    places = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(out) in line:
            low, high = line.split()[0].split("-")
            places.append((int(low, 16), int(high, 16)))
    copied_bytes = total = 0
    for name, parameter in model.named_parameters():
        mapped = any(low <= parameter.data_ptr() < high for low, high in places)
        assert mapped or parameter.nbytes <= 4, name
        total += parameter.nbytes
        copied_bytes += 0 if mapped else parameter.nbytes
    assert copied_bytes < 0.001 * total


# Interruption.


@pytest.mark.slow
def test_a_killed_process_continues_with_identical_bytes(source, tmp_path):
    quantize_checkpoint(str(source), tmp_path / "whole", options=options("20kB"))
    out, unfinished = tmp_path / "out", tmp_path / "out.unfinished"
    process = start("quantize", source, "-o", out, "--max-shard-size", "20kB")
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if list((unfinished / "model").glob("*.safetensors")):
            process.kill()
        time.sleep(0.001)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    progress = unfinished / "progress.json"
    kept = json.loads(progress.read_text())["finished"]
    before = {name: (unfinished / "model" / name).stat().st_ino for name in kept}
    done = run("quantize", source, "-o", out, "--max-shard-size", "20kB", "--json")
    assert done.returncode == 0, done.stderr
    assert not unfinished.exists()
    assert files(out) == files(tmp_path / "whole")
    assert all((out / name).stat().st_ino == inode for name, inode in before.items())


class _Stop:
    """Raises in the middle of a later file."""

    def __init__(self, monkeypatch, error: BaseException, after: int) -> None:
        self.left = after
        quantize = run_module._Work._quantize

        def failing(work, unit, pattern, writer):
            self.left -= 1
            if self.left < 0:
                raise error
            return quantize(work, unit, pattern, writer)

        monkeypatch.setattr(run_module._Work, "_quantize", failing)


def test_ctrl_c_says_how_to_continue_and_continuing_gives_the_same(source, tmp_path, monkeypatch):
    whole = quantize_checkpoint(str(source), tmp_path / "whole", options=options())
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        _Stop(patch, KeyboardInterrupt(), 9)
        error = refusal(source, out, kind=Interrupted)
    assert error.exit_code == 130
    assert error.fix == "the same command again continues"
    assert "files finished; they are kept in" in error.what
    assert not out.exists()
    names = os.listdir(tmp_path / "out.unfinished" / "model")
    assert names
    assert all(name.endswith(".safetensors") for name in names)
    lines: list[str] = []
    reporter = Reporter(quiet=True, log=lines.append)
    again = quantize_checkpoint(str(source), out, options=options(), reporter=reporter)
    assert lines[0].startswith("continuing: ")
    assert files(out) == files(tmp_path / "whole")
    assert again.worst == whole.worst
    assert again.relative_error == whole.relative_error


@pytest.mark.parametrize("change", ["settings", "source", "damage"])
def test_what_no_longer_fits_is_not_continued(change, copied, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        _Stop(patch, KeyboardInterrupt(), 9)
        refusal(copied, out, kind=Interrupted)
    asked = NESTED
    if change == "settings":
        asked = FLAT
    elif change == "source":
        first = sorted(copied.glob("*.safetensors"))[0]
        os.utime(first, ns=(1, 1))
    else:
        part = sorted((tmp_path / "out.unfinished" / "model").iterdir())[0]
        part.write_bytes(part.read_bytes()[:-1])
    lines: list[str] = []
    reporter = Reporter(quiet=True, log=lines.append)
    quantize_checkpoint(str(copied), out, options=options(quant=asked), reporter=reporter)
    if change != "damage":
        assert "starting over" in lines[0]
    quantize_checkpoint(str(copied), tmp_path / "whole", options=options(quant=asked))
    assert files(out) == files(tmp_path / "whole")


def test_a_full_disk_keeps_what_is_finished(source, tmp_path):
    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
        error = refusal(source, out, kind=EnvironmentFault)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "File too large" in error.what
    assert error.exit_code == 4
    assert not out.exists()
    quantize_checkpoint(str(source), out, options=options())
    quantize_checkpoint(str(source), tmp_path / "whole", options=options())
    assert files(out) == files(tmp_path / "whole")


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    source, tmp_path, monkeypatch
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 10**6))
    error = refusal(source, tmp_path / "out", kind=EnvironmentFault)
    assert error.code == "disk-too-small"
    assert error.what.startswith("needs 33.")
    assert error.what.endswith("1.00 MB are free")
    assert list(tmp_path.iterdir()) == []


# Refusals.


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_nan_names_tensor_and_place_and_leaves_nothing(name, copied, tmp_path):
    for path in copied.glob("*.safetensors"):
        state = load_file(path)
        if name in state:
            state[name].view(-1)[17] = float("nan")
            save_file(state, path, metadata={"format": "pt"})
    error = refusal(copied, tmp_path / "out", kind=ModelError)
    assert error.code == "nonfinite-weight"
    assert error.where == name
    assert error.what.startswith("nan at flat index 17 (1 non-finite of")
    assert sorted(os.listdir(tmp_path)) == ["copied"]


def test_quantized_input_is_refused(source, tmp_path):
    quantize_checkpoint(str(source), tmp_path / "out", options=options())
    error = refusal(tmp_path / "out", tmp_path / "again")
    assert error.line() == (
        f"error[already-quantized] {tmp_path / 'out'}: the checkpoint is quantized already (nf4);"
        " fix: start from the 16-bit checkpoint; this one loads as it is"
    )


def test_an_existing_output_is_replaced_only_when_asked(copied, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    quantize_checkpoint(str(copied), out, options=options())
    assert refusal(copied, out).code == "output-exists"
    quantize_checkpoint(str(copied), out, options=options(quant=INT8, overwrite=True))
    assert config(out)["quantization_config"]["load_in_8bit"] is True
    assert sorted(os.listdir(tmp_path)) == ["copied", "out"]
    other = tmp_path / "photos"
    other.mkdir()
    (other / "one.jpg").write_bytes(b"x")
    assert refusal(copied, other, overwrite=True).what == "is there already and is no model folder"
    for place in (copied, copied / "inner", tmp_path):
        assert refusal(copied, place, overwrite=True).code == "output-is-input"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"skip": ("v_prj",)},
            "error[no-such-module] --skip v_prj: names no linear layer of the model;"
            " fix: did you mean 'v_proj'?",
        ),
        (
            {"max_shard_size": "big"},
            "error[bad-value] --max-shard-size: 'big' is no size of at least 1 kB;"
            " fix: write it as 5GB or 500MB",
        ),
        (
            {"storage": "float16", "quant": INT8},
            "error[bad-value] --storage: means nothing for int8; fix: leave it out",
        ),
    ],
)
def test_wrong_settings_are_one_line(changes, line, source, tmp_path):
    assert refusal(source, tmp_path / "out", kind=InputError, **changes).line() == line
    assert list(tmp_path.iterdir()) == []


def test_packed_bytes_that_do_not_fill_the_storage_dtype(tmp_path):
    folder = write_model(tmp_path / "m", "llama", hidden_size=6, num_attention_heads=1,
                         num_key_value_heads=1, intermediate_size=9)  # fmt: skip
    error = refusal(folder, tmp_path / "out", storage="float32")
    assert error.code == "storage-does-not-fit"
    assert sorted(os.listdir(tmp_path)) == ["m"]


def test_merged_experts_are_refused_in_one_line(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=264, **small, **heads))
    model.save_pretrained(tmp_path / "moe")
    tiny_tokenizer().save_pretrained(tmp_path / "moe")
    quant = {"quant_type": "nf4", "allow_unquantized": True}
    error = refusal(tmp_path / "moe", tmp_path / "out", quant=quant)
    assert error.code == "converted-weights"
    assert "experts" in error.where


def test_missing_and_misshapen_tensors(copied, tmp_path):
    path = sorted(copied.glob("*.safetensors"))[0]
    state = load_file(path)
    name = next(name for name in state if "proj" in name)
    save_file(state | {name: state[name][:-1].clone()}, path, metadata={"format": "pt"})
    error = refusal(copied, tmp_path / "out")
    assert (error.code, error.where) == ("mismatched-weights", name)
    del state[name]
    save_file(state, path, metadata={"format": "pt"})
    error = refusal(copied, tmp_path / "out")
    assert error.what == f"1 tensors are missing, first: {name}"


# The commands.


@pytest.fixture
def command(capsys):
    """The command line in this process: exit code, stdout and stderr."""

    def call(*arguments):
        with pytest.raises(SystemExit) as done:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return done.value.code, captured.out, captured.err

    return call


def test_the_command_and_what_follows_it(command, source, tmp_path):
    out = tmp_path / "out"
    code, text, _ = command("quantize", source, "-o", out, "--blocksize", "128", "--json")
    assert code == 0
    values = json.loads(text)
    assert {
        "bytes_in", "bytes_out", "bits_per_weight", "relative_error", "peak_host_bytes",
        "seconds", "unquantized", "worst", "output",
    } <= values.keys()  # fmt: skip
    assert values["bytes_out"] == (out / "model.safetensors").stat().st_size
    assert values["bytes_in"] == sum(f.stat().st_size for f in source.glob("*.safetensors"))
    assert len(values["worst"]) == 5
    assert {row["name"] for row in values["unquantized"]} == {
        "lm_head.weight",
        "model.embed_tokens.weight",
    }
    code, text, _ = command("inspect", out, "--error", source, "--json")
    assert json.loads(text)["relative_error"] == pytest.approx(values["relative_error"])
    code, text, errors = command(
        "generate", out, "--prompt", "Hi", "--max-new-tokens", "3", "--json"
    )
    assert code == 0, errors
    assert json.loads(text)["tokens"] <= 3


def test_the_command_without_json(command, source, tmp_path):
    code, text, _ = command("quantize", source, "-o", tmp_path / "out", "--quant", "int8")
    assert code == 0
    lines = text.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'out'}: ")
    assert lines[1].startswith("bits per weight: ")
    assert lines[2].startswith("relative error: 0.")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--quant", "int8", "--blocksize", "128"],
            "error[bad-value] quant: blocksize means nothing for quant_type int8; fix: see --help",
        ),
        (
            ["--blocksize", "65"],
            "error[bad-value] blocksize: blocksize 65 is not one of"
            " 32, 64, 128, 256, 512, 1024, 2048, 4096; fix: see --help",
        ),
    ],
)
def test_wrong_options_are_one_line(arguments, line, command, source, tmp_path):
    code, _, errors = command("quantize", source, "-o", tmp_path / "x", *arguments)
    assert (code, errors.splitlines()[-1]) == (2, line)


def test_training_on_a_quantized_folder_verifies(source, tmp_path):
    quantize_checkpoint(str(source), tmp_path / "out", options=options())
    chats = write_chats(tmp_path / "chats.jsonl")
    result, _ = train_tiny(tmp_path / "out", chats, tmp_path / "run")
    assert result.verified


def test_the_error_is_the_brute_force_one(source, tmp_path):
    out = tmp_path / "out"
    for quant in (NESTED, FLAT, INT8):
        result = quantize_checkpoint(str(source), out, options=options(quant=quant, overwrite=True))
        model, _ = fourbit.load(str(out), dtype=torch.float32)
        plain = tensors(source)
        error = norm = 0.0
        for name, layer in model.named_modules():
            if isinstance(layer, QuantizedLinear):
                weight = plain[f"{name}.weight"].double()
                error += float((layer.dequantize(torch.float32).double() - weight).square().sum())
                norm += float(weight.square().sum())
        assert result.relative_error == pytest.approx((error / norm) ** 0.5, rel=1e-5)
        compared = compare(str(out), str(source))
        assert compared.relative_error == pytest.approx(result.relative_error, rel=1e-6)
        assert compared.layers[result.worst[0]["name"]] == result.worst[0]["relative_error"]
