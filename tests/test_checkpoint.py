from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fourbit import checkpoint
from fourbit.errors import EnvironmentFault, InputError, ModelError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
          torch.int16, torch.int8, torch.uint8, torch.bool]  # fmt: skip
IDENTITY = {"base": {"sha256": "ab", "revision": "main"}, "precision": "bf16", "torch": "2.13"}


def state(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    return {
        "tensors": {
            "adapter.safetensors": {"a": torch.randn(7, 3, generator=generator)},
            "optimizer.safetensors": {"m": torch.randn(300, generator=generator)},
        },
        "documents": {"state.json": {"step": step, "best": float("inf")}, "rng.json": [1, 2]},
        "identity": IDENTITY,
    }


def write(folder: Path, step: int) -> Path:
    return checkpoint.save(folder, step=step, **state(step))


def same(path: Path, step: int) -> bool:
    loaded, expected = checkpoint.load(path), state(step)
    tensors = {
        (file, name): torch.equal(tensor, loaded.tensors[file][name])
        for file, named in expected["tensors"].items()
        for name, tensor in named.items()
    }
    return (
        loaded.step == step
        and all(tensors.values())
        and loaded.documents == expected["documents"]
        and loaded.identity == expected["identity"]
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back_and_is_plain_safetensors(tmp_path):
    path = write(tmp_path / "new" / "checkpoints", 120)
    assert path.name == "step-000120"
    assert checkpoint.verify(path) == []
    assert same(path, 120)
    read = safetensors.torch.load_file(path / "adapter.safetensors")
    assert torch.equal(read["a"], state(120)["tensors"]["adapter.safetensors"]["a"])
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format_version"] == 1
    assert manifest["parent"] is None
    assert set(manifest["files"]) == {"adapter.safetensors", "optimizer.safetensors",
                                      "state.json", "rng.json"}  # fmt: skip
    following = write(path.parent, 121)
    assert json.loads((following / "manifest.json").read_text())["parent"] == "step-000120"


def test_every_dtype_layout_and_shape_round_trips(tmp_path):
    base = torch.arange(24).reshape(4, 6)
    tensors = {}
    for dtype in DTYPES:
        tensors |= {
            f"{dtype} strided": base.to(dtype)[:, ::2],
            f"{dtype} transposed": base.to(dtype).T,
            f"{dtype} offset": base.to(dtype).reshape(-1)[5:],
            f"{dtype} scalar": base.to(dtype)[1, 1],
            f"{dtype} empty": base.to(dtype)[:0],
        }
    tensors["nan"] = torch.tensor([float("nan"), float("inf"), -0.0])
    tensors["with grad"] = torch.ones(2, requires_grad=True)
    shared = torch.zeros(10)
    tensors["view 1"], tensors["view 2"] = shared[:4], shared[2:]
    path = checkpoint.save(
        tmp_path, step=1, tensors={"t.safetensors": tensors, "none.safetensors": {}},
        documents={}, identity={},
    )  # fmt: skip
    loaded = checkpoint.load(path)
    assert loaded.tensors["none.safetensors"] == {}
    for name, tensor in tensors.items():
        read = loaded.tensors["t.safetensors"][name]
        assert read.dtype == tensor.dtype
        assert read.shape == tensor.shape
        assert torch.equal(read.nan_to_num(), tensor.detach().nan_to_num())


def test_a_flipped_bit_anywhere_is_found_and_the_file_is_named(tmp_path):
    path = write(tmp_path, 1)
    rng = random.Random(0)
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        offsets = range(len(good)) if file.name == "manifest.json" else rng.sample(
            range(len(good)), min(30, len(good)))  # fmt: skip
        for offset in offsets:
            bad = bytearray(good)
            bad[offset] ^= 1 << rng.randrange(8)
            file.write_bytes(bytes(bad))
            problems = checkpoint.verify(path)
            assert problems
            assert problems[0].startswith(file.name)
        file.write_bytes(good)
    assert checkpoint.verify(path) == []


def test_truncated_missing_grown_and_replaced_files_are_named(tmp_path):
    path = write(tmp_path, 1)
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        for bad in (good[:-1], good[: len(good) // 2], b"", good + b"\0", bytes(len(good))):
            file.write_bytes(bad)
            assert checkpoint.verify(path)[0].startswith(file.name)
            with pytest.raises(ModelError, match=f"{path}.*{file.name}"):
                checkpoint.load(path)
        file.unlink()
        assert checkpoint.verify(path) == [f"{file.name}: is missing"]
        file.symlink_to("/dev/zero")
        assert "is not a regular file" in checkpoint.verify(path)[0]
        file.unlink()
        file.write_bytes(good)
    assert checkpoint.verify(path) == []


def resign(path: Path, **changes: object) -> None:
    """Writes a manifest as a hostile or a future fourbit would: changed, with a right digest."""
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    del manifest["digest"]
    manifest["digest"] = checkpoint._digest(manifest)
    (path / "manifest.json").write_bytes(checkpoint._canonical(manifest))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"format_version": 2}, "format version 2, this fourbit reads 1"),
        ({"format": "other"}, "is not a manifest of fourbit"),
        ({"step": 2}, "is of step 2"),
        ({"files": []}, "has no list of files"),
        ({"files": {"a.json": {}}}, "has no size"),
        ({"files": {"../a.json": {"size": 1, "sha256": ""}}}, "cannot be in a checkpoint"),
        ({"files": {"a.bin": {"size": 1, "sha256": ""}}}, "cannot be in a checkpoint"),
        ({"files": {"b.json": {"size": 1, "sha256": ""}}}, "b.json: is missing"),
    ],
)
def test_a_manifest_with_other_content_is_a_problem(tmp_path, changes, expected):
    path = write(tmp_path, 1)
    resign(path, **changes)
    assert expected in checkpoint.verify(path)[0]


