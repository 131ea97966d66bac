"""`fourbit export`: an adapter alone as a GGUF LoRA that llama.cpp loads beside its base.

llama.cpp adds ``alpha / r * B A`` with one alpha for the file and r read from each tensor, so any
other scaling (rsLoRA, alpha by pattern) is folded into B. Its rotary embedding pairs neighbouring
rows for the llama family, so rows of B for queries and keys are reordered as its converter
reorders the weights.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from fourbit import __version__, files
from fourbit.errors import InputError, ModelError, VerificationFailed
from fourbit.integrations import gguf as gguf_files
from fourbit.loading import load_config, load_tokenizer
from fourbit.merging.adapter import Adapter, Changes, find_changes
from fourbit.merging.base import make_skeleton
from fourbit.merging.trained import Trained, find_trained
from fourbit.rundir import check_path
from fourbit.training.progress import Reporter

_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
"""transformers' model type -> llama.cpp's architecture, for those whose export is tested."""
_REORDERED = ("llama",)
"""Architectures whose query and key rows llama.cpp keeps in another order."""


@dataclass(frozen=True)
class ExportResult:
    """What `export_gguf` returns, and the keys of ``fourbit export --json``."""

    output: str
    model: str
    architecture: str
    tensors: int
    bytes: int
    alpha: float
    rescaled: int
    findings: list[str]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{self.tensors} tensors for {self.architecture}, {files.human_bytes(self.bytes)};"
            f" alpha {self.alpha:g}, {self.rescaled} layers rescaled to it",
            f"adapter: {self.output}",
        ]


def export_gguf(
    path: str | Path,
    output: str | Path,
    *,
    model: str | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> ExportResult:
    """Writes the adapter as a GGUF file, and reads it back before it gets its name.

    Args:
        path: a run directory, or an adapter folder together with ``model``.
        output: the file.
        model: where the base lies, for its names and shapes; no weight is read.
        overwrite: replace the file if it exists.
        reporter: receives warnings.

    Raises:
        InputError: the output exists.
        ModelError: an adapter or architecture that llama.cpp's format cannot hold.
        EnvironmentFault: the disk refuses.
    """
    target = Path(output)
    _require_target(target, overwrite=overwrite)
    trained = find_trained(Path(path), model=model)
    config = load_config(trained.source, trust_remote_code=trained.trust_remote_code)
    architecture = _architecture(trained, config)
    _require_vocabulary(trained, config)
    skeleton = make_skeleton(config)
    changes = find_changes(skeleton, trained.adapter)
    _require_plain(trained.adapter, changes)
    tensors, alpha, rescaled = _tensors(trained, changes, config, architecture)
    findings = []
    if trained.adapter.changes_nothing():
        findings.append("the adapter changes nothing: every lora_B is zero")
        (reporter or Reporter()).warn(findings[0])
    _write(target, tensors, trained, architecture=architecture, alpha=alpha)
    return ExportResult(
        output=str(target),
        model=trained.base_name,
        architecture=architecture,
        tensors=len(tensors),
        bytes=target.stat().st_size,
        alpha=alpha,
        rescaled=rescaled,
        findings=findings,
    )


def _require_target(target: Path, *, overwrite: bool) -> None:
    check_path(target)
    if target.is_dir() or (os.path.lexists(target) and not overwrite):
        folder = target.is_dir()
        raise InputError(
            "output-exists",
            where=str(target),
            what="is a folder, a file is wanted" if folder else "already exists",
            fix="give a file such as adapter.gguf" if folder else "choose another, or --overwrite",
        )


def _architecture(trained: Trained, config: PretrainedConfig) -> str:
    architecture = _ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise ModelError(
            "gguf-architecture",
            where=trained.source.name,
            what=f"adapters of {config.model_type} have no tested GGUF form",
            fix=f"one of {', '.join(_ARCHITECTURES)}; or `fourbit merge`, and convert the result",
        )
    if trained.source.kind == "gguf":
        found = gguf_files.read(trained.source.path).get_field("general.architecture")
        architecture = architecture if found is None else str(found.contents())
    return architecture


def _require_vocabulary(trained: Trained, config: PretrainedConfig) -> None:
    tokenizer = load_tokenizer(trained.source, trust_remote_code=trained.trust_remote_code)
    highest = max(tokenizer.get_vocab().values(), default=0)
    rows = config.get_text_config().vocab_size
    if highest >= rows:
        raise ModelError(
            "vocabulary",
            where=trained.source.name,
            what=f"the tokenizer has tokens up to id {highest}, the embedding {rows} rows",
            fix="give the tokenizer's own model",
        )


def _require_plain(adapter: Adapter, changes: Changes) -> None:
    dora = any(update.magnitude is not None for update in changes.updates.values())
    kind = ""
    if dora:
        kind = "DoRA"
    elif changes.replaced:
        kind = f"a module trained whole ({next(iter(changes.replaced))})"
    elif changes.biases:
        kind = "a LoRA bias"
    if kind:
        raise ModelError(
            "adapter-kind",
            where=str(adapter.folder),
            what=f"llama.cpp's adapter format cannot hold {kind}",
            fix="`fourbit merge`, and convert the merged model",
        )


def _tensors(
    trained: Trained, changes: Changes, config: PretrainedConfig, architecture: str
) -> tuple[dict[str, Tensor], float, int]:
    """GGUF names and values, the file's alpha, and how many layers were rescaled to it."""
    adapter = trained.adapter
    alpha = float(adapter.config.lora_alpha)
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture),
        config.num_hidden_layers,
    )
    tensors: dict[str, Tensor] = {}
    rescaled = 0
    for weight, update in changes.updates.items():
        name = names.get_name(weight, try_suffixes=(".weight",))
        if name is None:
            raise ModelError(
                "gguf-name",
                where=str(adapter.folder),
                what=f"{weight} has no name in GGUF's {architecture}",
                fix="`fourbit merge`, and convert the merged model",
            )
        a, b = adapter.tensor(update.a), adapter.tensor(update.b)
        factor = update.scaling / (alpha / a.shape[0])
        if abs(factor - 1) > 1e-9:
            b, rescaled = b * factor, rescaled + 1
        if architecture in _REORDERED:
            b = _reordered(b, weight, config)
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = a, b
    return tensors, alpha, rescaled


