"""The harness in benchmarks/cpu: order, resuming, failures, verdicts. No model is touched."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1] / "benchmarks" / "cpu"
pytestmark = pytest.mark.skipif(not HERE.is_dir(), reason="an sdist has no benchmarks")
MODULES = ("protocol", "models", "train", "correct", "head", "load", "decode", "caps", "ceilings")

CHILD = """
import json, sys, pathlib
spec = json.loads(sys.argv[2])
log = pathlib.Path(spec["log"])
log.write_text((log.read_text() if log.exists() else "") + spec["name"])
if spec["name"] == "c":
    print(json.dumps({"skipped": "not here"})); sys.exit()
if spec["name"] == "d":
    sys.exit("it broke")
print("noise {")
print(json.dumps({"speed": 2.0 * len(log.read_text()), "threads_seen": spec["threads"]}))
"""


@pytest.fixture
def bench(monkeypatch):
    """Imports a script of benchmarks/cpu, whose modules have names that others may have too."""
    monkeypatch.syspath_prepend(str(HERE))
    yield importlib.import_module
    for name in (*MODULES, "claims", "picture", "run"):
        sys.modules.pop(name, None)


@pytest.fixture
def stage(bench, tmp_path, monkeypatch):
    protocol = bench("protocol")
    monkeypatch.setattr(protocol, "busy", lambda: 0.0)  # it listens for half a second
    script = tmp_path / "script.py"
    script.write_text(CHILD)
    log = tmp_path / "log"

    def go(names, *arguments):
        options = protocol.settle(protocol.parser("x").parse_args([*arguments, "--threads", "1"]))
        cases = [protocol.Case(name, {"name": name, "log": str(log)}) for name in names]
        outcome = protocol.measure(str(script), tmp_path / "out.csv", cases, options)
        order = log.read_text() if log.exists() else ""
        return outcome, order, protocol.read(tmp_path / "out.csv")

    return protocol, go


def test_sides_take_turns(stage):
    _, go = stage
    outcome, order, rows = go("ab", "--rounds", "3")
    assert order == "ababab"
    assert [(r["case"], r["round"]) for r in rows] == [(c, n) for n in "123" for c in "ab"]
    assert {r["threads_seen"] for r in rows} == {"1"}
    assert not outcome.failed
    assert not outcome.skipped


def test_a_side_that_cannot_run_stops_nobody(stage):
    _, go = stage
    outcome, order, rows = go("acdb", "--rounds", "2")
    assert order == "acdbab"
    assert outcome.skipped == {"c": "not here"}
    assert outcome.failed == {"d": "exit 1: it broke"}
    assert [r["case"] for r in rows] == ["a", "b", "a", "b"]


def test_resume_measures_what_is_missing(stage, monkeypatch):
    protocol, go = stage
    go("a", "--rounds", "2")
    outcome, order, rows = go("ab", "--rounds", "2", "--resume")
    assert order == "aabb"
    assert len(rows) == len(outcome.rows) == 4
    assert go("ab", "--rounds", "2")[1] == "aabbabab"  # without --resume everything again
    monkeypatch.setattr(protocol, "commit", lambda: "other")
    assert go("a", "--rounds", "1", "--resume")[1] == "aabbababa"


def test_only_names_cases(stage):
    _, go = stage
    assert go("ab", "--rounds", "1", "--only", "b*")[1] == "b"
    with pytest.raises(SystemExit, match="no such case; there are a, b"):
        go("ab", "--only", "z")


def test_new_columns_join_a_file(bench, tmp_path):
    protocol = bench("protocol")
    path = tmp_path / "a.csv"
    protocol.append(path, {"x": 1})
    protocol.append(path, {"x": 2, "y": "a,\nb"})
    assert protocol.read(path) == [{"x": "1", "y": ""}, {"x": "2", "y": "a,\nb"}]


def test_spread_is_of_the_rounds(bench):
    protocol = bench("protocol")
    rows = [{"case": "a", "v": v} for v in ("3", "1", "2", "")] + [{"case": "b", "v": "9"}]
    found = protocol.spread(rows, "a", "v")
    assert (found.median, found.low, found.high, found.count) == (2, 1, 3, 3)
    assert protocol.spread(rows, "c", "v") is None


def row(case, commit="new", **values):
    about = {"date": "2", "quick": "0", "machine": "m", "threads": "2", "versions": "v"}
    return {**about, "commit": commit, "case": case, **{k: str(v) for k, v in values.items()}}


def test_claims_compare_medians_of_the_newest_commit(bench, tmp_path):
    protocol, claims = bench("protocol"), bench("claims")
    path = tmp_path / "cpu_train.csv"
    protocol.append(path, {**row("fourbit", commit="old", tokens_per_second=1), "date": "1"})
    for speed in (10, 30, 20):
        protocol.append(path, row("fourbit", tokens_per_second=speed, peak_mb=100))
    protocol.append(path, row("trl", tokens_per_second=8, peak_mb=500))
    tables = {"cpu_train.csv": claims.newest(path, quick=False)}
    assert len(tables["cpu_train.csv"]) == 4
    by_text = {claim.text: claim for claim in claims.CLAIMS}
    claim = by_text["training / TRL's defaults"]
    assert claim.measured(tables) == 2.5
    assert not claim.kept(2.5)
    assert claim.kept(2.8)
    assert by_text["training / expert all-bf16"].measured(tables) is None
    most = by_text["seconds to load and quantize the 1.1B shape"]
    assert most.kept(4.0)
    assert not most.kept(4.1)


def test_a_wrong_path_or_loss_fails_the_training_benchmark(bench):
    protocol, train = bench("protocol"), bench("train")
    fused, mixed = json.dumps({"fused": 30}), json.dumps({"fused": 29, "generic": 1})
    rows = [
        row("bnb-expert", first_loss=4.00),
        row("fourbit", first_loss=4.02, paths=fused, layers=30),
        row("lora-bf16", first_loss=3.5),
    ]
    assert train.faults(protocol.Outcome(rows), "fused") == []
    rows[1] = row("fourbit", first_loss=4.02, paths=mixed, layers=30)
    assert "29" in train.faults(protocol.Outcome(rows), "fused")[0]
    assert train.faults(protocol.Outcome(rows), None) == []
    rows[1] = row("fourbit", first_loss=4.08, paths=fused, layers=30)
    assert train.faults(protocol.Outcome(rows), "fused") == [
        "fourbit: first loss 4.0800, bnb-expert has 4.0000"
    ]


def test_worse_gradients_or_losses_fail_the_correctness_gate(bench):
    correct = bench("correct")
    names = (*correct.SPREAD, "fourbit")
    found = [
        {"case": n, "gradient_error": 0.06, "mean_loss_difference": 1e-3, "steps": 50}
        for n in names
    ]
    assert correct.faults(found) == []
    found[-1] |= {"gradient_error": 0.07}
    assert "gradient of layer 0" in correct.faults(found)[0]
    found[-1] |= {"gradient_error": 0.06, "mean_loss_difference": 2e-3}
    assert "loss over 50 steps" in correct.faults(found)[0]


def test_gguf_names_and_rotary_order(bench):
    models = bench("models")
    torch = importlib.import_module("torch")
    assert models.gguf_name("model.layers.7.mlp.up_proj.weight") == "blk.7.ffn_up.weight"
    weight = torch.arange(8.0)[:, None]  # two heads of four rows
    assert models.interleaved(weight, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_documents_of_a_packed_row_carry_no_loss_across(bench):
    sides = bench("sides")
    torch = importlib.import_module("torch")
    ids = torch.arange(1024).view(2, 512)
    batch = sides.as_batch(ids, packed=True)
    starts = sides.document_starts(512)
    assert starts == [60, 180, 420, 510]
    assert (batch.position_ids[:, starts] == 0).all()
    assert batch.num_supervised == 2 * (511 - len(starts))
    assert (sides.as_batch(ids, packed=False).labels == ids).all()


def test_the_training_limit_needs_every_product(bench):
    ceilings = bench("ceilings")
    rates = {"bf16_gflops": 100, "bf16_back_gflops": 100}
    rows = [row(f"gemm {name}", **rates) for name in ceilings.SHAPES]
    limit = ceilings.training_limit(rows, "")
    # 106.2 M frozen weights and the 28.3 M of the head twice, adapters three times, at 100 GFLOP/s
    assert limit == pytest.approx(100 / (2 * 2e-9 * 1e9 * 0.1345 + 0.03), rel=0.1)
    assert ceilings.training_limit(rows[1:], "") is None
