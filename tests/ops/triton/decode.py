"""A decoding step through the GPU's kernels, beside the plain one: ``decode.py GROUP DEVICE``.

On a CPU the kernels are interpreted (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

import compare  # noqa: E402
from compare import close, randn  # noqa: E402

from fourbit import native  # noqa: E402
from fourbit.decoding import GraphDecoder, build_decoder, step  # noqa: E402
from fourbit.fused import primitives  # noqa: E402
from fourbit.fused.parts import Heads  # noqa: E402
from fourbit.ops import reference  # noqa: E402
from fourbit.ops.triton import decoding  # noqa: E402

DEVICE = torch.device("cpu")


def product() -> None:
    """Members of different sizes, with all that can be added, and what is left to others."""
    for widths, depth, rows, double in (
        ((64, 128, 128), 256, 1, True),
        ((128, 64), 128, 3, False),
        ((40,), 192, 17, True),
        ((512, 256, 130), 192, 5, True),
    ):
        if any(first * (depth // 64) % 256 for first in (widths[0], sum(widths[:2]))):
            double = double and len(widths) == 1
        for dtype in (torch.float32, torch.bfloat16):
            _joint(widths, depth, rows, double, dtype)
    packed, absmax = reference.quantize_4bit(randn(64, 256), 64, "nf4")
    nested = reference.quantize_absmax(absmax)
    form = {"blocksize": 64, "quant_type": "nf4"}
    twice, x = [(packed, *nested)] * 2, randn(2, 256)
    assert decoding.linear_group(x, twice, [64, 64], **form) is not None
    cut = (packed[: 48 * 128], nested[0][: 48 * 4], *nested[1:])
    assert decoding.linear_group(x, [cut, twice[0]], [48, 64], **form) is None, "inside a program"
    third = (packed[: 32 * 256], nested[0][:128], *nested[1:])
    short = decoding.linear_group(x[:, :128].contiguous(), [third] * 2, [64, 64], **form)
    assert short is None, "inside a second-level block"
    assert decoding.linear_group(randn(65, 256), twice, [64, 64], **form) is None, "many rows"
    x, (packed, absmax) = randn(2, 75), reference.quantize_4bit(randn(9, 75), 64, "nf4")
    assert decoding.linear_group(x, [(packed, absmax, None, None)], [9], **form) is None


def _joint(
    widths: tuple[int, ...], depth: int, rows: int, double: bool, dtype: torch.dtype
) -> None:
    x, total = randn(rows, depth, dtype=dtype), sum(widths)
    scales, expected = [], []
    for width in widths:
        packed, absmax = reference.quantize_4bit(randn(width, depth) * width, 64, "nf4")
        nested = reference.quantize_absmax(absmax) if double else (absmax, None, None)
        scales.append((packed, *nested))
        weight = reference.dequantize_4bit(*scales[-1], 64, "nf4", (width, depth), dtype)
        expected.append(x.float() @ weight.float().t())
    wanted = torch.cat(expected, dim=1)
    form = {"blocksize": 64, "quant_type": "nf4"}
    plain = decoding.linear_group(x, scales, widths, **form)
    assert plain is not None
    close(plain, wanted.to(dtype), ulps=8)
    bias, added = randn(total, dtype=dtype), randn(rows, total, dtype=dtype)
    for rank in (5, 100):
        low, expand = randn(rows, rank, dtype=dtype), randn(rank, total, dtype=dtype)
        ours = decoding.linear_group(
            x, scales, widths, bias=bias, thin=(low, expand), added=added, **form
        )
        assert ours is not None
        more = wanted + bias.float() + low.float() @ expand.float() + added.float()
        close(ours, more.to(dtype), ulps=8)


def attention() -> None:
    for rows, kv, group, head, capacity, softcap, window in (
        (1, 2, 2, 16, 256, 0.0, None),
        (3, 1, 5, 20, 200, 5.0, 6),
        (2, 2, 1, 64, 512, 0.0, 70),
        (40, 4, 4, 12, 64, 0.0, None),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            query = randn(rows, kv * group * head + 7, dtype=dtype)[:, 7:]
            # part of a larger cache, and NaN where nothing is to be seen
            keys, values = (randn(rows, kv, capacity + 8, head, dtype=dtype) for _ in range(2))
            keys, values = keys[:, :, :capacity], values[:, :, :capacity]
            places = torch.randint(0, capacity, (rows,), device=DEVICE)
            places[0] = capacity - 1
            heads = Heads(kv * group, kv, head, 0.3, softcap, window)
            visible = step._Visible(places, capacity)
            serves, step.serves = step.serves, lambda *_: False
            theirs = step.attend(query, (keys, values), visible, heads)
            step.serves = serves
            hidden = visible.hidden(window)[:, 0, 0]
            for row in range(rows):
                keys[row, :, hidden[row]] = float("nan")
                values[row, :, hidden[row]] = float("nan")
            ours = step.attend(query, (keys, values), visible, heads)
            close(ours, theirs, ulps=8)


def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Rows of whole blocks, so that the joint product serves."""
    from test_graph_decoder import make

    shapes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1}
    if name == "gpt2":
        shapes = {"n_embd": 128, "n_layer": 1}
    model = make(name, lora=True, dtype=dtype, **shapes)
    return model.to(DEVICE)


def whole_model() -> None:
    from test_graph_decoder import prompts, rerun

    calls = {"group": 0, "attend": 0}
    _count(decoding, "linear_group", calls, "group")
    _count(decoding, "attend", calls, "attend")
    names = ("llama", "qwen3", "gemma2", "gpt2")
    for name, dtype in (*((name, torch.float32) for name in names), ("llama", torch.bfloat16)):
        model, rows = make(name, dtype), prompts(9, 4)
        found = []
        for kernels in (True, False):
            chosen = step.serves, primitives.serves
            if not kernels:
                step.serves = primitives.serves = lambda *_: False
            before = dict(calls)
            decoder, reason = build_decoder(model, capture=rerun)
            assert isinstance(decoder, GraphDecoder), reason
            scores = [decoder.prefill(rows, room=2)]
            for token in ([5, 6], [7, 8]):
                scores.append(decoder.step(torch.tensor(token)).clone())
            found.append(torch.stack(scores[1:]))
            assert (calls != before) == kernels
            step.serves, primitives.serves = chosen
        bound = 1e-4 if dtype == torch.float32 else 0.05
        error = (found[0] - found[1]).norm() / found[1].norm()
        assert found[0].isfinite().all()
        assert error <= bound, (name, error)
    assert calls["group"] > calls["attend"] > 0


def _count(module: object, name: str, calls: dict[str, int], key: str) -> None:
    real = getattr(module, name)

    def counted(*arguments: object, **keywords: object) -> Tensor | None:
        result = real(*arguments, **keywords)
        calls[key] += result is not None
        return result

    setattr(module, name, counted)


GROUPS = {"product": product, "attention": attention, "model": whole_model}

if __name__ == "__main__":
    torch.manual_seed(0)
    DEVICE = compare.DEVICE = torch.device(sys.argv[2])
    # on a CPU our native kernels must not answer for Triton's
    with native.using(None):
        GROUPS[sys.argv[1]]()
    print(f"{sys.argv[1]}: equal")
