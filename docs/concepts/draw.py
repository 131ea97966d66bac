"""Draws the pictures of these pages with fourbit's own functions, and prints what they show.

python docs/concepts/draw.py                      # all pictures, beside this file
python docs/concepts/draw.py --only absmax lora   # some of them
python docs/concepts/draw.py --model FOLDER       # real weights of another model
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from fourbit import codebook, dequantize_4bit, dequantize_absmax, quantize_4bit, quantize_absmax
from fourbit.errors import FourbitError
from fourbit.loading import LoadOptions, load_model
from fourbit.lora import LoraSettings, expected_trainable
from fourbit.quantize import QuantConfig
from fourbit.sources import resolve_source

# The report's palette on white paper.
INK, SOFT, RULE, FAINT = "#1b2129", "#57616d", "#e3e6ea", "#9aa3ad"
BLUE, ORANGE, GREEN, PURPLE, RED = "#1f5fa8", "#c2410c", "#2a9d78", "#7461c9", "#a6201b"
TYPE_COLORS = {"nf4": BLUE, "int4": ORANGE, "fp4": GREEN}

EXAMPLE = (1.2, -0.5, -4.3, 1.2, -3.1, 0.8, 2.4, 5.4)
FORMATS = (
    ("fp32", torch.float32, 8, 23),
    ("bf16", torch.bfloat16, 8, 7),
    ("fp16", torch.float16, 5, 10),
    ("fp8 e4m3", torch.float8_e4m3fn, 4, 3),
    ("fp8 e5m2", torch.float8_e5m2, 5, 2),
)
"""Name, dtype, exponent bits, mantissa bits."""

LLAMA_7B = {
    **{f"layers.{i}.{name}": (4096, 4096) for i in range(32) for name in "qkvo"},
    **{f"layers.{i}.{name}": (4096, 11008) for i in range(32) for name in ("gate", "up")},
    **{f"layers.{i}.down": (11008, 4096) for i in range(32)},
}
"""``(in, out)`` of the linear layers that are quantized."""
LLAMA_7B_REST = 2 * 32000 * 4096 + 65 * 4096
"""Embedding, output head and norms: not quantized."""


def sheet(width: float, height: float) -> Figure:
    """An empty white figure; 150 pixels to the inch."""
    return Figure(figsize=(width, height), dpi=150, facecolor="white", layout="constrained")


def tidy(axes: Axes, *, grid: Literal["x", "y", ""] = "y") -> None:
    """The report's look: no frame, faint grid, readable ticks."""
    if grid:
        axes.grid(axis=grid, color=RULE)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=11, length=0, labelcolor=SOFT)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)


def title(axes: Axes, text: str) -> None:
    """A heading flush left."""
    axes.set_title(text, fontsize=14, loc="left", color=INK, pad=10)


def bare(axes: Axes) -> None:
    """No axes at all: a diagram."""
    axes.set_axis_off()


def random_weights(count: int) -> Tensor:
    """The same normal numbers in every run and on every page."""
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def relative_error(weight: Tensor, restored: Tensor) -> float:
    """``|restored - weight| / |weight|``, Euclidean."""
    return float((restored - weight).double().norm() / weight.double().norm())


# Pictures.


def float_formats() -> Figure:
    """The bits of each format as boxes."""
    figure = sheet(10, 3.6)
    axes = figure.add_subplot()
    bare(axes)
    for row, (name, _, exponent, mantissa) in enumerate(FORMATS):
        y = -row * 1.5
        axes.text(-0.6, y + 0.5, name, ha="right", va="center", fontsize=13, color=INK)
        kinds = [ORANGE] + [BLUE] * exponent + [GREEN] * mantissa
        for place, color in enumerate(kinds):
            axes.add_patch(Rectangle((place, y), 1, 1, color=color, ec="white", lw=1.5))
        axes.text(
            len(kinds) + 0.6,
            y + 0.5,
            f"1 + {exponent} + {mantissa}",
            va="center",
            fontsize=12,
            color=SOFT,
        )
    for x, color, text in ((14, ORANGE, "sign"), (18, BLUE, "exponent: range")):
        axes.add_patch(Rectangle((x, -6), 1, 1, color=color, ec="white"))
        axes.text(x + 1.4, -5.5, text, va="center", fontsize=12, color=SOFT)
    axes.add_patch(Rectangle((26.5, -6), 1, 1, color=GREEN, ec="white"))
    axes.text(27.9, -5.5, "mantissa: precision", va="center", fontsize=12, color=SOFT)
    axes.set_xlim(-5, 37)
    axes.set_ylim(-6.2, 1.2)
    return figure


