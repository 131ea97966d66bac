"""What an adapter was trained on, from its run's records, and proof that a base is that one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from fourbit import checkpoint
from fourbit.errors import InputError, ModelError, VerificationFailed
from fourbit.files import sha256_of
from fourbit.generate import find_adapter
from fourbit.loading import stored_quantization
from fourbit.merging.adapter import Adapter, read_adapter
from fourbit.quantize import QuantConfig
from fourbit.receipt import combined_digest, frozen_digests, packed_digest, read_receipt
from fourbit.rundir import CONFIG, RunDir
from fourbit.settings import load_settings
from fourbit.sources import ModelSource, resolve_source
from fourbit.training.config import TrainConfig


@dataclass(frozen=True)
class Trained:
    """An adapter and its base.

    Attributes:
        adapter: the files.
        source: the base.
        quant: how the base was held in training; None for 16 or 32 bits.
        config: of the run; None for an adapter without one.
        facts: of the run's receipt; empty without one.
        dtype: of the unquantized weights in training, where it is known.
    """

    adapter: Adapter
    source: ModelSource
    quant: QuantConfig | None
    config: TrainConfig | None
    facts: dict[str, Any]
    dtype: torch.dtype | None

    @property
    def trust_remote_code(self) -> bool:
        """Whether the run's owner allowed the model's own code."""
        return self.config is not None and self.config.trust_remote_code

    @property
    def base_name(self) -> str:
        """How the base is called in messages and cards."""
        revision = f" at revision {self.source.revision}" if self.source.revision else ""
        return self.source.name + revision


def find_trained(
    path: Path, *, model: str | None = None, quant: QuantConfig | None = None
) -> Trained:
    """Reads a run directory, its ``adapter/`` folder, or any other PEFT folder.

    Args:
        path: the run or the adapter.
        model: where the base lies; of a run, instead of the place it recorded.
        quant: how the base was held, for an adapter without a run.

    Raises:
        InputError: no model given for an adapter without a run, or a run of full fine-tuning.
        ModelError: files that cannot be used.
        VerificationFailed: the adapter is not the one the run's receipt was written for.
    """
    run = _run_of(path)
    if run is None:
        adapter = read_adapter(path)
        if model is None:
            said = f"; it calls its base '{adapter.base_name}'" if adapter.base_name else ""
            raise InputError(
                "no-base",
                where=str(path),
                what=f"an adapter without its run does not prove its base{said}",
                fix="--model MODEL",
            )
        source = resolve_source(model)
        stored = stored_quantization(source)
        held = quant if stored is None else stored.quant
        return Trained(adapter, source, held, None, {}, None)
    config = load_settings(TrainConfig, path=run.config_path).value
    if quant is not None:
        raise InputError(
            "quant-of-run",
            where="--quant",
            what="the run records how its base was held",
            fix="leave --quant out",
        )
    if config.method == "full":
        raise InputError(
            "nothing-to-merge",
            where=str(path),
            what="the run trained the whole model, not an adapter",
            fix=f"use {run.adapter_dir}, which is the tuned model",
        )
    receipt = read_receipt(run.receipt_path)
    receipt.require(where=str(run.path))
    adapter = read_adapter(run.adapter_dir)
    wanted = receipt.facts.get("adapter_sha256")
    if wanted is not None and sha256_of(adapter.file) != wanted:
        raise VerificationFailed(
            "adapter-changed",
            where=str(adapter.file),
            what="it is not the adapter that the run's receipt was written for",
            fix="restore the file, or give the adapter folder alone with --model",
        )
    revision = receipt.facts.get("base_revision") or config.revision
    source = resolve_source(model or config.model, revision=None if model else revision)
    return Trained(
        adapter,
        source,
        config.quant if config.method == "qlora" else None,
        config,
        receipt.facts,
        _training_dtype(run, config),
    )


def _run_of(path: Path) -> RunDir | None:
    folder = path if (path / CONFIG).is_file() else find_adapter(path).parent
    has_parts = (folder / "receipt.json").is_file() or (folder / "checkpoints").is_dir()
    return RunDir(folder) if has_parts and (folder / CONFIG).is_file() else None


def _training_dtype(run: RunDir, config: TrainConfig) -> torch.dtype | None:
    """``auto`` depended on the machine; the checkpoints say what it was there."""
    if config.precision != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[
            config.precision
        ]
    path, _ = checkpoint.newest(run.checkpoints_dir)
    if path is None:
        return None
    name = str(checkpoint.load(path).identity.get("precision", "")).removeprefix("torch.")
    dtype = getattr(torch, name, None)
    return dtype if isinstance(dtype, torch.dtype) else None


def require_same_model(trained: Trained, model: PreTrainedModel) -> str:
    """Compares a loaded base with the run's records.

    Returns:
        What was compared, for the record.

    Raises:
        ModelError: other bytes.
    """
    packed = packed_digest(model) if trained.quant is not None else None
    return require_digests(
        trained, packed, lambda: combined_digest(frozen_digests(model.requires_grad_(False)))
    )


def require_digests(trained: Trained, packed: str | None, every: Callable[[], str] | None) -> str:
    """Compares digests of a base with the receipt's.

    Args:
        trained: the run.
        packed: of the 4-bit weights; None when nothing was quantized.
        every: computes that of all frozen tensors in the run's dtype; None when it cannot.

    Returns:
        What was compared, for the record.

    Raises:
        ModelError: the base is another one.
    """
    compared = "nothing: the run recorded no digest"
    wanted = trained.facts.get("packed_sha256")
    if packed is not None and wanted is not None:
        if packed != wanted:
            raise _other_base(trained, "the 4-bit weights", wanted, packed)
        compared = "its 4-bit bytes"
    wanted = trained.facts.get("base_sha256")
    # Without the run's dtype the other tensors' bytes may differ by nothing but their cast.
    if wanted is None or every is None or trained.dtype is None:
        return compared
    found = every()
    if found != wanted:
        kind = "the weights" if packed is None else "the unquantized tensors"
        raise _other_base(trained, kind, wanted, found)
    return "every byte"


def _other_base(trained: Trained, kind: str, wanted: str, found: str) -> ModelError:
    recorded = trained.facts.get("base", "?")
    revision = trained.facts.get("base_revision")
    named = f"'{recorded}'" + (f" at revision {revision}" if revision else "")
    return ModelError(
        "other-base",
        where=trained.source.name,
        what=f"not the base the adapter was trained on ({named}): {kind} have SHA-256"
        f" {found[:12]}…, recorded is {wanted[:12]}…",
        fix="give the base of the run with --model",
    )
