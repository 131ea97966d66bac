"""Prompt tuning and P-tuning through the whole life of a run."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import fourbit
from commands import fourbit as fourbit_command
from commands import start, write_config
from fourbit import checkpoint
from fourbit.errors import InputError, ModelError, VerificationFailed
from fourbit.files import sha256_of
from fourbit.generate import Sampling, open_generator
from fourbit.inspection import inspect
from fourbit.rundir import RunDir
from fourbit.settings import load_settings
from fourbit.training.config import TrainConfig
from fourbit.training.progress import Reporter
from fourbit.training.prompts import start_ids, text_context
from models import tiny_config, tiny_tokenizer

METHODS = ("prompt_tuning", "p_tuning")
ADAPTER = "adapter_model.safetensors"


def config_of(folder: Path, model: Path, method: str, **changes) -> Path:
    path = write_config(folder, model, **{"method": method, "max_steps": 6, **changes})
    values = yaml.safe_load(path.read_text())
    values.pop("lora")  # the shared configuration is that of an adapter
    path.write_text(yaml.safe_dump(values))
    return path


def run(path: Path, lines: list[str] | None = None) -> Path:
    resolved = load_settings(TrainConfig, path=path)
    reporter = Reporter(quiet=True)
    if lines is not None:
        reporter.line = lines.append  # type: ignore[method-assign]
    result = fourbit.train(resolved.value, origins=resolved.origins, reporter=reporter)
    assert result.verified
    return path.parent / "run"


@pytest.fixture(scope="module", params=METHODS)
def finished(request, tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp(request.param)
    lines: list[str] = []
    prompt = {"num_virtual_tokens": 5}
    if request.param == "p_tuning":
        prompt["encoder_hidden_size"] = 12
    path = config_of(folder, model_folder("llama"), request.param, prompt=prompt)
    run(path, lines)
    return folder, request.param, lines


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished[0] / "run", tmp_path / "run")
    return tmp_path / "run", finished[1]


def test_a_run_trains_the_prompt_and_nothing_else(finished):
    folder, method, lines = finished
    receipt = json.loads((folder / "run" / "receipt.json").read_text())
    wanted = 5 * 48 if method == "prompt_tuning" else 5 * 48 + 48 * 12 + 12 + 156 + 12 * 48 + 48
    assert receipt["trainable_parameters"] == wanted
    assert receipt["ok"]
    assert receipt["loss_fell"]
    details = {check["name"]: check["detail"] for check in receipt["checks"]}
    assert "as the prompt's settings give" in details["trainable_count"]
    tensors = 1 if method == "prompt_tuning" else 7
    assert f"exactly the {tensors} trainable tensors" in details["optimizer_owns_adapters"]
    assert f"gradients reached {tensors} of {tensors}" in details["gradients_reached"]
    assert f"data.packing: false, since with {method} every row begins with the prompt" in lines
    config = load_settings(TrainConfig, path=folder / "run" / "config.yaml").value
    assert not config.data.packing
    # the untouched model, without the random prompt
    assert receipt["eval_loss_before"] == pytest.approx(untouched_loss(folder), rel=1e-5)
    plan = json.loads((folder / "run" / "plan.json").read_text())["plan"]
    assert plan["trainable"] == wanted


def untouched_loss(folder: Path) -> float:
    """The evaluation loss of the base, from its own forward pass."""
    from fourbit.data import prepare, read_rows

    config = load_settings(TrainConfig, path=folder / "run" / "config.yaml").value
    base, tokenizer = fourbit.load(config.model, quant=config.quant, dtype=torch.float32)
    data = prepare(config.data, read_rows(config.data), tokenizer, seed=config.seed)
    assert data.eval is not None
    total = 0.0
    for sample in (data.eval[i] for i in range(len(data.eval))):
        ids = torch.tensor(sample.input_ids.astype("int64"))[None]
        labels = ids.masked_fill(~torch.tensor(sample.supervised)[None], -100)
        with torch.no_grad():
            loss = base(input_ids=ids, labels=labels).loss
        total += float(loss) * int(sample.supervised.sum())
    return total / data.eval.num_supervised


def test_verify_accepts_it_with_its_base(finished):
    receipt = fourbit.verify(finished[0] / "run")
    assert receipt.ok, [check for check in receipt.checks if not check.ok]
    names = {check.name for check in receipt.checks}
    assert {"base", "adapter_equals_checkpoint", "adapter_count"} <= names


def failed(path: Path) -> set[str]:
    return {c.name for c in fourbit.verify(path, base=False).checks if not c.ok}


def tamper(path: Path, change, *, record: bool = True) -> None:
    """Changes the adapter, and the digest in the receipt too, as someone would who hides it."""
    file = path / "adapter" / ADAPTER
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    if record:
        receipt = json.loads((path / "receipt.json").read_text())
        receipt["adapter_sha256"] = sha256_of(file)
        (path / "receipt.json").write_text(json.dumps(receipt))


def test_a_changed_prompt_is_caught(copy):
    path, _ = copy

    def nudge(tensors):
        tensors["prompt_embeddings"][3, 7] += 0.01

    tamper(path, nudge)
    assert failed(path) == {"adapter_equals_checkpoint"}


def test_a_changed_prompt_with_its_old_digest_is_caught_too(copy):
    path, _ = copy
    tamper(path, lambda t: t["prompt_embeddings"].add_(1.0), record=False)
    assert "adapter_file" in failed(path)


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda t: t["prompt_embeddings"][2].zero_(), "adapter_tensors"),
        (lambda t: t.update(prompt_embeddings=t["prompt_embeddings"][:4].clone()), "adapter_count"),
        (lambda t: t.update(more=torch.ones(2)), "adapter_tensors"),
        (lambda t: t["prompt_embeddings"].fill_(float("nan")), "adapter_tensors"),
    ],
)
def test_damage_to_the_prompt_is_named(copy, change, check):
    path, _ = copy
    tamper(path, change)
    assert check in failed(path)


def test_another_configuration_beside_the_prompt_is_caught(copy):
    path, _ = copy
    file = path / "adapter" / "adapter_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "num_virtual_tokens": 6}))
    assert "adapter_count" in failed(path)


def test_the_folder_is_pefts_and_generates(finished, tmp_path):
    folder, method, _ = finished
    config = load_settings(TrainConfig, path=folder / "run" / "config.yaml").value
    adapter = folder / "run" / "adapter"
    described = json.loads((adapter / "adapter_config.json").read_text())
    assert described["peft_type"] == method.upper()
    assert described["base_model_name_or_path"] == config.model
    generator = open_generator(config.model, adapter=folder / "run", quant=config.quant)
    prompt = generator.prompt_ids([{"role": "user", "content": "3 plus 3?"}])
    first = generator.answers([prompt], Sampling(max_new_tokens=5))[0]
    base, _ = fourbit.load(config.model, quant=config.quant)
    loaded = peft.PeftModel.from_pretrained(base, str(adapter))
    theirs = loaded.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=5,
        do_sample=False,
    )
    assert first.text in generator.tokenizer.decode(theirs[0, len(prompt) :])
    card = (adapter / "README.md").read_text()
    assert "5 virtual tokens" in card
    assert "nf4" in card


def test_inspect_names_what_the_folder_holds(finished):
    folder, method, _ = finished
    found = inspect(str(folder / "run"))
    assert found.kind == "adapter"
    assert found.parameters == 5 * 48
    assert found.adapter["peft_type"] == method.upper()
    assert found.adapter["num_virtual_tokens"] == 5
    assert "num virtual tokens: 5" in found.lines()


def test_another_base_is_refused_in_one_line(finished, model_folder):
    folder, _, _ = finished
    config = load_settings(TrainConfig, path=folder / "run" / "config.yaml").value
    with pytest.raises(ModelError, match="not trained on these bytes"):
        open_generator(str(model_folder("qwen2")), adapter=folder / "run", quant=config.quant)


def test_a_base_of_another_width_is_refused_in_one_line(finished, tmp_path):
    from models import write_model

    folder, _, _ = finished
    other = write_model(tmp_path / "wide", "llama", hidden_size=64)
    shutil.copytree(folder / "run" / "adapter", tmp_path / "adapter")
    with pytest.raises(ModelError, match="48 values, the model's tokens 64"):
        open_generator(str(other), adapter=tmp_path / "adapter", quant=None)


# Resume.


@pytest.mark.parametrize(
    ("method", "prompt"),
    [
        ("prompt_tuning", {"num_virtual_tokens": 4}),
        (
            "p_tuning",
            {
                "num_virtual_tokens": 4,
                "encoder_reparameterization_type": "lstm",
                "encoder_hidden_size": 8,
                "encoder_dropout": 0.2,
            },
        ),
    ],
)
def test_a_killed_run_ends_with_the_bytes_of_an_undisturbed_one(
    method, prompt, model_folder, tmp_path, monkeypatch
):
    whole = run(config_of(tmp_path / "whole", model_folder("llama"), method, prompt=prompt))
    path = config_of(tmp_path / "cut", model_folder("llama"), method, prompt=prompt)
    real, saved = checkpoint.save, []

    class Killed(BaseException):
        """Nothing of ours catches it, as nothing catches a SIGKILL."""

    def save(*arguments, **keywords):
        done = real(*arguments, **keywords)
        saved.append(keywords["step"])
        if len(saved) == 2:
            raise Killed
        return done

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(Killed):
        run(path)
    monkeypatch.undo()
    resolved = load_settings(TrainConfig, path=path, overrides=[("resume", "auto")])
    assert fourbit.train(resolved.value, origins=resolved.origins, reporter=Reporter(quiet=True))
    cut = path.parent / "run"
    assert saved == [2, 4]
    assert sha256_of(cut / "adapter" / ADAPTER) == sha256_of(whole / "adapter" / ADAPTER)
    assert [line["step"] for line in RunDir(cut).read_metrics()] == [0, 1, 2, 3, 4, 5, 6]
    assert fourbit.verify(cut).ok


@pytest.mark.slow
def test_sigkill_then_resume(model_folder, tmp_path):
    prompt = {"num_virtual_tokens": 4, "encoder_hidden_size": 8}
    changes = {"prompt": prompt, "max_steps": 30}
    whole = config_of(tmp_path / "whole", model_folder("llama"), "p_tuning", **changes)
    cut = config_of(tmp_path / "cut", model_folder("llama"), "p_tuning", **changes)
    process = start("train", cut)
    log = RunDir(cut.parent / "run")
    while process.poll() is None and len(log.read_metrics()) < 5:
        time.sleep(0.005)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    for path in (whole, cut):
        done = fourbit_command("train", path, "--resume", "auto")
        assert done.returncode == 0, done.stderr
    digests = {sha256_of(c.parent / "run" / "adapter" / ADAPTER) for c in (whole, cut)}
    assert len(digests) == 1


def test_other_prompt_settings_are_no_resume(finished):
    folder, method, _ = finished
    overrides = [("resume", "auto"), ("prompt.num_virtual_tokens", "6")]
    config = load_settings(TrainConfig, path=folder / "config.yaml", overrides=overrides).value
    with pytest.raises(InputError, match="num_virtual_tokens"):
        fourbit.train(config, reporter=Reporter(quiet=True))


# Lengths and starts.


def length_config(**data) -> TrainConfig:
    prompt = {"num_virtual_tokens": 20}
    return TrainConfig.model_validate({"method": "p_tuning", "prompt": prompt, "data": data})


def test_virtual_tokens_count_against_the_context():
    model = tiny_config("llama")  # a context of 256
    assert text_context(length_config(), model) == 236
    assert text_context(length_config(max_length=236), model) == 236
    with pytest.raises(InputError) as caught:
        text_context(length_config(max_length=237), model)
    assert caught.value.line() == (
        "error[max-length] data.max_length: 237 and 20 virtual tokens are more than the model's"
        " context of 256; fix: at most data.max_length: 236"
    )
    long = TrainConfig(method="prompt_tuning", prompt={"num_virtual_tokens": 250})
    with pytest.raises(InputError, match="at most 248"):
        text_context(long, model)
    assert text_context(TrainConfig(), model) == 256


def test_the_start_of_a_prompt():
    tokenizer = tiny_tokenizer()

    def start(**prompt):
        config = TrainConfig(method="prompt_tuning", prompt={"num_virtual_tokens": 5, **prompt})
        torch.manual_seed(0)
        return start_ids(config, tokenizer, rows=264)

    text = {"prompt_tuning_init": "text"}
    a, b, c = tokenizer("abc").input_ids
    assert start(**text, prompt_tuning_init_text="abc") == [a, b, c, a, b]
    assert start(**text, prompt_tuning_init_text="abcabcabc") == [a, b, c, a, b]
    assert start(prompt_tuning_init="random") is None
    drawn = start()
    assert drawn == start()
    assert len(drawn) == 5
    assert not set(drawn) & set(tokenizer.all_special_ids)


def test_a_text_start_is_written_into_pefts_configuration(model_folder, tmp_path):
    prompt = {
        "num_virtual_tokens": 3,
        "prompt_tuning_init": "text",
        "prompt_tuning_init_text": "sum:",
    }
    path = config_of(tmp_path, model_folder("llama"), "prompt_tuning", prompt=prompt, max_steps=2)
    described = json.loads((run(path) / "adapter" / "adapter_config.json").read_text())
    assert described["prompt_tuning_init"] == "TEXT"
    assert described["prompt_tuning_init_text"] == "sum:"
    assert peft.PeftConfig.from_pretrained(str(tmp_path / "run" / "adapter")).inference_mode


# Other people's loops, and other arithmetic.


def pefts_prompt(folder: Path) -> peft.PeftModel:
    torch.manual_seed(0)
    base, _ = fourbit.load(str(folder), quant=fourbit.QuantConfig(), dtype=torch.float32)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    return peft.get_peft_model(base, config)


def test_watch_proves_a_loop_over_pefts_own_prompt(model_folder, tmp_path):
    model = pefts_prompt(model_folder("llama")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(1, 25).reshape(2, 12)
    with fourbit.watch(model, optimizer, adapter_dir=tmp_path) as receipt:
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(tmp_path)
    assert receipt.ok
    assert receipt.facts["trainable_parameters"] == 4 * 48


def test_watch_catches_a_weight_of_the_base_that_is_trained_along(model_folder):
    model = pefts_prompt(model_folder("llama")).train()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(1, 25).reshape(2, 12)

    def loop() -> None:
        with fourbit.watch(model, optimizer):
            for _ in range(2):
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()

    with pytest.raises(VerificationFailed, match="trainable_count"):
        loop()


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16", "save_dtype": "bf16"},
        {"gradient_checkpointing": "all"},
        {"quant": {"quant_type": "int8"}},
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_other_precisions_and_recomputation_train_too(method, changes, model_folder, tmp_path):
    path = config_of(tmp_path, model_folder("gpt2"), method, **changes)
    assert fourbit.verify(run(path)).ok


def test_the_loss_falls_far(model_folder, tmp_path):
    changes = {"max_steps": 60, "eval_every": 0, "save_every": 0, "samples": 0}
    path = config_of(tmp_path, model_folder("llama"), "prompt_tuning", optim={"lr": 0.1}, **changes)
    losses = [line["loss"] for line in RunDir(run(path)).read_metrics() if line["step"]]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
