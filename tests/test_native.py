"""The compiled library: found, of these sources, capped as torch is, one OpenMP in the process."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fourbit
from fourbit import native

PACKAGE = Path(fourbit.__path__[0])
needs_kernels = pytest.mark.skipif(not native.supported(), reason="no compiled kernels here")
needs_bf16 = pytest.mark.skipif(
    "avx512_bf16" not in native.supported(), reason="this CPU has no avx512_bf16"
)


def python(code: str, *, source: Path = PACKAGE.parent, **environment: str) -> str:
    """Output of ``code`` in a process that imports fourbit from ``source``."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("ATEN_", "ONEDNN_"))}
    # by path, because an editable installation's import hook may come before PYTHONPATH
    start = (
        f"import sys; sys.meta_path[:] = sys.meta_path[-3:]; sys.path.insert(0, {str(source)!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{start}\n{code}"],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_library_that_is_there_is_used():
    trouble = native.trouble()
    assert trouble is None or trouble.expected, trouble
    assert (trouble is None) == bool(native.supported())
    assert (trouble is None) == native.library_path().is_file()


@needs_kernels
def test_scalar_is_always_there_and_the_strongest_set_comes_last():
    assert native.supported()[0] == "scalar"
    order = ("scalar", "neon", "avx2", "avx512", "avx512_bf16")
    assert [name for name in order if name in native.supported()] == list(native.supported())
    with native.using("scalar"):
        assert native.isa() == "scalar"
    assert native.isa() in native.supported()


@needs_kernels
def test_an_unknown_kernel_is_a_lookup_error():
    with pytest.raises(LookupError):
        native.kernel("no_such_kernel", "p")


@needs_kernels
@pytest.mark.skipif(shutil.which("nm") is None, reason="reads the symbols with nm")
def test_no_function_is_shared_between_instruction_sets():
    """The linker keeps one copy of an inline function of std:: that was not inlined, perhaps the
    AVX-512 one: the scalar kernels would then run it on a CPU that cannot."""
    listing = subprocess.run(
        ["nm", "--defined-only", str(native.library_path())], capture_output=True, text=True
    ).stdout.splitlines()
    shared = [line for line in listing if line.split()[-2] in "WVuw"]
    assert not shared
    assert any("fb_scalar" in line for line in listing)


CAPS = "\n".join(
    (
        "import torch",
        "from fourbit import native",
        "from fourbit.device import resolve_precision",
        "dtype = resolve_precision('auto', torch.device('cpu'))",
        "print(native.isa(), dtype, native.bf16_allowed())",
    )
)


@needs_kernels
@pytest.mark.parametrize(
    ("variable", "value", "isa"),
    [
        ("ATEN_CPU_CAPABILITY", "default", ("scalar", "neon")),
        ("ATEN_CPU_CAPABILITY", "avx2", ("scalar", "avx2")),
        ("ONEDNN_MAX_CPU_ISA", "avx512_core", ("avx512",)),
    ],
)
def test_caps_on_torch_and_onednn_hold_here_too(variable, value, isa):
    possible = [name for name in isa if name in native.supported()]
    if not possible:
        pytest.skip("another CPU's caps")
    chosen, dtype, bf16 = python(CAPS, **{variable: value}).split()
    assert chosen == possible[-1]
    assert dtype == "torch.float32"
    assert bf16 == "False"


@needs_bf16
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"), reason="capped from outside"
)
def test_without_caps_the_best_set_is_in_use():
    assert python(CAPS) == "avx512_bf16 torch.bfloat16 True"


def copy_of_the_package(folder: Path, *, with_sources: bool) -> Path:
    source = folder / "src"
    shutil.copytree(PACKAGE, source / "fourbit", ignore=shutil.ignore_patterns("__pycache__"))
    if with_sources:
        shutil.copytree(PACKAGE.parents[1] / "csrc", folder / "csrc")
    return source


STATE = "from fourbit import native; print(native.supported() != (), native.trouble())"


@needs_kernels
@pytest.mark.skipif(native.source_hash() is None, reason="not run from a checkout")
def test_a_library_older_than_its_sources_is_not_used(tmp_path):
    source = copy_of_the_package(tmp_path, with_sources=True)
    header = tmp_path / "csrc" / "kernels" / "loss.h"
    code = "\n".join(
        (
            STATE,
            "from pathlib import Path",
            f"header = Path({str(header)!r}); text = header.read_text()",
            "header.write_text(text + '\\n')",
            "native._loaded.cache_clear(); native.supported.cache_clear()",
            "print(native.supported() != (), native.trouble())",
            # what an in-place build leaves there is no source
            "header.write_text(text); Path(header.parents[1], 'CMakeCache.txt').touch()",
            "native._loaded.cache_clear(); native.supported.cache_clear()",
            "print(native.supported() != (), native.trouble())",
        )
    )
    fresh, edited, restored = python(code, source=source).splitlines()
    assert fresh == restored == "True None"
    assert edited.startswith("False Trouble(what='libfourbit")
    assert "is older than csrc/" in edited
    assert "make native" in edited


@needs_kernels
def test_without_a_library_pytorch_serves(tmp_path):
    source = copy_of_the_package(tmp_path, with_sources=False)
    (source / "fourbit" / native.library_path().name).unlink()
    code = "\n".join(
        (
            STATE,
            "import torch",
            "from fourbit.loss import linear_cross_entropy",
            "from fourbit.doctor import diagnose",
            "hidden = torch.ones(3, 4, requires_grad=True)",
            "linear_cross_entropy(hidden, torch.ones(5, 4), torch.tensor([1, -100, 4])).backward()",
            "print(hidden.grad.abs().max() < 1e-6)",
            "print(*(line for line in diagnose().lines() if 'kernels: ' in line), sep='|')",
        )
    )
    state, loss, line = python(code, source=source).splitlines()
    assert state.startswith("False Trouble(what='none were built")
    assert loss == "tensor(True)"
    assert line.startswith("note: kernels: none, plain PyTorch serves, slower: none were built")
    assert "; fix: install a C++ compiler" in line
    (source / "fourbit" / native.library_path().name).write_bytes(b"no library")
    assert "cannot be loaded" in python(STATE, source=source)


OPENMP = "\n".join(
    (
        "import re",
        "from pathlib import Path",
        "ours()",
        "maps = Path('/proc/self/maps').read_text()",
        "print(*sorted(set(re.findall(r'\\S*lib[gi]?omp\\d?[-.]\\S*', maps))))",
    )
)


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("first", ["torch", "ours"])
def test_there_is_one_openmp_whichever_library_comes_first(first):
    """Two would be two pools of threads, and each kernel would wait for cores the other holds."""
    ours = f"import ctypes; ctypes.CDLL({str(native.library_path())!r})"
    torch_first = f"import torch\ndef ours():\n    {ours}"
    ours_first = f"def ours():\n    {ours}\n    import torch"
    code = {"torch": torch_first, "ours": ours_first}[first] + "\n" + OPENMP
    found = python(code).split()
    assert len(found) == 1, found
    if first == "torch":
        assert Path(found[0]).is_relative_to(Path(torch.__file__).parent)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no disassembler")
def test_no_kernel_touches_the_mmx_registers():
    # They are x87's: code that leaves them in use makes the next x87 code of the process give NaN.
    path = native.library_path()
    if not path.is_file():
        pytest.skip("no compiled kernels")
    listing = subprocess.run(
        ["objdump", "-d", str(path)], capture_output=True, text=True, check=True
    ).stdout
    assert not re.search(r"%mm[0-7]\b", listing)
