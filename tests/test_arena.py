"""The preloaded allocator: the same values, room used again, pages given back, and who has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from fourbit import arena
from models import write_model

pytestmark = pytest.mark.skipif(not arena.available(), reason="no allocator was built here")

STEP = """
import random, torch
from fourbit import arena, device
assert arena.active()
rnd, alive, before = random.Random(0), [], arena.live_bytes()
for turn in range(3000):
    count = rnd.choice((40_000, 100_000, 333_333, 1_000_001))
    alive.append((turn, torch.full((count,), float(turn))))
    if len(alive) > 12:
        mark, tensor = alive.pop(rnd.randrange(len(alive)))
        assert tensor[0] == tensor[-1] == mark and tensor.data_ptr() % 64 == 0
        assert bool((tensor == mark).all())
del tensor
assert arena.live_bytes() - before == sum(-(-4 * t.numel() // 64) * 64 + 192 for _, t in alive)
"""


def run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LD_PRELOAD": str(arena.LIBRARY), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_blocks_keep_their_values_and_are_counted():
    run(STEP)


def test_room_of_the_same_size_is_used_again_and_pages_go_back():
    run("""
import torch
from fourbit import arena, device
def resident(): return device.private_memory()
kept, size = [], 1_200_000
torch.zeros(size); start = resident()
for _ in range(40):  # what a layer does: something for backward, and something it forgets
    scrap, keep = torch.ones(size), torch.ones(size)
    small = [object() for _ in range(500)]
    kept.append(keep); del scrap
grown = resident() - start
assert grown < 41.5 * 4 * size, grown
del kept, keep
assert resident() - start > 30 * 4 * size
device.release_memory()
assert resident() - start < 4 * size
""")


def test_a_fork_a_grown_storage_and_an_absurd_size():
    run("""
import os, torch
torch.set_num_threads(1)  # OpenMP itself does not survive a fork
x = torch.ones(1_000_000)
child = os.fork()
if child == 0:
    y = torch.full((500_000,), 3.0); del x
    os._exit(0 if float(y.sum()) == 1_500_000 else 1)
assert os.waitpid(child, 0)[1] == 0
x.resize_(3_000_000); assert float(x[:1_000_000].sum()) == 1e6
try: torch.empty(1 << 58)
except RuntimeError as error:
    from fourbit import device
    assert device.is_out_of_memory(error), error
""")


def test_under_an_address_limit_glibc_serves():
    run("""
import resource, torch
from fourbit import arena
resource.setrlimit(resource.RLIMIT_AS, (1 << 36, 1 << 36))
x = torch.ones(1_000_000)
assert float(x.sum()) == 1e6 and not arena.active() and arena.live_bytes() == 0
""")


def test_the_command_line_trains_with_it(tmp_path):
    folder = write_model(tmp_path / "model", "llama")
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({"text": f"row {i} of some words"}) + "\n" for i in range(8))
    )
    words = ["--model", str(folder), "--data", str(data), "-o", str(tmp_path / "run")]
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    for own, expected in ({}, True), ({"LD_PRELOAD": "libm.so.6"}, False):
        done = subprocess.run(
            [sys.executable, "-m", "fourbit", "train", *words, "--max-steps", "1", "--overwrite"],
            env={**environment, **own},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert json.loads((tmp_path / "run" / "plan.json").read_text())["arena"] is expected
