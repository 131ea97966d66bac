from __future__ import annotations

import dataclasses
import math
import re
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fourbit.errors import EnvironmentFault
from fourbit.report import ReportContent, plot_summary, write_report
from fourbit.report.charts import Series, decimate, line_chart, running_mean, tick_text, ticks
from fourbit.report.content import curve_points
from fourbit.report.markup import significant

VOID = {"meta", "link", "br", "img", "input", "hr"}
EMPTY = ReportContent("run", {}, {}, [], {}, None, {}, [], None, {}, {})


class Page(HTMLParser):
    """Checks that every tag is closed in order; keeps what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data + "\n"

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def steps(count: int) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [{"step": 0, "eval_loss": 3.5}]
    for step in range(1, count + 1):
        line = {
            "step": step,
            "epoch": step / count,
            "loss": 3 / step + 0.01 * (step % 7),
            "lr": 1e-3 * (1 - step / count),
            "grad_norm": 0.8,
            "tokens": 1000,
            "supervised_tokens": 400,
            "tokens_per_second": 250.0 + step % 5,
            "seconds": 4.0,
            "memory_bytes": 9e8,
        }
        if step % 10 == 0:
            line["eval_loss"] = 3 / step
        lines.append(line)
    return lines


def full(count: int = 20) -> ReportContent:
    return ReportContent(
        title="orders",
        config={"model": "smollm2", "lora.r": 16, "max_steps": None, "data.packing": True},
        origins={"model": "config.yaml:1", "lora.r": "default"},
        metrics=steps(count),
        plan={"parts": {"weights": 600e6, "activations": 350e6}, "peak_bytes": 950_000_000},
        measured_peak_bytes=1_000_000_000,
        receipt={
            "ok": True,
            "checks": [{"name": "base-unchanged", "ok": True, "detail": "272 tensors"}],
            "findings": ["a finding"],
            "trainable": 4884480,
        },
        samples=[{"prompt": "p", "reference": "right", "before": "wrong", "after": " right\n"}],
        scores={"exact_match_before": 0.0, "exact_match_after": 0.95, "questions": 200},
        audit={"rows": 2000, "supervised_share": 0.25},
        machine={"cpu": "a cpu", "memory_total": 8_000_000_000, "accelerator": None},
    )


def written(tmp_path: Path, content: ReportContent) -> tuple[str, Page]:
    path = tmp_path / "report.html"
    write_report(path, content)
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_a_full_report_says_what_it_was_given(tmp_path):
    _, page = written(tmp_path, full())
    for words in (
        "all 1 checks hold", "0.0% → 95.0%", "3.010 → 0.210", "1.00 GB", "252",
        "planned 950.00 MB (-5.0%)", "20,000", "8,000 of them supervised", "80.0 s",
        "equals the reference", "differs from the reference", "272 tensors", "a finding",
        "4,884,480", "config.yaml:1",
        "null", "25.0%", "8.00 GB", "63.2%",
    ):  # fmt: skip
        assert words in page.text, words
    order = [page.text.index(f"\n{name}\n") for name in (
        "In short", "Training", "Memory", "Samples", "Receipt", "Data audit", "Configuration",
        "Machine",
    )]  # fmt: skip
    assert order == sorted(order)


def test_nothing_is_fetched_and_nothing_runs(tmp_path):
    text, page = written(tmp_path, full())
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    assert not {"script", "link", "iframe", "object", "img"} & {tag for tag, _ in page.tags}
    for _, attrs in page.tags:
        assert not {"src", "href", "srcset", "style"} & attrs.keys()
        assert not any(name.startswith("on") for name in attrs)


def test_pictures_and_tables_can_be_read_aloud(tmp_path):
    _, page = written(tmp_path, full())
    pictures = [a for a in page.named("svg") if a.get("role") == "img"]
    assert len(pictures) == 5
    labels = " ".join(a["aria-label"] or "" for a in pictures)
    assert "evaluation from 3.5 at step 0 to 0.15 at step 20" in labels
    assert "planned 950.00 MB, measured 1.00 GB" in labels
    assert all(a.get("aria-hidden") == "true" for a in page.named("svg") if "role" not in a)
    assert page.named("html") == [{"lang": "en"}]
    assert len(page.named("caption")) == len(page.named("table")) > 4
    assert all(a.get("scope") == "col" for a in page.named("th"))


@pytest.mark.parametrize(
    ("receipt", "words"),
    [
        ({}, "nothing was checked"),
        ({"ok": True, "checks": []}, "nothing was checked"),
        (
            {"ok": True, "checks": [{"name": "a", "ok": False, "detail": ""}]},
            "1 of 1 checks failed (a)",
        ),
        ({"ok": False, "checks": [{"name": "a", "ok": True}]}, "the receipt says so"),
    ],
)
def test_only_a_whole_receipt_is_verified(tmp_path, receipt, words):
    _, page = written(tmp_path, dataclasses.replace(full(), receipt=receipt))
    assert f"NOT verified\n: {words}" in page.text
    assert "\nVerified\n" not in page.text


EVIL = '<script>alert(1)</script><img src=x onerror="a()">&amp;\u202egnp\x1b[31m\x00\ud800\ufeff'


def test_hostile_text_everywhere_is_only_text(tmp_path):
    content = ReportContent(
        title=EVIL,
        config={EVIL: EVIL},
        origins={EVIL: EVIL},
        metrics=[{"step": 1, "loss": 1.0, EVIL: EVIL}],
        plan={"parts": {EVIL: 5.0}, "peak_bytes": 5},
        measured_peak_bytes=5,
        receipt={
            "ok": False,
            "checks": [{"name": EVIL, "ok": False, "detail": EVIL}],
            "findings": [EVIL],
            EVIL: {EVIL: [EVIL]},
        },
        samples=[dict.fromkeys(("prompt", "reference", "before", "after"), EVIL)],
        scores={EVIL + "_before": 0.5, EVIL + "_after": 0.6, EVIL: 1},
        audit={EVIL: EVIL},
        machine={EVIL: [EVIL, {EVIL: EVIL}]},
    )
    text, page = written(tmp_path, content)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 15
    assert not set("\u202e\x1b\x00\ud800\ufeff\ue000\ue001") & set(text)
    assert '<span class="hidden">\\u202e</span>gnp' in text
    assert '<span class="hidden">\\x00\\ud800\\ufeff</span>' in text


def test_text_keeps_its_lines_emoji_and_joiners(tmp_path):
    sample = {"prompt": "a\n\tb", "reference": "", "before": "👩\u200d💻", "after": "می\u200cخواهم"}
    text, page = written(tmp_path, dataclasses.replace(EMPTY, samples=[sample]))
    assert "a\n\tb" in text
    assert "👩\u200d💻" in text
    assert "می\u200cخواهم" in text
    assert "the reference" not in page.text
    assert "\ue000" not in written(tmp_path, dataclasses.replace(EMPTY, title="\ue000x\ue001"))[0]


def test_long_text_is_folded_and_huge_text_cut(tmp_path):
    sample = {"prompt": "short", "reference": "y" * 1000, "before": "<" * 3_000_000, "after": "z"}
    text, page = written(tmp_path, dataclasses.replace(EMPTY, samples=[sample]))
    assert len(page.named("details")) == 2
    assert "y" * 1000 in page.text
    assert "all 3,000,000 characters" in page.text
    assert "2,980,000 more characters are not in this report." in page.text
    assert len(text) < 200_000


def test_many_huge_samples_stay_small(tmp_path):
    sample = dict.fromkeys(("prompt", "reference", "before", "after"), "x" * 50_000)
    text, page = written(tmp_path, dataclasses.replace(EMPTY, samples=[sample] * 500))
    assert len(text) < 1_000_000
    assert "425 more are not shown." in page.text


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [{}],
        [{"step": None, "loss": 1.0}],
        [{"step": 0, "eval_loss": 2.0}],
        [{"step": 1, "loss": 2.0, "lr": 0.0, "memory_bytes": 5, "tokens_per_second": 0.0}],
        [{"step": 1, "loss": None, "lr": None, "memory_bytes": None, "eval_loss": None}],
        [{"step": s, "loss": v} for s, v in enumerate((1.0, None, math.nan, -math.inf, 2.0))],
        [{"step": s, "loss": 1e99, "lr": 5e-324, "tokens": 10**400} for s in range(3)],
        [{"step": "x", "loss": "y", "lr": True}],
    ],
)
def test_thin_and_broken_metrics_still_make_a_report(tmp_path, metrics):
    text, page = written(tmp_path, dataclasses.replace(full(), metrics=metrics))
    drawn = re.findall(r' (?:d|[xy]|c[xy]|width|height)="([^"]*)"', text)
    assert drawn
    assert not any("nan" in d or "inf" in d for d in drawn)
    assert "nan" not in page.text
    plot_summary(tmp_path / "p.png", dataclasses.replace(full(), metrics=metrics))


def test_an_empty_report_says_that_it_is_empty(tmp_path):
    _, page = written(tmp_path, EMPTY)
    for words in ("No figures were", "No step was", "neither planned nor", "There is no receipt"):
        assert words in page.text
    assert page.named("svg") == []


def test_two_thousand_steps_are_less_than_a_megabyte(tmp_path):
    text, _ = written(tmp_path, full(2000))
    assert len(text.encode()) < 300_000


def test_the_same_content_gives_the_same_bytes(tmp_path):
    assert written(tmp_path, full())[0] == written(tmp_path, full())[0]


def test_a_gap_breaks_the_curve_and_a_spike_survives():
    points: list[tuple[float, float | None]] = [(float(i), 1.0) for i in range(10_000)]
    points[5003] = (5003.0, 99.0)
    points[7001] = (7001.0, None)
    kept = decimate(points, buckets=100)
    assert len(kept) <= 302
    assert {points[0], points[5003], points[7001], points[-1]} <= set(kept)
    assert kept == sorted(kept, key=lambda p: p[0])
    path = re.search(r'class="curve line" d="([^"]*)"', line_chart([Series("s", kept)], summary=""))
    assert path is not None
    assert path[1].count("M") == 2


def test_a_curve_of_one_point_is_a_dot():
    assert 'class="single"' in line_chart([Series("s", [(1.0, 2.0), (2.0, None)])], summary="")
    assert 'class="single"' not in line_chart([Series("s", [(1.0, 2.0), (2.0, 3.0)])], summary="")


def test_the_running_mean_by_hand():
    points = [(1.0, 2.0), (2.0, 4.0), (3.0, None), (4.0, 6.0)]
    assert running_mean(points, 2) == [(1.0, 2.0), (2.0, 3.0), (3.0, None), (4.0, 5.0)]
    assert running_mean(points, 1) == points
    assert curve_points([{"step": 2, "x": 4e6}, {"step": 3}], "x", 1e6) == [(2.0, 4.0)]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 7), (0.1, 0.11), (-3, 5), (1e-5, 2e-4), (0, 3e9), (999, 1001)]
)
def test_ticks_cover_the_values_with_labels_that_differ(low, high):
    levels = ticks(low, high)
    assert levels[0] <= low + 1e-12 * abs(low)
    assert levels[-1] >= high * (1 - 1e-12)
    assert 3 <= len(levels) <= 8
    labels = [tick_text(level, levels[1] - levels[0]) for level in levels]
    assert len(set(labels)) == len(labels)
    assert max(map(len, labels)) <= 8


def test_tick_labels():
    assert tick_text(0.25, 0.05) == "0.25"
    assert tick_text(1500, 500) == "1,500"
    assert tick_text(2e-4, 5e-5) == "2e-4"
    assert tick_text(1.5e-4, 5e-5) == "1.5e-4"
    assert tick_text(0.0, 5e-5) == "0"


def test_a_refusing_disk_is_one_line_and_keeps_the_old_report(tmp_path):
    with pytest.raises(EnvironmentFault):
        write_report(tmp_path / "missing" / "report.html", EMPTY)


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_the_summary_picture(tmp_path):
    plot_summary(tmp_path / "a.png", full())
    plot_summary(tmp_path / "b.png", dataclasses.replace(full(), scores=None))
    plot_summary(tmp_path / "c.png", EMPTY)
    sizes = {png_size(tmp_path / name) for name in ("a.png", "b.png", "c.png")}
    assert sizes == {(1200, 500)}
    assert len({(tmp_path / name).read_bytes() for name in ("a.png", "b.png", "c.png")}) == 3


def test_pictures_leave_pyplot_alone(tmp_path):
    code = (
        "import sys, pathlib\n"
        "from fourbit.report import ReportContent, plot_summary\n"
        "assert 'matplotlib' not in sys.modules\n"
        "c = ReportContent('t', {}, {}, [], {}, None, {}, [], None, {}, {})\n"
        "plot_summary(pathlib.Path(sys.argv[1]), c)\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "p.png")], check=True)


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(7930.33, 2, "7,900"), (510.03, 2, "510"), (43.35, 2, "43"), (0.0603, 2, "0.06"),
     (2882.4, 4, "2,882"), (-52.754, 4, "-52.75"), (0.0, 2, "0"), (2e12, 2, "2e+12")],
)  # fmt: skip
def test_significant_digits_without_exponents(value, digits, text):
    assert significant(value, digits) == text