def float_steps() -> Figure:
    """How far apart neighbouring values are, relative to the value, over the whole range."""
    figure = sheet(10, 4.2)
    axes = figure.add_subplot()
    colors = (INK, BLUE, GREEN, ORANGE, PURPLE)
    for (name, dtype, _, _), color in zip(FORMATS, colors, strict=True):
        info = torch.finfo(dtype)
        exponents = torch.arange(-149, 128, dtype=torch.float64)
        values = 2.0**exponents
        values = values[(values >= info.smallest_normal * info.eps) & (values <= info.max)]
        steps = info.eps * values.clamp(min=info.smallest_normal) / values
        axes.loglog(values, steps, color=color, linewidth=2.2, label=name)
    axes.set_xlabel("value", fontsize=12, color=SOFT)
    axes.set_ylim(1e-8, 2)
    axes.set_xlim(1e-46, 1e40)
    title(axes, "distance to the next value, relative to the value")
    axes.legend(frameon=False, fontsize=11, ncol=5, loc="lower center", bbox_to_anchor=(0.5, 0.0))
    axes.minorticks_off()
    tidy(axes)
    return figure


def absmax() -> Figure:
    """The worked example at 8 and at 4 bits."""
    figure = sheet(10, 4.2)
    axes = figure.add_subplot()
    bare(axes)
    x = torch.tensor(EXAMPLE)
    axes.text(-6.0, 2, "x", ha="right", va="center", fontsize=13, color=INK)
    axes.hlines(2, -5.5, 5.5, color=FAINT, lw=1, zorder=0)
    axes.plot(x, [2] * len(x), "o", color=INK, markersize=7)
    for value in EXAMPLE:
        axes.text(value + nudge(value), 2.16, f"{value:g}", ha="center", fontsize=12, color=INK)
    start = x
    for y, bits, color in ((1, 8, BLUE), (0, 4, ORANGE)):
        codes, scale = quantize_absmax(x, bits=bits)
        end = dequantize_absmax(codes, scale)
        levels = 2 ** (bits - 1) - 1
        grid = torch.arange(-levels, levels + 1) / scale
        axes.vlines(grid, y - 0.06, y + 0.06, color=color, lw=0.8, alpha=0.6)
        axes.text(-6.0, y, f"{bits} bits", ha="right", va="center", fontsize=13, color=color)
        axes.text(-6.0, y - 0.22, f"scale {float(scale):.4g}", ha="right", fontsize=11, color=SOFT)
        # The lines of the lower row begin under the codes of the upper one.
        top = y + (0.92 if bits == 8 else 0.68)
        for i, code in enumerate(codes.tolist()):
            axes.plot([start[i], end[i]], [top, y + 0.08], color=FAINT, lw=1, zorder=0)
            place = float(end[i]) + (nudge(EXAMPLE[i]) if bits == 8 else 0)
            axes.text(place, y - 0.27, str(code), ha="center", fontsize=12, color=color)
        axes.plot(end, [y] * len(x), "o", color=color, markersize=7)
        start = end
    axes.set_xlim(-7.4, 5.9)
    axes.set_ylim(-0.38, 2.4)
    return figure


def nudge(value: float) -> float:
    """Keeps the labels of 0.8 and 1.2 apart."""
    return {0.8: -0.1, 1.2: 0.1}.get(value, 0.0)


