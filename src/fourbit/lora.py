"""LoRA on a 4-bit base: its settings, which layers it lands on, and the fused computation.

LoRA: arXiv 2106.09685; on a 4-bit base: arXiv 2305.14314, equation 5.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from pydantic import Field, field_validator
from torch import Tensor

from fourbit import ops
from fourbit.errors import InputError, nearest
from fourbit.linear import Linear4bit, autocast_input
from fourbit.settings import Settings

_MATCH_SECONDS = 5.0
_STARTS = re.compile(r"gaussian|orthogonal|pissa|pissa_niter_\d+|olora")


class LoraSettings(Settings):
    """The adapter. Names and meanings are PEFT's."""

    r: int = Field(default=16, ge=1, description="rank of the adapters")
    lora_alpha: float = Field(
        default=32, gt=0, description="the update is scaled by lora_alpha / r"
    )
    lora_dropout: float = Field(
        default=0.05, ge=0, lt=1, description="dropout on the adapter's input"
    )
    target_modules: str | list[str] = Field(
        default="all-linear", description="all-linear, a list of module-name endings, or one regex"
    )
    target_parameters: list[str] | None = Field(
        default=None,
        description="a mixture's expert weights by name, e.g. [experts.gate_up_proj]; no dropout",
    )
    exclude_modules: list[str] | None = Field(
        default=None, description="module-name endings to leave out"
    )
    modules_to_save: list[str] | None = Field(
        default=None, description="modules trained whole and saved with the adapter, e.g. [lm_head]"
    )
    rank_pattern: dict[str, int] = Field(default={}, description="r by module-name pattern")
    alpha_pattern: dict[str, float] = Field(
        default={}, description="lora_alpha by module-name pattern"
    )
    use_rslora: bool = Field(default=False, description="scale by lora_alpha / sqrt(r)")
    use_dora: bool = Field(
        default=False, description="weight-decomposed adapters (slower, unfused)"
    )
    init_lora_weights: bool | str = Field(
        default=True,
        description="true, gaussian, orthogonal; pissa, pissa_niter_N, olora: from the weights",
    )

    @field_validator("init_lora_weights")
    @classmethod
    def _known_start(cls, value: bool | str) -> bool | str:
        if isinstance(value, str) and not _STARTS.fullmatch(value):
            raise ValueError(
                f"'{value}' is not true, false, gaussian, orthogonal, pissa, pissa_niter_N or olora"
            )
        return value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _legal_pattern(cls, value: dict[str, float]) -> dict[str, float]:
        for pattern, number in value.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"'{pattern}' is no valid regular expression ({error})") from None
            if number <= 0:
                raise ValueError(f"{number} for '{pattern}' is not above 0")
        return value


def lora_forward(
    base: Linear4bit, x: Tensor, adapter: tuple[Tensor, Tensor, float, float]
) -> Tensor:
    """Base and adapter as one autograd operation.

    ``y = x · dequant(W)ᵀ + bias + scaling · (dropout(x) · Aᵀ) · Bᵀ``. Saved for backward are only
    ``x`` and ``dropout(x) · Aᵀ``; W is dequantized again.

    Args:
        base: the frozen layer, W ``[N, K]``.
        x: ``[..., K]``.
        adapter: ``(lora_A [r, K], lora_B [N, r], scaling, dropout probability)``.

    Returns:
        ``[..., N]`` in the dtype of ``x``.
    """
    x = autocast_input(x)
    lora_A, lora_B, scaling, dropout = adapter
    if not torch.is_grad_enabled() and dropout == 0:
        y = base(x)
        xa = torch.nn.functional.linear(x, lora_A.to(x.dtype))
        return y + torch.nn.functional.linear(xa, lora_B.to(x.dtype)).mul_(scaling)
    inner = x if base.compute_dtype is None else x.to(base.compute_dtype)
    y = ops.lora_linear_4bit(
        inner,
        base.scales,
        base.bias,
        adapter,
        blocksize=base.blocksize,
        quant_type=base.quant_type,
    )
    return y.to(x.dtype)


