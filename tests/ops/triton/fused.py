"""Fused decoder layers on Triton's kernels against transformers': ``fused.py NAME cpu|cuda``."""

from __future__ import annotations

import sys

import torch
from test_fused import build, error, fuse, run

from fourbit import native
from fourbit.fused import paths
from fourbit.ops.triton import norms
from fourbit.ops.triton.registry import launch

_launched: list[str] = []


def counted(kernel, grid):
    _launched.append(kernel.__name__)
    return launch(kernel, grid)


def main() -> None:
    name, device = sys.argv[1], torch.device(sys.argv[2])
    norms.launch = counted
    ids = torch.randint(0, 256, (2, 11), device=device)
    # two documents in the second row
    places = torch.arange(11, device=device).repeat(2, 1)
    places[1, 6:] -= 6
    inputs = {} if name == "gpt2" else {"position_ids": places}
    with native.using(None):  # the kernels of csrc/ must not answer for Triton's
        model = build(name, dropout=0.2).to(device)
        logits, grads = run(model, ids, **inputs)
        assert not _launched
        fused_logits, fused_grads = run(fuse(model), ids, **inputs)
    assert paths(model) == {"fused": 2}, paths(model)
    assert _launched
    torch.testing.assert_close(fused_logits, logits, rtol=1e-4, atol=1e-4)
    assert error(fused_grads, grads) < 1e-4, error(fused_grads, grads)
    print(f"{name}: equal")


if __name__ == "__main__":
    main()