def outlier() -> Figure:
    """One outlier with one scale, and with a scale per block of 64; 4 bits."""
    x = random_weights(256)
    x[77] = 30.0
    clean = torch.arange(256) // 64 != 1
    figure = sheet(10, 4.2)
    for place, blocksize in enumerate((None, 64)):
        axes = figure.add_subplot(1, 2, place + 1)
        codes, scale = quantize_absmax(x, bits=4, blocksize=blocksize)
        restored = dequantize_absmax(codes, scale, blocksize=blocksize)
        error = f"{100 * relative_error(x[clean], restored[clean]):.1f}%"
        axes.plot(x, ".", color=FAINT, markersize=5, label="weights")
        axes.plot(restored, ".", color=BLUE, markersize=5, label="restored from 4 bits")
        axes.text(77, 3.25, "30 \u2191", ha="center", fontsize=13, color=ORANGE)
        axes.set_ylim(-3.9, 3.7)
        axes.set_xlim(-2, 257)
        axes.set_xticks([0, 64, 128, 192, 256])
        title(axes, "one scale" if blocksize is None else "a scale for each 64")
        axes.set_xlabel(f"error of the three other blocks: {error}", fontsize=12, color=INK)
        tidy(axes, grid="x")
        print(f"outlier, blocksize {blocksize}: error of the three other blocks {error}")
    axes.legend(facecolor="white", edgecolor="white", fontsize=11, loc="lower right", ncol=2,
                markerscale=2, framealpha=1)  # fmt: skip
    return figure


def quantiles() -> Figure:
    """The normal density cut into NF4's steps, and the values of the three types."""
    figure = sheet(10, 5.6)
    top, bottom = figure.subplots(2, 1, height_ratios=[1.5, 1])
    normal = NormalDist()
    widest = normal.inv_cdf(1 - (1 / 32 + 1 / 30) / 2)
    sigmas = codebook.normal_float(4) * widest
    line = torch.linspace(-2.6, 2.6, 400)
    top.plot(line, [normal.pdf(float(v)) for v in line], color=INK, lw=2)
    for i, (low, high) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        span = torch.linspace(float(low), float(high), 30)
        shade = BLUE if low >= 0 else GREEN
        density = [normal.pdf(float(v)) for v in span]
        top.fill_between(span, density, color=shade, alpha=0.45 if i % 2 else 0.2, lw=0)
    top.vlines(sigmas, 0, [normal.pdf(float(v)) for v in sigmas], color=INK, lw=0.8)
    top.text(0.9, 0.36, "8 equal areas above zero", fontsize=12, color=BLUE)
    top.text(-0.9, 0.36, "7 equal areas below zero", fontsize=12, color=GREEN, ha="right")
    top.set_ylim(0, 0.42)
    top.set_yticks([])
    top.set_xlim(-2.6, 2.6)
    top.set_xlabel("standard deviations", fontsize=12, color=SOFT)
    tidy(top, grid="")
    edges = [normal.inv_cdf(i / 16) for i in range(1, 16)]
    density = [0.0, *(normal.pdf(edge) for edge in edges), 0.0]
    means = torch.tensor([density[i] - density[i + 1] for i in range(16)])
    rows = [(name, codebook.code(name, torch.device("cpu"))) for name in TYPE_COLORS]
    rows.append(("16 equal bins", means / means.max()))
    for row, (name, values) in enumerate(rows):
        color = TYPE_COLORS.get(name, SOFT)
        shown = values[values.abs() <= 1]
        bottom.hlines(-row, -1, 1, color=RULE, lw=1.2, zorder=0)
        bottom.vlines(shown, -row - 0.3, -row + 0.3, color=color, lw=2.2)
        bottom.text(-1.05, -row, name, ha="right", va="center", fontsize=13, color=color)
    bottom.vlines(0, -3.5, 0.55, color=RED, lw=0.9, ls=(0, (4, 3)), zorder=0)
    bottom.text(0, 0.66, "zero", ha="center", fontsize=11, color=RED)
    bottom.set_xlim(-1.45, 1.08)
    bottom.set_ylim(-3.5, 1.0)
    bare(bottom)
    return figure


