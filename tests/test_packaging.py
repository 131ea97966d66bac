"""From the sources to an installed wheel: with a compiler, without one, on another processor."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not run from the sources"),
    pytest.mark.skipif(sys.platform == "win32", reason="kernels are not built there"),
]
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")),
    reason="no C++ compiler",
)

USE = """
import json, torch
from fourbit import doctor, native, ops
from fourbit.ops import reference
weight = torch.randn(33, 64)
packed, absmax = ops.quantize_4bit(weight, blocksize=64, quant_type="nf4")
plain_packed, plain_absmax = reference.quantize_4bit(weight, 64, "nf4")
values = ops.dequantize_4bit((packed, absmax, None, None), blocksize=64, quant_type="nf4",
                             shape=(33, 64), dtype=torch.float32)
print(json.dumps({
    "file": native.__file__,
    "supported": native.supported(),
    "equal": torch.equal(packed, plain_packed) and torch.equal(absmax, plain_absmax),
    "error": float((values - weight).abs().max() / weight.abs().max()),
    "line": [line for line in doctor.diagnose().lines() if "kernels: " in line],
}))
"""


def backend(call: str, folder: Path, **environment: str) -> str:
    """Name of what the build backend made, asked in a process of its own as pip does."""
    pytest.importorskip("scikit_build_core")
    done = subprocess.run(
        [sys.executable, "-c", f"import scikit_build_core.build as b; print('made', b.{call})"],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split("made ")[-1].strip()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    return folder / backend(f"build_sdist({str(folder)!r})", ROOT)


def wheel_of(sdist: Path, folder: Path, *, broken: bool = False, **environment: str) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = folder.iterdir()
    if broken:
        (unpacked / "csrc" / "numbers.h").write_text("#error not on this compiler\n")
    made = folder / "made"
    return made / backend(f"build_wheel({str(made)!r})", unpacked, **environment)


def use_installed(wheel: Path, folder: Path) -> dict:
    """What an environment that has the wheel, and this one's other packages, says of itself."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*install, "--no-deps", "--no-index", str(wheel)], check=True, timeout=300)
    (packages,) = folder.glob("lib/python*/site-packages")
    # only the folder: an editable fourbit in it is not followed
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), "-c", USE],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert Path(found["file"]).is_relative_to(packages)
    assert found["equal"]
    assert found["error"] < 0.2
    assert len(found["line"]) == 1
    return found


def test_the_sdist_holds_what_is_needed_to_build_and_test_and_no_more(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in (
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "Makefile",
        "constraints.txt",
        "csrc/CMakeLists.txt",
        "csrc/source_hash.cmake",
        "csrc/kernels/loss.h",
        "csrc/isa/scalar.cpp",
        "src/fourbit/native.py",
        "tests/test_packaging.py",
        "tests/conftest.py",
        "docs/formats.md",
    ):
        assert needed in names
    for name in names:
        parts = Path(name).parts
        assert not any(part.startswith(".") or part == "__pycache__" for part in parts), name
        assert parts[:1] not in (("build",), ("dist",), ("runs",)), name
        assert not name.endswith((".so", ".dylib", ".pyc", "CMakeCache.txt")), name
        assert "CMakeFiles" not in parts, name


@needs_compiler
def test_a_wheel_from_the_sdist_works_in_a_fresh_environment(sdist, tmp_path):
    wheel = wheel_of(sdist, tmp_path / "from")
    platform = re.sub(r"[-.]", "_", sysconfig.get_platform())
    assert re.fullmatch(r"fourbit-[\d.]+-py3-none-(\w+)\.whl", wheel.name)
    assert wheel.name.endswith(f"-{platform}.whl") or sys.platform == "darwin"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    native_files = [name for name in names if name.endswith((".so", ".dylib"))]
    libraries = {"libfourbit", "libfourbit_arena"} if sys.platform == "linux" else {"libfourbit"}
    assert {name.partition(".")[0] for name in native_files} == {f"fourbit/{n}" for n in libraries}
    tops = {Path(name).parts[0] for name in names}
    assert tops == {"fourbit", next(top for top in tops if top.endswith(".dist-info"))}
    found = use_installed(wheel, tmp_path / "fresh")
    assert found["supported"][0] == "scalar"
    assert found["line"][0].startswith("ok: kernels: ")
    assert "(csrc)" in found["line"][0]


@needs_compiler
def test_a_compiler_that_fails_leaves_a_pure_package(sdist, tmp_path):
    wheel = wheel_of(sdist, tmp_path / "from", broken=True)
    assert wheel.name.endswith("-py3-none-any.whl")


def test_without_a_compiler_a_pure_package_is_made_and_doctor_says_so(sdist, tmp_path):
    wheel = wheel_of(sdist, tmp_path / "from", CXX="/bin/false")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".so", ".dylib"))]
    found = use_installed(wheel, tmp_path / "fresh")
    assert found["supported"] == []
    assert found["line"][0].startswith(
        "note: kernels: none, plain PyTorch serves, slower: none were built"
    )
    assert "; fix: install a C++ compiler" in found["line"][0]


@needs_compiler
@pytest.mark.skipif(shutil.which("cmake") is None, reason="calls cmake")
@pytest.mark.skipif(sys.platform != "linux", reason="pretends to be another Linux machine")
def test_an_unknown_processor_without_openmp_gets_serial_scalar_kernels(tmp_path):
    configure = ["cmake", "-S", str(ROOT / "csrc"), "-B", str(tmp_path / "build")]
    settings = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "unheard-of",
        "CMAKE_DISABLE_FIND_PACKAGE_OpenMP": "ON",
        "FOURBIT_OUTPUT": str(tmp_path),
    }
    subprocess.run([*configure, *(f"-D{k}={v}" for k, v in settings.items())], check=True)
    subprocess.run(["cmake", "--build", str(tmp_path / "build")], check=True)
    path = tmp_path / "libfourbit.so"
    assert b"GOMP_parallel" not in path.read_bytes()
    library = ctypes.CDLL(str(path))
    library.fb_isa.restype = ctypes.c_char_p
    assert [library.fb_isa(0), library.fb_isa(1)] == [b"scalar", None]