def test_tensors_that_are_not_safetensors_are_a_model_error_despite_a_right_manifest(tmp_path):
    path = write(tmp_path, 1)
    hostile = (2**64 - 1).to_bytes(8, "little") + b"{}"
    (path / "adapter.safetensors").write_bytes(hostile)
    entry = {"size": len(hostile), "sha256": hashlib.sha256(hostile).hexdigest()}
    resign(path, files={"adapter.safetensors": entry})
    assert checkpoint.verify(path) == []
    with pytest.raises(ModelError, match=r"adapter\.safetensors: "):
        checkpoint.load(path)


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, '{"format": 1}', "\xff"])
def test_a_manifest_that_is_not_one_is_a_problem(tmp_path, text):
    path = write(tmp_path, 1)
    (path / "manifest.json").write_text(text)
    assert checkpoint.verify(path)[0].startswith("manifest.json: ")


def test_newest_goes_by_step_and_skips_what_is_corrupt(tmp_path):
    assert checkpoint.newest(tmp_path / "absent") == (None, [])
    for step in (999_999, 5, 1_000_000, 40):
        write(tmp_path, step)
    for number, path in enumerate(sorted(tmp_path.iterdir())):
        # A clock that jumped: the oldest step has the latest time.
        os.utime(path, (4e9 - number * 1e9, 4e9 - number * 1e9))
    for name in ("step-7", "step-0000007", "step-000009x", ".step-000009.tmp-" + "0" * 32, "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000008").write_text("a file")
    assert checkpoint.newest(tmp_path) == (tmp_path / "step-1000000", [])
    (tmp_path / "step-1000000" / "rng.json").write_bytes(b"")
    resign(tmp_path / "step-999999", format_version=9)
    path, skipped = checkpoint.newest(tmp_path)
    assert path == tmp_path / "step-000040"
    assert skipped == [
        "step-1000000: rng.json: has 0 bytes, the manifest says 6",
        "step-999999: manifest.json: format version 9, this fourbit reads 1",
    ]
    assert (tmp_path / "step-1000000").is_dir()


def test_at_step_names_the_steps_there_are(tmp_path):
    for step in (2, 10):
        write(tmp_path, step)
    assert checkpoint.at_step(tmp_path, step=10) == tmp_path / "step-000010"
    with pytest.raises(InputError, match="no checkpoint of step 3; fix: steps .*: 2, 10"):
        checkpoint.at_step(tmp_path, step=3)
    (tmp_path / "step-000010" / "rng.json").unlink()
    with pytest.raises(ModelError, match=r"rng\.json: is missing"):
        checkpoint.at_step(tmp_path, step=10)


