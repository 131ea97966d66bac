"""Calibration of a model, one decoder layer after the other.

The model is held in 4 bits; of the layer at hand the 16-bit weights are read again. The layer runs
once with them: what its projections are given says which of their errors matter, and what it gives
is what the next layer is given. Inputs that carry the errors of layers quantized before, as GPTQ
takes them, were measured to give a higher perplexity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fourbit.errors import ModelError
from fourbit.integrations.transformers import decoder_layers
from fourbit.linear import QuantizedLinear, multiplying

_TOKENS = 2048
"""Of one forward pass through a layer."""
_TILE = 256
"""Columns of a matrix of moments that are summed in one product."""
_CLOSE = 0.05
"""Share by which the walk's last layer may differ from the model's own: far above rounding."""

Calibrate = Callable[[str, QuantizedLinear, Tensor, Tensor], dict[str, Tensor]]
"""A projection's name, itself, its weight ``[out, in]`` and its inputs' second moments, to the
parameters it shall have."""
Done = Callable[[int, nn.Module], None]


@dataclass
class _Call:
    """How the model calls one of its decoder layers, the hidden states apart."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class _Moments:
    """Sums of ``x xᵀ`` of the inputs of a layer's projections; equal inputs are summed once."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    same_as: dict[str, str] = field(default_factory=dict)
    _seen: dict[tuple[int, int], str] = field(default_factory=dict)
    _inputs: list[Tensor] = field(default_factory=list)

    def begin(self) -> None:
        """Before each forward pass."""
        self._seen.clear()
        self._inputs.clear()

    def add(self, name: str, x: Tensor) -> None:
        """The input of one projection."""
        key = (x.data_ptr(), x._version)
        owner = self.same_as.get(name) or self._seen.get(key, name)
        self.same_as[name] = owner
        if owner != name:
            return
        self._seen[key] = name
        self._inputs.append(x)  # kept until the pass is over: its address must stay its own
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        width = flat.shape[1]
        if name not in self.sums:
            self.sums[name] = flat.new_zeros(width, width)
        # a symmetric sum: what is left of the diagonal's tiles is never computed
        for start in range(0, width, _TILE):
            part = slice(start, start + _TILE)
            self.sums[name][part, start:].addmm_(flat[:, part].t(), flat[:, start:])

    def of(self, name: str) -> Tensor | None:
        """The sum for one projection; None if it was never called."""
        owner = self.same_as.get(name)
        if owner is None:
            return None
        whole = self.sums[owner]
        for stop in range(_TILE, len(whole), _TILE):
            part = slice(stop - _TILE, stop)
            whole[stop:, part] = whole[part, stop:].t()
        return whole


@torch.no_grad()
def calibrate_layers(
    model: PreTrainedModel,
    tokens: Tensor,
    weight: Callable[[str], Tensor],
    calibrate: Calibrate,
    *,
    start: int = 0,
    done: Done | None = None,
) -> None:
    """Replaces the parameters of every quantized projection inside the decoder layers.

    Args:
        model: quantized, in evaluation mode.
        tokens: int64 ``[windows, length]``.
        weight: a projection's name to its weight before it was quantized.
        calibrate: what to make of a projection.
        start: layers before this one have been calibrated earlier.
        done: told the number of each layer that is finished, and the layer.

    Raises:
        ModelError: an architecture whose layers cannot be called one by one.
    """
    layers = decoder_layers(model)
    rows = max(1, _TOKENS // tokens.shape[1])
    batches = list(tokens[: max(rows, len(tokens) // rows * rows)].split(rows))
    calls, states = _calls(model, layers, batches)
    names = {module: name for name, module in model.named_modules()}
    for number, layer in enumerate(layers):
        inside = {
            names[module]: module
            for module in layer.modules()
            if isinstance(module, QuantizedLinear)
        }
        whole = {name: weight(name) for name in inside}
        moments = _Moments()
        watched = inside if number >= start else {}
        with multiplying({m: whole[n] for n, m in inside.items()}), _watching(watched, moments):
            for index, state in enumerate(states):
                moments.begin()
                states[index] = _forward(layer, state, calls[number])
        for name, module in watched.items():
            found = moments.of(name)
            if found is not None:
                module.replace_(calibrate(name, module, whole[name], found))
        if number >= start and done is not None:
            done(number, layer)


def _forward(layer: nn.Module, state: Tensor, call: _Call) -> Tensor:
    out = layer(state, *call.args, **call.kwargs)
    return out if isinstance(out, Tensor) else out[0]


@contextmanager
def _watching(modules: dict[str, QuantizedLinear], moments: _Moments) -> Iterator[None]:
    def note(name: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        moments.add(name, args[0])

    handles = [
        module.register_forward_pre_hook(partial(note, name)) for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _calls(
    model: PreTrainedModel, layers: list[nn.Module], batches: list[Tensor]
) -> tuple[list[_Call], list[Tensor]]:
    """How each layer is called, and what the first one is given for each batch.

    Raises:
        ModelError: going from layer to layer is not what the model does.
    """
    calls: list[_Call] = []
    firsts: list[Tensor] = []
    outputs: list[Tensor] = []

    def note(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        calls.append(_Call(args[1:], rest) if args else _Call((), rest))
        hidden = args[0] if args else rest.pop("hidden_states")
        outputs.append(hidden)

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    last = (
        layers[-1].register_forward_hook(
            lambda _l, _a, out: outputs.append(out if isinstance(out, Tensor) else out[0])
        )
        if layers
        else None
    )
    try:
        model.base_model(input_ids=batches[0].to(model.device), use_cache=False)
    finally:
        for handle in [*handles, *([last] if last else [])]:
            handle.remove()
    if len(calls) != len(layers) or not layers:
        raise _not_walkable(model, "its decoder layers are not called once each, in order")
    state = outputs[0]
    for layer, call in zip(layers, calls, strict=True):
        state = _forward(layer, state, call)
    wanted = outputs[-1]
    if (state - wanted).norm() > _CLOSE * wanted.norm():
        raise _not_walkable(model, "its layers called one by one give something else")

    class _Caught(Exception):
        pass

    def catch(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        firsts.append(args[0] if args else kwargs["hidden_states"])
        raise _Caught

    handle = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for batch in batches:
            with suppress(_Caught):
                model.base_model(input_ids=batch.to(model.device), use_cache=False)
    finally:
        handle.remove()
    return calls, firsts


def _not_walkable(model: PreTrainedModel, what: str) -> ModelError:
    return ModelError(
        "cannot-calibrate",
        where=model.config.model_type,
        what=what,
        fix="quantize it without --calibrate",
    )
