"""What this machine has: instruction sets, dtypes, memory. Asked on call, never at import."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch

from fourbit import arena, native
from fourbit.errors import InputError

Precision = Literal["auto", "bf16", "fp16", "fp32"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_X86_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
_ARM_SETS = ("asimd", "bf16", "i8mm", "sve")


@dataclass(frozen=True)
class Machine:
    """Facts about the host and its accelerator; bytes unless named otherwise."""

    cpu: str
    cores: int
    threads: int
    instruction_sets: tuple[str, ...]
    memory_total: int
    memory_available: int
    accelerator: str | None
    accelerator_memory: int | None
    bf16: bool
    python: str
    torch: str

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


@lru_cache(maxsize=1)
def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that matter to our products, as the operating system names them."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return ()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags = set(value.split())
            return tuple(name for name in (*_X86_SETS, *_ARM_SETS) if name in flags)
    return ()


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 products run in hardware.

    Without avx512_bf16, AMX or ARM's bf16 a CPU emulates them, up to five times slower than fp32;
    so it does where torch or oneDNN are held to a smaller instruction set.
    """
    if device.type == "cpu":
        found = {"avx512_bf16", "amx_bf16", "bf16"} & set(instruction_sets())
        return bool(found) and native.bf16_allowed()
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8 or torch.version.hip is not None
    return False


@contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """Inside, a GPU computes the same bits every time; a CPU does so anyway.

    Args:
        wanted: False for nothing at all.

    Raises:
        InputError: an operation for which PyTorch knows no such way; it is named.
    """
    if not wanted or default_device().type != "cuda":
        yield
        return
    # cuBLAS reads it when it begins, so nobody has to set it outside
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    strict = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic
    fills = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # nothing here reads such memory
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise InputError(
            "not-deterministic",
            where="deterministic",
            what=str(error).strip().splitlines()[0],
            fix="leave deterministic out, or set attn_implementation: eager",
        ) from error
    finally:
        torch.use_deterministic_algorithms(strict)
        settings.fill_uninitialized_memory = fills


def default_device() -> torch.device:
    """The first accelerator torch can use, else the CPU; under torchrun that of this process.

    Raises:
        InputError: more processes on this host than accelerators.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index, count = int(os.environ.get("LOCAL_RANK", "0") or 0), torch.cuda.device_count()
    if index >= count > 1:
        raise InputError(
            "too-many-processes",
            where=f"rank {os.environ.get('RANK', index)}",
            what=f"this host shows {count} graphics cards, and this is process {index + 1} on it",
            fix=f"one process, one device: torchrun --nproc-per-node {count}",
        )
    # a scheduler may show each process its own card only
    return torch.device("cuda", index if index < count else 0)


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of activations and unquantized weights.

    Raises:
        InputError: bf16 on hardware that would emulate it, fp16 on a CPU.
    """
    fast = has_fast_bf16(device)
    if precision == "auto":
        if fast:
            return torch.bfloat16
        return torch.float16 if device.type == "cuda" else torch.float32
    if precision == "bf16" and not fast:
        instead = "fp16" if device.type == "cuda" else "fp32"
        raise InputError(
            "no-bf16",
            where="precision",
            what=f"{device.type} has no bf16 arithmetic",
            fix=f"use precision: {instead}, or auto",
        )
    if precision == "fp16" and device.type == "cpu":
        raise InputError(
            "no-fp16",
            where="precision",
            what="fp16 training needs an accelerator",
            fix="use precision: bf16 or fp32, or auto",
        )
    return DTYPES[precision]


