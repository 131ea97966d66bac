"""Draws docs/footprint.png: what GPT-2 (124M) takes in memory, by format.

python docs/draw_footprint.py

The model is built from its configuration with random weights and quantized; the bytes are those
that ``get_memory_footprint`` counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import AutoConfig, AutoModelForCausalLM

import fourbit
from fourbit.linear import QuantizedLinear
from fourbit.quantize import QuantConfig

# The report's palette on white paper.
INK, SOFT, RULE = "#1b2129", "#57616d", "#d5dbe2"
WEIGHTS, SCALES, PLAIN = "#2f6fb7", "#e08a1e", "#b3bac2"

FORMATS: tuple[tuple[str, torch.dtype, QuantConfig | None], ...] = (
    ("float32", torch.float32, None),
    ("float16, bfloat16", torch.float16, None),
    ("INT8", torch.float16, QuantConfig(quant_type="int8")),
    ("NF4", torch.float16, QuantConfig(double_quant=False)),
    ("NF4, double quantization", torch.float16, QuantConfig()),
)


def parts(dtype: torch.dtype, quant: QuantConfig | None) -> tuple[int, int, int]:
    """Bytes of the weights of linear layers, of their scales, and of everything else."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2"), dtype=dtype)
    kinds: tuple[type, ...] = (fourbit.Linear4bit, fourbit.Linear8bit)
    if quant is None:
        from transformers.pytorch_utils import Conv1D

        kinds = (Conv1D,)
    else:
        fourbit.quantize_model(model, quant)
    weights = scales = 0
    for module in model.modules():
        if isinstance(module, kinds):
            weights += module.weight.nbytes
            names = module.scale_names if isinstance(module, QuantizedLinear) else ()
            held = [getattr(module, name) for name in names]
            scales += sum(scale.nbytes for scale in held if scale is not None)
    return weights, scales, model.get_memory_footprint() - weights - scales


def main() -> None:
    """Draws, and prints the numbers."""
    rows = [(name, *parts(dtype, quant)) for name, dtype, quant in FORMATS]
    figure = Figure(figsize=(9, 3.9), dpi=150, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    full = sum(rows[0][1:])
    for place, (name, *sizes) in enumerate(rows):
        left = 0.0
        for size, color in zip(sizes, (WEIGHTS, SCALES, PLAIN), strict=True):
            axes.barh(place, size / 1e6, left=left, height=0.62, color=color, edgecolor="white")
            left += size / 1e6
        total = sum(sizes)
        text = f"{total / 1e6:,.1f} MB" + ("" if place == 0 else f"  ({total / full:.1%})")
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        axes.text(left + 5, place, text, va="center", fontsize=11, color=INK, bbox=box)
        print(f"{name}: {total:,} = {' + '.join(f'{s:,}' for s in sizes)}")
    axes.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=11, color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, full / 1e6 * 1.16)
    axes.tick_params(length=0, labelcolor=SOFT)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(axis="x", color=RULE)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("megabytes (10⁶ bytes)", fontsize=11, color=SOFT)
    axes.set_title("GPT-2 (124M) in memory", fontsize=14, loc="left", color=INK, pad=10)
    labels = ("weights of linear layers", "their scales", "embeddings, norms, biases")
    handles = [axes.barh([0], [0], color=color) for color in (WEIGHTS, SCALES, PLAIN)]
    axes.legend(
        handles,
        labels,
        loc="lower right",
        frameon=True,
        framealpha=1,
        edgecolor="white",
        fontsize=10,
        labelcolor=SOFT,
    )
    FigureCanvasAgg(figure)
    figure.savefig(Path(__file__).with_name("footprint.png"))


if __name__ == "__main__":
    main()
