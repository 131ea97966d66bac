"""The compiled kernels of ``csrc/``: found, asked for by name, called with plain pointers.

Nothing is loaded before the first question. Without a library (no compiler when the package was
built, an unknown CPU) every question is answered with None, and plain PyTorch serves.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_ABI = 1
_ENDING = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
_TYPES = {
    "p": ctypes.c_void_p,
    "l": ctypes.c_int64,
    "i": ctypes.c_int,
    "f": ctypes.c_float,
    "d": ctypes.c_double,
}
_CAPPED = {"DEFAULT": ("scalar", "neon"), "AVX2": ("scalar", "avx2")}
"""Where ATEN_CPU_CAPABILITY holds torch to a smaller instruction set, these are what is left."""
_ONEDNN_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE")

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The codes of csrc/kernels.h."""

_chosen: list[str | None] = []


class Trouble(NamedTuple):
    """Why there are no kernels.

    Attributes:
        what: the fact, in half a sentence.
        fix: what to do.
        expected: whether this is how a build without a compiler ends, no mistake.
    """

    what: str
    fix: str
    expected: bool = False


@lru_cache(maxsize=1)
def _loaded() -> tuple[ctypes.CDLL | None, Trouble | None]:
    path = library_path()
    if not path.is_file():
        return None, _absent()
    try:
        # torch first: its OpenMP is then the one that this library finds by name
        library = ctypes.CDLL(str(path))
        library.fb_isa.restype = ctypes.c_char_p
        library.fb_isa.argtypes = [ctypes.c_int]
        library.fb_kernel.restype = ctypes.c_void_p
        library.fb_kernel.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
        library.fb_source.restype = ctypes.c_char_p
        matching = library.fb_abi() == _ABI
    except (OSError, AttributeError) as error:
        return None, Trouble(f"{path} cannot be loaded ({error})", _rebuild())
    sources = source_hash()
    if sources is not None and library.fb_source().decode() != sources:
        return None, Trouble(f"{path.name} is older than csrc/", _rebuild())
    if not matching:
        return None, Trouble(f"{path.name} is of another version of fourbit", _rebuild())
    return library, None


def _absent() -> Trouble:
    if sys.platform == "win32":
        what, fix = "none are built for Windows", "use fourbit inside WSL"
    else:
        what = "none were built with this installation"
        fix = f"install a C++ compiler (g++ or clang++), then {_rebuild()}"
    return Trouble(what, fix, expected=True)


def _rebuild() -> str:
    if _sources() is not None:
        return "run `make native`, or `pip install -e .` again"
    return "pip install --force-reinstall --no-deps --no-binary fourbit fourbit"


def _sources() -> Path | None:
    """csrc/ of the checkout that this package is run from; None for an installed package."""
    folder = Path(__file__).parents[2] / "csrc"
    return folder if (folder / "dispatch.cpp").is_file() else None


def source_hash() -> str | None:
    """What a library made of csrc/ as it is now would say of its sources; None without csrc/."""
    folder = _sources()
    if folder is None:
        return None
    patterns = ("*.h", "*.cpp", "isa/*.cpp", "kernels/*.h", "CMakeLists.txt")
    found = (path for pattern in patterns for path in folder.glob(pattern))
    digests = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in found
    }
    listing = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(listing.encode()).hexdigest()


def trouble() -> Trouble | None:
    """Why `supported` is empty; None when it is not."""
    return _loaded()[1]


def library_path() -> Path:
    """Where the build puts the library, whether or not it is there."""
    return Path(__file__).with_name(f"libfourbit{_ENDING}")


@lru_cache(maxsize=1)
def supported() -> tuple[str, ...]:
    """The instruction sets that both the library and this CPU have, weakest first."""
    library = _loaded()[0]
    if library is None:
        return ()
    names = []
    while (name := library.fb_isa(len(names))) is not None:
        names.append(name.decode())
    return tuple(names)


def isa() -> str | None:
    """The instruction set in use: the best one that torch and oneDNN are not kept from using.

    ``ATEN_CPU_CAPABILITY`` and ``ONEDNN_MAX_CPU_ISA`` are their own switches.
    """
    return _chosen[-1] if _chosen else _best()


@lru_cache(maxsize=1)
def _best() -> str | None:
    names = supported()
    allowed = _CAPPED.get(torch.backends.cpu.get_cpu_capability())
    if allowed is not None:
        names = tuple(name for name in names if name in allowed)
    if not bf16_allowed():
        names = tuple(name for name in names if name != "avx512_bf16")
    return names[-1] if names else None


def bf16_allowed() -> bool:
    """Whether oneDNN, which multiplies large matrices, may use the CPU's bf16 instructions."""
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "ALL"))
    return cap.upper() not in _ONEDNN_WITHOUT_BF16 and (
        torch.backends.cpu.get_cpu_capability() not in _CAPPED
    )


@contextmanager
def using(name: str | None) -> Iterator[None]:
    """Inside, kernels of the instruction set ``name`` (one of `supported`) are used; None: none."""
    assert name is None or name in supported()
    _chosen.append(name)
    try:
        yield
    finally:
        _chosen.pop()


def kernel(name: str, arguments: str) -> Callable[..., None]:
    """The C function ``name`` of csrc/table.h for the instruction set in use.

    Args:
        name: as in the table.
        arguments: a letter each: p pointer, l int64, i int, f float, d double. Tensors are passed
            by their `address`.

    Raises:
        LookupError: no library, or none of this name; ask `isa` first.
    """
    chosen = isa()
    if chosen is None:
        raise LookupError(name)
    return _nothing if _imagining else _function(chosen, name, arguments)


def sizes(name: str, arguments: str) -> Callable[..., None]:
    """As `kernel`, for the functions that only say what room others need."""
    chosen = isa()
    if chosen is None:
        raise LookupError(name)
    return _function(chosen, name, arguments)


def address(tensor: Tensor | None) -> int:
    """Of the first element, for `kernel`; 0 for no tensor, and for one without memory."""
    return 0 if tensor is None or isinstance(tensor, FakeTensor) else tensor.data_ptr()


def addresses(*tensors: Tensor | None) -> list[int]:
    """The `address` of each."""
    return [address(tensor) for tensor in tensors]


def value(tensor: Tensor) -> float:
    """The number in a tensor of one element; 0 where a plan's tensor has none."""
    return 0 if isinstance(tensor, FakeTensor) else tensor.item()


def reads(tensor: Tensor) -> bool:
    """Whether a kernel may be given ``tensor``: there is one, and memory behind it."""
    real = bool(_imagining) or not isinstance(tensor, FakeTensor)
    return tensor.device.type == "cpu" and real and isa() is not None


_imagining: list[bool] = []


@contextmanager
def imagined() -> Iterator[None]:
    """Inside, kernels do nothing: a plan runs the code around them on tensors without memory."""
    _imagining.append(True)
    try:
        yield
    finally:
        _imagining.pop()


def _nothing(*_arguments: object) -> None:
    pass


def integers(*values: int) -> ctypes.Array[ctypes.c_int64]:
    """What C reads as ``int64_t[]``, or as a struct of 64-bit members; pass its address."""
    return (ctypes.c_int64 * len(values))(*values)


@lru_cache(maxsize=1024)
def _function(chosen: str, name: str, arguments: str) -> Callable[..., None]:
    library = _loaded()[0]
    assert library is not None
    address = library.fb_kernel(chosen.encode(), name.encode())
    if not address:
        raise LookupError(f"{name} for {chosen}")
    prototype = ctypes.CFUNCTYPE(None, *(_TYPES[letter] for letter in arguments))
    return prototype(address)
