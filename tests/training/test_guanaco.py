"""The recipe of the paper: its values, and that it runs."""

from __future__ import annotations

from pathlib import Path

from commands import fourbit
from fourbit.settings import load_settings
from fourbit.training.config import TrainConfig
from models import write_chats

RECIPE = Path(__file__).parents[2] / "examples" / "guanaco.yaml"


def test_values_of_the_paper():
    run = load_settings(TrainConfig, path=RECIPE).value
    assert (run.method, run.quant.quant_type, run.quant.double_quant) == ("qlora", "nf4", True)
    assert (run.lora.r, run.lora.lora_alpha, run.lora.lora_dropout) == (64, 16, 0.1)
    assert run.lora.target_modules == "all-linear"
    assert (run.optim.lr, run.optim.beta2, run.optim.max_grad_norm) == (2e-4, 0.999, 0.3)
    assert (run.optim.schedule, run.optim.weight_decay) == ("constant", 0.0)
    assert run.batch_size * run.grad_accum == 16
    assert (run.max_steps, run.data.max_length, run.data.train_on) == (1875, 512, "all")


def test_it_runs_on_a_model_and_rows_at_hand(model_folder, tmp_path):
    chats = write_chats(tmp_path / "chats.jsonl", 24)
    smaller = ["--data.eval", "2", "--data.max_length", "128", "--lora.r", "8", "--max_steps", "2"]
    where = ["--model", model_folder("llama"), "--data.train", chats, "-o", tmp_path / "run"]
    done = fourbit("train", RECIPE, *where, *smaller, "--json")
    assert done.returncode == 0, done.stderr
    assert '"verified":true' in done.stdout.replace(" ", "")