def _reordered(b: Tensor, weight: str, config: PretrainedConfig) -> Tensor:
    """Rows of one head: (two halves of pairs) to (pairs of neighbours)."""
    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": config.num_key_value_heads or config.num_attention_heads,
    }.get(weight.split(".")[-2])
    if heads is None:
        return b
    return b.view(heads, 2, -1, b.shape[1]).transpose(1, 2).reshape(b.shape)


def _write(
    target: Path, tensors: dict[str, Tensor], trained: Trained, *, architecture: str, alpha: float
) -> None:
    staged = target.absolute().with_name(f".{target.name[:200]}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        staged.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(str(staged), architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_string("general.description", f"LoRA exported by fourbit {__version__}")
        for name, tensor in tensors.items():
            writer.add_tensor(name, np.ascontiguousarray(tensor.numpy()))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _require_equal(staged, tensors, target)
        with staged.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(staged, target)
        files.sync_folder(target.absolute().parent)
    except OSError as error:
        raise files.disk_fault(error, where=target) from error
    finally:
        staged.unlink(missing_ok=True)


def _require_equal(staged: Path, tensors: dict[str, Tensor], target: Path) -> None:
    """The file as gguf's own reader sees it."""
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(str(staged)).tensors}
    same = found.keys() == tensors.keys() and all(
        torch.equal(torch.from_numpy(np.array(found[name].data)), tensor)
        for name, tensor in tensors.items()
    )
    if not same:
        raise VerificationFailed(
            "export-differs",
            where=str(target),
            what="the file read back does not hold the adapter's tensors; nothing was kept",
            fix="check the disk",
        )
