"""Adapters on a model and on disk: injection, the saved folder, the tensors of a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fourbit import files
from fourbit.distributed import ALONE, Ranks, assign_, is_shard, whole
from fourbit.errors import ModelError, VerificationFailed
from fourbit.integrations.peft import add_adapter, lora_layers, planned_targets
from fourbit.integrations.prompts import prompt_state, prompted
from fourbit.lora import LoraSettings

ADAPTER_FILE = "adapter_model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
SAVE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def inject(model: PreTrainedModel, settings: LoraSettings, *, seed: int, base: str) -> PeftModel:
    """Puts fresh adapters on every target; initial values are a function of ``seed``.

    Args:
        model: quantized or plain.
        settings: the adapter.
        seed: of the initial values.
        base: what the saved adapter names as its base model.

    Raises:
        InputError: targets that match nothing, or ranks above a layer's dimensions.
        VerificationFailed: PEFT did not put an adapter on every intended layer.
    """
    targets = planned_targets(model, settings)
    torch.manual_seed(seed)
    wrapped = add_adapter(model, settings)
    wrapped.peft_config["default"].base_model_name_or_path = base
    missing = sorted(targets.keys() - lora_layers(wrapped).keys())
    if missing:
        raise VerificationFailed(
            "adapter-missing",
            where="lora.target_modules",
            what=f"{len(missing)} of {len(targets)} targets took no adapter, first: {missing[0]}",
        )
    return wrapped


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors a checkpoint must hold, under PEFT's file names where PEFT is used.

    Of divided parameters they are divided too.
    """
    if _kept_by_peft(model):
        return get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _kept_by_peft(model: nn.Module) -> bool:
    """Whether PEFT's file holds all that is trained; of P-tuning it holds only the result."""
    return isinstance(model, PeftModel) and prompted(model) is None


@torch.no_grad()
def restore_trainable(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Puts a checkpoint's tensors back, all or none.

    Raises:
        ModelError: names or shapes differ from the model's.
    """
    own = trainable_state(model)
    divided = any(is_shard(tensor) for tensor in own.values())
    wrong = sorted(own.keys() ^ state.keys())
    wrong += [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if wrong:
        raise ModelError(
            "adapter-mismatch",
            where=ADAPTER_FILE,
            what=f"{len(wrong)} tensors do not fit the model, first: {wrong[0]}",
            fix="resume with the configuration the run began with",
        )
    if _kept_by_peft(model) and not divided:
        set_peft_model_state_dict(model, dict(state))
        return
    for name, tensor in own.items():
        assign_(tensor, state[name])


def save_adapter(
    model: nn.Module, folder: Path, *, save_dtype: torch.dtype, card: str, ranks: Ranks = ALONE
) -> None:
    """Writes the PEFT folder (or, for full fine-tuning, the model folder) and swaps it in.

    Of several processes, all of which give their parts, the first one writes.

    Raises:
        EnvironmentFault: the disk is full or cannot be written; the old folder stays.
    """
    if isinstance(model, PeftModel):
        kept = prompt_state(model) or trainable_state(model)
    else:
        kept = model.state_dict()
    state = {name: _for_file(tensor, save_dtype, ranks) for name, tensor in kept.items()}
    if not ranks.first:
        return
    staging = folder.parent / f".{folder.name}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        staging.mkdir(parents=True)
        if isinstance(model, PeftModel):
            _write_peft(model, staging, state)
        else:
            _write_model(model, staging, state, save_dtype)
        files.replace_file(staging / "README.md", card.encode())
        _swap(staging, folder)
    except OSError as error:
        raise files.disk_fault(error, where=folder) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _for_file(tensor: Tensor, save_dtype: torch.dtype, ranks: Ranks) -> Tensor:
    tensor = whole(tensor).detach()
    if not ranks.first:
        return tensor.new_empty(0)
    return tensor.to("cpu", save_dtype if tensor.is_floating_point() else None).contiguous()


def _write_peft(model: PeftModel, folder: Path, state: dict[str, Tensor]) -> None:
    save_file(state, folder / ADAPTER_FILE, metadata={"format": "pt"})
    config = model.peft_config["default"].to_dict()
    config["inference_mode"] = True
    config = {key: sorted(v) if isinstance(v, set) else v for key, v in config.items()}
    text = json.dumps(config, indent=2, sort_keys=True, default=str)
    files.replace_file(folder / "adapter_config.json", text.encode())


def _write_model(
    model: nn.Module, folder: Path, state: dict[str, Tensor], save_dtype: torch.dtype
) -> None:
    assert isinstance(model, PreTrainedModel)
    previous = model.config.dtype
    model.config.dtype = save_dtype
    model.save_pretrained(folder, state_dict=state)
    model.config.dtype = previous


def _swap(staging: Path, folder: Path) -> None:
    for path in staging.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    old = folder.parent / f".{folder.name}.old-{uuid.uuid4().hex[:8]}"
    if folder.exists():
        os.replace(folder, old)
    os.replace(staging, folder)
    files.sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
