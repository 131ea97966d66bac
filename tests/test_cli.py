"""The command line: one JSON object, one line per mistake, documented exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from commands import fourbit, write_config
from fourbit.cli import main


@pytest.fixture
def call(capsys):
    """Calls the command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return run


def one_error(err: str) -> str:
    lines = [line for line in err.splitlines() if line.startswith("error[")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def train_on(model_folder, tmp_path, text, *more):
    data = tmp_path / "data.jsonl"
    data.write_text(text)
    return (
        "train",
        *("--model", model_folder("llama"), "--data", data, "-o", tmp_path / "run"),
        *more,
    )


# What a newcomer gets wrong first.


def test_wrong_data_path_names_a_near_file(call, model_folder, tmp_path):
    (tmp_path / "orders.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    code, _, err = call(
        *("train", "--model", model_folder("llama"), "--data", tmp_path / "order.jsonl"),
        *("-o", tmp_path / "run"),
    )
    assert code == 2
    line = one_error(err)
    assert "order.jsonl" in line
    assert "orders.jsonl" in line


def test_wrong_column_names_show_how_to_name_them(call, model_folder, tmp_path):
    arguments = train_on(model_folder, tmp_path, '{"question": "a", "answer": "b"}\n')
    code, _, err = call(*arguments)
    assert code == 2
    line = one_error(err)
    assert "question" in line
    assert "--data.prompt" in line


def test_unknown_key_names_the_nearest(call, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("model: smollm2\nlora:\n  rr: 8\n")
    code, _, err = call("train", config)
    assert code == 2
    line = one_error(err)
    assert "c.yaml:3" in line
    assert "lora.r" in line


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["trian"], 2, "did you mean 'train'"),
        (["train", "--lora.rr", "8"], 2, "lora.r"),
        (["train", "--lr"], 2, "needs a value"),
        (["train", "a.yaml", "b.yaml"], 2, "b.yaml"),
        (["train", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["train", "--optim.lr", "-1"], 2, "optim.lr"),
        (["train", "--optim.lr", "nan"], 2, "optim.lr"),
        (["train", "--lora.lora_dropout", "1.5"], 2, "lora.lora_dropout"),
        (["train", "--grad_accum", "0"], 2, "grad_accum"),
        (["train", "--optim.optim_bits", "16"], 2, "optim.optim_bits"),
        (["train", "--optim.paged", "sometimes"], 2, "optim.paged"),
        (["train", "--method", "p_tunin"], 2, "p_tuning"),
        (["train", "--method", "p_tuning", "--lora.r", "8"], 2, "lora.r: not read by method p_tu"),
        (["train", "--prompt.num_virtual_tokens", "8"], 2, "not read by method qlora"),
        (["plan", "smollm2", "--method", "full", "--r", "4"], 2, "lora.r: not read by method full"),
        (["train", "--parallel", "pipeline"], 2, "ddp"),
        (["train", "--quant.blocksize", "100"], 2, "blocksize"),
        (["train", "--quant.quant_type", "int3"], 2, "nf4"),
        (["train"], 2, "data.train"),
        (["generate", "no/such/folder/here", "--prompt", "x"], 3, "no-such-model"),
        (["generate", "smolm2", "--prompt", "x"], 3, "did you mean 'smollm2'"),
        (["generate", "smollm2", "--prompt", " "], 2, "empty"),
        (["generate", "smollm2"], 2, "--prompt"),
        (["verify", "nowhere"], 2, "no run directory"),
        (["inspect", "nowhere"], 3, "nowhere"),
        (["plan", "nowhere"], 3, "nowhere"),
        (["doctor", "--jsn"], 2, "--json"),
        (["serve"], 2, "No such command"),
    ],
)
def test_mistakes_end_in_one_line(call, tmp_path, monkeypatch, words, code, part):
    monkeypatch.chdir(tmp_path)
    ended, out, err = call(*words)
    assert part in one_error(err)
    assert ended == code
    assert out == ""


def test_mistakes_with_json_print_one_object(call):
    code, out, err = call("inspect", "nowhere", "--json")
    assert code == 3
    values = json.loads(out)
    assert values["exit_code"] == 3
    assert values["error"]["where"] == "nowhere"
    assert err.startswith("error[")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "empty"),
        ("\n \n", "empty"),
        ('{"prompt": "a" "completion": "b"}\n', "data.jsonl:1:"),
        ('{"prompt": "a", "completion": ""}\n', "data.jsonl:1"),
        ('{"messages": [{"role": "robot", "content": "x"}]}\n', "robot"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n', "assistant"),
    ],
)
def test_bad_data_names_its_line(call, model_folder, tmp_path, text, part):
    code, _, err = call(*train_on(model_folder, tmp_path, text))
    assert code == 2
    assert part in one_error(err)


GOOD = '{"prompt": "what is up", "completion": "the sky"}\n' * 8


