"""One of several processes: trains the runs of the given configurations one after another."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fourbit.distributed import joined
from fourbit.settings import load_settings
from fourbit.training import shared_base
from fourbit.training.config import TrainConfig
from fourbit.training.progress import Reporter
from fourbit.training.run import train

if __name__ == "__main__":
    if os.environ.get("PACKED_ONCE"):
        shared_base._LEAST_BYTES = 0
    with joined() as ranks:
        for path in sys.argv[1:]:
            config = load_settings(TrainConfig, path=Path(path)).value
            train(config, reporter=Reporter(quiet=True), ranks=ranks)
