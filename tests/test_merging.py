"""`fourbit merge`: the folder answers as the adapter does, and every planted fault is caught."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields

import peft
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
)

import fourbit
from commands import fourbit as run_command
from fourbit.errors import (
    EnvironmentFault,
    FourbitError,
    InputError,
    ModelError,
    VerificationFailed,
)
from fourbit.merging import MergeOptions, count_requantized, merge, writer
from fourbit.merging import adapter as adapters
from fourbit.merging import proof as proofs
from fourbit.merging import run as merging_run
from fourbit.quantize import QuantConfig, dequantize_4bit, quantize_4bit
from fourbit.training.progress import Reporter
from models import tiny_tokenizer, train_tiny, write_chats, write_model

QUIET = Reporter(quiet=True)
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def make_run(tmp_path_factory, model_folder):
    """``make_run("llama")``: a finished run on a tiny model, made once for its settings."""
    root = tmp_path_factory.mktemp("runs")
    chats = write_chats(root / "chats.jsonl", 16)
    made = {}

    def make(name, method="qlora", **changes):
        key = json.dumps([name, method, changes], sort_keys=True)
        if key not in made:
            made[key] = root / f"run{len(made)}"
            values = {"data": {"eval": 3}, "max_steps": 3, "optim": {"lr": 0.03}, **changes}
            train_tiny(
                model_folder(name), chats, made[key], method=method, precision="fp32", **values
            )
        return made[key]

    return make


@pytest.fixture
def copy_of(make_run, tmp_path):
    """A run that a test may damage."""

    def copy(*arguments, **keywords):
        return shutil.copytree(make_run(*arguments, **keywords), tmp_path / "run")

    return copy


def call(path, output, **options):
    return merge(path, output, options=MergeOptions(**options), reporter=QUIET)


def rewrite(folder, change):
    path = folder / WEIGHTS
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def rewrite_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def adapter_of(run, tmp_path):
    """The adapter alone, without the records of its run."""
    return shutil.copytree(run / "adapter", tmp_path / "alone")


# The numbers.


@pytest.mark.parametrize(
    ("name", "method", "changes"),
    [
        ("llama", "qlora", {}),
        pytest.param("gpt2", "qlora", {}, marks=pytest.mark.slow),
        ("gpt2", "lora", {"lora": {"r": 4, "use_dora": True}}),
        pytest.param(
            *("qwen2", "qlora", {"lora": {"r": 4, "use_dora": True, "use_rslora": True}}),
            marks=pytest.mark.slow,
        ),
        (
            "qwen3",
            "lora",
            {
                "lora": {
                    "r": 4,
                    "rank_pattern": {"q_proj": 2},
                    "alpha_pattern": {"k_proj": 7},
                    "modules_to_save": ["lm_head"],
                }
            },
        ),
        pytest.param("phi", "qlora", {}, marks=pytest.mark.slow),
        pytest.param("gemma2", "qlora", {}, marks=pytest.mark.slow),
        pytest.param("phi3", "qlora", {}, marks=pytest.mark.slow),
        pytest.param(
            "falcon", "qlora", {"data": {"eval": 4, "packing": False}}, marks=pytest.mark.slow
        ),
    ],
)
def test_a_float32_merge_answers_to_rounding(make_run, tmp_path, name, method, changes):
    result = call(make_run(name, method, **changes), tmp_path / "out", dtype="fp32")
    assert result.proof is not None
    assert result.proof.max_abs_diff < 1e-4 * result.proof.logit_std
    assert result.proof.kl < 1e-9
    assert result.proof.top1_agreement == 1.0
    assert result.proof.adapter_kl is not None
    assert result.proof.adapter_kl > 1e-3
    assert result.base_checked == "every byte"


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"),
    [("bf16", torch.bfloat16), pytest.param("fp16", torch.float16, marks=pytest.mark.slow)],
)
def test_every_weight_is_base_plus_update_rounded_once(
    make_run, model_folder, tmp_path, dtype, torch_dtype
):
    run = make_run("llama")
    call(run, tmp_path / "out", dtype=dtype)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    source = AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.float32)
    saved = load_file(run / "adapter" / WEIGHTS)
    seen = 0
    for name, weight in source.named_parameters():
        expected = weight.detach()
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" in saved:
            packed, state = quantize_4bit(expected, quant_type="nf4", double_quant=True)
            a, b = saved[f"{prefix}.lora_A.weight"], saved[f"{prefix}.lora_B.weight"]
            expected = dequantize_4bit(packed, state).double() + 32 / 4 * (b.double() @ a.double())
            seen += 1
        gap = (merged[name].double() - expected.double()).abs()
        # Rounded once: within half a unit of the last place, and a little of float32's sums.
        unit = torch.finfo(torch_dtype).eps / 2
        assert bool((gap <= unit * expected.double().abs() * 1.01 + 1e-6).all()), name
        assert merged[name].dtype == torch_dtype
    assert seen == 14
    assert len(merged) == len(dict(source.named_parameters()))


def test_the_original_base_reports_what_changes(make_run, model_folder, tmp_path):
    run = make_run("llama")
    result = call(run, tmp_path / "out", dtype="fp32", base="original")
    assert result.base == "original"
    assert result.trained_difference is not None
    assert result.trained_difference.kl > 1e-6 > result.proof.kl
    base = AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.float32)
    tuned = peft.PeftModel.from_pretrained(base, str(run / "adapter")).merge_and_unload()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for (name, one), (_, two) in zip(
        ours.named_parameters(), tuned.named_parameters(), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6, msg=name)


def test_a_lora_bias_and_a_trained_bias(model_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(model_folder("phi"), dtype=torch.float32)
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(base, config)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    result = call(tmp_path / "adapter", tmp_path / "out", model=str(model_folder("phi")),
                  dtype="fp32")  # fmt: skip
    assert result.proof.kl < 1e-9
    before = load_file(model_folder("phi") / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.bias"
    assert not torch.equal(before[name], after[name])


def test_a_resized_vocabulary_with_its_tokenizer(model_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.float32)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(10)])
    base.resize_token_embeddings(272)
    config = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
    )
    tuned = peft.get_peft_model(base, config)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    tuned.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    call(tmp_path / "adapter", tmp_path / "out", model=str(model_folder("llama")), dtype="fp32")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == 272
    assert config["tie_word_embeddings"] is False
    assert "<extra_9>" in AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    for file in (tmp_path / "adapter").glob("*token*"):
        file.unlink()
    tokenizer.add_tokens([f"<more_{i}>" for i in range(10)])
    tokenizer.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError) as caught:
        call(tmp_path / "adapter", tmp_path / "o2", model=str(model_folder("llama")))
    assert caught.value.what == "the tokenizer has tokens up to id 278, the embedding 272 rows"


def test_an_int8_run(make_run, tmp_path):
    run = make_run("llama", quant={"quant_type": "int8"}, data={"eval": 4, "packing": False})
    result = call(run, tmp_path / "out", dtype="fp32")
    assert result.proof.kl < 1e-9
    # INT8 rounds activations too: that is shown, and is no fault of the merge.
    assert result.trained_difference.kl > 1e-7


@pytest.mark.slow
def test_a_base_that_is_quantized_on_disk(model_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.float32)
    fourbit.quantize_model(base, QuantConfig(double_quant=False, allow_unquantized=True))
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    chats = write_chats(tmp_path / "chats.jsonl", 8)
    run = tmp_path / "run"
    train_tiny(tmp_path / "base", chats, run, data={"eval": 2}, precision="fp32")
    result = call(run, tmp_path / "out", dtype="fp32")
    assert result.proof.kl < 1e-9
    assert result.base_checked == "every byte"
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert call(run, tmp_path / "o2", proof=False).base_checked == "every byte"
    found = fails(InputError, "base-quantized", run, tmp_path / "o3", base="original")
    assert found.what == "the base on disk is quantized itself, there is no original"
    alone = adapter_of(run, tmp_path)
    call(alone, tmp_path / "o4", dtype="fp32", model=str(tmp_path / "base"))
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "o4"))
    assert all(torch.equal(one[name], two[name]) for name in one)


# The folder.


def test_the_folder_is_an_ordinary_model(make_run, model_folder, tmp_path):
    output = tmp_path / "out"
    result = call(make_run("llama"), output, dtype="bf16")
    assert sorted(p.name for p in output.iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merge.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((output / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"] is True
    model, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(output / "model.safetensors")
    record = json.loads((output / "merge.json").read_text())
    assert record["proven"] is True
    assert record["proof"]["kl"] == result.proof.kl
    card = (output / "README.md").read_text()
    assert "Compared with the adapter" in card
    assert list(tmp_path.glob(".*")) == []


def test_shards_and_their_index(make_run, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(merging_run, "parse_size", lambda _: 20_000)
    call(make_run("llama"), tmp_path / "many", dtype="bf16", max_shard_size="20kB")
    monkeypatch.undo()
    call(make_run("llama"), tmp_path / "one", dtype="bf16", proof=False)
    names = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    together = {}
    for name in names:
        tensors = load_file(tmp_path / "many" / name)
        assert all(index["weight_map"][key] == name for key in tensors)
        together |= tensors
    whole = {}
    for path in (tmp_path / "one").glob("*.safetensors"):
        whole |= load_file(path)
    assert together.keys() == whole.keys()
    assert all(torch.equal(together[key], whole[key]) for key in whole)
    total = sum(t.numel() * t.element_size() for t in whole.values())
    assert index["metadata"]["total_size"] == total


def test_untied_when_the_adapter_trains_the_head(make_run, tmp_path):
    run = make_run("llama", lora={"r": 4, "modules_to_save": ["lm_head"]})
    call(run, tmp_path / "out", dtype="fp32")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    saved = load_file(run / "adapter" / WEIGHTS)
    assert torch.equal(tensors["lm_head.weight"], saved["base_model.model.lm_head.weight"])
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


def test_a_head_on_disk_that_differs_stays_untied(model_folder, tmp_path):
    """config.json says tied, the file holds another head: transformers does not tie them."""
    base = shutil.copytree(model_folder("llama"), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    chats = write_chats(tmp_path / "chats.jsonl", 8)
    train_tiny(base, chats, tmp_path / "run", data={"eval": 2}, precision="fp32")
    result = call(tmp_path / "run", tmp_path / "out", dtype="fp32")
    assert result.proof.kl < 1e-9
    assert "lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_without_a_proof_the_folder_says_so(make_run, tmp_path):
    result = call(make_run("llama"), tmp_path / "out", proof=False)
    assert result.as_dict()["proven"] is False
    assert result.as_dict()["max_abs_diff"] is None
    assert result.base_checked == "every byte"
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["proof"] is None
    assert "**Not proven**" in (tmp_path / "out" / "README.md").read_text()


def test_missing_rows_are_replaced_by_texts_and_noted(copy_of, tmp_path):
    run = copy_of("llama")
    config = (run / "config.yaml").read_text().replace("chats.jsonl", "gone.jsonl")
    (run / "config.yaml").write_text(config)
    result = call(run, tmp_path / "out", dtype="fp32")
    assert result.proof.asked == "built-in texts"
    assert result.findings == ["the run's evaluation rows are not there: built-in texts are asked"]


def test_an_adapter_that_changes_nothing_is_noted(make_run, model_folder, tmp_path):
    folder = adapter_of(make_run("llama"), tmp_path)
    rewrite(folder, lambda t: t.update({n: v * 0 for n, v in t.items() if "lora_B" in n}))
    result = call(folder, tmp_path / "out", model=str(model_folder("llama")), dtype="fp32")
    assert "the adapter changes nothing: every lora_B is zero" in result.findings


def test_an_adapter_without_its_run_on_a_quantized_base(make_run, model_folder, tmp_path):
    run = make_run("llama")
    call(run, tmp_path / "one", dtype="fp32", proof=False)
    call(
        adapter_of(run, tmp_path),
        tmp_path / "two",
        model=str(model_folder("llama")),
        quant=QuantConfig(),
        dtype="fp32",
    )
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


# Mistakes and damage: each one line, and nothing is left behind.


def fails(error, code, path, output, **options):
    """The line of the error that a merge ends with."""
    with pytest.raises(error) as caught:
        call(path, output, **options)
    assert caught.value.code == code
    assert not output.exists()
    assert not list(output.parent.glob(f".{output.name}.*"))
    return caught.value


@pytest.fixture
def alone(make_run, tmp_path):
    return adapter_of(make_run("llama"), tmp_path)


def test_another_base(copy_of, tmp_path):
    run = copy_of("llama")
    other = write_model(tmp_path / "other", "llama", seed=5)
    for options in ({}, {"proof": False}):
        found = fails(ModelError, "other-base", run, tmp_path / "o", model=str(other), **options)
        assert found.exit_code == 3
        assert "not the base the adapter was trained on ('" in found.what
        assert "the 4-bit weights have SHA-256" in found.what
        assert found.fix == "give the base of the run with --model"


def test_another_base_of_a_16_bit_run(make_run, tmp_path):
    other = write_model(tmp_path / "other", "gpt2", seed=5)
    run = make_run("gpt2", "lora", lora={"r": 4, "use_dora": True})
    for options in ({}, {"proof": False}):
        found = fails(ModelError, "other-base", run, tmp_path / "o", model=str(other), **options)
        assert "the weights have SHA-256" in found.what


def test_a_base_of_other_sizes(alone, tmp_path):
    other = write_model(tmp_path / "other", "llama", hidden_size=32)
    found = fails(ModelError, "adapter-mismatch", alone, tmp_path / "o", model=str(other))
    assert found.line() == (
        f"error[adapter-mismatch] {alone}: the adapter does not fit this model: base_model.model."
        "model.layers.0.mlp.down_proj.lora_B.weight has shape [48, 4], the model and the rank give"
        " [32, 4]; fix: give the base model it was trained on, and the whole adapter"
    )


def test_an_adapter_of_another_architecture(alone, model_folder, tmp_path):
    found = fails(
        ModelError, "adapter-mismatch", alone, tmp_path / "o", model=str(model_folder("gpt2"))
    )
    assert "the adapter does not fit this model" in found.what


def test_the_adapter_of_another_run(copy_of, make_run, tmp_path):
    run = copy_of("llama")
    shutil.copy(make_run("llama", "lora") / "adapter" / WEIGHTS, run / "adapter" / WEIGHTS)
    found = fails(VerificationFailed, "adapter-changed", run, tmp_path / "o")
    assert found.exit_code == 7
    assert found.what == "it is not the adapter that the run's receipt was written for"


def test_a_dropped_tensor(alone, model_folder, tmp_path):
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    rewrite(alone, lambda tensors: tensors.pop(key))
    found = fails(
        ModelError, "adapter-mismatch", alone, tmp_path / "o", model=str(model_folder("llama"))
    )
    assert found.what == f"the adapter does not fit this model: 1 tensors are missing, first: {key}"


def test_a_dropped_layer(alone, model_folder, tmp_path):
    def drop(tensors):
        for key in [key for key in tensors if "layers.1.mlp.up_proj" in key]:
            del tensors[key]

    rewrite(alone, drop)
    found = fails(
        ModelError, "adapter-mismatch", alone, tmp_path / "o", model=str(model_folder("llama"))
    )
    assert "2 tensors are missing, first: " in found.what


def test_a_tensor_too_many(alone, model_folder, tmp_path):
    rewrite(alone, lambda tensors: tensors.update({"stray": torch.ones(2)}))
    found = fails(
        ModelError, "adapter-mismatch", alone, tmp_path / "o", model=str(model_folder("llama"))
    )
    assert "1 tensors have no place, first: stray" in found.what


@pytest.mark.parametrize("cut", [4, 200, -1])
def test_a_truncated_adapter(alone, model_folder, tmp_path, cut):
    path = alone / WEIGHTS
    path.write_bytes(path.read_bytes()[:cut])
    found = fails(
        ModelError, "damaged-file", alone, tmp_path / "o", model=str(model_folder("llama"))
    )
    assert found.where == str(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nonfinite_adapter(alone, model_folder, tmp_path, value):
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"

    def spoil(tensors):
        tensors[key][3, 1] = value

    rewrite(alone, spoil)
    found = fails(
        ModelError, "nonfinite-adapter", alone, tmp_path / "o", model=str(model_folder("llama"))
    )
    assert found.line() == (
        f"error[nonfinite-adapter] {alone}: {key} holds {value} at flat index 13 (1 non-finite of"
        " 320 values); fix: train again, or take an earlier checkpoint"
    )


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"peft_type": "LOHA"}, "LOHA has no merge here"),
        ({"use_qalora": True}, "an adapter with use_qalora has no merge here"),
        ({"init_lora_weights": "pissa"}, "an adapter with init_lora_weights: pissa has no"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ],
)
def test_kinds_without_a_merge(alone, model_folder, tmp_path, changes, part):
    rewrite_config(alone, **changes)
    found = fails(
        ModelError, "adapter-kind", alone, tmp_path / "o", model=str(model_folder("llama"))
    )
    assert part in found.what


def test_a_configuration_loads_no_code(alone, model_folder, tmp_path):
    rewrite_config(
        alone,
        auto_mapping={"parent_library": "os", "base_model_class": "x"},
        megatron_core="os",
        base_model_name_or_path="../../etc",
        unknown_key={"a": 1},
    )
    assert call(alone, tmp_path / "o", model=str(model_folder("llama"))).proof is not None


def test_an_unreadable_configuration(alone, model_folder, tmp_path):
    (alone / "adapter_config.json").write_text("[]")
    found = fails(
        ModelError, "bad-adapter-config", alone, tmp_path / "o", model=str(model_folder("llama"))
    )
    assert found.what == "holds a list, not an object"


def test_an_adapter_alone_needs_its_base(alone, tmp_path):
    found = fails(InputError, "no-base", alone, tmp_path / "o")
    assert "an adapter without its run does not prove its base" in found.what
    assert found.fix == "--model MODEL"


def test_full_fine_tuning_has_nothing_to_merge(make_run, tmp_path):
    run = make_run("llama", "full", optim={"lr": 1e-3})
    found = fails(InputError, "nothing-to-merge", run, tmp_path / "o")
    assert str(run / "adapter") in found.fix


def test_a_failed_receipt(copy_of, tmp_path):
    run = copy_of("llama")
    receipt = json.loads((run / "receipt.json").read_text())
    receipt["checks"][0]["ok"] = False
    (run / "receipt.json").write_text(json.dumps(receipt))
    assert fails(VerificationFailed, "receipt", run, tmp_path / "o").exit_code == 7


def test_a_mixture_of_experts_is_refused(tmp_path):
    config = tmp_path / "moe"
    MixtralForCausalLM(
        MixtralConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=2,
            vocab_size=264,
        )
    ).save_pretrained(config)
    tiny_tokenizer().save_pretrained(config)
    model = AutoModelForCausalLM.from_pretrained(config)
    tuned = peft.get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    tuned.save_pretrained(tmp_path / "adapter")
    found = fails(
        ModelError, "converted-weights", tmp_path / "adapter", tmp_path / "o", model=str(config)
    )
    assert "transformers rebuilds the weights of mixtral while loading" in found.what


def test_values_beyond_float16(make_run, model_folder, tmp_path, alone):
    rewrite(alone, lambda t: t.update({n: v * 1e6 for n, v in t.items() if "lora_B" in n}))
    found = fails(
        InputError,
        "overflow",
        alone,
        tmp_path / "o",
        model=str(model_folder("llama")),
        dtype="fp16",
        proof=False,
    )
    assert found.fix == "--dtype bf16"


def test_outputs_in_the_way(make_run, tmp_path):
    run = make_run("llama")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file, a folder is wanted"):
        call(run, tmp_path / "file")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"holds files that no merge wrote \(a.txt\)"):
            call(run, tmp_path / "notes", overwrite=overwrite)
    (tmp_path / "empty").mkdir()
    call(run, tmp_path / "empty", proof=False)
    with pytest.raises(InputError, match="already holds a merged model"):
        call(run, tmp_path / "empty", proof=False)
    call(run, tmp_path / "empty", proof=False, overwrite=True, dtype="fp32")
    record = json.loads((tmp_path / "empty" / "merge.json").read_text())
    assert record["dtype"] == "fp32"
    assert sorted(p.name for p in tmp_path.glob(".*")) == []


def test_a_disk_that_is_too_small(make_run, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: usage)
    found = fails(EnvironmentFault, "disk", make_run("llama"), tmp_path / "o")
    assert found.exit_code == 4
    assert "1.00 MB are free" in found.what


def test_two_merges_into_one_folder(tmp_path):
    with (
        writer.staged(tmp_path / "out"),
        pytest.raises(FourbitError, match="another process is writing to it") as caught,
        writer.staged(tmp_path / "out"),
    ):
        pass
    assert caught.value.exit_code == 6


def test_what_a_killed_merge_left_is_cleared(make_run, tmp_path):
    left = tmp_path / ".out.merging"
    left.mkdir()
    (left / "model-00001-of-00009.safetensors").write_bytes(b"half")
    call(make_run("llama"), tmp_path / "out", proof=False)
    assert not left.exists()
    assert not (tmp_path / "out" / "model-00001-of-00009.safetensors").exists()


@pytest.mark.parametrize("size", ["5", "0.1KB", "many", "-5GB", "5TB"])
def test_sizes_that_are_none(make_run, tmp_path, size):
    found = fails(InputError, "bad-value", make_run("llama"), tmp_path / "o", max_shard_size=size)
    assert found.what == f"'{size}' is no size of at least 1 kB"


# The proof notices a merge that went wrong.


def spoilt(monkeypatch, change):
    """A merge whose tensors pass through ``change(name, tensor)``."""
    original = merging_run._Merge.merged
    monkeypatch.setattr(
        merging_run._Merge, "merged", lambda self, name: change(name, original(self, name))
    )


def test_a_layer_without_its_update_fails_the_proof(make_run, model_folder, tmp_path, monkeypatch):
    base = load_file(model_folder("llama") / "model.safetensors")

    def change(name, tensor):
        return base[name].to(tensor.dtype) if name.endswith("0.mlp.up_proj.weight") else tensor

    spoilt(monkeypatch, change)
    for dtype in ("fp16", "bf16"):
        found = fails(
            VerificationFailed, "merge-differs", make_run("llama"), tmp_path / "o", dtype=dtype
        )
        assert found.exit_code == 7
        assert "the merged model does not answer as the adapter does: max_abs_diff is" in found.what
        assert "the limit for " in found.what


@pytest.mark.parametrize(
    "fault",
    ["flipped", *(pytest.param(f, marks=pytest.mark.slow) for f in ("transposed", "nan"))],
)
def test_wrong_values_fail_the_proof(make_run, tmp_path, monkeypatch, fault):
    def change(name, tensor):
        if not name.endswith("1.self_attn.o_proj.weight"):
            return tensor
        if fault == "transposed":
            return tensor.t().contiguous()
        return -tensor if fault == "flipped" else tensor * float("nan")

    spoilt(monkeypatch, change)
    code = "merge-unreadable" if fault == "nan" else "merge-differs"
    fails(FourbitError, code, make_run("llama"), tmp_path / "o", dtype="bf16")


def test_an_untied_head_fails_the_proof(make_run, tmp_path, monkeypatch):
    original = merging_run.config_for
    monkeypatch.setattr(
        merging_run,
        "config_for",
        lambda raw, **k: {**original(raw, **k), "tie_word_embeddings": False},
    )
    found = fails(ModelError, "merge-unreadable", make_run("llama"), tmp_path / "o")
    assert "1 tensors are missing, first: lm_head.weight" in found.what


def test_limits_grow_with_the_rounding():
    limits = [proofs.LIMITS[d] for d in (torch.float32, torch.float16, torch.bfloat16)]
    for one, two in zip(limits, limits[1:], strict=False):
        assert (one.max_abs_diff, one.kl, one.loss) < (two.max_abs_diff, two.kl, two.loss)
        assert one.top1 > two.top1


def test_figures_of_a_comparison_by_hand():
    first = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    second = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    rows = proofs.Rows((([1, 2], [False, True]),), (), "test")
    parity = proofs.compare(
        proofs.Measured(first, 1.0, None, ()), proofs.Measured(second, 1.5, None, ()), rows
    )
    p, q = first[0].softmax(0), second[0].softmax(0)
    assert parity.kl == pytest.approx(float((p * (p / q).log()).sum()) / 2, rel=1e-5)
    assert parity.max_abs_diff == 1.0
    assert parity.top1_agreement == 1.0


# Back into 4 bits, and PEFT's names.


def test_what_4_bits_would_lose():
    quant = QuantConfig()
    packed, state = quantize_4bit(torch.randn(64, 64), double_quant=True)
    base = dequantize_4bit(packed, state)
    nothing = count_requantized(base, base, quant)
    assert nothing.weights == 4096
    assert nothing.unmoved_share > 0.99
    small = count_requantized(base, base + 1e-4 * torch.randn(64, 64), quant)
    large = count_requantized(base, base + 1.0 * torch.randn(64, 64), quant)
    assert small.unmoved_share > 0.97 > large.unmoved_share
    assert small.lost_share > 1 > large.lost_share
    both = small + large
    assert both.weights == 8192
    assert both.unmoved == small.unmoved + large.unmoved


def test_the_names_we_read_are_peft_s():
    known = {field.name for field in fields(LoraConfig)}
    assert set(adapters._KNOWN) | set(adapters._REFUSED) <= known


# The command line.


def test_the_command(make_run, tmp_path):
    done = run_command("merge", make_run("llama"), "-o", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert {
        "max_abs_diff", "kl", "top1_agreement", "bytes", "loss_before", "loss_after", "dtype",
        "base", "output", "seconds", "peak_host_bytes", "exact_match_before", "proven",
    } <= values.keys()  # fmt: skip
    assert values["bytes"] == sum(p.stat().st_size for p in (tmp_path / "out").iterdir()
                                  if p.name not in ("merge.json", "README.md"))  # fmt: skip
    again = run_command("merge", make_run("llama"), "-o", tmp_path / "out")
    assert again.returncode == 2
    lines = [line for line in again.stderr.splitlines() if line.startswith("error[")]
    assert lines == [
        f"error[output-exists] {tmp_path / 'out'}: already holds a merged model;"
        " fix: choose another output folder, or --overwrite"
    ]


def test_public_names():
    assert fourbit.merge is merge
    assert fourbit.MergeOptions is MergeOptions


def test_rounding_back_to_4_bits_is_refused_when_it_loses_the_update(make_run, tmp_path):
    run = make_run("llama", optim={"lr": 1e-3})
    with pytest.raises(VerificationFailed) as caught:
        call(run, tmp_path / "out", requantize=True)
    assert caught.value.code == "requantize-loses-update"
    assert "(limit 0.5)" in caught.value.what
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_rounded_back_by_force_says_what_was_lost(make_run, tmp_path):
    run = make_run("llama", optim={"lr": 1e-3})
    result = call(run, tmp_path / "out", requantize=True, force=True)
    assert result.requantized is not None
    assert result.requantized.lost_share > 0.5
    assert result.requantized.unmoved_share > 0.9
    assert result.requantized_difference is not None
    assert result.proof is not None
    assert result.requantized_difference.kl > 10 * result.proof.kl
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    model, _ = fourbit.load(str(tmp_path / "out"), dtype=torch.float32)
    layers = [m for m in model.modules() if isinstance(m, fourbit.Linear4bit)]
    assert len(layers) == 14
    assert all(layer.quant_type == "nf4" and layer.double_quant for layer in layers)
    assert "rounding error" in "\n".join(result.lines())


def test_a_large_update_may_be_rounded_back(make_run, tmp_path):
    result = call(make_run("llama"), tmp_path / "out", requantize=True)
    assert result.requantized is not None
    assert result.requantized.lost_share < 0.5
    assert result.bytes < call(make_run("llama"), tmp_path / "plain", dtype="bf16").bytes


def test_there_is_nothing_to_round_back_for_a_16_bit_run(make_run, tmp_path):
    fails(
        InputError,
        "nothing-to-requantize",
        make_run("llama", "lora"),
        tmp_path / "o",
        requantize=True,
    )