def test_saving_a_step_again_keeps_a_good_one_and_moves_a_bad_one_aside(tmp_path):
    path = write(tmp_path, 3)
    before = (path / "manifest.json").stat()
    assert write(tmp_path, 3) == path
    assert (path / "manifest.json").stat() == before
    for number in (1, 2):
        (path / "rng.json").write_text("[1, 3]")
        assert write(tmp_path, 3) == path
        assert same(path, 3)
        assert (tmp_path / f"step-000003.bad-{number}" / "rng.json").read_text() == "[1, 3]"


def test_retention_keeps_the_newest_verified_the_protected_and_foreign_folders(tmp_path):
    for step in range(1, 8):
        write(tmp_path, step)
    (tmp_path / "step-000000").mkdir()
    (tmp_path / "step-000000" / "mine.txt").write_text("x")
    assert checkpoint.retain(tmp_path, limit=None, protect=set()) == []
    assert checkpoint.retain(tmp_path, limit=7, protect=set()) == []
    deleted = checkpoint.retain(tmp_path, limit=4, protect={2})
    assert [path.name for path in deleted] == ["step-000001", "step-000003", "step-000004"]
    for step in (6, 7):
        data = bytearray((tmp_path / f"step-00000{step}" / "adapter.safetensors").read_bytes())
        data[-1] ^= 1
        (tmp_path / f"step-00000{step}" / "adapter.safetensors").write_bytes(bytes(data))
    checkpoint.retain(tmp_path, limit=1, protect=set())
    assert checkpoint.newest(tmp_path)[0] == tmp_path / "step-000005"
    assert "step-000000" in names(tmp_path)
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_later_steps_can_be_set_aside_and_stay_readable(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    aside = checkpoint.set_aside_after(tmp_path, step=1)
    assert [path.name for path in aside] == ["step-000002.stale-1", "step-000003.stale-1"]
    assert checkpoint.newest(tmp_path)[0] == tmp_path / "step-000001"
    assert same(write(tmp_path, 2), 2)


def test_only_our_staging_folders_are_cleaned(tmp_path):
    assert checkpoint.clean_staging(tmp_path / "absent") == []
    dead = tmp_path / (".step-000012.tmp-" + "0f" * 16)
    for path in (dead, tmp_path / ".step-12.tmp-x", tmp_path / ".mine"):
        path.mkdir()
        (path / "file").write_text("x")
    write(tmp_path, 1)
    assert checkpoint.clean_staging(tmp_path) == [dead]
    assert names(tmp_path) == [".mine", ".step-12.tmp-x", "step-000001"]


def test_bad_names_and_values_are_a_bug_and_leave_nothing(tmp_path):
    for name in ("../a.safetensors", "a.bin", ".a.safetensors", "a/b.safetensors", ""):
        with pytest.raises(ValueError, match="not a file name"):
            checkpoint.save(tmp_path, step=1, tensors={name: {}}, documents={}, identity={})
    with pytest.raises(ValueError, match="not a file name"):
        checkpoint.save(tmp_path, step=1, tensors={}, documents={"manifest.json": 1}, identity={})
    with pytest.raises(ValueError, match="negative"):
        write(tmp_path, -1)
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, step=1, tensors={}, documents={"a.json": {1, 2}}, identity={})
    with pytest.raises(ValueError, match="dtype"):
        checkpoint.save(
            tmp_path, step=1, tensors={"a.safetensors": {"c": torch.ones(1, dtype=torch.cfloat)}},
            documents={}, identity={},
        )  # fmt: skip
    assert names(tmp_path) == []


def attempt(folder: Path, step: int) -> EnvironmentFault | None:
    try:
        write(folder, step)
    except EnvironmentFault as error:
        return error
    return None


class Refusing:
    """The system call ``real``, refused the ``left``-th time from now."""

    def __init__(self, real, left: int, code: int) -> None:
        self.real, self.left, self.code = real, left, code

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise OSError(self.code, os.strerror(self.code))
        return self.real(*args, **kwargs)


