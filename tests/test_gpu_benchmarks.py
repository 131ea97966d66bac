"""benchmarks/gpu at a tiny size on the CPU: every section runs, and wrong answers are noticed."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(
    not (BENCHMARKS / "gpu").is_dir(), reason="an sdist has no benchmarks"
)
TINY = ("--device", "cpu", "--shape", "tiny", "--rounds", "1")


@pytest.fixture
def gpu(monkeypatch):
    """Imports a module of benchmarks/gpu."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return lambda name: importlib.import_module(f"gpu.{name}")


@pytest.fixture
def measured(gpu, tmp_path):
    """Runs one section in this process; its rows."""
    run = gpu("run")

    def go(section, *arguments):
        run.main([section, *TINY, "--results", str(tmp_path), "--inline", *arguments])
        return run.results.read(tmp_path / f"gpu_{section}.csv")

    return go


def only(*patterns):
    return [word for pattern in patterns for word in ("--only", pattern)]


def positive(row, *columns):
    return all(float(row[column]) > 0 for column in columns)


def test_ceilings(measured):
    (row,) = measured("ceilings")
    assert positive(row, "gemm_tflops", "gemm_burst_tflops", "copy_gb_s", "launch_us")
    assert (row["device"], row["shape"], row["round"]) == ("cpu", "tiny", "1")


@pytest.mark.parametrize("section", ["dequantize", "quantize"])
def test_formats(measured, section):
    rows = measured(section)
    assert [row["case"].split()[1] for row in rows] == ["64x64", "32x64", "192x64", "64x192"]
    assert all(row["equal"] == "1" and positive(row, "tb_s") for row in rows)


def test_few_rows(measured):
    rows = measured("few_rows", *only("*192x64"))
    assert [row["case"].split("=")[1] for row in rows] == ["1", "2", "4", "8", "16", "32", "64"]
    assert all(positive(row, "us", "bf16_us", "tb_s") for row in rows)


def test_layer(measured):
    rows = measured("layer")
    assert len(rows) == 9  # four products both ways, and their sum
    total = sum(float(row["inside_us"]) for row in rows[:-1])
    assert float(rows[-1]["inside_us"]) == pytest.approx(total, rel=1e-3)


def test_attention(measured):
    rows = measured("attention")
    assert [row["case"] for row in rows] == ["attention causal", "attention packed"]
    assert all(positive(row, "forward_us", "both_us", "sdpa_both_us") for row in rows)


def test_optimizer(measured):
    rows = {row["case"]: row for row in measured("optimizer", *only("*fourbit*", "*torch*"))}
    assert rows["optimizer fourbit 8"]["digest"] == rows["optimizer fourbit 8 paged"]["digest"]
    assert rows["optimizer fourbit 32"]["digest"] == rows["optimizer fourbit 32 paged"]["digest"]
    assert {row["parameters"] for row in rows.values()} == {"38912"}


def test_train(measured):
    sides = only("fourbit", "fourbit-bf16", "fourbit-paged", "fourbit-recompute", "bnb-expert")
    rows = {row["case"].split()[0]: row for row in measured("train", "--paged", *sides)}
    ours = rows["fourbit"]
    assert json.loads(ours["paths"]) == {"fused": 2}
    assert positive(ours, "tokens_per_second", "loss", "norm")
    for other in ("fourbit-paged", "fourbit-recompute"):
        assert float(rows[other]["loss"]) == pytest.approx(float(ours["loss"]), rel=1e-5)
    assert float(rows["fourbit-bf16"]["norm"]) != float(ours["norm"])


def test_decode(measured):
    rows = measured("decode", *only("*fourbit", "*bf16"))
    assert [row["made"] for row in rows] == ["33", "33"]
    assert rows[0]["engine"] == "native"


def test_start(measured):
    (row,) = measured("start", *only("*fourbit"))
    assert positive(row, "first_step_s", "second_step_s", "build_s")


def test_memory(measured):
    rows = measured("memory", *only("memory*"))
    assert [row["case"] for row in rows] == [
        "memory 7b", "memory 8b 2k", "memory 65b", "memory 8b 60k",
    ]  # fmt: skip
    assert all(positive(row, "loss", "tokens_per_second") for row in rows)


@pytest.mark.slow
def test_memory_cells(measured):
    (row,) = measured("memory", *only("plan*"))
    assert positive(row, "measured_mb", "planned_mb")


