"""`fourbit verify`: a run's files read again; the stored verdict is not trusted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from fourbit import checkpoint, files
from fourbit import device as devices
from fourbit.errors import FourbitError, InputError, ModelError
from fourbit.integrations.prompts import PROMPT_KEY
from fourbit.loading import LoadOptions, load_model
from fourbit.lora import rank_by_pattern
from fourbit.methods import quantized_base, trains_prompt
from fourbit.receipt import START, Receipt, combined_digest, frozen_digests, read_receipt
from fourbit.rundir import RunDir
from fourbit.settings import load_settings
from fourbit.sources import resolve_source
from fourbit.training import prompt_checks
from fourbit.training.adapter import ADAPTER_FILE, OPTIMIZER_FILE, SAVE_DTYPES
from fourbit.training.config import TrainConfig


def verify_run(path: Path, *, base: bool = True) -> Receipt:
    """Checks every file of a run against every other.

    Args:
        path: the run directory.
        base: load the base model again and compare its bytes (the slow part).

    Raises:
        InputError: no run at ``path``, or one that has not ended.
    """
    folder = RunDir(path)
    if not folder.config_path.is_file():
        raise InputError(
            "no-run", where=str(path), what="no run directory (config.yaml is missing)"
        )
    stored = read_receipt(folder.receipt_path)
    config = load_settings(TrainConfig, path=folder.config_path).value
    receipt = Receipt(facts=dict(stored.facts))
    failed = [check.name for check in stored.checks if not check.ok]
    receipt.add(
        "receipt", not failed and bool(stored.checks), ", ".join(failed) or "every check was passed"
    )
    _check_adapter(receipt, folder, config, stored)
    _check_checkpoints(receipt, folder, config)
    _check_metrics(receipt, folder, stored)
    if base:
        _check_base(receipt, config, stored)
    return receipt


def _adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def _check_adapter(receipt: Receipt, run: RunDir, config: TrainConfig, stored: Receipt) -> None:
    paths = sorted(run.adapter_dir.glob("*.safetensors"))
    if not paths:
        receipt.add("adapter_file", False, f"no safetensors in {run.adapter_dir}")
        return
    digest = files.sha256_of(paths[0])
    same = digest == stored.facts.get("adapter_sha256")
    detail = f"SHA-256 {digest[:16]}… as recorded" if same else f"{paths[0].name} was changed"
    receipt.add("adapter_file", same, detail)
    try:
        tensors = _adapter_tensors(run.adapter_dir)
    except Exception as error:  # noqa: BLE001  # safetensors raises its own base exception
        receipt.add("adapter_tensors", False, f"unreadable: {error}")
        return
    receipt.add(*_tensor_check(tensors, config))
    if config.method == "full":
        return
    if trains_prompt(config.method):
        if PROMPT_KEY in tensors:
            recorded = stored.facts.get("trainable_parameters")
            check = prompt_checks.count_check
            receipt.add(*check(run.adapter_dir, tensors[PROMPT_KEY], config, recorded))
        return
    _check_count(receipt, run.adapter_dir, tensors, stored)


def _tensor_check(tensors: dict[str, torch.Tensor], config: TrainConfig) -> tuple[str, bool, str]:
    wrong = [n for n, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if wrong:
        return "adapter_tensors", False, f"{wrong[0]} holds NaN or Inf"
    dead = [n for n, t in tensors.items() if "lora_B" in n and not t.any()]
    if dead:
        return "adapter_tensors", False, f"{len(dead)} lora_B are zero, first: {dead[0]}"
    wanted = SAVE_DTYPES[config.save_dtype]
    other = [n for n, t in tensors.items() if t.is_floating_point() and t.dtype != wanted]
    if other:
        return "adapter_tensors", False, f"{other[0]} is not {config.save_dtype}"
    if trains_prompt(config.method):
        return prompt_checks.tensor_check(tensors, config)
    return "adapter_tensors", True, f"{len(tensors)} finite tensors, every lora_B moved"


def _check_count(
    receipt: Receipt, folder: Path, tensors: dict[str, torch.Tensor], stored: Receipt
) -> None:
    try:
        peft_config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        default_r, patterns = int(peft_config["r"]), dict(peft_config.get("rank_pattern") or {})
        stacks = tuple(p.rpartition(".")[0] for p in peft_config.get("target_parameters") or ())
    except (OSError, ValueError, KeyError, TypeError) as error:
        receipt.add("adapter_config", False, f"adapter_config.json is unreadable ({error})")
        return
    count = sum(tensor.numel() for name, tensor in tensors.items() if START not in name)
    wrong = [
        name
        for name, tensor in tensors.items()
        if ".lora_A." in name and not _has_rank(name, tensor, (default_r, patterns), stacks)
    ]
    pairs = {name.replace(".lora_A.", ".lora_B.") for name in tensors if ".lora_A." in name}
    unpaired = pairs ^ {name for name in tensors if ".lora_B." in name}
    recorded = stored.facts.get("trainable_parameters")
    ok = count == recorded and not wrong and not unpaired
    detail = f"{count:,} parameters in {len(pairs)} pairs of rank {default_r}"
    if not ok:
        culprit = next(iter(wrong or sorted(unpaired)), "")
        detail = f"{count:,} parameters in the file, {recorded:,} recorded {culprit}".strip()
    receipt.add("adapter_count", ok, detail)


def _has_rank(
    name: str, tensor: torch.Tensor, ranks: tuple[int, dict[str, int]], stacks: tuple[str, ...]
) -> bool:
    """Whether a ``lora_A`` has the configured rank; a stack of experts has it once for each."""
    default, patterns = ranks
    module = name.removeprefix("base_model.model.").partition(".lora_A.")[0]
    rank = rank_by_pattern(module, patterns, default=default)
    if stacks and module.replace(".base_layer", "").endswith(stacks):
        return tensor.shape[0] % rank == 0
    return tensor.shape[0] == rank


def _check_checkpoints(receipt: Receipt, run: RunDir, config: TrainConfig) -> None:
    folder = run.checkpoints_dir
    paths = sorted(p for p in folder.glob("*") if checkpoint.step_of(p) is not None)
    problems = [problem for path in paths for problem in checkpoint.verify(path)]
    detail = f"{len(paths)} checkpoints, every file's SHA-256 equal"
    receipt.add("checkpoints", bool(paths) and not problems, problems[0] if problems else detail)
    step = receipt.facts.get("adapter_step")
    path = folder / checkpoint.step_name(step) if isinstance(step, int) else None
    if problems or path is None or not path.is_dir():
        return
    saved = checkpoint.load(path, lazily={OPTIMIZER_FILE})
    adapter = _adapter_tensors(run.adapter_dir)
    differing = _difference(saved.tensors[ADAPTER_FILE], adapter, config)
    detail = f"equal to checkpoint {path.name}"
    if differing is not None:
        detail = f"differs from checkpoint {path.name} at {differing}"
    receipt.add("adapter_equals_checkpoint", differing is None, detail)
    _check_owner(receipt, saved, config)


def _difference(
    trained: Mapping[str, torch.Tensor], adapter: dict[str, torch.Tensor], config: TrainConfig
) -> str | None:
    """The first tensor of the adapter that is not the checkpoint's."""
    if trains_prompt(config.method):
        return prompt_checks.checkpoint_difference(trained, adapter.get(PROMPT_KEY), config)
    wanted = SAVE_DTYPES[config.save_dtype]
    differing = (
        name
        for name, t in trained.items()
        if name not in adapter or not t.to(wanted).equal(adapter[name])
    )
    return next(differing, None)


