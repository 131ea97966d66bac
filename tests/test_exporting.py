"""`fourbit export --to gguf`: the adapter in llama.cpp's names, order and scaling."""

from __future__ import annotations

import json
import shutil

import gguf
import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

import fourbit
from commands import fourbit as run_command
from fourbit.errors import EnvironmentFault, InputError, ModelError, VerificationFailed
from fourbit.exporting import export_gguf
from models import train_tiny, write_chats, write_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")


@pytest.fixture(scope="module")
def make_adapter(tmp_path_factory, model_folder):
    """A PEFT folder with random values on a tiny model."""
    root = tmp_path_factory.mktemp("adapters")
    made = {}

    def make(name, **changes):
        key = json.dumps([name, changes], sort_keys=True)
        if key not in made:
            base = AutoModelForCausalLM.from_pretrained(model_folder(name), dtype=torch.float32)
            values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **changes}
            tuned = peft.get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **values))
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.1)
            made[key] = root / str(len(made))
            tuned.save_pretrained(made[key])
        return made[key]

    return make


def read(path):
    reader = gguf.GGUFReader(str(path))
    tensors = {t.name: torch.from_numpy(np.array(t.data)) for t in reader.tensors}
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return tensors, fields


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_under_its_name(make_adapter, model_folder, tmp_path, name):
    folder = make_adapter(name)
    result = export_gguf(folder, tmp_path / "a.gguf", model=str(model_folder(name)))
    tensors, fields = read(tmp_path / "a.gguf")
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 8.0
    expected = {"gemma3_text": "gemma3", "mistral": "llama"}.get(name, name)
    assert fields["general.architecture"] == result.architecture == expected
    saved = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == len(saved) == result.tensors
    config = AutoConfig.from_pretrained(model_folder(name))
    # transformers' own reader of llama.cpp's weights undoes the order of rows.
    undo = LlamaTensorProcessor(config=config.to_dict())
    parts = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
             "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}  # fmt: skip
    for key, value in saved.items():
        words = key.split(".")
        block, part, which = words[4], words[-3], words[-2].lower()
        there = tensors[f"blk.{block}.{parts[part]}.weight.{which}"]
        if which == "lora_b" and expected == "llama":
            weights = undo.process(there.numpy(), f"blk.{block}.{parts[part]}.weight").weights
            there = torch.from_numpy(np.copy(weights))
        assert torch.equal(there, value), key


def test_rows_really_are_reordered(make_adapter, model_folder, tmp_path):
    folder = make_adapter("llama")
    export_gguf(folder, tmp_path / "a.gguf", model=str(model_folder("llama")))
    tensors, _ = read(tmp_path / "a.gguf")
    key = "base_model.model.model.layers.0.self_attn.{}.lora_B.weight"
    saved = load_file(folder / "adapter_model.safetensors")
    assert not torch.equal(tensors["blk.0.attn_q.weight.lora_b"], saved[key.format("q_proj")])
    assert torch.equal(tensors["blk.0.attn_v.weight.lora_b"], saved[key.format("v_proj")])


def test_other_scalings_are_folded_into_b(make_adapter, model_folder, tmp_path):
    folder = make_adapter(
        "qwen2", use_rslora=True, rank_pattern={"v_proj": 2}, alpha_pattern={"o_proj": 5}
    )
    result = export_gguf(folder, tmp_path / "a.gguf", model=str(model_folder("qwen2")))
    tensors, fields = read(tmp_path / "a.gguf")
    saved = load_file(folder / "adapter_model.safetensors")
    for part, name, scaling in (
        ("q_proj", "attn_q", 8 / 4**0.5),
        ("v_proj", "attn_v", 8 / 2**0.5),
        ("o_proj", "attn_output", 5 / 4**0.5),
    ):
        a, b = (tensors[f"blk.1.{name}.weight.lora_{side}"] for side in "ab")
        theirs = fields["adapter.lora.alpha"] / a.shape[0] * (b @ a)
        prefix = f"base_model.model.model.layers.1.self_attn.{part}"
        a, b = saved[f"{prefix}.lora_A.weight"], saved[f"{prefix}.lora_B.weight"]
        torch.testing.assert_close(theirs, scaling * (b @ a))
    assert result.rescaled == 14


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"use_dora": True}, "cannot hold DoRA"),
        ({"modules_to_save": ["lm_head"]}, "a module trained whole (lm_head.weight)"),
    ],
)
def test_what_the_format_cannot_hold(make_adapter, model_folder, tmp_path, changes, part):
    with pytest.raises(ModelError) as caught:
        export_gguf(
            make_adapter("llama", **changes), tmp_path / "a.gguf", model=str(model_folder("llama"))
        )
    assert part in caught.value.what
    assert caught.value.fix == "`fourbit merge`, and convert the merged model"
    assert list(tmp_path.iterdir()) == []


