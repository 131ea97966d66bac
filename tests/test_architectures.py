"""Real architectures in tiny: loading, a training step, packing, generation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fourbit
from fourbit.errors import InputError
from fourbit.generate import Sampling, open_generator
from fourbit.linear import Linear4bit, parameter_counts
from fourbit.objective import Objective
from fourbit.quantize import QuantConfig
from models import (
    PACKABLE,
    TIED,
    UNPACKABLE,
    documents,
    linears,
    make_batch,
    plain_twin,
    train_tiny,
    write_chats,
    write_model,
)

ALL = (*PACKABLE, *UNPACKABLE)
# One of each kind: grouped queries and tied, soft caps, Conv1D, fused, and no packing.
QUICK = {"llama", "gemma2", "gpt2", "phi3", "opt"}
EVERY = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in ALL]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def quantized(model_folder):
    """Read-only models in float32, each loaded once."""
    loaded = {}

    def get(name):
        if name not in loaded:
            folder = str(model_folder(name))
            loaded[name] = fourbit.load(folder, quant=QuantConfig(), dtype=torch.float32)[0]
        return loaded[name]

    return get


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl")


def token_ids(rows=2, length=17):
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", [*ALL, "mamba"])
def test_logits_are_those_of_the_dequantized_weights(name, quantized, model_folder):
    model, ids = quantized(name), token_ids()
    with torch.no_grad():
        ours, wanted = model(ids).logits, plain_twin(model, model_folder(name))(ids).logits
    assert wanted.std() > 0.1
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_quantization_changes_the_logits(name, quantized, model_folder):
    from transformers import AutoModelForCausalLM

    plain, ids = AutoModelForCausalLM.from_pretrained(model_folder(name)), token_ids()
    with torch.no_grad():
        difference = (quantized(name)(ids).logits - plain(ids).logits).abs().max()
    assert difference > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_all_linear_layers_but_the_head_are_quantized(name, quantized):
    model = quantized(name)
    plain = [key for key, layer in linears(model).items() if not isinstance(layer, Linear4bit)]
    assert plain == [key for key, layer in model.named_modules() if layer is _head(model)]


def _head(model):
    return model.get_output_embeddings()


@pytest.mark.parametrize("name", ALL)
def test_head_and_embedding_stay_and_stay_tied(name, quantized):
    model = quantized(name)
    embedding = model.get_input_embeddings()
    assert type(_head(model)) is nn.Linear
    assert embedding.weight.dtype == torch.float32
    assert (_head(model).weight is embedding.weight) == (name in TIED)


def test_state_space_kernels_keep_the_weights_they_read_themselves(quantized):
    model = quantized("mamba")
    kinds = {key.rsplit(".", 1)[-1]: isinstance(m, Linear4bit) for key, m in linears(model).items()}
    assert kinds == {
        "in_proj": True,
        "x_proj": False,
        "dt_proj": False,
        "out_proj": False,
        "lm_head": False,
    }


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_parameters_are_counted_unpacked(name, quantized, model_folder):
    from transformers import AutoModelForCausalLM

    wanted = AutoModelForCausalLM.from_pretrained(model_folder(name)).num_parameters()
    model = quantized(name)
    assert model.num_parameters() == wanted == parameter_counts(model)[1]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_shards_equal_one_file(name, dtype, tmp_path):
    whole = write_model(tmp_path / "whole", name, dtype=dtype)
    shards = write_model(tmp_path / "shards", name, dtype=dtype, max_shard_size="40KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    one, many = (
        fourbit.load(str(folder), quant=QuantConfig(), dtype=torch.float32)[0]
        for folder in (whole, shards)
    )
    assert one.state_dict().keys() == many.state_dict().keys()
    for key, tensor in one.state_dict().items():
        assert torch.equal(tensor, many.state_dict()[key]), key
    with torch.no_grad():
        wanted = plain_twin(one, whole)(token_ids()).logits
        torch.testing.assert_close(many(token_ids()).logits, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", PACKABLE)
def test_packed_documents_have_the_logits_they_have_alone(name, quantized):
    objective, texts = Objective(quantized(name)), documents(4)
    objective.require_isolation(make_batch([texts]))
    with torch.no_grad():
        packed = objective.logits(make_batch([texts, texts[:1]]))
        alone = torch.cat([objective.logits(make_batch([[text]]))[0] for text in texts])
    # Sums over masked positions may group differently: float32 rounding, nothing more.
    torch.testing.assert_close(packed[0], alone, rtol=0, atol=5e-5)
    torch.testing.assert_close(
        packed[1, : len(texts[0])], alone[: len(texts[0])], rtol=0, atol=5e-5
    )


@pytest.mark.parametrize("name", [*UNPACKABLE, "mamba"])
def test_what_cannot_be_packed_is_refused_in_one_line(name, quantized):
    with pytest.raises(InputError) as caught:
        Objective(quantized(name)).require_isolation(make_batch([documents(3)]))
    assert caught.value.line() == (
        f"error[packing-leaks] data.packing: {name} does not keep packed documents apart;"
        " fix: set data.packing: false"
    )


@pytest.mark.parametrize("name", UNPACKABLE)
def test_without_packing_padding_changes_no_logits(name, quantized):
    objective, texts = Objective(quantized(name)), documents(3)
    with torch.no_grad():
        padded = objective.logits(make_batch([[text] for text in texts]))
        for row, text in enumerate(texts):
            alone = objective.logits(make_batch([[text]]))[0]
            torch.testing.assert_close(padded[row, : len(text)], alone, rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", EVERY)
def test_a_run_trains_verifies_and_answers(name, model_folder, chats, tmp_path):
    folder, output = model_folder(name), tmp_path / "run"
    packing = name in PACKABLE
    result, config = train_tiny(folder, chats, output, data={"packing": packing})
    receipt = json.loads((output / "receipt.json").read_text())
    assert result.verified
    assert receipt["ok"]
    layers = [m for m in linears(fourbit.load(str(folder))[0]) if "lm_head" not in m]
    assert len(load_file(output / "adapter" / "adapter_model.safetensors")) == 2 * len(layers)
    again = fourbit.verify(output)
    assert again.ok, [check for check in again.checks if not check.ok]
    assert any(check.name == "base" for check in again.checks)
    generator = open_generator(str(folder), adapter=output, quant=config.quant)
    prompts = [generator.prompt_ids([{"role": "user", "content": text}]) for text in ("1?", "22?")]
    answers = generator.answers(prompts, Sampling(max_new_tokens=5))
    assert len(answers) == 2
    assert all(isinstance(answer.text, str) and answer.tokens <= 5 for answer in answers)
    assert any(answer.tokens for answer in answers)


def test_an_unpackable_model_is_refused_before_a_step(model_folder, chats, tmp_path):
    with pytest.raises(InputError, match="packing-leaks"):
        train_tiny(model_folder("opt"), chats, tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_mamba_run_names_the_layers_peft_refuses(model_folder, chats, tmp_path):
    with pytest.raises(InputError) as caught:
        train_tiny(
            model_folder("mamba"), chats, tmp_path / "run", data={"packing": False}, lora={"r": 2}
        )
    assert caught.value.code == "adapter-refused"
    assert caught.value.where == "lora.target_modules"
    assert "out_proj" in caught.value.what


def test_a_mamba_run_trains_on_the_layers_it_may(model_folder, chats, tmp_path):
    lora = {"r": 4, "target_modules": ["in_proj"]}
    result, config = train_tiny(
        model_folder("mamba"), chats, tmp_path / "run", data={"packing": False}, lora=lora
    )
    assert result.verified
    assert fourbit.verify(config.output).ok


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_other_methods_train_and_verify(name, method, model_folder, chats, tmp_path):
    result, config = train_tiny(model_folder(name), chats, tmp_path / "run", method=method)
    assert result.verified
    again = fourbit.verify(config.output)
    assert again.ok, [check for check in again.checks if not check.ok]
    if method == "full":
        model, _ = fourbit.load(str(tmp_path / "run" / "adapter"), dtype=torch.float32)
        before, _ = fourbit.load(str(model_folder(name)), dtype=torch.float32)
        pairs = zip(model.parameters(), before.parameters(), strict=True)
        assert all(not torch.equal(new, old) for new, old in pairs)


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("llama", {"use_dora": True}),
        ("gpt2", {"use_dora": True}),
        ("qwen2", {"modules_to_save": ["lm_head"]}),
        ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}}),
    ],
)
def test_adapter_variants_train_and_verify(name, lora, model_folder, chats, tmp_path):
    result, config = train_tiny(
        model_folder(name), chats, tmp_path / "run", lora={"r": 4, **lora}, max_steps=3
    )
    assert result.verified
    again = fourbit.verify(config.output)
    assert again.ok, [check for check in again.checks if not check.ok]
    generator = open_generator(
        str(model_folder(name)), adapter=Path(config.output), quant=config.quant
    )
    prompt = generator.prompt_ids([{"role": "user", "content": "1?"}])
    assert generator.answers([prompt], Sampling(max_new_tokens=3))[0].tokens <= 3


def test_accumulated_micro_batches_report_the_loss_of_one_big_batch(model_folder, tmp_path):
    data = write_chats(tmp_path / "four.jsonl", count=4)
    seen = []
    for batch_size, grad_accum in ((4, 1), (1, 4), (3, 2)):
        output = tmp_path / f"run-{batch_size}"
        train_tiny(
            model_folder("llama"),
            data,
            output,
            batch_size=batch_size,
            grad_accum=grad_accum,
            max_steps=1,
            precision="fp32",
            data={"packing": False},
            lora={"r": 4, "lora_dropout": 0},
        )
        line = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
        seen.append((line["loss"], line["grad_norm"]))
    for loss, norm in seen[1:]:
        assert loss == pytest.approx(seen[0][0], rel=1e-5)
        assert norm == pytest.approx(seen[0][1], rel=1e-4)


def test_an_adapter_trained_in_float32_answers_too(model_folder, chats, tmp_path):
    _, config = train_tiny(model_folder("llama"), chats, tmp_path / "run", precision="fp32")
    generator = open_generator(
        str(model_folder("llama")), adapter=Path(config.output), quant=config.quant
    )
    assert generator.answers([[1, 2, 3]], Sampling(max_new_tokens=2))