@pytest.mark.slow
def test_demo(measured):
    rows = measured("demo")
    assert [row["case"] for row in rows] == ["demo cpu", "demo cpu fp32"]
    assert all(row["verified"] == "1" and len(json.loads(row["curve"])) == 3 for row in rows)


def test_a_side_is_a_process_and_a_trial_leaves_no_rows(tmp_path):
    before = set((BENCHMARKS / "results").iterdir())
    command = [sys.executable, str(BENCHMARKS / "gpu" / "run.py"), "ceilings", *TINY]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "not measured" in done.stdout
    assert "gemm_tflops" in done.stdout
    assert set((BENCHMARKS / "results").iterdir()) == before


def test_one_that_fails_ends_with_1_and_names_it(gpu, tmp_path, capsys, monkeypatch):
    run = gpu("run")

    def broken(spec):
        yield {"case": "layer before", "bare_us": 1.0}
        raise RuntimeError("it broke")

    monkeypatch.setattr(gpu("layer"), "measure", broken)
    with pytest.raises(SystemExit, match="1"):
        run.main(["layer", *TINY, "--results", str(tmp_path), "--inline"])
    assert "FAILED layer: RuntimeError: it broke" in capsys.readouterr().out


def test_unknown_sections_and_absent_gpus_end_in_a_line(gpu, capsys, monkeypatch):
    run = gpu("run")
    with pytest.raises(SystemExit):
        run.main(["nonsense"])
    assert "no section nonsense; there are ceilings, " in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU that torch can use"):
        run.main(["train"])


# What is noticed.


def row(case, **values):
    about = {"call": "1", "device": "cuda", "shape": "8b", "commit": "abc", "round": "1"}
    return {**about, "case": case, **{key: str(value) for key, value in values.items()}}


def test_another_path_loss_or_norm_fails_the_training_section(gpu):
    train = gpu("train")
    fused = json.dumps({"fused": 32})
    good = {"loss": 11.9, "norm": 2.0, "paths": fused, "layers": 32, "kernels": 1}
    peer = row("bnb-expert T=8192", loss=11.91, norm=2.02)
    assert train.faults([row("fourbit T=8192", **good), peer]) == []
    mixed = {**good, "paths": json.dumps({"fused": 31, "generic: hooks inside": 1})}
    assert "not all fused" in train.faults([row("fourbit T=8192", **mixed), peer])[0]
    # an old card has no kernels for layers, and none are claimed
    assert train.faults([row("fourbit T=8192", **{**mixed, "kernels": 0}), peer]) == []
    for key, value in (("loss", 12.4), ("norm", 0.0), ("norm", "nan")):
        found = train.faults([row("fourbit T=8192", **{**good, key: value}), peer])
        assert found == [f"fourbit T=8192: {key} {value}, bnb-expert has {float(peer[key]):.6g}"]
    out_of_memory = row("fourbit T=16384", oom=1)
    assert train.faults([out_of_memory]) == []


def test_other_bits_fail_the_kernels_sections(gpu):
    dequantize = gpu("dequantize")
    assert dequantize.faults([row("d", equal=1, bnb_equal=1), row("d", equal=1)]) == []
    assert "plain operations" in dequantize.faults([row("d", equal=0)])[0]
    assert "bitsandbytes" in dequantize.faults([row("d", equal=1, bnb_equal=0)])[0]
    few_rows = gpu("few_rows")
    assert few_rows.faults([row("f", error=2e-3, dtype="bfloat16")]) == []
    assert few_rows.faults([row("f", error="nan", dtype="bfloat16")])
    attention = gpu("attention")
    good = {"error": 2e-3, "sdpa_error": 2e-3, "gradient_error": 3e-3, "sdpa_gradient_error": 3e-3}
    assert attention.faults([row("a", **good)]) == []
    assert "gradient_error" in attention.faults([row("a", **{**good, "gradient_error": 1e-2})])[0]


def test_the_optimizers_must_agree(gpu):
    optimizer = gpu("optimizer")
    rows = [
        row("optimizer fourbit 32", checksum=5.0, digest="a"),
        row("optimizer fourbit 32 paged", checksum=5.0, digest="a"),
        row("optimizer torch fused", checksum=5.00001, digest="b"),
        row("optimizer fourbit 8", checksum=5.1, digest="c"),
    ]
    assert optimizer.faults(rows) == []
    assert "paging changed" in optimizer.faults([*rows[:1], {**rows[1], "digest": "z"}])[0]
    assert (
        "do not compute the same" in optimizer.faults([*rows[:2], {**rows[2], "checksum": "6"}])[0]
    )


