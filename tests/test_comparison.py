"""`fourbit compare`: names of methods, paired statistics, and the command from end to end."""

from __future__ import annotations

import json
import math
import random
import re

import pytest
import yaml

from commands import fourbit, write_config
from fourbit.comparison import parse_variants
from fourbit.comparison.results import item_values
from fourbit.comparison.statistics import compare_items, compare_losses, over_seeds
from fourbit.errors import InputError
from models import PACKABLE, linears, tiny_model, write_chats


@pytest.mark.parametrize("name", PACKABLE)
def test_attention_and_mlp_are_all_linear_layers_and_nothing_else(name):
    model = tiny_model(name)
    found = []
    for config in configs("qlora-attention,qlora-mlp").values():
        pattern = str(config.lora.target_modules)
        found += [n for n, _ in model.named_modules() if re.fullmatch(pattern, n)]
    assert sorted(found) == sorted(n for n in linears(model) if "lm_head" not in n)


def configs(methods, *variants, base=()):
    return {v.name: v.config(None, base) for v in parse_variants(methods, variants)}


def test_names_are_settings():
    found = configs(
        "full,lora-r64,qlora-fp4-single,qlora-int8,qlora-attention",
        "slow = full --optim.lr 1e-5",
        base=[("lr", "2e-4"), ("lora.r", "8"), ("lora.lora_alpha", "16")],
    )
    assert found["full"].method == "full"
    assert found["full"].optim.lr == pytest.approx(2e-5)
    assert found["slow"].optim.lr == pytest.approx(1e-5)
    assert found["full"].lora.r == 16, "what a method does not read stays at its default"
    assert (found["lora-r64"].lora.r, found["lora-r64"].lora.lora_alpha) == (64, 128)
    fp4 = found["qlora-fp4-single"].quant
    assert (fp4.quant_type, fp4.double_quant) == ("fp4", False)
    assert found["qlora-int8"].quant.quant_type == "int8"
    assert "attn" in str(found["qlora-attention"].lora.target_modules)
    assert found["qlora-attention"].lora.r == 8


@pytest.mark.parametrize(
    ("methods", "variants", "said"),
    [
        ("qlora", [], "needs two"),
        ("qlora,qlorra", [], "did you mean 'qlora'"),
        ("qlora,qlora-fp5", [], "did you mean 'fp4'"),
        ("qlora,full-r8", [], "method full has no lora.r"),
        ("qlora,lora-nf4", [], "method lora has no quant.quant_type"),
        ("qlora,qlora", [], "named twice"),
        ("qlora", ["slow"], "is no variant"),
        ("qlora", ["slow=full --optim.lr"], "is no --key value"),
        ("qlora", ["../up=full"], "is no variant"),
        ("qlora", ["a=full '"], "quotation"),
    ],
)
def test_names_that_mean_nothing(methods, variants, said):
    with pytest.raises(InputError) as error:
        parse_variants(methods, variants)
    assert said in error.value.line()


def test_a_variant_with_a_wrong_key_is_named():
    (_, bad) = parse_variants("qlora", ["slow=full --optim.learning 1"])
    with pytest.raises(InputError) as error:
        bad.config(None, [])
    assert "slow" in error.value.where
    assert "optim.learning" in error.value.line()


def test_an_interval_over_seeds_is_students():
    found = over_seeds([1.0, 2.0, 3.0])
    assert found.value == 2.0
    assert found.half == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(over_seeds([1.0]).half)


def test_losses_are_paired_by_seed():
    # the seeds differ much more from each other than the methods do
    theirs = {0: 1.0, 1: 5.0, 2: 9.0}
    ours = {seed: value - 0.1 - 0.001 * seed for seed, value in theirs.items()}
    found = compare_losses("a", "b", "loss", ours, theirs)
    assert found.seen
    assert "a is better than b" in found.words()
    assert "-0.101" in found.words()
    single = compare_losses("a", "b", "loss", {0: 1.0}, {0: 2.0})
    assert not single.seen
    assert "one seed cannot tell" in single.words()
    assert compare_losses("a", "b", "loss", {0: 1.0}, {1: 2.0}) is None


def test_no_difference_is_seen_where_there_is_none_and_one_where_there_is():
    random.seed(0)
    false, missed, rounds = 0, 0, 200
    for _ in range(rounds):
        hard = [random.random() for _ in range(300)]

        def answers(gain, hard=hard):
            return {s: [float(random.random() < min(1, p + gain)) for p in hard] for s in range(3)}

        reference = answers(0.0)
        false += compare_items("a", "b", "acc", answers(0.0), reference).seen
        missed += not compare_items("a", "b", "acc", answers(0.35), reference).seen
    assert false <= 0.05 * rounds
    assert missed <= 0.1 * rounds


def test_what_an_item_gave():
    chosen = {"acc": 0.5, "each": [{"acc": 1, "gold": 1}, {"acc": 1, "gold": 0}]}
    assert item_values(chosen) == [1.0, 0.0]
    told = {"exact_match": 0.5, "each": [{"exact_match": True, "f1": 1.0}]}
    assert item_values(told) == [1.0]
    assert item_values({"perplexity": 3.0, "each": [{"log_likelihood": -3.0}]}) == []