def double_quantization() -> Figure:
    """The bytes of a block of 64 weights, one box a byte."""
    figure = sheet(10, 2.9)
    axes = figure.add_subplot()
    bare(axes)
    once, twice = (block_bytes(double_quant=double) for double in (False, True))
    rows = (
        (1.9, "scale in float32", ["#1f5fa8"] * 32 + [ORANGE] * 4, f"{once:g} bytes"),
        (0, "scale in 8 bits", ["#1f5fa8"] * 32 + [ORANGE], f"33 + 4/256 bytes = {twice:.3f}"),
    )
    for y, name, boxes, total in rows:
        axes.text(-0.6, y + 0.5, name, ha="right", va="center", fontsize=13, color=INK)
        for place, color in enumerate(boxes):
            axes.add_patch(Rectangle((place, y), 1, 1, color=color, ec="white", lw=1.5))
        axes.text(len(boxes), y - 0.45, total, ha="right", fontsize=12, color=INK)
    axes.add_patch(Rectangle((33, 0), 4 / 256, 1, color=RED, lw=0.6))
    axes.text(0, 3.25, "64 codes of 4 bits", fontsize=12, color=BLUE)
    axes.text(36, 3.25, "scale", fontsize=12, color=ORANGE, ha="right")
    axes.text(33.3, 0.5, "a 256th of the\nscales' scale", fontsize=11, color=RED, va="center")
    axes.set_xlim(-7.6, 39)
    axes.set_ylim(-0.7, 3.9)
    print(f"a block of 64 weights: {once} bytes, with double quantization {twice} bytes")
    return figure


def block_bytes(*, double_quant: bool) -> float:
    """Bytes of 64 weights, counted on packed tensors of 256 blocks."""
    packed, state = quantize_4bit(random_weights(64 * 256), double_quant=double_quant)
    parts = [packed, state.absmax]
    if state.nested_absmax is not None:
        parts.append(state.nested_absmax)
    return sum(part.nbytes for part in parts) / 256


def lora() -> Figure:
    """The frozen weight and the two factors beside it, in proportion (576 x 576, r = 64)."""
    figure = sheet(10, 4.2)
    axes = figure.add_subplot()
    bare(axes)
    axes.set_aspect("equal")

    def box(corner: tuple[float, float], size: tuple[float, float], color: str) -> None:
        axes.add_patch(Rectangle(corner, *size, facecolor=color, edgecolor="white", lw=1))

    def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
        style: dict[str, Any] = {"arrowstyle": "->", "color": SOFT, "lw": 1.6}
        axes.annotate("", end, start, arrowprops=style)

    box((2.2, 2.6), (3.6, 3.6), BLUE)
    axes.text(4, 4.4, "W\nfrozen, 4 bits\nout × in", ha="center", va="center", fontsize=13,
              color="white", linespacing=1.5)  # fmt: skip
    box((2.2, 0.4), (3.6, 0.4), ORANGE)
    axes.text(4, 1.0, "A, trained: r × in", ha="center", fontsize=13, color=ORANGE)
    box((7.6, -1.2), (0.4, 3.6), ORANGE)
    axes.text(8.2, 0.6, "B, trained: out × r\nbegins as zeros", va="center", fontsize=13,
              color=ORANGE, linespacing=1.5)  # fmt: skip
    axes.text(0.3, 2.5, "x", fontsize=18, ha="center", va="center", color=INK)
    arrow((0.6, 2.7), (2.1, 4.2))
    arrow((0.6, 2.2), (2.1, 0.8))
    arrow((5.9, 0.6), (7.5, 0.6))
    arrow((5.9, 4.4), (12.5, 2.9))
    arrow((11.5, 1.0), (12.5, 2.1))
    axes.text(12.25, 1.25, "× α/r", fontsize=13, color=SOFT)
    axes.text(12.8, 2.5, "+", fontsize=20, ha="center", va="center", color=INK)
    arrow((13.1, 2.5), (14.0, 2.5))
    axes.text(14.3, 2.5, "y", fontsize=18, ha="center", va="center", color=INK)
    axes.set_xlim(0, 14.7)
    axes.set_ylim(-1.4, 6.4)
    return figure