def _check_owner(receipt: Receipt, saved: checkpoint.Checkpoint, config: TrainConfig) -> None:
    """The optimizer's saved state belongs to adapters alone, two moments for each."""
    names = {
        name.rsplit(".", 1)[0]
        for name in saved.tensors[OPTIMIZER_FILE]
        if name.endswith(".exp_avg")
    }
    count = sum(START not in name for name in saved.tensors[ADAPTER_FILE])
    ok = len(names) == count
    if trains_prompt(config.method):
        ok = ok and all(name.startswith("prompt_encoder.") for name in names)
    elif config.method != "full" and not config.lora.modules_to_save:
        ok = ok and all(".lora_" in name for name in names)
    detail = f"its state covers exactly the {count} trained tensors"
    if not ok:
        detail = f"its state covers {len(names)} tensors, {count} are trained"
    receipt.add("optimizer_owns_adapters", ok, detail)


def _check_metrics(receipt: Receipt, run: RunDir, stored: Receipt) -> None:
    lines = [line for line in run.read_metrics() if line.get("step", 0) > 0]
    steps = [line["step"] for line in lines]
    wanted = list(range(1, (stored.facts.get("steps") or 0) + 1))
    if steps != wanted:
        receipt.add(
            "metrics", False, f"{len(steps)} lines of steps, {len(wanted)} steps were trained"
        )
        return
    updated = [line for line in lines if line.get("updated")]
    finite = all(
        isinstance(line.get("loss"), float) and math.isfinite(line["loss"]) for line in updated
    )
    moving = all((line.get("grad_norm") or 0) > 0 for line in updated)
    supervised = sum(line.get("supervised_tokens") or 0 for line in lines)
    ends = bool(updated) and (
        updated[0]["loss"] == stored.facts.get("train_loss_first")
        and updated[-1]["loss"] == stored.facts.get("train_loss_last")
    )
    ok = finite and moving and supervised > 0 and ends
    detail = f"{len(steps)} steps, losses finite, gradients above zero, {supervised:,} tokens"
    if not ok:
        reasons = {
            "a loss is not finite": finite,
            "a gradient norm is zero": moving,
            "no supervised tokens": supervised > 0,
            "first or last loss is not the recorded one": ends,
        }
        detail = next(reason for reason, good in reasons.items() if not good)
    receipt.add("metrics", ok, detail)


def _check_base(receipt: Receipt, config: TrainConfig, stored: Receipt) -> None:
    if config.method == "full":
        return
    device = devices.default_device()
    try:
        source = resolve_source(
            config.model, revision=stored.facts.get("base_revision") or config.revision
        )
        options = LoadOptions(
            quant=config.quant if quantized_base(config.method) else None,
            dtype=devices.resolve_precision(config.precision, device),
            trust_remote_code=config.trust_remote_code,
        )
        base = load_model(source, options).requires_grad_(False)
        digest = combined_digest(frozen_digests(base))
    except (ModelError, FourbitError) as error:
        receipt.findings.append(f"the base was not checked: {error.what}")
        return
    same = digest == stored.facts.get("base_sha256")
    detail = f"{config.model} loaded again: SHA-256 {digest[:16]}… as recorded"
    if not same:
        detail = f"{config.model} is not the base this adapter was trained on"
    receipt.add("base", same, detail)
