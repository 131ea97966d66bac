"""A plan for a GPU against what steps on Triton's kernels allocate: ``planned.py NAME``."""

from __future__ import annotations

import sys
from dataclasses import replace

from fourbit import native

with native.using(None):  # no kernel of csrc/ is registered, to answer for Triton's
    from test_plan import SHAPE, lora_of, trained_model

    from fourbit.fused import paths
    from fourbit.planning.skeleton import make_skeleton
    from fourbit.planning.step import ImaginedSteps, observed
    from models import tiny_config


def main() -> None:
    name = sys.argv[1]
    shape = replace(SHAPE, packing=False, kernels="gpu", lora=lora_of(name))
    imagined = ImaginedSteps(make_skeleton(tiny_config(name), shape), shape).moments(0)
    with native.using(None):
        model = trained_model(name, shape)
        real = observed(model, shape, 0)
        assert set(paths(model)) == {"fused"}, paths(model)
    assert imagined.keys() == real.keys()
    for phase, moment in real.items():
        print(phase, moment.total, imagined[phase].total)
        off = abs(imagined[phase].total - moment.total)
        assert off <= 0.02 * moment.total + 10_000, (phase, imagined[phase], moment)
    print(f"{name}: planned")


if __name__ == "__main__":
    main()
