"""An adapter's files read without trust: what each tensor does to which weight of the model.

PEFT itself, on a skeleton without memory, says which tensors a configuration must have, with what
shapes and scalings; the file is held against that list, all or nothing.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft import set_peft_model_state_dict as put_state
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fourbit.errors import ModelError
from fourbit.generate import find_adapter
from fourbit.integrations.peft import lora_layers
from fourbit.quantize import check_finite
from fourbit.receipt import plain_name
from fourbit.sources import check_safetensors
from fourbit.training.adapter import ADAPTER_FILE

_PREFIX = "base_model.model."
_KNOWN = (
    "r",
    "target_modules",
    "exclude_modules",
    "lora_alpha",
    "lora_dropout",
    "fan_in_fan_out",
    "bias",
    "use_rslora",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "lora_bias",
)
"""What decides a merge. Every other name is dropped: none can load code or follow a path."""
_REFUSED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Initial values that leave the base as it is; PiSSA, OLoRA and others change it."""


@dataclass(frozen=True)
class Update:
    """A low-rank update of one weight: ``scaling * B @ A``, with DoRA's magnitude.

    Attributes:
        a: key of A ``[r, in]`` in the adapter's file.
        b: key of B ``[out, r]``.
        scaling: alpha / r, or alpha / sqrt(r).
        transposed: the weight is stored ``[in, out]`` (GPT-2's Conv1D).
        magnitude: key of DoRA's ``[out]``; None without DoRA.
    """

    a: str
    b: str
    scaling: float
    transposed: bool
    magnitude: str | None = None


@dataclass(frozen=True)
class Changes:
    """Everything an adapter changes, by the names of the plain model.

    Attributes:
        updates: weight -> low-rank update.
        biases: bias -> (key of what is added, its scaling).
        replaced: parameter -> key of the tensor that takes its place.
        vocabulary: rows of the embedding when the adapter resized it; None otherwise.
    """

    updates: Mapping[str, Update]
    biases: Mapping[str, tuple[str, float]]
    replaced: Mapping[str, str]
    vocabulary: int | None = None


@dataclass(frozen=True)
class Adapter:
    """A PEFT folder whose header was checked; tensors are read when they are asked for.

    Attributes:
        folder: holds adapter_config.json and the tensors.
        config: only the settings that decide a merge.
        shapes: of every tensor by its key.
        keys: where a key is written otherwise in the file.
        base_name: what the adapter calls its base; shown, never followed.
    """

    folder: Path
    config: LoraConfig
    shapes: Mapping[str, tuple[int, ...]]
    keys: Mapping[str, str]
    base_name: str | None

    @property
    def file(self) -> Path:
        """The file of the tensors."""
        return self.folder / ADAPTER_FILE

    def tensor(self, key: str) -> Tensor:
        """One tensor in float32."""
        with safe_open(self.file, framework="pt") as tensors:
            stored = tensors.get_tensor(self.keys.get(key, key))
            return stored.to(torch.float32, copy=True)

    def changes_nothing(self) -> bool:
        """Whether every B is zero and nothing is replaced whole."""
        with safe_open(self.file, framework="pt") as tensors:
            names = [self.keys.get(k, k) for k in self.shapes if ".lora_A." not in k]
            lora = all(".lora_B." in key for key in names)
            return lora and not any(bool(tensors.get_tensor(key).any()) for key in names)


def read_adapter(path: Path) -> Adapter:
    """Reads an adapter's configuration and header, and proves its values finite.

    Args:
        path: a PEFT folder or a run directory.

    Raises:
        ModelError: no adapter, damaged files, NaN or Inf, or a kind that has no merge.
    """
    folder = find_adapter(path)
    header = check_safetensors(folder / ADAPTER_FILE)
    shapes = {k: tuple(entry["shape"]) for k, entry in header.items() if k != "__metadata__"}
    keys = _plain_keys(shapes)
    values = _config_values(folder / "adapter_config.json")
    _refuse_kinds(values, folder)
    known = {key: values[key] for key in _KNOWN if values.get(key) is not None}
    try:
        config = LoraConfig(task_type="CAUSAL_LM", inference_mode=True, **known)
    except (TypeError, ValueError) as error:
        raise ModelError(
            "bad-adapter-config",
            where=str(folder / "adapter_config.json"),
            what=str(error).splitlines()[0],
            fix="save the adapter again",
        ) from error
    base_name = values.get("base_model_name_or_path")
    adapter = Adapter(folder, config, shapes, keys, base_name)
    with safe_open(adapter.file, framework="pt") as tensors:
        for key in shapes:
            tensor = tensors.get_tensor(keys.get(key, key))
            if not tensor.is_floating_point():
                raise _unfit(adapter, f"{key} holds {tensor.dtype}, not floating values")
            _require_finite(tensor, key, adapter)
    return adapter