def memory() -> Figure:
    """Bytes of a 7B model in training, by part; what activations need comes on top."""
    figure = sheet(10, 3.8)
    axes = figure.add_subplot()
    bars = memory_parts()
    colors = {"weights": BLUE, "adapters": ORANGE, "gradients": GREEN, "optimizer state": PURPLE}
    for row, (method, parts) in enumerate(bars.items()):
        left = 0.0
        for part, size in parts.items():
            axes.barh(-row, size / 1e9, left=left, height=0.55, color=colors[part],
                      label=part if row == 0 else None)  # fmt: skip
            left += size / 1e9
        axes.text(left + 1, -row, f"{left:.1f} GB", va="center", fontsize=13, color=INK)
        exact = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in parts.items())
        print(f"memory, {method}: {left:.2f} GB ({exact})")
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    axes.legend(handles, list(colors), frameon=False, fontsize=12, loc="lower right")
    axes.set_yticks([-row for row in range(len(bars))], list(bars), fontsize=13)
    axes.set_xlim(0, 128)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("GB, without activations", fontsize=12, color=SOFT)
    title(axes, "training a 7B model")
    tidy(axes, grid="x")
    return figure


def memory_parts() -> dict[str, dict[str, float]]:
    """Bytes by method and part for LLaMA-7B with the default adapter (r = 16), as fourbit trains.

    Trained numbers are float32 with two float32 moments; a frozen base is bf16 or NF4.
    """
    linear = sum(inputs * outputs for inputs, outputs in LLAMA_7B.values())
    adapter = expected_trainable(LLAMA_7B, LoraSettings())
    trained = {
        "adapters": 4 * adapter,
        "gradients": 4 * adapter,
        "optimizer state": 8 * adapter,
    }
    total = linear + LLAMA_7B_REST
    packed = linear * QuantConfig().bits_per_weight / 8
    return {
        "full": {
            "weights": 4 * total,
            "adapters": 0,
            "gradients": 4 * total,
            "optimizer state": 8 * total,
        },
        "LoRA": {"weights": 2 * total, **trained},
        "QLoRA": {"weights": packed + 2 * LLAMA_7B_REST, **trained},
    }


def real_weights(model: str) -> Figure:
    """Where a model's weights fall in [-1, 1] after scaling, and what each type makes of them."""
    layers, embedding = load_weights(model)
    normal = [random_weights(1 << 20)]
    groups = {"normal numbers": normal, "linear layers": layers, "embedding": [embedding]}
    table = {name: type_errors(weights) for name, weights in groups.items()}
    print_table(table)
    shapes = {str(i): (w.shape[1], w.shape[0]) for i, w in enumerate(layers)}
    count = expected_trainable(shapes, LoraSettings())
    print(f"adapter of rank {LoraSettings().r} on every linear layer: {count:,} parameters")
    figure = sheet(10, 4.6)
    left, right = figure.subplots(1, 2, width_ratios=[1.35, 1])
    edges = torch.linspace(-1, 1, 101)
    counts = torch.stack([torch.histc(scaled(w), bins=100, min=-1, max=1) for w in layers]).sum(0)
    share = counts / counts.sum() * 50  # bins of 1/50: the curve encloses 1
    left.stairs(share, edges, fill=True, color=FAINT, alpha=0.6)
    lowest = 0.16
    for row, name in enumerate(TYPE_COLORS):
        values = codebook.code(name, torch.device("cpu"))
        y = -lowest * (row + 1)
        left.vlines(values[values.abs() <= 1], y - 0.05, y + 0.05, color=TYPE_COLORS[name], lw=2)
        left.text(1.06, y, name, va="center", fontsize=12, color=TYPE_COLORS[name])
    left.set_xlim(-1.05, 1.25)
    left.set_ylim(-lowest * 3.6, float(share.max()) * 1.08)
    left.set_yticks([])
    left.set_xticks([-1, -0.5, 0, 0.5, 1])
    title(left, "weights divided by absmax of their 64")
    tidy(left, grid="")
    for shift, group, alpha in ((-0.2, "linear layers", 1.0), (0.2, "embedding", 0.5)):
        values = [100 * table[group][name]["error"] for name in TYPE_COLORS]
        bars = right.bar(
            [i + shift for i in range(3)], values, 0.37, color=list(TYPE_COLORS.values()),
            alpha=alpha,
        )  # fmt: skip
        right.bar_label(bars, fmt="%.2f", fontsize=11, padding=2)
    right.set_xticks(range(3), list(TYPE_COLORS), fontsize=13)
    right.set_yticks([])
    right.set_ylim(0, 17.5)
    right.set_xlabel("dark: linear layers, light: embedding", fontsize=12, color=SOFT)
    title(right, "relative error in %")
    tidy(right, grid="")
    return figure


