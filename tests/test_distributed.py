"""Who is still there: the watchdog of several processes, with a store that is a dictionary."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from fourbit import FourbitConfig, checkpoint
from fourbit import device as devices
from fourbit.distributed import (
    ALONE,
    assign_,
    is_shard,
    joined,
    local,
    session,
    shard_of,
    watchdog,
    whole,
)
from fourbit.distributed.ranks import Ranks
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


class Told(Ranks):
    """Rank 0 of some whose answers are given, a value for each exchange."""

    def __init__(self, *answers: list) -> None:
        super().__init__(0, len(answers[0]))
        self.answers = list(answers)

    def gather(self, value):
        return self.answers.pop(0)


def test_other_data_on_a_rank_is_named_with_both():
    told = Told([{"the fingerprint of the data": "aa"}, {"the fingerprint of the data": "bb"}])
    with pytest.raises(InputError) as caught:
        told.require_same({"the fingerprint of the data": "aa"}, fix="the same files")
    line = caught.value.line()
    assert "rank 1" in line
    assert "the fingerprint of the data is bb, rank 0 has aa" in line


def test_other_versions_and_shared_cards_are_named():
    usual = {"fourbit": "1", "torch": "2.13.0", "transformers": "5", "the kind of device": "cuda"}
    other = {**usual, "torch": "2.12.0"}
    with pytest.raises(InputError, match="rank 2.*torch is 2.12.0, rank 0 has 2.13.0"):
        session._require_same_software(Told([usual, usual, other]))
    with pytest.raises(InputError, match="rank 2.*the same graphics card as rank 0"):
        session._require_same_software(Told([usual] * 3, ["card-a", "card-b", "card-a"]))
    session._require_same_software(Told([usual] * 3, ["card-a", "card-b", "card-c"]))


def test_more_processes_than_cards_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("RANK", "7")
    for index, card in (("0", 0), ("1", 1)):
        monkeypatch.setenv("LOCAL_RANK", index)
        assert devices.default_device() == torch.device("cuda", card)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(InputError, match="rank 7.*shows 2 graphics cards.*process 4"):
        devices.default_device()
    # each process is shown its own
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert devices.default_device() == torch.device("cuda", 0)


def test_a_model_spread_over_devices_is_refused_where_there_are_several_processes(
    monkeypatch, model_folder
):
    quantization = FourbitConfig(load_in_4bit=True)
    load = partial(
        AutoModelForCausalLM.from_pretrained,
        model_folder("llama"),
        quantization_config=quantization,
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="2 processes, and a device_map that spreads"):
        load(device_map={"model": "cpu", "lm_head": "disk"})
    assert load(device_map={"": "cpu"}).is_quantized