def _plain_keys(shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """Renames PEFT's second copy of a resized embedding, or drops it where both are there."""
    keys = {}
    for key in [key for key in shapes if ".modules_to_save." in key]:
        plain = key.replace(".modules_to_save.", ".")
        shape = shapes.pop(key)
        if plain not in shapes:
            shapes[plain], keys[plain] = shape, key
    return keys


def _require_finite(tensor: Tensor, key: str, adapter: Adapter) -> None:
    try:
        check_finite(tensor, name=key)
    except ModelError as error:
        raise ModelError(
            "nonfinite-adapter",
            where=str(adapter.folder),
            what=f"{key} holds {error.what}",
            fix="train again, or take an earlier checkpoint",
        ) from None


def _config_values(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"holds a {type(values).__name__}, not an object")
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(
            "bad-adapter-config", where=str(path), what=str(error), fix="save the adapter again"
        ) from error
    return values


def _refuse_kinds(values: Mapping[str, Any], folder: Path) -> None:
    kind = values.get("peft_type", "LORA")
    wanted = [name for name in _REFUSED if values.get(name)]
    if values.get("init_lora_weights") not in _PLAIN_INITS:
        wanted.append(f"init_lora_weights: {values['init_lora_weights']}")
    if values.get("ensure_weight_tying") and values.get("modules_to_save"):
        wanted.append("ensure_weight_tying")
    if kind == "LORA" and not wanted:
        return
    raise ModelError(
        "adapter-kind",
        where=str(folder),
        what=f"{'an adapter with ' + wanted[0] if kind == 'LORA' else kind} has no merge here",
        fix="load it with PEFT beside its base",
    )


def find_changes(skeleton: PreTrainedModel, adapter: Adapter) -> Changes:
    """Which weights of a model the adapter changes, and how.

    Args:
        skeleton: the plain model on meta; PEFT's layers are put into it.
        adapter: the files.

    Raises:
        ModelError: tensors that are missing, unknown or of another shape than the configuration
            and the model give.
    """
    rows = vocabulary_of(skeleton, adapter)
    if rows is not None:
        skeleton.resize_token_embeddings(rows, mean_resizing=False)
    plain = set(skeleton.state_dict())
    wrapped = _wrap(skeleton, adapter, low_cpu_mem_usage=True)
    expected = {
        key: tuple(tensor.shape)
        for key, tensor in get_peft_model_state_dict(wrapped, save_embedding_layers=False).items()
    }
    for key in adapter.shapes.keys() - expected.keys():
        name = plain_name(key)
        if name in plain and name.rsplit(".", 1)[0] in _embedding_names(skeleton):
            expected[key] = tuple(wrapped.state_dict(keep_vars=True)[key].shape)
    _require_equal(expected, adapter)
    updates, biases = _low_rank(wrapped, adapter)
    used = {key for u in updates.values() for key in (u.a, u.b, u.magnitude)}
    used |= {key for key, _ in biases.values()}
    replaced = {plain_name(key): key for key in adapter.shapes if key not in used}
    unknown = sorted(replaced.keys() - plain)
    if unknown:
        raise _unfit(adapter, f"{replaced[unknown[0]]} belongs to no weight of the model")
    return Changes(updates, biases, replaced, rows)


def vocabulary_of(model: PreTrainedModel, adapter: Adapter) -> int | None:
    """Rows of the embedding the adapter carries, when they are not the model's."""
    own = {name: p.shape[0] for name, p in model.state_dict().items()}
    for module in _embedding_names(model):
        shape = adapter.shapes.get(f"{_PREFIX}{module}.weight")
        if shape is not None and shape[0] != own[f"{module}.weight"]:
            return shape[0]
    return None


def _embedding_names(model: nn.Module) -> set[str]:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    ends = (inner.get_input_embeddings(), inner.get_output_embeddings())
    return {name for name, module in inner.named_modules() if module in ends}


def _wrap(model: PreTrainedModel, adapter: Adapter, *, low_cpu_mem_usage: bool) -> PeftModel:
    # PEFT's layers write into the configuration they are given.
    config = copy.deepcopy(adapter.config)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = get_peft_model(model, config, low_cpu_mem_usage=low_cpu_mem_usage)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        message = next((line for line in str(error).splitlines() if line.strip()), "")
        raise _unfit(adapter, message.strip()) from error
    assert isinstance(wrapped, PeftModel)
    return wrapped


def attach(model: PreTrainedModel, adapter: Adapter) -> PeftModel:
    """The adapter on a loaded model, ready to answer; the caller has compared the files."""
    rows = vocabulary_of(model, adapter)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    wrapped = _wrap(model, adapter, low_cpu_mem_usage=False)
    put_state(wrapped, {key: adapter.tensor(key) for key in adapter.shapes})
    return wrapped.requires_grad_(False).eval()


def _require_equal(expected: Mapping[str, tuple[int, ...]], adapter: Adapter) -> None:
    missing = sorted(expected.keys() - adapter.shapes.keys())
    extra = sorted(adapter.shapes.keys() - expected.keys())
    wrong = sorted(k for k in expected.keys() & adapter.shapes.keys()
                   if expected[k] != adapter.shapes[k])  # fmt: skip
    if wrong:
        key = wrong[0]
        got, want = list(adapter.shapes[key]), list(expected[key])
        raise _unfit(adapter, f"{key} has shape {got}, the model and the rank give {want}")
    if missing:
        raise _unfit(adapter, f"{len(missing)} tensors are missing, first: {missing[0]}")
    if extra:
        raise _unfit(adapter, f"{len(extra)} tensors have no place, first: {extra[0]}")


def _unfit(adapter: Adapter, what: str) -> ModelError:
    return ModelError(
        "adapter-mismatch",
        where=str(adapter.folder),
        what=f"the adapter does not fit this model: {what}",
        fix="give the base model it was trained on, and the whole adapter",
    )


def _low_rank(
    wrapped: PeftModel, adapter: Adapter
) -> tuple[dict[str, Update], dict[str, tuple[str, float]]]:
    updates: dict[str, Update] = {}
    biases: dict[str, tuple[str, float]] = {}
    for name, layer in lora_layers(wrapped).items():
        base = layer.get_base_layer()
        if type(base).__name__ not in ("Linear", "FalconLinear", "Conv1D"):
            raise _unfit(adapter, f"{name} is a {type(base).__name__}, not a linear layer")
        scaling = float(layer.scaling["default"])
        bias = f"{_PREFIX}{name}.lora_B.bias"
        magnitude = f"{_PREFIX}{name}.lora_magnitude_vector"
        updates[f"{name}.weight"] = Update(
            a=f"{_PREFIX}{name}.lora_A.weight",
            b=f"{_PREFIX}{name}.lora_B.weight",
            scaling=scaling,
            transposed=isinstance(base, Conv1D),
            magnitude=magnitude if magnitude in adapter.shapes else None,
        )
        if bias in adapter.shapes:
            if base.bias is None:
                raise _unfit(adapter, f"{name} has a LoRA bias, and its layer has no bias")
            biases[f"{name}.bias"] = (bias, scaling)
    return updates, biases


def apply_update(weight: Tensor, update: Update, tensor: Callable[[str], Tensor]) -> Tensor:
    """``weight`` (float32, changed in place) with the update of its layer.

    Args:
        weight: ``[out, in]``, or ``[in, out]`` where the update says transposed.
        update: the keys and the scaling.
        tensor: reads a tensor of the adapter in float32.
    """
    matrix = weight.t() if update.transposed else weight
    matrix.addmm_(tensor(update.b), tensor(update.a), alpha=update.scaling)
    if update.magnitude is not None:
        # DoRA: the direction is the updated row's, its length the trained magnitude.
        norm = torch.linalg.vector_norm(matrix, dim=1, keepdim=True)
        matrix.mul_(tensor(update.magnitude).reshape(-1, 1) / norm)
    return weight
