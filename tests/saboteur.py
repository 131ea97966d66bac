"""``python -m fourbit`` in which rank 1 dies, hangs or errs once: ``SABOTAGE=PLACE:HOW:CALL``."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from fourbit.training import run
from fourbit.training.keeping import Keeper
from fourbit.training.loop import TrainLoop

PLACES: dict[str, tuple[Any, str]] = {
    "load": (run, "load_model"),
    "step": (TrainLoop, "_parts"),
    "save": (Keeper, "require_same_adapter"),
    "evaluation": (TrainLoop, "evaluate"),
}


def harm(how: str) -> None:
    if how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "errs":
        raise ZeroDivisionError("sabotage")
    time.sleep(1000)


def sabotaged(real: Callable[..., Any], how: str, call: int) -> Callable[..., Any]:
    count = [0]

    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        count[0] += 1
        if count[0] == call:
            harm(how)
        return real(*arguments, **keywords)

    return wrapper


if __name__ == "__main__":
    from fourbit.cli import main

    first_time = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if os.environ["RANK"] == "1" and first_time:
        place, how, call = os.environ["SABOTAGE"].split(":")
        owner, name = PLACES[place]
        setattr(owner, name, sabotaged(getattr(owner, name), how, int(call)))
    main()
