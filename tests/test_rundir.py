from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fourbit.errors import EnvironmentFault, FourbitError, InputError, LockHeld
from fourbit.rundir import RunDir


def fresh(path: Path) -> RunDir:
    return RunDir.open(path, resume=False, overwrite=False)


def fill(path: Path, mark: str) -> None:
    with RunDir.open(path, resume=True, overwrite=False) as run:
        run.write_text(run.config_path, f"model: {mark}\n")
        run.append_metrics({"step": 1, "mark": mark})
        (run.checkpoints_dir / "step-000001").mkdir(parents=True)
        (run.checkpoints_dir / "step-000001" / "w").write_text(mark)
        run.log(mark)


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def refused(path: Path, *, resume: bool = False, overwrite: bool = False) -> FourbitError:
    with pytest.raises(FourbitError) as caught:
        RunDir.open(path, resume=resume, overwrite=overwrite)
    return caught.value


def test_a_new_run_with_missing_parents(tmp_path):
    with fresh(tmp_path / "a b" / "c" / "run") as run:
        assert run.path.is_dir()
        assert run.read_metrics() == []
        owner = json.loads((run.path / ".lock").read_text())
        assert owner["pid"] == os.getpid()
        assert {"host", "started", "command"} <= owner.keys()


def test_a_started_run_that_wrote_nothing_can_be_started_again(tmp_path):
    for _ in range(2):
        fresh(tmp_path / "run").close()


def test_inputs_that_were_refused_leave_no_run_behind(tmp_path):
    with fresh(tmp_path / "run") as run:
        run.log("error: no such file")
    with fresh(tmp_path / "run") as run:
        run.log("better now")
    assert len((tmp_path / "run" / "log.txt").read_text().splitlines()) == 2


def test_an_existing_run_needs_a_choice_and_is_not_touched(tmp_path):
    fill(tmp_path / "run", "old")
    before = tree(tmp_path / "run")
    error = refused(tmp_path / "run")
    assert isinstance(error, InputError)
    assert error.line() == (
        f"error[output-exists] {tmp_path}/run: already holds a run (config.yaml, checkpoints, "
        "metrics.jsonl, log.txt); fix: --resume auto goes on with it, --overwrite moves it aside "
        "and starts anew"
    )
    assert tree(tmp_path / "run") == before
    assert refused(tmp_path / "run", resume=True, overwrite=True).code == "conflicting-flags"
    fill(tmp_path / "run2", "x")


def test_overwrite_moves_aside_deletes_nothing_and_leaves_other_files(tmp_path):
    run = tmp_path / "run"
    (tmp_path / "run.old-2").mkdir()
    for mark in ("first", "second"):
        if mark == "second":
            (run / "notes.txt").write_text("mine")
        fill(run, mark)
        before = {k: v for k, v in tree(run).items() if k not in (".lock", "notes.txt")}
        RunDir.open(run, resume=False, overwrite=True).close()
        aside = tmp_path / ("run.old-1" if mark == "first" else "run.old-3")
        assert tree(aside) == before
    assert sorted(p.name for p in run.iterdir()) == [".lock", "notes.txt"]


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize("content", [["thesis.tex"], ["config.yaml"], ["config.yaml", "src"],
                                     [".lock"], [".lock", "config.yaml"]])  # fmt: skip
def test_a_directory_that_no_run_made_is_refused_untouched(tmp_path, flags, content):
    for name in content:
        (tmp_path / name).write_text("mine")
    error = refused(tmp_path, **flags)
    assert error.code == "not-a-run-directory"
    assert error.exit_code == 2
    assert tree(tmp_path) == dict.fromkeys(content, b"mine")


def test_a_run_copied_without_its_lock_is_still_a_run(tmp_path):
    fill(tmp_path / "run", "x")
    (tmp_path / "run" / ".lock").unlink()
    RunDir.open(tmp_path / "run", resume=True, overwrite=False).close()


def test_a_second_process_is_told_who_holds_the_run(tmp_path):
    run = tmp_path / "run"
    with fresh(run):
        for flags in ({}, {"resume": True}, {"overwrite": True}):
            error = refused(run, **flags)
            assert isinstance(error, LockHeld)
            assert error.exit_code == 6
            assert f"in use by pid {os.getpid()} on " in error.what
            assert "command: " in error.what
    fresh(run).close()


