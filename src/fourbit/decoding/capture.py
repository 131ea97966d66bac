"""Recording what a function launches on a GPU, so that it can be launched again as a whole.

Everything that needs a GPU is in `CudaCapture`; whoever records takes any `Capture`, so that the
same code runs on a CPU with one that calls the function again.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Given a function of no arguments that reads and writes tensors which stay where they are, runs
it at least once and returns what does the same again. Raises RuntimeError where that cannot be."""

_WARM_UPS = 3
"""Runs before the recording: kernels are compiled, libraries choose theirs, tables are made."""


class CudaCapture:
    """A `Capture` by CUDA graphs; all of one instance share their memory and run one at a time."""

    def __init__(self) -> None:
        self._pool: Any = None  # an opaque handle

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Runs ``function`` on a stream of its own, then records it.

        Raises:
            RuntimeError: it does something that a graph cannot hold.
        """
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        # not torch.cuda.graph: a recording that fails would leave its stream the current one
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                function()
            torch.cuda.synchronize()
            gc.collect()  # nothing may be freed while it is recorded
            graph.capture_begin(pool=self._pool)
            try:
                function()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return graph.replay
