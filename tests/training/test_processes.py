"""One run on several processes: the same bytes as on one, whatever is divided among them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import fourbit as library
from commands import ENVIRONMENT, fourbit, train_quietly, write_config
from fourbit.files import sha256_of
from fourbit.rundir import RunDir
from ranks import SABOTEUR, ended, error_lines, free_port, start_ranks, torchrun, train_on

FORMATS = {"nf4": {"quant_type": "nf4", "double_quant": True}, "int8": {"quant_type": "int8"}}
KINDS = [
    ("ddp", "nf4", True),
    ("ddp", "int8", False),
    ("fsdp", "nf4", False),
    ("fsdp", "int8", True),
]
OTHER_KINDS = [(parallel, quant, not packing) for parallel, quant, packing in KINDS]
SHORT = {"max_steps": 5, "samples": 0, "save_every": 0, "eval_every": 2}


def settings(quant: str, packing: bool) -> dict:
    return {
        **SHORT,
        "quant": FORMATS[quant],
        # three micro-batches: with two processes one of them has nothing to do in the second round
        "grad_accum": 3,
        "data": {"eval": 3, "max_length": 128, "packing": packing},
    }


def configured(folder: Path, model: Path, **changes) -> Path:
    data = changes.pop("data", {"eval": 3, "max_length": 128})
    path = write_config(folder, model, **changes)
    values = yaml.safe_load(path.read_text())
    values["data"] = {**data, "train": str(folder / "chats.jsonl")}
    path.write_text(yaml.safe_dump(values))
    return path


def adapter(run: Path) -> str:
    return sha256_of(run / "adapter" / "adapter_model.safetensors")


def curve(run: Path) -> list[tuple]:
    """What must not depend on the number of processes, of every line of metrics."""
    keys = ("step", "loss", "grad_norm", "lr", "eval_loss", "supervised_tokens")
    return [tuple(line.get(key) for key in keys) for line in RunDir(run).read_metrics()]


def name_of(kind: tuple) -> str:
    return "-".join(map(str, kind))


def train_kinds(
    root: Path, model: Path, kinds: list[tuple], **environment: str
) -> dict[tuple, Path]:
    """These kinds of runs on two processes, in one start of them."""
    configs = {
        kind: configured(root / name_of(kind), model, parallel=kind[0], **settings(*kind[1:]))
        for kind in kinds
    }
    train_on(2, *configs.values(), **environment)
    return {kind: config.parent / "run" for kind, config in configs.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_folder):
    return train_kinds(tmp_path_factory.mktemp("kinds"), model_folder("llama"), KINDS)


@pytest.fixture(scope="module")
def other_runs(tmp_path_factory, model_folder):
    return train_kinds(tmp_path_factory.mktemp("kinds"), model_folder("llama"), OTHER_KINDS)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, model_folder):
    """The same in this process alone, made when it is asked for."""
    made: dict[tuple, Path] = {}

    def run(quant: str, packing: bool) -> Path:
        if (quant, packing) not in made:
            folder = tmp_path_factory.mktemp("alone")
            changes = settings(quant, packing)
            config = configured(folder, model_folder("llama"), **changes)
            data = yaml.safe_load(config.read_text())["data"]
            made[quant, packing] = train_quietly(
                folder, model_folder("llama"), **{**changes, "data": data}
            )
        return made[quant, packing]

    return run


def test_a_base_quantized_once_for_all_gives_the_same_bytes(tmp_path, model_folder, alone):
    kinds = [KINDS[0], KINDS[3]]
    found = train_kinds(tmp_path, model_folder("llama"), kinds, PACKED_ONCE="1")
    for kind, run in found.items():
        assert "once for all processes of this host" in (run / "log.txt").read_text()
        assert "every process quantizes for itself" not in (run / "log.txt").read_text()
        assert not (run / "packed").exists()
        assert curve(run) == curve(alone(*kind[1:]))
        assert adapter(run) == adapter(alone(*kind[1:]))


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_two_processes_give_the_bytes_of_one(runs, alone, kind):
    assert curve(runs[kind]) == curve(alone(*kind[1:]))
    assert adapter(runs[kind]) == adapter(alone(*kind[1:]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHER_KINDS, ids=name_of)
def test_two_processes_give_the_bytes_of_one_with_and_without_packing(other_runs, alone, kind):
    assert curve(other_runs[kind]) == curve(alone(*kind[1:]))
    assert adapter(other_runs[kind]) == adapter(alone(*kind[1:]))


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3]], ids=name_of)
def test_the_receipt_speaks_for_every_process(runs, alone, kind):
    receipt = json.loads((runs[kind] / "receipt.json").read_text())
    assert receipt["ok"]
    assert receipt["processes"] == 2
    assert "ranks_agree" in {check["name"] for check in receipt["checks"]}
    single = json.loads((alone(*kind[1:]) / "receipt.json").read_text())
    assert receipt["base_sha256"] == single["base_sha256"]
    assert library.verify(runs[kind]).ok


def test_divided_layers_are_half_in_each_of_two_processes(runs):
    receipt = json.loads((runs["fsdp", "nf4", False] / "receipt.json").read_text())
    held = [rank["layer_bytes"] for rank in receipt["ranks"]]
    # one scale for a whole tensor cannot be divided
    assert sum(held) * 0.49 < min(held)
    assert all(rank["bytes_sent"] > 0 for rank in receipt["ranks"])


def only_until(run: Path, step: int) -> None:
    """The run as if it had been killed after this step."""
    for name in ("adapter", "receipt.json", "report.html"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (run / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, model_folder, parallel):
    changes = {"max_steps": 8, "samples": 0, "save_every": 1, "save_total_limit": None}
    changes |= {"grad_accum": 4, "eval_every": 3, "parallel": parallel}
    alone = train_quietly(tmp_path / "alone", model_folder("llama"), **changes)
    config = write_config(tmp_path / "moved", model_folder("llama"), **changes, resume="auto")
    run = tmp_path / "moved" / "run"
    train_on(2, config)
    only_until(run, 2)
    train_on(1, config)
    only_until(run, 5)
    train_on(4, config)
    assert "resumed at step 5" in (run / "log.txt").read_text()
    assert adapter(run) == adapter(alone)
    assert curve(run) == curve(alone)


def test_another_configuration_on_one_rank_is_named(tmp_path, model_folder):
    one = write_config(tmp_path, model_folder("llama"), parallel="ddp")
    command = ["-m", "fourbit", "train", one]
    results = ended(start_ranks([command, [*command, "--lora.r", "2"]]))
    assert [code for code, _ in results] == [2, 2]
    lines = [line for _, errors in results for line in error_lines(errors)]
    assert len(lines) == 1, lines
    assert "rank 1" in lines[0]
    assert "lora.r is 2, rank 0 has 4" in lines[0]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def steps_done(run: Path) -> int:
    lines = RunDir(run).read_metrics() if (run / "metrics.jsonl").exists() else []
    return max((line["step"] for line in lines), default=0)


def test_sigterm_on_one_rank_saves_and_ends_all(tmp_path, model_folder):
    changes = {"samples": 0, "save_every": 0, "epochs": 6}
    alone = train_quietly(tmp_path / "alone", model_folder("llama"), **changes)
    config = write_config(tmp_path / "ended", model_folder("llama"), **changes)
    run = tmp_path / "ended" / "run"
    processes = start_ranks([["-m", "fourbit", "train", config]] * 2)
    while steps_done(run) < 2 and processes[1].poll() is None:
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    results = ended(processes)
    assert [code for code, _ in results] == [75, 75], results
    lines = [line for _, errors in results for line in error_lines(errors)]
    assert len(lines) == 1, lines
    assert "saved step-" in lines[0]
    done = fourbit("train", config, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert adapter(run) == adapter(alone)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, model_folder):
    """Settings of a short run, and the digest of its adapter."""
    changes = {"samples": 0, "save_every": 2, "eval_every": 3, "max_steps": 6}
    run = train_quietly(tmp_path_factory.mktemp("whole"), model_folder("llama"), **changes)
    return changes, adapter(run), curve(run)


@pytest.mark.slow
@pytest.mark.parametrize("sabotage", ["load:dies:1", "step:dies:5", "save:dies:2",
                                      "evaluation:dies:2", "step:errs:5"])  # fmt: skip
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_torchrun_goes_on_after_rank_1_is_lost(
    undisturbed, tmp_path, model_folder, sabotage, parallel
):
    changes, digest, whole_curve = undisturbed
    config = write_config(tmp_path, model_folder("llama"), **changes, parallel=parallel)
    process = torchrun(2, SABOTEUR, "train", config, restarts=1, SABOTAGE=sabotage)
    [(code, errors)] = ended([process])
    assert code == 0, errors
    told = [line for line in error_lines(errors) if "rank 1" in line]
    assert told, errors
    phase = {"load": "loading", "save": "saving"}.get(sabotage.split(":")[0])
    assert (phase or sabotage.split(":")[0]) in told[0]
    assert adapter(tmp_path / "run") == digest
    assert curve(tmp_path / "run") == whole_curve


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_rank_that_hangs_ends_the_others_within_a_minute(
    undisturbed, tmp_path, model_folder, parallel
):
    config = write_config(tmp_path, model_folder("llama"), **undisturbed[0], parallel=parallel)
    command = [SABOTEUR, "train", config]
    processes = start_ranks([command] * 2, SABOTAGE="step:hangs:5")
    run = tmp_path / "run"
    while steps_done(run) < 1 and processes[0].poll() is None:
        time.sleep(0.05)
    began = time.monotonic()
    _, errors = processes[0].communicate(timeout=120)
    waited = time.monotonic() - began
    processes[1].kill()
    processes[1].communicate()
    assert processes[0].returncode == 4, errors
    assert waited < 60
    lines = error_lines(errors)
    assert len(lines) == 1, errors
    assert re.search(r"rank 1, step \d: hangs", lines[0])


@pytest.mark.slow
def test_a_rank_that_errs_is_named_by_the_others(undisturbed, tmp_path, model_folder):
    config = write_config(tmp_path, model_folder("llama"), **undisturbed[0])
    command = [SABOTEUR, "train", config]
    results = ended(start_ranks([command] * 2, SABOTAGE="step:errs:5"))
    assert [code for code, _ in results] == [1, 1]
    assert "rank 1, step 3: stopped: ZeroDivisionError: sabotage" in results[0][1]


def ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0


@pytest.fixture
def two_hosts():
    """Names of two network namespaces with a link between them, 10.77.0.1 and 10.77.0.2."""
    if shutil.which("ip") is None or not ip("netns", "add", "fourbit0"):
        pytest.skip("network namespaces need root and iproute2")
    names = ["fourbit0", "fourbit1"]
    try:
        assert ip("netns", "add", names[1])
        assert ip("link", "add", "fb0", "type", "veth", "peer", "name", "fb1")
        for number, name in enumerate(names):
            assert ip("link", "set", f"fb{number}", "netns", name)
            assert ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", f"fb{number}")
            assert ip("-n", name, "link", "set", f"fb{number}", "up")
            assert ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def start_hosts(names: list[str], config: Path) -> list[subprocess.Popen[str]]:
    port = str(free_port())
    return [
        subprocess.Popen(
            [
                *("ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"),
                *("--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1"),
                *("--master-addr", "10.77.0.1", "--master-port", port),
                *("-m", "fourbit", "train", str(config)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT, "GLOO_SOCKET_IFNAME": f"fb{number}"},
        )
        for number, name in enumerate(names)
    ]


@pytest.mark.slow
def test_two_hosts_run_one_job(undisturbed, two_hosts, tmp_path, model_folder):
    changes, digest, _ = undisturbed
    config = write_config(tmp_path, model_folder("llama"), **changes)
    results = ended(start_hosts(two_hosts, config))
    assert [code for code, _ in results] == [0, 0], results
    assert adapter(tmp_path / "run") == digest


@pytest.mark.slow
def test_a_link_that_is_cut_ends_both_hosts_within_a_minute(two_hosts, tmp_path, model_folder):
    config = write_config(tmp_path, model_folder("llama"), epochs=400, samples=0)
    processes = start_hosts(two_hosts, config)
    while steps_done(tmp_path / "run") < 3 and processes[0].poll() is None:
        time.sleep(0.1)
    assert ip("-n", two_hosts[1], "link", "set", "fb1", "down")
    began = time.monotonic()
    results = ended(processes)
    assert time.monotonic() - began < 60
    assert "rank 1, step" in error_lines(results[0][1])[0]
    assert "has not answered" in error_lines(results[1][1])[0]
