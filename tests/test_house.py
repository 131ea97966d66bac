"""The house keeps its floors: imports go down only, imports are lean, one table of values."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "fourbit"

# From the ground up; a room may import rooms on lower floors and on its own.
FLOORS = [
    {"errors", "lazy"},
    {"files", "settings", "native", "arena"},
    {"codebook", "device", "shards", "rundir", "methods"},
    {"ops", "checkpoint", "distributed"},
    {"quantize"},
    {"calibrated", "absmax"},
    {"linear"},
    {"lora", "loss", "optim", "prompts", "bnb_format", "experts", "fused", "offload"},
    {
        "integrations.config",
        "integrations.experts",
        "integrations.anatomy",
        "integrations.attention",
    },
    {"integrations.starts", "integrations.merging", "integrations.names"},
    {"integrations.tuners"},
    {"integrations.peft", "integrations.prompts"},
    {"integrations.fused"},
    {"integrations.transformers", "integrations.gguf", "receipt"},
    {"sources", "data", "decoding", "integrations.trainer", "integrations.takeover"},
    {"loading"},
    {"objective", "generate", "report"},
    {"planning"},
    {"training"},
    {"evaluation"},
    {"comparison"},
    {"verification", "quantizing"},
    {"merging"},
    {"api", "doctor", "exporting", "inspection", "demo"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, floor in enumerate(FLOORS) for room in floor}


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def room_of(dotted: str) -> str | None:
    """``fourbit.data.packing`` belongs to the room ``data``."""
    parts = dotted.split(".")[1:]
    for length in (2, 1):
        name = ".".join(parts[:length])
        if name in LEVEL:
            return name
    return None


def dotted(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "fourbit"}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_down_only(path):
    if (
        path == SOURCE / "__init__.py"
        or path.name == "__init__.py"
        and path.parent.name == "integrations"
    ):
        return
    room = room_of(dotted(path))
    assert room is not None, f"{path} is on no floor: add it to FLOORS"
    for name in imported(path):
        other = room_of(name)
        if other is not None and other != room:
            assert LEVEL[other] < LEVEL[room], f"{path.name} imports {name} from above or beside"


def test_no_import_cycle_between_modules():
    known = {dotted(path): path for path in modules()}
    graph = {
        name: {
            target
            for found in imported(path)
            for target in (found, found.rsplit(".", 1)[0])
            if target in known and target != name and target != "fourbit"
        }
        for name, path in known.items()
        if name != "fourbit"
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for target in sorted(graph.get(name, ())):
                # a package's face imports its own parts; they do not import the face
                if not (target.startswith(name + ".") or name.startswith(target + ".")):
                    visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.strip()


def test_importing_fourbit_loads_nothing_heavy():
    code = (
        "import sys, fourbit, fourbit.cli;"
        "print([m for m in ('torch', 'transformers', 'peft', 'numpy', 'matplotlib')"
        " if m in sys.modules])"
    )
    assert run_python(code) == "[]"


def test_settings_are_read_before_transformers_is():
    code = (
        "import sys, fourbit.training.config, fourbit.comparison;"
        "print([m for m in ('transformers', 'peft', 'accelerate') if m in sys.modules])"
    )
    assert run_python(code) == "[]"


def test_no_import_touches_cuda_or_patches_others():
    code = (
        "import torch, peft.tuners.lora.model as m; before = m.dispatch_default;"
        "import fourbit.training.run, fourbit.demo.run, fourbit.api;"
        "print(torch.cuda.is_initialized(), m.dispatch_default is before)"
    )
    assert run_python(code) == "False True"


def test_every_public_name_exists():
    import fourbit

    for name in fourbit.__all__:
        assert getattr(fourbit, name) is not None


def test_the_nf4_table_is_written_once():
    holders = [path.name for path in modules() if "0.6961928" in path.read_text()]
    assert holders == ["codebook.py"]


def test_nothing_is_left_undone():
    for path in modules():
        text = path.read_text()
        for word in ("TODO", "FIXME", "XXX", "NotImplementedError("):
            assert word not in text, f"{path.name} says {word}"
