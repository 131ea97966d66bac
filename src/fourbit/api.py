"""Python functions behind `fourbit verify` and `fourbit plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fourbit import device as devices
from fourbit import planning
from fourbit.loading import load_config, stored_quantization
from fourbit.methods import READ_BY, Method
from fourbit.receipt import Receipt
from fourbit.settings import replaced
from fourbit.shards import parse_size
from fourbit.sources import resolve_source
from fourbit.training.config import RunQuant, TrainConfig
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
    method: Method | None = None,
    device: torch.device | str | None = None,
    budget: int | str | None = None,
    compare: bool = False,
    processes: int = 1,
) -> planning.Plan:
    """Bytes by part for fine-tuning ``model`` as configured; no weight is read.

    Args:
        model: folder or config.json (no weights are needed), GGUF file, hub id or alias.
        config: the run; defaults where None. What is not named in it comes from the device's
            preset, where it has one.
        method: instead of the configured one.
        device: where it would run: this machine's ``cpu`` or ``cuda``, or the name of a card
            (`fourbit.planning.PRESETS`); None takes this machine's.
        budget: bytes for the whole process, or a size such as ``6GB``: the plan is then that of the
            best settings that fit, named in ``recommended``; None takes the configured one.
        processes: plan one of so many that train together on this machine, or of one card each.
        compare: plan full, LoRA and QLoRA side by side, for ``methods`` and ``advice``.

    Raises:
        InputError: ``budget`` is no size, ``device`` not known, or PEFT refuses the adapter.
        ModelError: the model's configuration cannot be read or is no causal LM.
    """
    run = config or TrainConfig()
    if method is not None:
        run = run.model_copy(update={"method": method})
    size = parse_size(budget, where="budget") if isinstance(budget, str) else budget
    size = run.budget_bytes if size is None else size
    preset = None if device is None else planning.preset_of(str(device))
    target = devices.default_device()
    if device is not None and preset is None:
        target = torch.device(device)
    if preset is not None:
        run = _starting_at(run, preset)
        room, dtype = planning.Room.on(preset, budget=size), devices.DTYPES[run.precision]
    else:
        room = planning.Room.here(target, budget=size, processes=processes)
        dtype = devices.resolve_precision(run.precision, target)
    source = resolve_source(model, revision=run.revision, weights=False)
    stored = stored_quantization(source)
    if stored is not None:
        run = run.model_copy(update={"quant": RunQuant.of(stored.quant)})
    architecture = load_config(source)
    kernels = planning.kernels_of(target) if preset is None else preset.kernels
    shape = run.shape(dtype=dtype, kernels=kernels, processes=processes)
    make = planning.plan_training if size is None else planning.recommend
    found = make(architecture, shape, room)
    if found.fits is False and processes > 1 and run.parallel == "auto":
        divided = run.model_copy(update={"parallel": "fsdp"})
        other = divided.shape(dtype=dtype, kernels=kernels, processes=processes)
        plan_of_parts = make(architecture, other, room)
        if plan_of_parts.fits:
            run, shape, found = divided, other, plan_of_parts
    if compare:
        # what each method leaves to its plan stays left to it
        settled = ("gradient_checkpointing", "optim.paged")
        run = replaced(run, {k: v for k, v in found.recommended.items() if k not in settled})
        shape = run.shape(dtype=dtype, kernels=kernels, processes=processes)
        found = planning.side_by_side(architecture, shape, room, found)
    return found


def _starting_at(run: TrainConfig, preset: planning.Preset) -> TrainConfig:
    """What ``run`` does not name is as the preset says."""
    values: dict[str, Any] = {}
    if "batch_size" not in run.model_fields_set:
        values["batch_size"] = preset.batch_size
    if run.precision == "auto":
        values["precision"] = preset.precision
    if run.method in READ_BY["lora"]:
        named = run.lora.model_fields_set
        values |= {f"lora.{k}": v for k, v in preset.lora.items() if k not in named}
    return replaced(run, values)