@pytest.fixture(scope="module")
def compared(tmp_path_factory, model_folder):
    """A comparison that failed in one method, as a user sees it."""
    folder = tmp_path_factory.mktemp("compared")
    config = write_config(folder, model_folder("llama"), epochs=1, eval_every=0)
    test = write_chats(folder / "test.jsonl", 6)
    text = folder / "book.txt"
    text.write_text("It was a dark night.\n\nIt rained.\n" * 20)
    words = [
        "compare", config, "--methods", "lora,qlora-single", "--variant",
        "wide=qlora --lora.r 4096", "--seeds", "2", "--tasks", f"exact_match={test}", "--text",
        text, "--window", "64", "--max-new-tokens", "4", "-o", folder / "out",
    ]  # fmt: skip
    return words, folder, fourbit(*words, "--json")


def test_the_command_from_end_to_end(compared):
    _, folder, done = compared
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    lora, qlora, wide = told["rows"]
    assert lora["seeds"] == qlora["seeds"] == [0, 1]
    assert lora["verified"]
    assert lora["trainable_parameters"] == qlora["trainable_parameters"] > 0
    assert qlora["parts"]["weights"] < lora["parts"]["weights"]
    assert qlora["scores"]["exact_match"]["seeds"] == 2
    assert qlora["scores"]["perplexity"]["before"] > 1
    assert wide["seeds"] == []
    assert "rank" in wide["failed"]["0"]
    measures = {(one["method"], one["measure"]) for one in told["verdicts"]}
    assert measures == {
        ("qlora-single", "exact_match"),
        ("qlora-single", "perplexity of book.txt"),
        ("qlora-single", "evaluation loss"),
    }
    page = (folder / "out" / "compare.html").read_text()
    for one in told["verdicts"]:
        assert one["verdict"] in page
    assert "wide" in page
    assert (folder / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_it_goes_on_where_it_stopped_and_can_grow(compared):
    words, folder, _ = compared
    (folder / "out" / "results" / "qlora-single-seed1.json").unlink()
    state = folder / "out" / "compare.json"
    told = json.loads(state.read_text())
    for settings in told["identity"]["settings"].values():
        del settings["deterministic"]  # as a version wrote it that did not have this setting
    state.write_text(json.dumps(told))
    done = fourbit(*words, "--json")
    assert done.returncode == 0, done.stderr
    assert "qlora-single, seed 1" in done.stderr
    assert "lora, seed 0" not in done.stderr.replace("qlora", "")
    assert [len(row["seeds"]) for row in json.loads(done.stdout)["rows"]] == [2, 2, 0]


def test_another_comparison_is_not_mixed_in(compared):
    words, folder, _ = compared
    config = folder / "config.yaml"
    other = folder / "other.yaml"
    other.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "epochs": 2}))
    changed = [other if word == config else word for word in words]
    done = fourbit(*changed)
    assert done.returncode == 2
    assert "epochs: 1" in done.stderr
    assert "--overwrite" in done.stderr
    foreign = folder / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    done = fourbit(*[foreign if word == folder / "out" else word for word in words])
    assert done.returncode == 2
    assert "not of a comparison" in done.stderr
    assert (foreign / "thesis.txt").read_text() == "mine"


@pytest.mark.slow
def test_a_method_that_gave_no_result_yet_may_be_corrected(compared):
    words, folder, _ = compared
    narrow = ["wide=qlora --lora.r 2" if "4096" in str(word) else word for word in words]
    done = fourbit(*narrow, "--json")
    assert done.returncode == 0, done.stderr
    assert [len(row["seeds"]) for row in json.loads(done.stdout)["rows"]] == [2, 2, 2]
    assert (folder / "out" / "wide.old-1").is_dir()
    done = fourbit(*words)
    assert done.returncode == 2
    assert "settings, wide, lora" in done.stderr


@pytest.mark.slow
def test_a_base_that_the_run_calibrates_is_the_one_that_is_measured(tmp_path, model_folder):
    model = model_folder("llama")
    data = {"train": str(write_chats(tmp_path / "many.jsonl", 90)), "eval": 2, "max_length": 128}
    config = write_config(tmp_path, model, data=data, max_steps=1, eval_every=0)
    text = tmp_path / "book.txt"
    text.write_text("It was a dark night.\n\nIt rained.\n" * 20)
    out = tmp_path / "out"
    done = fourbit(
        "compare", config, "--methods", "qlora,qlora-calibrated", "--seeds", "1", "--text", text,
        "--window", "64", "-o", out, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plain, calibrated = (row["scores"]["perplexity"] for row in json.loads(done.stdout)["rows"])
    assert plain["before"] != calibrated["before"]
    base = out / "qlora-calibrated" / "seed-0" / "base"
    alone = fourbit(
        "eval",
        base,
        "--tasks",
        f"perplexity={text}",
        "--window",
        "64",
        "--precision",
        "fp32",
        "--json",
    )
    assert alone.returncode == 0, alone.stderr
    found = json.loads(alone.stdout)["results"]["perplexity"]["perplexity"]
    assert calibrated["before"] == pytest.approx(found)