def load_weights(model: str) -> tuple[list[Tensor], Tensor]:
    """Weights of the linear layers that would be quantized, and of the embedding; float32."""
    options = LoadOptions(dtype=torch.float32, device=torch.device("cpu"))
    loaded = load_model(resolve_source(model), options)
    head = loaded.get_output_embeddings()
    layers = [
        module.weight.detach()
        for module in loaded.modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    return layers, loaded.get_input_embeddings().weight.detach()


def scaled(weight: Tensor) -> Tensor:
    """Divided by the largest magnitude of each 64, which is what a code stands for."""
    full = weight.numel() - weight.numel() % 64
    blocks = weight.reshape(-1)[:full].view(-1, 64)
    return (blocks / blocks.abs().amax(dim=1, keepdim=True).clamp(min=1e-38)).view(-1)


def type_errors(weights: Sequence[Tensor]) -> dict[str, dict[str, float]]:
    """Per data type: relative error over all ``weights``, with double quantization, and entropy."""
    power = sum(float(w.double().square().sum()) for w in weights)
    out = {}
    for name in codebook.QUANT_TYPES:
        squares, counts = {False: 0.0, True: 0.0}, torch.zeros(16, dtype=torch.float64)
        for weight in weights:
            for double in squares:
                packed, state = quantize_4bit(weight, quant_type=name, double_quant=double)
                difference = dequantize_4bit(packed, state) - weight
                squares[double] += float(difference.double().square().sum())
                for codes in (packed >> 4, packed & 15):
                    counts += torch.bincount(codes.view(-1), minlength=16)
        shares = counts[counts > 0] / counts.sum()
        out[name] = {
            "error": (squares[False] / power) ** 0.5,
            "double": (squares[True] / power) ** 0.5,
            "entropy": float(-(shares * shares.log2()).sum()),
        }
    return out


def print_table(table: dict[str, dict[str, dict[str, float]]]) -> None:
    """The rows as they stand in nf4.md."""
    for name in TYPE_COLORS:
        cells = [f"{100 * group[name]['error']:.2f}%" for group in table.values()]
        cells.append(f"{100 * table['linear layers'][name]['double']:.2f}%")
        cells.append(f"{table['linear layers'][name]['entropy']:.2f}")
        print(f"| `{name}` | " + " | ".join(cells) + " |")


PICTURES: dict[str, Callable[[], Figure]] = {
    "float-formats": float_formats,
    "float-steps": float_steps,
    "absmax": absmax,
    "outlier": outlier,
    "quantiles": quantiles,
    "double-quantization": double_quantization,
    "lora": lora,
    "memory": memory,
}


def save(figure: Figure, path: Path) -> None:
    """As PNG with a palette's worth of bytes and no date or version inside."""
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


def main() -> int:
    """Draws what was asked for; 1 when the real weights were not at hand."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=[*PICTURES, "real-weights"], metavar="NAME")
    parser.add_argument("--model", default="smollm2", help="folder, GGUF file, hub id or alias")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, metavar="DIR")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = options.only or [*PICTURES, "real-weights"]
    for name, draw in PICTURES.items():
        if name in wanted:
            save(draw(), options.out / f"{name}.png")
    if "real-weights" in wanted:
        try:
            save(real_weights(options.model), options.out / "real-weights.png")
        except FourbitError as error:
            print(f"real-weights.png not drawn: {error.line()}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
