"""docs/bitsandbytes.md: the tests it names exist, its names and numbers are the code's."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest
from transformers import BitsAndBytesConfig

from fourbit.bnb_format import NAMES_4BIT, NAMES_8BIT
from fourbit.integrations.config import FourbitConfig

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "bitsandbytes.md"
FORMATS = ROOT / "docs" / "formats.md"

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="the documentation is not shipped here")


def rows(page: Path, first: str) -> list[list[str]]:
    """Cells of the table whose heading begins with the cell ``first``."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    table = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    assert table
    return table


def test_every_named_test_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE.read_text(encoding="utf-8"))
    assert len(named) > 20
    for file, name in named:
        text = (ROOT / file).read_text(encoding="utf-8")
        assert not name or f"def {name}(" in text, f"{file}::{name}"


def test_every_parameter_has_its_row():
    listed = {row[0].strip("`") for row in rows(PAGE, "parameter")}
    ours = set(inspect.signature(FourbitConfig.__init__).parameters) - {"self", "unknown"}
    theirs = set(inspect.signature(BitsAndBytesConfig.__init__).parameters) - {"self", "kwargs"}
    assert listed == ours
    assert theirs <= ours


def test_every_tensor_name_has_its_row():
    listed = {row[0] for first in ("4-bit tensor", "8-bit tensor") for row in rows(FORMATS, first)}
    text = (
        " ".join(listed)
        .replace("`P.", "`")
        .replace("`__fp4`", "`weight.quant_state.bitsandbytes__fp4`")
    )
    for name in (*NAMES_4BIT, *NAMES_8BIT):
        assert f"`{name}`" in text, name


@pytest.mark.parametrize("page", [PAGE, FORMATS], ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).is_file(), target


@pytest.fixture(scope="module")
def draw() -> ModuleType:
    spec = importlib.util.spec_from_file_location("footprint", PAGE.parent / "draw_footprint.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_footprints_are_those_of_the_picture(draw):
    table = {row[0]: [int(n.replace(",", "")) for n in row[1:]] for row in rows(PAGE, "format")}
    assert list(table) == [name for name, _, _ in draw.FORMATS]
    for name, dtype, quant in draw.FORMATS:
        sizes = draw.parts(dtype, quant)
        assert table[name] == [*sizes, sum(sizes)]