def test_the_lock_dies_with_its_holder_and_stale_text_does_not_matter(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from fourbit.rundir import RunDir\n"
        "run = RunDir.open(Path(sys.argv[1]), resume=False, overwrite=False)\n"
        "print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        assert f"pid {child.pid} " in refused(tmp_path / "run").what
        child.send_signal(signal.SIGKILL)
    finally:
        child.kill()
        child.wait()
        child.stdout.close()  # pyright: ignore[reportOptionalMemberAccess]
    assert json.loads((tmp_path / "run" / ".lock").read_text())["pid"] == child.pid
    with fresh(tmp_path / "run") as run:
        assert json.loads((run.path / ".lock").read_text())["pid"] == os.getpid()


def test_a_lock_whose_owner_is_gone_is_explained(tmp_path):
    run = fresh(tmp_path)
    dead = subprocess.Popen(["true"])
    dead.wait()
    owner = json.loads((tmp_path / ".lock").read_text())
    (tmp_path / ".lock").write_text(json.dumps(owner | {"pid": dead.pid}))
    error = refused(tmp_path)
    assert "that process is gone, yet the lock itself is held" in error.what
    assert "end the worker it left behind" in error.fix
    run.close()
    fresh(tmp_path).close()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("a\0b", "control character"),
        ("a\nb", "control character"),
        ("a\udc80b", "not UTF-8"),
        ("a" * 256, "a name in the path is longer than 255 bytes"),
        ("a/" * 2500, "the path is longer than 4095 bytes"),
    ],
)
def test_impossible_paths_are_one_line(tmp_path, name, what):
    error = refused(tmp_path / name)
    assert error.exit_code == 2
    assert what in error.what
    assert "\n" not in error.line()
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "dangling"):
        error = refused(path)
        assert isinstance(error, InputError)
        assert error.code == "file-in-the-way"
        assert error.where in (str(tmp_path / "file"), str(tmp_path / "dangling"))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a /proc")
def test_a_file_system_that_takes_no_files_is_an_environment_fault():
    assert refused(Path("/proc/fourbit/run")).exit_code == 4


@pytest.mark.parametrize("call", ["open", "mkdir", "fsync", "pwrite"])
@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_refuses_is_an_environment_fault(tmp_path, monkeypatch, call, code):
    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        error = refused(tmp_path / "run")
    assert isinstance(error, EnvironmentFault)
    assert os.strerror(code) in error.what
    assert error.fix
    fresh(tmp_path / "run").close()


def test_without_flock_there_is_a_clear_fault(tmp_path, monkeypatch):
    monkeypatch.setattr("fourbit.rundir.fcntl", None)
    assert refused(tmp_path / "run").code == "no-file-locks"


def test_metrics_are_valid_json_and_a_torn_last_line_is_mended(tmp_path):
    run = RunDir(tmp_path)
    run.append_metrics({"step": 1, "loss": float("nan"), "more": {"a": [float("inf"), 1.5]}})
    run.append_metrics({"step": 2, "loss": 0.5})
    assert run.read_metrics() == [
        {"step": 1, "loss": None, "more": {"a": [None, 1.5]}, "nonfinite": True},
        {"step": 2, "loss": 0.5},
    ]
    whole = run.metrics_path.read_bytes()
    line = b'{"step": 3, "loss": 0.25}'
    for cut in range(len(line) + 1):
        run.metrics_path.write_bytes(whole + line[:cut])
        again = RunDir(tmp_path)
        complete = cut == len(line)
        assert len(again.read_metrics()) == 2 + complete
        again.append_metrics({"step": 4})
        assert [m["step"] for m in again.read_metrics()] == [1, 2, 3, 4][: 2 + complete] + [4]
        assert again.metrics_path.read_bytes().count(b"\n") == 3 + complete


def test_a_bad_line_in_the_middle_is_named(tmp_path):
    run = RunDir(tmp_path)
    run.metrics_path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: is not a JSON object"):
        run.read_metrics()


def test_truncation_keeps_order_bytes_and_lines_without_a_step(tmp_path):
    run = RunDir(tmp_path)
    assert run.truncate_metrics(3) == 0
    for step in (1, 2, 3, 4, 5):
        run.append_metrics({"step": step, "x": 0.1 * step})
    run.append_metrics({"event": "end"})
    before = run.metrics_path.read_bytes().splitlines()
    assert run.truncate_metrics(3) == 2
    assert run.metrics_path.read_bytes().splitlines() == [*before[:3], before[5]]
    run.append_metrics({"step": 4})
    assert run.read_metrics()[-1] == {"step": 4}


def test_a_write_that_fails_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch):
    run = RunDir(tmp_path)
    run.write_json(run.receipt_path, {"ok": True, "loss": float("inf")})
    expected = {"ok": True, "loss": None, "nonfinite": True}
    assert json.loads(run.receipt_path.read_text()) == expected
    for call in ("fsync", "replace", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, _full)
            with pytest.raises(EnvironmentFault, match="No space left"):
                run.write_json("receipt.json", {"ok": False})
        assert json.loads(run.receipt_path.read_text()) == expected
        assert [p.name for p in tmp_path.iterdir()] == ["receipt.json"]
    run.write_text("receipt.json", "ü\n")
    assert run.receipt_path.read_bytes() == "ü\n".encode()


def _full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_log_has_times_no_secrets_and_no_disguise(tmp_path):
    run = RunDir(tmp_path)
    assert run.log("token=abcdefgh \x1b[31m\u202e done\n  second line\n")
    assert run.log("")
    first, second, third = run.log_path.read_text().splitlines()
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00 token=\*\*\* \\x1b", first)
    assert "\u202e" not in first
    assert second == "      second line"
    assert third.endswith("+00:00 ")
    run.log_path.unlink()
    run.log_path.mkdir()
    assert not run.log("nowhere to go")