def resolve_targets(
    shapes: Mapping[str, tuple[int, int]], settings: LoraSettings, *, head: str | None
) -> dict[str, tuple[int, int]]:
    """The layers the adapter will sit on, before anything is injected.

    Args:
        shapes: ``name -> (in_features, out_features)`` of every linear layer.
        settings: the adapter.
        head: name of the output projection, which is never a target.

    Raises:
        InputError: nothing matched (near names listed), the output head was asked for, a pattern
            takes too long to match, or a rank exceeds a layer's dimensions.
    """
    wanted = settings.target_modules
    with _time_box(wanted):
        matched = {name: s for name, s in shapes.items() if _matches(name, wanted, head)}
    excluded = settings.exclude_modules or []
    matched = {n: s for n, s in matched.items() if not any(_ends(n, e) for e in excluded)}
    if not matched:
        endings = {name.rsplit(".", 1)[-1] for name in shapes}
        asked = wanted if isinstance(wanted, str) else ", ".join(wanted)
        is_ending = isinstance(wanted, str) and any(_ends(name, wanted) for name in shapes)
        raise InputError(
            "no-target-modules",
            where="lora.target_modules",
            what=f"'{asked}' matches no linear layer of this model",
            fix=f"write it as a list: [{wanted}]"
            if is_ending
            else nearest(asked.split(",")[0], endings),
        )
    if head is not None and head in matched:
        raise InputError(
            "target-is-head",
            where="lora.target_modules",
            what=f"'{head}' is the output head, which takes no adapter",
            fix=f"remove it, or train it whole with lora.modules_to_save: [{head}]",
        )
    for name, (in_features, out_features) in matched.items():
        rank = rank_of(name, settings)
        if wanted == "all-linear" and min(in_features, out_features) == 1:
            continue  # a gate of one value takes any rank; nobody asked for it by name
        if rank > min(in_features, out_features):
            raise InputError(
                "rank-too-large",
                where="lora.r",
                what=f"rank {rank} exceeds the smaller side of {name}"
                f" ({out_features} x {in_features})",
                fix=f"use r <= {min(in_features, out_features)}, or set lora.rank_pattern",
            )
    return matched


def rank_of(name: str, settings: LoraSettings) -> int:
    """The rank of the adapter on layer ``name``, `rank_pattern` considered as PEFT does."""
    return rank_by_pattern(name, settings.rank_pattern, default=settings.r)


def rank_by_pattern(name: str, patterns: Mapping[str, int], *, default: int) -> int:
    """PEFT's rule: the first pattern that is the end of the layer's name decides."""
    for pattern, rank in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return rank
    return default


def expected_trainable(targets: Mapping[str, tuple[int, int]], settings: LoraSettings) -> int:
    """Adapter parameters by formula: ``sum(r * (in + out))``, plus ``out`` each with DoRA."""
    return sum(
        rank_of(name, settings) * (in_features + out_features)
        + (out_features if settings.use_dora else 0)
        for name, (in_features, out_features) in targets.items()
    )


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


def _matches(name: str, wanted: str | list[str], head: str | None) -> bool:
    if wanted == "all-linear":
        return name != head
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(_ends(name, ending) for ending in wanted)


@contextmanager
def _time_box(wanted: str | list[str]) -> Iterator[None]:
    """Stops a regex that backtracks for ever; only a main thread can be interrupted."""
    if not isinstance(wanted, str) or threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        re.compile(wanted)
    except re.error as error:
        raise InputError(
            "bad-regex",
            where="lora.target_modules",
            what=f"'{wanted}' is no valid regular expression ({error})",
            fix="list module names instead, e.g. [q_proj, v_proj]",
        ) from error

    def stop(_signum: int, _frame: object) -> None:
        raise InputError(
            "regex-too-slow",
            where="lora.target_modules",
            what=f"matching '{wanted}' took more than {_MATCH_SECONDS:.0f} s",
            fix="list module names instead, e.g. [q_proj, v_proj]",
        )

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, _MATCH_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