@pytest.mark.parametrize("name", ["fsync", "rename", "mkdir", "open"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_disk_that_refuses_any_call_leaves_the_old_checkpoints(tmp_path, monkeypatch, name, code):
    faults, nth, finished = 0, 0, False
    while not finished and nth < 100:
        nth += 1
        folder = tmp_path / str(nth)
        write(folder, 1)
        call = Refusing(getattr(os, name), nth, code)
        with monkeypatch.context() as patch:
            patch.setattr(os, name, call)
            error = attempt(folder, 2)
        if error is not None:
            faults += 1
            assert error.exit_code == 4
            assert os.strerror(code) in error.what
        assert same(folder / "step-000001", 1)
        # Refused after the rename, the new checkpoint is there and whole; nothing else ever is.
        assert set(names(folder)) <= {"step-000001", "step-000002"}
        assert checkpoint.newest(folder)[1] == []
        assert attempt(folder, 2) is None
        assert same(folder / "step-000002", 2)
        finished = call.left > 0
    assert finished
    assert faults > 0


def test_a_disk_that_is_full_at_any_byte_leaves_the_old_checkpoints(tmp_path):
    write(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in range(0, 1300, 97):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            error = attempt(tmp_path, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert error is not None
        assert "File too large" in error.what
        assert names(tmp_path) == ["step-000001"]
        assert same(tmp_path / "step-000001", 1)
    assert attempt(tmp_path, 2) is None
    assert same(tmp_path / "step-000002", 2)


def fork(body: Callable[[], None]) -> int:
    """Runs ``body`` in a child, and returns its pid at once, for it to be killed."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
        finally:
            os._exit(0)
    return pid


CALLS = ("open", "fsync", "mkdir", "rename", "close", "lstat", "scandir", "fdopen", "unlink")


def save_until_killed(folder: Path, moment: int) -> None:
    """Saves step 2 and dies at the given moment: before or after one of its system calls."""
    left = moment

    def tick() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def deadly(real):
        def call(*args, **kwargs):
            tick()
            result = real(*args, **kwargs)
            tick()
            return result

        return call

    for name in CALLS:
        setattr(os, name, deadly(getattr(os, name)))
    write(folder, 2)


def test_a_kill_before_and_after_every_system_call_of_a_save_loses_nothing(tmp_path):
    outcomes = []
    killed = True
    while killed and len(outcomes) < 400:
        folder = tmp_path / str(len(outcomes))
        write(folder, 1)
        pid = fork(partial(save_until_killed, folder, len(outcomes) + 1))
        killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        path, skipped = checkpoint.newest(folder)
        assert path is not None
        assert skipped == []
        outcomes.append(path.name)
        assert same(path, int(path.name[-1]))
        checkpoint.clean_staging(folder)
        assert set(names(folder)) == {"step-000001", path.name}
    assert not killed
    assert outcomes == sorted(outcomes)
    assert outcomes.count("step-000001") > 30
    assert outcomes.count("step-000002") > 3


def test_kills_at_random_moments_of_many_saves_leave_a_newest_that_verifies(tmp_path):
    rng = random.Random(0)
    write(tmp_path, 0)
    reached = 0
    for _ in range(12):

        def body(first=reached + 1):
            for step in range(first, first + 10_000):
                write(tmp_path, step)
                checkpoint.retain(tmp_path, limit=3, protect=set())

        pid = fork(body)
        time.sleep(rng.uniform(0.01, 0.2))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        checkpoint.clean_staging(tmp_path)
        path, skipped = checkpoint.newest(tmp_path)
        assert path is not None
        assert skipped == []
        step = checkpoint.step_of(path)
        assert step is not None
        assert step >= reached
        assert same(path, step)
        reached = step
    assert reached > 12


def test_the_identity_must_hold_but_for_what_may_change():
    current = {"base": {"sha256": "cd", "revision": "main"}, "torch": "2.14", "new": [1]}
    found = checkpoint.compare_identity(IDENTITY, current, warn_only={"torch"})
    assert found == [
        ("base.sha256", "ab", "cd", False),
        ("new", None, [1], False),
        ("precision", "bf16", None, False),
        ("torch", "2.13", "2.14", True),
    ]
    with pytest.raises(InputError) as caught:
        checkpoint.require_same_identity(
            IDENTITY, current, warn_only={"torch"}, where="step-000002"
        )
    assert caught.value.line() == (
        "error[identity-changed] step-000002: this is not the run that was saved: "
        "base.sha256 ab -> cd; new absent -> [1]; precision bf16 -> absent; "
        "fix: restore the old values or start a new run (allowed to change: torch)"
    )
    warned = checkpoint.require_same_identity(
        IDENTITY, current, warn_only={"torch", "base", "new", "precision"}, where="x"
    )
    assert "torch 2.13 -> 2.14" in warned
    saved = json.loads(json.dumps({"shape": (1, 2)}))
    assert checkpoint.compare_identity(saved, {"shape": (1, 2)}, warn_only=set()) == []
