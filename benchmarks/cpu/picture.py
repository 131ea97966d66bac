"""The picture of the README, from the CSV files: docs/cpu.png.

    python benchmarks/cpu/picture.py [--to FILE]

Bars are medians, whiskers the range over the rounds, dashed lines the machine's own ceilings,
measured beside: its matrix products for training, reading every weight once a token for decoding.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ceilings
import claims
import decode
import protocol
import train
from protocol import Row

TOOLS = {
    "fourbit": "#0072B2",
    "llama.cpp": "#009E73",
    "bnb": "#E69F00",
    "torchao": "#56B4E9",
    "trl": "#CC79A7",
    "lora": "#8C8C8C",
    "transformers": "#8C8C8C",
}
"""Colours of Okabe and Ito, which remain apart for colour-blind readers."""
LABELS = {
    "fourbit": "fourbit",
    "fourbit-transformers": "fourbit in transformers",
    "fourbit-defaults": "fourbit, dropout + packing",
    "fourbit-checkpointing": "fourbit, checkpointing",
    "bnb": "bitsandbytes",
    "bnb-expert": "bitsandbytes all-bf16",
    "trl": "TRL SFTTrainer",
    "lora-bf16": "LoRA, 16-bit base",
    "torchao": "torchao NF4, one row",
    "fourbit-lora": "fourbit + LoRA",
    "fourbit-int8": "fourbit INT8",
    "fourbit-16bit": "fourbit, 16 bits",
    "bnb-lora": "bitsandbytes + LoRA",
    "bnb-int8": "bitsandbytes INT8",
    "transformers-bf16": "transformers bf16",
    "transformers-fp32": "transformers fp32",
    "torchao-int4": "torchao INT4",
}
TRAINING = (
    "fourbit", "fourbit-transformers", "fourbit-defaults", "fourbit-checkpointing",
    "lora-bf16", "bnb-expert", "bnb", "trl", "torchao",
)  # fmt: skip
DECODING = (
    "fourbit", "fourbit-lora", "fourbit-int8", "fourbit-16bit",
    "llama.cpp-Q4_0", "llama.cpp-Q8_0", "bnb", "bnb-lora", "transformers-bf16", "torchao-int4",
)  # fmt: skip
PANELS = (
    ("Training, tokens/s", train.FILE, TRAINING, "tokens_per_second"),
    ("Peak memory of training, GB", train.FILE, TRAINING[:-1], "peak_mb"),
    ("Decoding, tokens/s", decode.FILE, DECODING, "tokens_per_second"),
)
SIZES = (
    ("", "SmolLM2-135M, 4 × 512 tokens a step"),
    ("-1.1b", "1.1B shape, 1 × 512 tokens a step"),
)
_GREY = "#555555"


def tool(case: str) -> str:
    """Whose case it is."""
    return next(name for name in TOOLS if case.startswith(name))


def bars(axes: Any, rows: list[Row], names: tuple[str, ...], column: str, size: str) -> None:
    """Horizontal bars of the cases that were measured, each with its number."""
    scale = 1e-3 if column.endswith("_mb") else 1.0
    found = [(name, protocol.spread(rows, name + size, column)) for name in names]
    shown = [(name, each) for name, each in found if each is not None]
    for place, (name, each) in enumerate(shown):
        middle, low, high = (v * scale for v in (each.median, each.low, each.high))
        axes.barh(place, middle, color=TOOLS[tool(name)], height=0.72)
        axes.errorbar(
            middle, place, xerr=[[middle - low], [high - middle]], color="black", linewidth=1
        )
        text = f"{middle:.1f}" if middle < 20 else f"{middle:.0f}"
        axes.annotate(
            text, (high, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.set_yticks(range(len(shown)), [LABELS.get(name, name) for name, _ in shown], fontsize=9)
    axes.set_ylim(max(len(shown), 5) - 0.5, -0.5)
    axes.margins(x=0.16)
    axes.tick_params(axis="x", labelsize=8, colors=_GREY)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="#E5E5E5")
    axes.set_axisbelow(True)


def ceiling(axes: Any, limit: float | None, text: str) -> None:
    """A dashed line with its name beside its foot."""
    if limit is None:
        return
    axes.axvline(limit, color=_GREY, linestyle="--", linewidth=1)
    axes.annotate(
        f"{text} {limit:.0f}", (limit, 1), xytext=(-4, 3), xycoords=("data", "axes fraction"),
        textcoords="offset points", ha="right", fontsize=8, color=_GREY,
    )  # fmt: skip


def decode_ceiling(rows: list[Row], size: str) -> float | None:
    """Tokens/s at which our 4-bit weights saturate reading."""
    read = protocol.spread(rows, "read", "read_gb_s")
    weights = protocol.spread(rows, f"fourbit{size}", "weights_mb")
    return None if read is None or weights is None else read.median * 1e3 / weights.median


def main() -> None:
    parser = protocol.parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--to", type=Path, default=protocol.REPOSITORY / "docs" / "cpu.png")
    options = protocol.settle(parser.parse_args())
    files = (train.FILE, decode.FILE, ceilings.FILE)
    tables = {name: claims.newest(options.results / name, quick=options.quick) for name in files}
    if not tables[train.FILE] or not tables[decode.FILE]:
        sys.exit("nothing to draw: run train.py and decode.py first")
    draw(tables, options.to)
    print(options.to)


def draw(tables: dict[str, list[Row]], target: Path) -> None:
    """Three panels for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [1.0, 0.62]
    figure, grid = pyplot.subplots(
        2, 3, figsize=(15, 6.6), gridspec_kw={"height_ratios": heights}, layout="constrained"
    )
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)
    for line, (size, name) in zip(grid, SIZES, strict=True):
        for axes, (title, file, names, column) in zip(line, PANELS, strict=True):
            bars(axes, tables[file], names, column, size)
            axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=18)
        line[0].annotate(
            name, (0, 1), xytext=(0, 38), xycoords="axes fraction", textcoords="offset points",
            fontsize=12, color=_GREY,
        )  # fmt: skip
        limit = ceilings.training_limit(tables[ceilings.FILE], size)
        ceiling(line[0], limit, "matrix products alone:")
        ceiling(line[2], decode_ceiling(tables[decode.FILE], size), "memory bandwidth:")
    newest = max(tables[train.FILE], key=lambda row: row["date"])
    figure.supxlabel(
        f"{newest['machine']}; {newest['threads']} threads; commit {newest['commit']}; medians and"
        " range of fresh processes in turn; benchmarks/results/cpu_*.csv",
        fontsize=8,
        color=_GREY,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main()
