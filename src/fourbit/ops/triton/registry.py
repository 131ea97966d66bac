"""When Triton serves, and how its kernels take their place."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from fourbit.ops.schema import LIBRARY

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of activations and weights that the kernels take."""

FIRST = (8, 0)
"""The compute capability from which on Triton multiplies on tensor cores."""

_Fn = TypeVar("_Fn", bound=Callable[..., Any])


@cache
def installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


@cache
def multiplies(device: torch.device) -> bool:
    """Whether products of Triton's are fast on a GPU: it knows the tensor cores of sm_80 and on."""
    if interpreted():
        return True
    return installed() and torch.cuda.get_device_capability(device) >= FIRST


def interpreted() -> bool:
    """Whether kernels run on CPU tensors, in Triton's interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


_imagining: list[bool] = []


@contextmanager
def imagined() -> Iterator[None]:
    """Inside, whatever has the kernels of a GPU does nothing: a plan's tensors have no memory."""
    _imagining.append(True)
    try:
        yield
    finally:
        _imagining.pop()


def imagining() -> bool:
    """Whether a plan for a GPU is being made."""
    return bool(_imagining)


def serves(*tensors: Tensor | None) -> bool:
    """Whether kernels can read these: on a GPU, or anywhere in the interpreter."""
    present = [t for t in tensors if t is not None]
    if not installed() or any(t.dtype not in DTYPES for t in present if t.is_floating_point()):
        return False
    if any(isinstance(t, FakeTensor) for t in present):
        return False
    return interpreted() or all(t.is_cuda for t in present)


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """What runs a kernel on the device of its first argument, whichever device is current."""

    def run(first: Tensor, *arguments: object, **options: object) -> None:
        device = first.device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            kernel[grid](first, *arguments, **options)
            return
        with torch.cuda.device(device):
            kernel[grid](first, *arguments, **options)

    return run


def cuda_kernel(name: str) -> Callable[[_Fn], _Fn]:
    """Registers the CUDA kernel of an op where Triton is installed."""

    def register(function: _Fn) -> _Fn:
        if installed():
            LIBRARY.impl(name, function, "CUDA")
        return function

    return register
