"""Python functions behind `fourbit verify` and `fourbit plan`."""

from __future__ import annotations

from pathlib import Path

import torch

from fourbit import device as devices
from fourbit import planning
from fourbit.loading import load_config, stored_quantization
from fourbit.receipt import Receipt
from fourbit.shards import parse_size
from fourbit.sources import resolve_source
from fourbit.training.config import TrainConfig
from fourbit.verification import verify_run


def verify(run_dir: str | Path, *, base: bool = True) -> Receipt:
    """Re-checks a run's files, and with ``base`` the base model's bytes too.

    Raises:
        InputError: no finished run there.
    """
    return verify_run(Path(run_dir), base=base)


def plan(
    model: str,
    *,
    config: TrainConfig | None = None,
    device: torch.device | str | None = None,
    budget: int | str | None = None,
) -> planning.Plan:
    """Bytes by part for fine-tuning ``model`` as configured; no weight is read.

    Args:
        model: folder, GGUF file, hub id or alias.
        config: the run; defaults where None.
        device: where it would run; None takes this machine's.
        budget: bytes for the whole process, or a size such as ``6GB``: the plan is then that of the
            best settings that fit, named in ``recommended``.

    Raises:
        InputError: ``budget`` is no size.
        ModelError: the model's configuration cannot be read or is no causal LM.
    """
    run = config or TrainConfig()
    target = devices.default_device() if device is None else torch.device(device)
    source = resolve_source(model, revision=run.revision)
    stored = stored_quantization(source)
    shape = planning.TrainingShape(
        method=run.method,
        quant=run.quant if stored is None else stored.quant,
        lora=run.lora,
        dtype=devices.resolve_precision(run.precision, target),
        batch_size=run.batch_size,
        length=run.data.max_length,
        recompute=run.recomputed_layers,
        packing=run.data.packing or run.batch_size > 1,
        grad_accum=run.grad_accum,
        prompt=run.prompt,
        optim=run.optim,
    )
    if budget is None:
        return planning.plan_training(load_config(source), shape, device=target)
    size = parse_size(budget, where="budget") if isinstance(budget, str) else budget
    return planning.recommend(
        load_config(source),
        shape,
        budget=size,
        baseline=planning.baseline_on(target),
        holes=planning.holes_on(target),
    )
