"""Joining the other processes of a run, and leaving them so that each knows why."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from fourbit import __version__
from fourbit import device as devices
from fourbit.distributed.ranks import ALONE, Ranks
from fourbit.distributed.watchdog import BROKEN_SECONDS, Watchdog, as_failure
from fourbit.errors import EnvironmentFault, FourbitError, InputError, Preempted

_MEETING = timedelta(minutes=10)
"""For all processes to be there."""
_EXCHANGE = timedelta(minutes=30)
"""For one exchange; processes that are gone are noticed by other means and much earlier."""
_FAREWELL_SECONDS = 10.0
"""A process that fails stays so long for the others to see why."""
_SESSIONS = itertools.count()
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def restarts() -> int:
    """How often torchrun has started the processes of this run again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") or 0)


@contextmanager
def joined() -> Iterator[Ranks]:
    """Inside, the processes that torchrun (or anything that sets its variables) started are one.

    An error in one of them ends all: each says which and why, and ends with its exit code.

    Raises:
        InputError: variables are missing, or processes that do not fit together.
        EnvironmentFault: another process is gone.
        SystemExit: an error that another process has already told in the same words.
    """
    if int(os.environ.get("WORLD_SIZE", "1") or 1) <= 1:
        yield ALONE
        return
    ranks, watchdog = _join()
    try:
        _require_same_software(ranks)
        yield ranks
    except BaseException as error:
        if isinstance(error, FourbitError):
            watchdog.leave(as_failure(error))
        ending = _ending(error, watchdog)
        watchdog.leave(as_failure(ending))
        silent = _told_by_the_first(ending, watchdog)
        _say_goodbye(watchdog)
        watchdog.stop()
        if silent:
            raise SystemExit(as_failure(ending)["exit_code"]) from error
        if ending is error:
            if isinstance(error, FourbitError) and not error.where.startswith("rank "):
                error.where = f"rank {ranks.rank}, {error.where}"
            raise
        raise ending from error
    watchdog.leave(None)
    with ranks.waiting():
        torch.distributed.barrier()
    watchdog.stop()
    torch.distributed.destroy_process_group()


def _join() -> tuple[Ranks, Watchdog]:
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    missing = [name for name in _NEEDED if not os.environ.get(name)]
    if missing:
        raise InputError(
            "no-rendezvous",
            where="environment",
            what=f"WORLD_SIZE asks for several processes, but {', '.join(missing)} is not set",
            fix="start with torchrun --nproc-per-node N -m fourbit train",
        )
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(devices.default_device())
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        store, rank, size = next(rendezvous("env://", rank, size, timeout=_MEETING))
        # torchrun keeps its store over restarts, and one process may train several runs
        store = PrefixStore(f"fourbit/{restarts()}/{next(_SESSIONS)}", store)
        # a connection of its own: one that waits would keep the thread from showing signs
        own: Any = store.clone()  # type: ignore[attr-defined]  # not in torch's stubs
        watchdog = Watchdog(own, rank, size)
        watchdog.publish()
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_EXCHANGE)
    except (RuntimeError, ValueError) as error:
        raise EnvironmentFault(
            "no-rendezvous",
            where=f"rank {rank}",
            what=f"the {size} processes did not meet: {str(error).strip().splitlines()[0]}",
            fix="check MASTER_ADDR and the network, and that every process was started",
        ) from error
    ranks = Ranks(rank, size, watchdog)
    ranks.gather(None)  # everybody's first sign is there
    watchdog.start()
    return ranks, watchdog


def _require_same_software(ranks: Ranks) -> None:
    import transformers

    device = devices.default_device()
    facts = {
        "fourbit": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "the kind of device": device.type,
    }
    ranks.require_same(facts, fix="install the same on every host, and show each its devices")
    places = ranks.gather(_place(device))
    taken: dict[str, int] = {}
    for rank, place in enumerate(places):
        if place is not None and place in taken:
            raise InputError(
                "device-shared",
                where=f"rank {rank}",
                what=f"has the same graphics card as rank {taken[place]}",
                fix="one process, one device: --nproc-per-node at most the number of cards",
            )
        if place is not None:
            taken[place] = rank


def _place(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    return str(torch.cuda.get_device_properties(device).uuid)


def _ending(error: BaseException, watchdog: Watchdog) -> BaseException:
    """What this process ends for: another one, where that is the cause of its own error."""
    # torchrun ends the others with SIGTERM when one has died: that is no pre-emption
    caused = not isinstance(error, FourbitError) or (
        isinstance(error, Preempted) and not watchdog.together
    )
    if not caused or isinstance(error, (KeyboardInterrupt, GeneratorExit)):
        return error
    until = time.monotonic() + BROKEN_SECONDS + 2
    while time.monotonic() < until:
        found = watchdog.missing(BROKEN_SECONDS)
        if found is not None and found.exit_code != Preempted.exit_code:
            return found
        if watchdog.all_ended():
            break
        time.sleep(0.1)
    return error


def _told_by_the_first(error: BaseException, watchdog: Watchdog) -> bool:
    if watchdog.rank == 0:
        return False
    mine: dict[str, Any] = as_failure(error)
    until = time.monotonic() + 3
    while time.monotonic() < until:
        theirs = watchdog.first_failure(0)
        if theirs is not None:
            return theirs == mine
        time.sleep(0.1)
    return False


def _say_goodbye(watchdog: Watchdog) -> None:
    """Stays until every other process knows: what starts processes ends all when one has ended."""
    until = time.monotonic() + _FAREWELL_SECONDS
    while time.monotonic() < until and not watchdog.all_ended():
        time.sleep(0.1)
    # rank 0 may keep the store in which the others read
    while watchdog.rank == 0 and time.monotonic() < until and not watchdog.all_heard():
        time.sleep(0.1)