def test_an_untested_architecture(make_adapter, model_folder, tmp_path):
    with pytest.raises(ModelError, match="adapters of phi have no tested GGUF form"):
        export_gguf(make_adapter("phi"), tmp_path / "a.gguf", model=str(model_folder("phi")))


def test_a_base_of_other_sizes(make_adapter, tmp_path):
    other = write_model(tmp_path / "other", "llama", hidden_size=32)
    with pytest.raises(ModelError, match="the adapter does not fit this model"):
        export_gguf(make_adapter("llama"), tmp_path / "a.gguf", model=str(other))


def test_a_nonfinite_adapter(make_adapter, model_folder, tmp_path):
    folder = shutil.copytree(make_adapter("llama"), tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(ModelError) as caught:
        export_gguf(folder, tmp_path / "a.gguf", model=str(model_folder("llama")))
    assert caught.value.code == "nonfinite-adapter"


def test_the_output_is_whole_or_absent(make_adapter, model_folder, tmp_path, monkeypatch):
    folder, base = make_adapter("llama"), str(model_folder("llama"))
    target = tmp_path / "a.gguf"
    target.write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        export_gguf(folder, target, model=base)
    assert target.read_text() == "mine"

    def broken(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", broken)
    with pytest.raises(EnvironmentFault) as caught:
        export_gguf(folder, target, model=base, overwrite=True)
    assert caught.value.exit_code == 4
    assert target.read_text() == "mine"
    monkeypatch.undo()

    monkeypatch.setattr(fourbit.exporting, "torch", FlippedTorch())
    with pytest.raises(VerificationFailed, match="does not hold the adapter's tensors"):
        export_gguf(folder, target, model=base, overwrite=True)
    monkeypatch.undo()
    assert target.read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]
    export_gguf(folder, target, model=base, overwrite=True)
    assert target.read_bytes()[:4] == b"GGUF"


class FlippedTorch:
    """torch whose tensors read back have one bit flipped."""

    equal = staticmethod(torch.equal)

    @staticmethod
    def from_numpy(array):
        array.view(np.uint8).flat[0] ^= 1
        return torch.from_numpy(array)


@pytest.mark.slow
def test_the_command_on_a_run(model_folder, tmp_path):
    chats = write_chats(tmp_path / "chats.jsonl", 8)
    train_tiny(model_folder("llama"), chats, tmp_path / "run", precision="fp32")
    done = run_command("export", tmp_path / "run", "--to", "gguf", "-o", tmp_path / "a.gguf",
                       "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["tensors"] == 28
    assert values["bytes"] == (tmp_path / "a.gguf").stat().st_size


def write_base(folder, path):
    """The tiny llama in float32 GGUF, as llama.cpp's converter would write it."""
    config = AutoConfig.from_pretrained(folder)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    extra = [f"<x{i}>" for i in range(config.vocab_size - 259)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *extra]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3, *([6] * 256), *([1] * len(extra))])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, tensor in load_file(folder / "model.safetensors").items():
        heads = {
            "q_proj": config.num_attention_heads,
            "k_proj": config.num_key_value_heads,
        }.get(key.split(".")[-2])
        if heads is not None:
            rows = tensor.view(heads, 2, -1, tensor.shape[1])
            tensor = rows.transpose(1, 2).reshape(tensor.shape)
        name = names.get_name(key, try_suffixes=(".weight",))
        writer.add_tensor(name, np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}])
def test_llama_cpp_answers_alike(make_adapter, model_folder, tmp_path, changes):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    folder, base = make_adapter("llama", **changes), model_folder("llama")
    export_gguf(folder, tmp_path / "a.gguf", model=str(base))
    write_base(base, tmp_path / "base.gguf")
    ids = [5, 17, 33, 99, 128, 7]
    theirs = llama_cpp.Llama(
        model_path=str(tmp_path / "base.gguf"),
        lora_path=str(tmp_path / "a.gguf"),
        n_ctx=64,
        logits_all=True,
        n_threads=1,
        verbose=False,
    )
    theirs.eval(ids)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        without = plain(torch.tensor([ids])).logits[0]
        tuned = peft.PeftModel.from_pretrained(plain, str(folder))
        ours = tuned(torch.tensor([ids])).logits[0]
    found = torch.tensor(theirs.scores[: len(ids)])
    effect = (ours - without).abs().max()
    assert (found - ours).abs().max() < 0.01 * effect
