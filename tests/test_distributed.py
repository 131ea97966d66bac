"""Who is still there: the watchdog of several processes, with a store that is a dictionary."""

from __future__ import annotations

import json
import time
from dataclasses import asdict

import pytest
import torch

from fourbit import checkpoint
from fourbit.distributed import ALONE, assign_, is_shard, joined, local, shard_of, watchdog, whole
from fourbit.distributed.watchdog import Sign, Watchdog, as_failure
from fourbit.errors import EnvironmentFault, InputError, NumericStop


class Dictionary:
    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.values[key].encode() for key in keys]


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(watchdog.time, "monotonic", lambda: self.now)


@pytest.fixture
def watched(monkeypatch):
    """Rank 0 of three, and a function that lets time pass while others show signs."""
    clock, store = Clock(monkeypatch), Dictionary()
    dog = Watchdog(store, 0, 3)
    usual = {1: Sign(waits=True), 2: Sign(waits=True)}

    def pass_time(seconds: float, **signs: Sign) -> None:
        for _ in range(int(seconds)):
            clock.now += 1
            for rank in (1, 2):
                sign = signs.get(f"rank_{rank}", usual[rank])
                if sign.beat >= 0:
                    sign.beat += 1
                store.set(f"fourbit/sign/{rank}", json.dumps(asdict(sign)))
            dog._look()

    return dog, pass_time


def test_nobody_is_missing_while_all_show_signs(watched):
    dog, pass_time = watched
    pass_time(300)
    assert dog.missing() is None


def test_a_rank_without_signs_is_dead(watched):
    dog, pass_time = watched
    silent = Sign(beat=-1, phase="step 12", waits=True)
    pass_time(15, rank_2=silent)
    assert dog.missing() is None
    assert dog.missing(watchdog.BROKEN_SECONDS) is not None
    pass_time(10, rank_2=silent)
    lost = dog.missing()
    assert lost is not None
    assert lost.exit_code == 4
    assert lost.line().startswith("error[rank-lost] rank 2, step 12: died: no sign of life")


def test_a_rank_that_does_nothing_hangs(watched):
    dog, pass_time = watched
    idle = Sign(phase="loading the model")
    pass_time(38, rank_1=idle)
    assert dog.missing() is None
    pass_time(10, rank_1=idle)
    lost = dog.missing()
    assert lost is not None
    assert "rank 1, loading the model: hangs" in lost.line()


@pytest.mark.parametrize("busy", ["computes", "waits", "gets things done"])
def test_a_busy_rank_does_not_hang(watched, busy):
    dog, pass_time = watched
    sign = Sign(waits=busy == "waits")
    for _ in range(100):
        sign.computed += 0.05 * (busy == "computes")
        sign.ticks += busy == "gets things done"
        pass_time(1, rank_1=sign)
    assert dog.missing() is None


def test_what_another_rank_failed_for_is_told_with_its_exit_code(watched):
    dog, pass_time = watched
    error = NumericStop("nonfinite", where="step 7", what="the loss was NaN", fix="lower optim.lr")
    pass_time(2, rank_1=Sign(phase="step 7", failed=as_failure(error)))
    told = dog.missing()
    assert told is not None
    assert told.exit_code == 5
    assert "rank 1, step 7: stopped: error[nonfinite] step 7: the loss was NaN" in told.line()


def test_a_rank_that_has_left_is_not_missed(watched):
    dog, pass_time = watched
    pass_time(1, rank_1=Sign(left=True), rank_2=Sign(left=True))
    pass_time(100, rank_1=Sign(beat=-1, left=True), rank_2=Sign(beat=-1, left=True))
    assert dog.missing() is None
    assert dog.all_ended()


def test_a_store_that_does_not_answer_is_told(watched, monkeypatch):
    dog, pass_time = watched
    pass_time(5)
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: 1000.0 + 60)
    told = dog.missing()
    assert told is not None
    assert "has not answered for 20 s" in told.line()


def test_signs_are_shown_and_the_phase_is_in_them():
    store = Dictionary()
    dogs = [Watchdog(store, rank, 2) for rank in (0, 1)]
    for dog in dogs:
        dog.publish()
        dog.start()
    dogs[1].enter("saving step 3")
    until = time.monotonic() + 10
    while time.monotonic() < until and "saving" not in store.values["fourbit/sign/1"]:
        time.sleep(0.01)
    assert json.loads(store.values["fourbit/sign/1"])["phase"] == "saving step 3"
    for dog in dogs:
        dog.leave(None)
        dog.stop()
    assert json.loads(store.values["fourbit/sign/1"])["left"]


def test_one_process_exchanges_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as ranks:
        assert ranks is ALONE
    assert ALONE.gather({"a": 1}) == [{"a": 1}]
    assert ALONE.shared("x") == "x"
    assert ALONE.any_of([True, False]) == [True, False]
    tensor = torch.arange(3.0)
    assert local(tensor) is tensor
    assert whole(tensor) is tensor
    assert shard_of(tensor, tensor) is tensor
    assert not is_shard(tensor)
    assign_(tensor, torch.ones(3))
    assert torch.equal(tensor, torch.ones(3))


def test_processes_without_a_meeting_point_are_refused(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="RANK, MASTER_ADDR, MASTER_PORT is not set"), joined():
        pass


def test_a_save_that_is_not_agreed_on_does_not_count(tmp_path):
    def save(step: int, **keywords) -> None:
        tensors = {"a.safetensors": {"x": torch.full((2,), float(step))}}
        checkpoint.save(tmp_path, step=step, tensors=tensors, documents={}, identity={}, **keywords)

    def refuse() -> None:
        raise EnvironmentFault("rank-lost", where="rank 1", what="died")

    save(1)
    with pytest.raises(EnvironmentFault, match="died"):
        save(2, agree=refuse)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    newest, skipped = checkpoint.newest(tmp_path)
    assert newest is not None
    assert newest.name == "step-000001"
    assert not skipped


def test_the_store_is_kept_until_the_others_have_heard(watched):
    dog, pass_time = watched
    failed = as_failure(NumericStop("nonfinite", where="step 7", what="NaN", fix="lower optim.lr"))
    pass_time(1, rank_1=Sign(failed=failed), rank_2=Sign(failed=failed, heard=True))
    assert dog.all_ended()
    assert not dog.all_heard()
    pass_time(1, rank_1=Sign(failed=failed, heard=True), rank_2=Sign(failed=failed, heard=True))
    assert dog.all_heard()