@pytest.mark.parametrize(
    ("more", "code", "part"),
    [
        (["--data.max_length", "100000"], 2, "context"),
        (["--lora.r", "4096"], 2, "exceeds the smaller side"),
        (["--lora.target_modules", "[q_prj]"], 2, "did you mean 'q_proj'"),
        (["--lora.target_modules", "[lm_head]"], 2, "output head"),
        (["--lora.modules_to_save", "[lm_haed]"], 2, "lm_haed"),
        (["--precision", "fp16"], 2, "fp16"),
        (["--data.prompt", "{prompt}"], 2, "completion is missing"),
        (["--report_to", "wandb"], 4, "not installed"),
    ],
)
def test_impossible_settings_end_before_training(call, model_folder, tmp_path, more, code, part):
    ended, _, err = call(*train_on(model_folder, tmp_path, GOOD, *more))
    assert part in one_error(err)
    assert ended == code


def test_output_in_the_way_is_refused(call, model_folder, tmp_path):
    (tmp_path / "run").write_text("a file")
    code, _, err = call(*train_on(model_folder, tmp_path, GOOD))
    assert code in (2, 4)
    assert "run" in one_error(err)
    assert (tmp_path / "run").read_text() == "a file"


def test_a_dry_run_writes_nothing(call, model_folder, tmp_path):
    code, out, _ = call(*train_on(model_folder, tmp_path, GOOD, "--dry-run", "--json"))
    assert code == 0
    values = json.loads(out)
    assert values["dry_run"] is True
    assert values["predicted_peak_bytes"] > 0
    assert not (tmp_path / "run").exists()


def test_train_verify_generate_plan_inspect(call, model_folder, tmp_path):
    config = write_config(tmp_path, model_folder("llama"), epochs=1)
    code, out, _ = call("train", config, "--json", "--save-dtype", "bf16")
    assert code == 0
    result = json.loads(out)
    assert result["verified"] is True
    for key in (
        *("run_dir", "steps", "tokens_per_second", "peak_memory_bytes", "predicted_peak_bytes"),
        *("train_loss_first", "train_loss_last", "eval_loss_before", "eval_loss_after"),
    ):
        assert result[key] is not None, key

    run = tmp_path / "run"
    present = {path.name for path in run.iterdir()}
    assert {
        *("config.yaml", "adapter", "checkpoints", "metrics.jsonl"),
        *("receipt.json", "report.html", "log.txt"),
    } <= present

    code, out, _ = call("verify", run, "--json")
    assert code == 0
    assert json.loads(out)["ok"] is True

    arguments = (model_folder("llama"), "--adapter", run, "--prompt", "hello", "--json")
    code, out, _ = call("generate", *arguments, "--max-new-tokens", "4")
    assert code == 0
    assert set(json.loads(out)) >= {"text", "tokens", "tokens_per_second"}

    code, out, _ = call("plan", model_folder("llama"), "--json", "--max-length", "64")
    assert code == 0
    assert {"parts", "peak_bytes", "fits"} <= set(json.loads(out))

    code, out, _ = call("inspect", run, "--json")
    assert code == 0
    assert {"tensors", "parameters", "bytes"} <= set(json.loads(out))


def test_relative_paths_work_everywhere(call, model_folder, tmp_path, monkeypatch):
    config = write_config(tmp_path, model_folder("llama"), max_steps=1, output="runs/first")
    monkeypatch.chdir(tmp_path)
    assert call("train", config.name, "--json")[0] == 0
    assert call("verify", "runs/first", "--json")[0] == 0
    assert call("train", config.name, "--resume", "auto", "--json")[0] == 0
    assert (tmp_path / "runs" / "first" / "report.html").is_file()


def test_an_untrained_adapter_of_another_base_is_refused(call, model_folder, tmp_path):
    config = write_config(tmp_path, model_folder("llama"), max_steps=1, eval_every=0)
    assert call("train", config, "--json")[0] == 0
    other = shutil.copytree(model_folder("llama"), tmp_path / "other")
    from safetensors.torch import load_file, save_file

    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= -1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    code, _, err = call("generate", other, "--adapter", tmp_path / "run", "--prompt", "x")
    assert code == 3
    assert "was not trained on these bytes" in one_error(err)


@pytest.mark.parametrize(
    "name", ["train", "plan", "verify", "generate", "chat", "inspect", "doctor", "demo"]
)
def test_help_has_examples(call, name):
    code, out, _ = call(name, "--help")
    assert code == 0
    assert f"fourbit {name}" in out.split("Examples:")[1]


def test_train_help_lists_every_setting(call):
    from fourbit.settings import options
    from fourbit.training.config import TrainConfig

    _, out, _ = call("train", "--help")
    for option in options(TrainConfig):
        assert f"--{option.key}" in out


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_waiting_threads_sleep_unless_the_user_chose(given, spins):
    code = (
        "import os, sys; from fourbit.cli import main\n"
        "try: main(['--version'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules\n"
        "print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    kept = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**kept, **given}, capture_output=True, text=True
    )
    assert done.stdout.split()[-1] == str(spins)


def test_two_runs_in_one_directory(model_folder, tmp_path):
    from fourbit.rundir import RunDir

    config = write_config(tmp_path, model_folder("llama"))
    with RunDir.open(tmp_path / "run", resume=False, overwrite=False):
        done = fourbit("train", config, "--resume", "auto")
    assert done.returncode == 6
    assert "error[" in done.stderr


def test_a_chat_reads_lines_from_a_pipe(model_folder):
    import subprocess
    import sys

    done = subprocess.run(
        [
            *(sys.executable, "-m", "fourbit", "chat", str(model_folder("llama"))),
            *("--max-new-tokens", "3"),
        ],
        input="hello\nagain\n\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2