def machine() -> Machine:
    """Everything `fourbit doctor` says about this machine."""
    device = default_device()
    total, available = host_memory()
    accelerator = memory = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        accelerator, memory = properties.name, properties.total_memory
    return Machine(
        cpu=_cpu_name(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        instruction_sets=instruction_sets(),
        memory_total=total,
        memory_available=available,
        accelerator=accelerator,
        accelerator_memory=memory,
        bf16=has_fast_bf16(device),
        python=platform.python_version(),
        torch=torch.__version__,
    )


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def host_memory() -> tuple[int, int]:
    """``(total, available)`` bytes of host memory; zeros where the system does not say.

    A container has what its control group leaves it, which the system's own figures do not show.
    """
    path = Path("/proc/meminfo")
    if path.exists():
        fields = dict(line.split(":", 1) for line in path.read_text().splitlines())
        total, free = (int(fields[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
        for limit, used in group_limits():
            total, free = min(total, limit), min(free, max(0, limit - used))
        return total, free
    if sys.platform == "win32":
        return 0, 0
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total, 0


def group_limits(
    groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[tuple[int, int]]:
    """``(limit, used)`` bytes of this process's control groups that have a limit, of version 2.

    Pages of files, which can be dropped, do not count as used.

    Args:
        groups: where the control groups are mounted.
        own: the file that names those of this process.
    """
    found = []
    try:
        lines = own.read_text().splitlines()
        place = next(line[3:].strip("/") for line in lines if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    folder = groups / place
    for group in (folder, *folder.parents):
        if not group.is_relative_to(groups):
            break
        try:
            limit = (group / "memory.max").read_text().strip()
            used = int((group / "memory.current").read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            if limit != "max":
                found.append((int(limit), used - int(stat.get("inactive_file", 0))))
        except (OSError, ValueError):
            continue
    return found


def free_memory(device: torch.device) -> int:
    """Bytes free on ``device``; of the host for a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return host_memory()[1]


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new peak measurement; on a CPU that is the kernel's high-water mark."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    mark = Path("/proc/self/clear_refs")
    if mark.exists():
        try:
            mark.write_text("5")
        except OSError:
            return  # a container may forbid it: the peak then counts from the process's start


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the highest since `reset_peak_memory`: device memory, or the process's RSS."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM")


def resident_memory() -> int | None:
    """Resident bytes of this process now."""
    return _status_bytes("VmRSS")


def private_memory() -> int | None:
    """Bytes that belong to this process alone: mapped files, which it can give up, do not count."""
    return _status_bytes("RssAnon")


class PeakMemory:
    """Inside ``with``, watches `private_memory` from a thread; the kernel keeps no such mark.

    Attributes:
        start: bytes at the beginning; None where the system does not say.
        peak: highest so far, None likewise.
    """

    _SECONDS = 0.005

    def __init__(self) -> None:
        self.start = self.peak = private_memory()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        if self.start is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        if self.start is not None:
            self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak or 0, private_memory() or 0)
            if self._done.wait(self._SECONDS):
                return


def _status_bytes(key: str) -> int | None:
    path = Path("/proc/self/status")
    if not path.exists():
        return None
    for line in path.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return None


def release_memory() -> None:
    """Gives freed memory back to the system.

    glibc keeps what tensor-by-tensor loading freed; after a load that can be several times the
    quantized model.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    arena.trim()
    trim = _from_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def drop_file_pages(tensor: torch.Tensor, *, whole: bool = False) -> None:
    """Gives back what was read of a mapped file for ``tensor``; read again, it comes again.

    A tensor that lies in no mapped file stays as it is. One that does must not have been written:
    its values would again be the file's.

    Args:
        tensor: on the CPU.
        whole: everything that was read of its file, for other tensors too.
    """
    advise = _from_glibc("madvise")
    if advise is None or tensor.device.type != "cpu":
        return
    begin, page = tensor.data_ptr(), mmap.PAGESIZE
    first = -(-begin // page) * page
    last = (begin + tensor.nbytes) // page * page
    low, high = _mapped_file(begin)
    if whole:
        first, last = low, high
    if low <= first < last <= high:
        advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED)


def page_out(tensor: torch.Tensor) -> None:
    """Asks the system to take back the memory of ``tensor``, whose values stay what they are.

    Of a mapped file nothing is lost: what is used again is read again. Unlike `drop_file_pages`
    this is safe for memory that may have been written; where the system refuses, nothing happens.
    """
    advise = _from_glibc("madvise")
    if advise is None or tensor.device.type != "cpu":
        return
    begin, page = tensor.data_ptr(), mmap.PAGESIZE
    first, last = -(-begin // page) * page, (begin + tensor.nbytes) // page * page
    if first < last:
        advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_PAGEOUT)


def _mapped_file(address: int) -> tuple[int, int]:
    """Where the mapping of a file begins and ends in which ``address`` lies; zeros if in none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
        low, high = (int(part, 16) for part in addresses.split("-"))
        if low <= address < high:
            return (low, high) if inode != "0" else (0, 0)
    return 0, 0


_MADV_DONTNEED, _MADV_PAGEOUT = 4, 21
"""Of Linux' mman.h."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on whatever device and whoever says so."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(said in text for said in _OUT_OF_MEMORY)


_OUT_OF_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "bad_alloc",
    "out of memory",
)
"""In the errors of torch's CPU allocator, of the C++ library and of CUDA's own libraries."""


def keep_freed_memory() -> None:
    """From now on what is freed stays in the process, where the next step of a training needs it.

    glibc would give the end of its heap back after every step and have it mapped and cleared anew
    in the next. `release_memory` still gives it back.
    """
    options = _from_glibc("mallopt")
    if options is not None:
        # the first alone would leave everything above 128 KB to mappings of its own
        options(_M_TRIM_THRESHOLD, 2**31 - 1)
        options(_M_MMAP_THRESHOLD, 32 << 20)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""


def _from_glibc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
