"""Memory of training processes on Linux: an allocator that uses freed room again, preloaded.

glibc's leaves holes between large tensors into which no tensor of the same size fits; what a step
needs then grows to up to twice what is alive in it. `csrc/arena.cpp` stands before it. Only a
process that starts with it can have it, so the command line starts itself anew (`preload`); inside
other programs glibc serves. It is the same mechanism by which jemalloc or tcmalloc are used.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import lru_cache
from pathlib import Path

_VARIABLE = "LD_PRELOAD"
LIBRARY = Path(__file__).with_name("libfourbit_arena.so")


def preload() -> None:
    """Starts this process anew with the allocator in it; returns where it is there or cannot be.

    A process that preloads something of its own is left alone. To be called before anything else
    was done: the arguments are what is kept.
    """
    if active():
        # what this process starts needs none of it
        os.environ.pop(_VARIABLE, None)
        return
    if os.environ.get(_VARIABLE) or not available():
        return
    environment = {**os.environ, _VARIABLE: str(LIBRARY)}
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    except OSError:
        return  # then without


def available() -> bool:
    """Whether a process that is started now could have it."""
    return sys.platform == "linux" and LIBRARY.is_file() and " " not in str(LIBRARY)


@lru_cache(maxsize=1)
def active() -> bool:
    """Whether large tensors of this process lie in it."""
    live = _function("fb_arena_live")
    return live is not None and live() >= 0


def live_bytes() -> int:
    """Bytes of the blocks in use; 0 without the allocator."""
    live = _function("fb_arena_live")
    return max(0, live()) if live is not None else 0


def trim() -> None:
    """Gives the pages of free room back to the system."""
    function = _function("fb_arena_trim")
    if function is not None:
        function()


@lru_cache(maxsize=8)
def _function(name: str) -> ctypes._NamedFuncPointer | None:
    if sys.platform != "linux":
        return None
    found = getattr(ctypes.CDLL(None), name, None)
    if found is not None:
        found.restype = ctypes.c_int64
    return found
