"""How a CPU kernel takes its place before the plain PyTorch one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fourbit import native
from fourbit.ops.schema import CPU_KERNELS, LIBRARY

NARROW_OR_WIDE = (torch.float32, torch.bfloat16)
"""Dtypes of activations that kernels of csrc/ take (its `by_type`)."""

_Fn = TypeVar("_Fn", bound=Callable[..., Any])


def cpu_kernel(name: str) -> Callable[[_Fn], _Fn]:
    """Registers the CPU kernel of an op where there is a library to call."""

    def register(function: _Fn) -> _Fn:
        if native.isa() is not None:
            LIBRARY.impl(name, function, "CPU")
            CPU_KERNELS[name] = function
        return function

    return register


def threads() -> int:
    """How many threads a kernel may use: as many as torch."""
    return torch.get_num_threads()
