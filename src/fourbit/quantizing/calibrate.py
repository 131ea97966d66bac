"""`--calibrate`: the scales and codes of a checkpoint chosen for the text that it will see."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fourbit import files
from fourbit.calibrated import DAMPING
from fourbit.data import BadLines, DataConfig, is_text_file, read_plain_rows, to_examples
from fourbit.data.files import check_regular_file
from fourbit.data.templates import render, resolve_template
from fourbit.errors import InputError
from fourbit.integrations.transformers import decoder_layers
from fourbit.linear import QuantizedLinear
from fourbit.loading import LoadOptions, load_model, load_tokenizer
from fourbit.objective import Objective
from fourbit.quantize import QuantConfig
from fourbit.quantizing.walk import calibrate_layers
from fourbit.sources import ModelSource
from fourbit.training.progress import Reporter

TOKENS_SUFFIX = ".npy"
_CHECKED = 16
"""Most windows that are left out of calibration, to see whether it holds for them."""
_FEW = 16384
"""Tokens below which the feedback mostly follows noise."""


@dataclass(frozen=True)
class Calibration:
    """What a model is calibrated on.

    Attributes:
        path: a text file, rows as training reads them, or token ids (``.npy``).
        tokens: how many of them are used, spread over the whole file.
        length: tokens of a sequence.
        damping: share of the mean second moment added to each; more follows the text less.
        check: other text, on which the loss is measured before and after.
    """

    path: Path
    tokens: int = 131072
    length: int = 512
    damping: float = DAMPING
    check: Path | None = None


@dataclass(frozen=True)
class Calibrated:
    """A calibrated model and what it gained.

    Attributes:
        model: the same 4-bit model, with other codes and scales.
        facts: tokens used, and losses in nats a token before and after.
    """

    model: PreTrainedModel
    facts: dict[str, Any]


def calibration_text(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, length: int, key: str
) -> tuple[Tensor, str]:
    """All of a file as sequences of one length, int64 ``[windows, length]``, and its SHA-256.

    Chats are rendered with the model's template; what belongs together stays together.

    Raises:
        InputError: the file cannot be read, or holds less than two sequences.
    """
    if path.suffix == TOKENS_SUFFIX:
        return _stored_windows(path, len(tokenizer), length=length, key=key)
    rows, sha256 = read_plain_rows(str(path), key=key)
    if is_text_file(str(path)):
        texts = ["".join(row.data["text"] for row in rows)]
    else:
        bad = BadLines(0)
        examples, _ = to_examples(rows, DataConfig(train=str(path)), bad=bad)
        bad.check()
        template = None
        if any(example.messages is not None for example in examples):
            template = resolve_template(tokenizer)
        texts = [
            example.text or ""
            if example.messages is None or template is None
            else render(example.messages, tokenizer, template)
            for example in examples
        ]
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text, verbose=False).input_ids, *(ends if len(texts) > 1 else [])]
    return _windows(torch.tensor(ids), path, length=length, key=key), sha256


def _windows(ids: Tensor, path: Path, *, length: int, key: str) -> Tensor:
    count = len(ids) // length
    if count < 2:
        raise InputError(
            "too-little-text",
            where=str(path),
            what=f"holds {len(ids)} tokens, calibration needs at least {2 * length}",
            fix=f"give more text to {key}",
        )
    return ids[: count * length].view(count, length)


def _stored_windows(path: Path, vocabulary: int, *, length: int, key: str) -> tuple[Tensor, str]:
    """Of token ids in NumPy's format, which a run writes of its training data."""
    check_regular_file(str(path), key=key)
    try:
        ids = np.load(path, allow_pickle=False)
    except (ValueError, EOFError):
        ids = np.empty(0)
    whole = ids.ndim == 1 and ids.dtype.kind in "iu" and ids.size > 0
    if not whole or not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise InputError(
            "bad-token-ids",
            where=str(path),
            what="holds no token ids of this model",
            fix=f"give a text or rows to {key}",
        )
    tokens = torch.from_numpy(ids.astype(np.int64))
    return _windows(tokens, path, length=length, key=key), files.sha256_of(path)