def test_a_loss_curve_outside_of_the_band_fails_the_demo(gpu):
    demo = gpu("demo")
    cpu = row("demo cpu", verified=1, curve="[2.0, 0.5, 0.01]")
    near = row("demo gpu", verified=1, curve="[2.05, 0.51, 0.02]")
    assert demo.faults([cpu, near]) == []
    assert "leaves the band" in demo.faults([cpu, {**near, "curve": "[2.0, 0.54, 0.01]"}])[0]
    assert demo.faults([{**cpu, "verified": "0"}]) == ["demo cpu: not verified"]


def test_floors_are_those_of_the_arithmetic(gpu):
    floors = gpu("floors")
    model = floors.Model.of("llama-8b")
    assert (model.linear, model.head, model.adapters) == (6_979_321_856, 525_336_576, 41_943_040)
    assert sum(n * k for n, k in model.adapter_shapes()) == model.adapters
    card = floors.Ceiling(flops=790e12, bytes_per_second=4.3e12)
    assert 1e6 * model.flops_per_token(2048) / card.flops == pytest.approx(40.7, abs=0.05)
    # with nothing to move but what must: between the products alone and the table's estimate
    assert 20_700 < 8192 / model.step_seconds(8192, 2048, card) < 1e6 / 40.7
    assert card.bytes_per_second / model.decode_bytes(1024) == pytest.approx(899, abs=1)
    assert card.bytes_per_second / model.decode_bytes(1024, 2.0) == pytest.approx(284, abs=1)


def verdicts(claims, tables):
    return {line.split("  (")[0].strip()[37:]: line.split()[0] for line in claims.lines(tables)}


def test_claims_take_both_figures_from_one_call(gpu):
    claims, floors = gpu("claims"), gpu("floors")
    ceiling = {"gemm_tflops": 400, "copy_gb_s": 2000}
    floor = 8192 / floors.Model.of("llama-8b").step_seconds(
        8192, 2048, floors.Ceiling(400e12, 2000e9)
    )
    tables = {
        "gpu_ceilings": [
            row("ceilings", **ceiling),
            {**row("ceilings", gemm_tflops=900, copy_gb_s=9000), "call": "2"},
        ],
        "gpu_train": [
            row("fourbit T=8192", tokens_per_second=0.85 * floor),
            row("bnb T=8192", tokens_per_second=0.3 * floor),
            row("bnb-recompute T=8192", tokens_per_second=0.5 * floor),
        ],
    }
    by_text = {promise.claim.text: promise.claim for promise in claims.PROMISES}
    share = claims.newest(by_text["8B step, 8k tokens: share of the floor"], tables)
    assert share == pytest.approx(0.85, rel=1e-5)
    # against the best of the peer's settings, of those that ran
    assert claims.newest(by_text["8B step / bitsandbytes + PEFT's best"], tables) == pytest.approx(
        1.7, rel=1e-5
    )
    assert claims.newest(by_text["8B step / Unsloth's best"], tables) is None
    for column, value in (("device", "cpu"), ("commit", "abc-dirty"), ("shape", "1b")):
        other = [{**r, column: value} for r in tables["gpu_train"]]
        lines = claims.lines({**tables, "gpu_train": other})
        assert lines[0].startswith("not measured")
        assert lines[0].endswith("(run.py train --shape 8b --tokens 8192 --paged)")
    lines = claims.lines(tables)
    assert lines[0].startswith("kept")
    assert lines[1].startswith("BROKEN")


def test_a_capped_run_that_ran_out_breaks_its_claim(gpu):
    claims = gpu("claims")
    by_text = {promise.claim.text: promise.claim for promise in claims.PROMISES}
    claim = by_text["8B under 16 GB: tokens of one sequence"]
    rows = [row("memory 8b 60k", length=61440)]
    assert claim.kept(claims.newest(claim, {"gpu_memory": rows}))
    rows.append(row("memory 8b 60k", oom=1))
    assert not claim.kept(claims.newest(claim, {"gpu_memory": rows}))


def test_the_readme_names_a_command_for_each_claim(gpu):
    text = (BENCHMARKS / "README.md").read_text()
    missing = [
        promise.claim.text
        for promise in gpu("claims").PROMISES
        if promise.claim.text not in text or f"gpu/run.py {promise.arguments}`" not in text
    ]
    assert not missing
