"""One packed copy of a 16-bit model for all processes of a host.

Each of them could quantize it for itself, to the same bytes, but then the work is done by all and
the bytes are held by all. Instead one of them writes a packed copy, and all map its files.
"""

from __future__ import annotations

import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fourbit.distributed import Ranks
from fourbit.errors import Interrupted, Preempted
from fourbit.files import human_bytes
from fourbit.loading import stored_quantization
from fourbit.methods import quantized_base
from fourbit.quantize import QuantConfig
from fourbit.sources import ModelSource, resolve_source
from fourbit.training.child import ChildFailed, quantize_words, run_command
from fourbit.training.config import TrainConfig
from fourbit.training.progress import Reporter

_LEAST_BYTES = 1 << 29
"""Of the model's files. A smaller one is quantized sooner than a process is started."""
_FOLDER = "packed"


@contextmanager
def packed_once(
    source: ModelSource, config: TrainConfig, run: Path, ranks: Ranks, say: Reporter
) -> Iterator[ModelSource]:
    """What to load: a packed copy where several processes would make the same one.

    The copy has no name any more when this ends; what has mapped it keeps it.

    Args:
        source: the model.
        config: of the run.
        run: its directory, which the first process sees.
        ranks: the processes.
        say: is told what happens.

    Raises:
        Interrupted, Preempted: while the copy was made.
    """
    if not _worth_it(source, config, ranks):
        yield source
        return
    hosts = ranks.gather(socket.gethostname())
    leads = hosts.index(hosts[ranks.rank]) == ranks.rank
    made = _make(source, config, run if ranks.first else None, say) if leads else None
    # containers may share a host's name and nothing else
    folders = [Path(told) if told else None for told in ranks.gather(made and str(made))]
    mine = folders[hosts.index(hosts[ranks.rank])]
    there = mine is not None and (mine / "config.json").is_file()
    try:
        everywhere = all(ranks.gather(there))
        yield resolve_source(str(mine)) if everywhere and mine is not None else source
        ranks.gather(None)  # all have loaded it
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _worth_it(source: ModelSource, config: TrainConfig, ranks: Ranks) -> bool:
    if ranks.alone or not quantized_base(config.method):
        return False
    quant = config.quant
    usual = QuantConfig().llm_int8_threshold  # no option of the command
    if stored_quantization(source) is not None or quant.llm_int8_threshold != usual:
        return False
    return sum(file.stat().st_size for file in source.weight_files()) >= _LEAST_BYTES


def _make(source: ModelSource, config: TrainConfig, run: Path | None, say: Reporter) -> Path | None:
    """The folder of the copy; None where it cannot be made, and then each process quantizes."""
    folder = Path(tempfile.mkdtemp(prefix="fourbit-")) if run is None else run / _FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    say.line(f"quantizing {source.name} once for all processes of this host")
    words = quantize_words(config, folder, source.revision)
    try:
        told = run_command(*words, "--json", where=str(folder))
    except (Interrupted, Preempted):
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except ChildFailed as error:
        say.line(f"every process quantizes for itself: {error.what}")
        return None
    say.line(f"{human_bytes(told['bytes_out'])} in files that all processes map")
    return folder