def calibrate(
    source: ModelSource,
    quant: QuantConfig,
    *,
    skip: list[str] | None,
    options: Calibration,
    weight: Callable[[str], Tensor],
    folder: Path,
    reporter: Reporter,
) -> Calibrated:
    """Loads a model in few bits and calibrates it; goes on where ``folder`` says it stopped.

    Args:
        source: of the 16-bit weights.
        quant: the format.
        skip: modules left plain.
        options: on what.
        weight: module name to its weight as the checkpoint has it, ``[out, in]``.
        folder: where finished layers are kept until the whole is written.
        reporter: progress.

    Raises:
        InputError: no usable text.
        ModelError: an architecture that cannot be calibrated.
    """
    tokenizer = load_tokenizer(source)
    windows, _ = calibration_text(options.path, tokenizer, length=options.length, key="--calibrate")
    used, kept = _parted(windows, options)
    other = None
    if options.check is not None:
        text, _ = calibration_text(
            options.check, tokenizer, length=options.length, key="--calibrate-check"
        )
        other = _spread(text, _CHECKED)
    if used.numel() < _FEW:
        reporter.warn(
            f"{used.numel()} tokens are little to calibrate on; {_FEW} or more are better"
        )
    model = load_model(source, LoadOptions(quant=quant, skip=skip))
    checks = {"held out": kept, **({} if other is None else {"other": other})}
    before = {name: _loss(model, text) for name, text in checks.items()}
    _calibrate_layers(model, used, quant, options, weight, folder, reporter)
    after = {name: _loss(model, text) for name, text in checks.items()}
    facts: dict[str, Any] = {"tokens": used.numel()}
    for name in checks:
        told = f"loss on {'text held out of calibration' if name == 'held out' else 'other text'}"
        reporter.line(f"{told}: {before[name]:.4f} -> {after[name]:.4f}")
        if after[name] > before[name]:
            reporter.warn(f"calibration made {told} worse: give more text, or more --damping")
        key = name.replace(" ", "_")
        facts |= {f"loss_{key}_before": before[name], f"loss_{key}_after": after[name]}
    return Calibrated(model, facts)


def _parted(windows: Tensor, options: Calibration) -> tuple[Tensor, Tensor]:
    """Windows to calibrate on, and a few others from all over the text."""
    count = min(_CHECKED, max(1, len(windows) // 8))
    places = torch.linspace(0, len(windows) - 1, count + 2)[1:-1].long().unique()
    held = torch.zeros(len(windows), dtype=torch.bool)
    held[places] = True
    return _spread(windows[~held], max(1, options.tokens // options.length)), windows[held]


def _spread(windows: Tensor, count: int) -> Tensor:
    if len(windows) <= count:
        return windows
    return windows[torch.linspace(0, len(windows) - 1, count).long()]


@torch.no_grad()
def _loss(model: PreTrainedModel, windows: Tensor) -> float:
    objective = Objective(model)
    total = 0.0
    for batch in windows.split(4):
        labels = torch.full_like(batch, -100)
        labels[:, :-1] = batch[:, 1:]
        inputs = {"input_ids": batch.to(objective.device)}
        total += float(objective.loss_of(inputs, labels.to(objective.device)))
    return total / (windows.numel() - len(windows))


def _calibrate_layers(
    model: PreTrainedModel,
    windows: Tensor,
    quant: QuantConfig,
    options: Calibration,
    weight: Callable[[str], Tensor],
    folder: Path,
    reporter: Reporter,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    layers = decoder_layers(model)
    start = _restored(layers, folder)
    if start:
        reporter.line(f"continuing: {start} of {len(layers)} layers are calibrated")

    def improve(
        name: str, layer: QuantizedLinear, whole: Tensor, moments: Tensor
    ) -> dict[str, Tensor]:
        return layer.quantized_for(whole, moments, damping=options.damping, name=name)

    with reporter.task("calibrating layers", total=len(layers), start=start) as advance:

        def done(number: int, layer: nn.Module) -> None:
            data = save(parameters_inside(layer))
            files.replace_file(folder / f"{number:05}.safetensors", data)
            advance(number + 1, "")

        calibrate_layers(model, windows, weight, improve, start=start, done=done)


def parameters_inside(layer: nn.Module) -> dict[str, Tensor]:
    """The integer parameters of every quantized projection inside a decoder layer."""
    return {
        f"{name}.{key}": parameter.detach().contiguous()
        for name, module in layer.named_modules()
        if isinstance(module, QuantizedLinear)
        for key, parameter in module.named_parameters(recurse=False)
        if key != "bias"
    }


def _restored(layers: list[nn.Module], folder: Path) -> int:
    """Puts finished layers back; how many there are from the first one on."""
    for number, layer in enumerate(layers):
        path = folder / f"{number:05}.safetensors"
        if not path.is_file():
            return number
        try:
            stored = load_file(path)
        except Exception:  # noqa: BLE001  # cut off while it was written: it is made again
            return number
        if stored.keys() != parameters_inside(layer).keys():
            return number
        for name, module in layer.named_modules():
            if isinstance(module, QuantizedLinear):
                prefix = f"{name}."
                own = {k.removeprefix(prefix): t for k, t in stored.items() if k.startswith(prefix)}
                module.replace_({k: t for k, t in own.items() if "." not in k})
    return len(layers)


def as_pattern(pattern: QuantizedLinear, calibrated: QuantizedLinear) -> QuantizedLinear:
    """The layer that is written, with the parameters that calibration gave its twin."""
    layer = copy.deepcopy(pattern)
    layer.replace_(
        {
            key: parameter.detach()
            for key, parameter in calibrated.named_parameters(recurse=False)
            if key != "bias"
        }
    )
    return layer
