"""What the fused blocks are made of, and the record of which path each layer took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from fourbit import native, ops
from fourbit.linear import Linear4bit

_PATH = "_fourbit_path"
_OBSERVES = "_fourbit_observes"


@dataclass(frozen=True)
class Norm:
    """One norm: ``x / rms(x) * (weight + offset)``, or a layer norm when ``bias`` is there.

    Attributes:
        weight: ``[D]``.
        bias: ``[D]`` of a layer norm; None for a root-mean-square norm.
        eps: added to the mean square (to the variance).
        offset: added to the weight.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float
    offset: float


@dataclass(frozen=True)
class Heads:
    """Shape and scores of one layer's attention.

    Attributes:
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        scale: of the scores.
        softcap: of the scores; 0 for none.
        sliding_window: number of keys a query sees, itself included; None for all.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float
    sliding_window: int | None

    @property
    def widths(self) -> tuple[int, int, int]:
        """Columns of query, key and value in one row of their joint buffer."""
        kv = self.kv_heads * self.head_dim
        return self.heads * self.head_dim, kv, kv


@dataclass(frozen=True)
class Projection:
    """One frozen linear layer with at most one adapter on it.

    Attributes:
        base: packed, or a plain frozen ``nn.Linear``.
        lora_A: ``[r, K]``; None without an adapter.
        lora_B: ``[N, r]``.
        scaling: of the adapter.
        dropout: probability on the adapter's input.
    """

    base: Linear4bit | nn.Linear
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0
    dropout: float = 0.0

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, K)``."""
        return self.base.out_features, self.base.in_features


def observer(hook: Callable[..., None]) -> Callable[..., None]:
    """Marks a forward pre-hook that only looks: fused layers call it instead of giving way."""
    setattr(hook, _OBSERVES, True)
    return hook


def only_observes(hook: object) -> bool:
    """Whether a hook is one that `observer` marked."""
    return hasattr(hook, _OBSERVES)


def draw_seeds(projections: tuple[Projection, ...]) -> tuple[int, ...]:
    """A dropout seed for each projection that needs one, else 0, as `ops.lora_linear_4bit` draws.

    One after another from torch's CPU generator: gradient checkpointing restores it, and a layer
    that takes the other path draws the same.
    """
    return tuple(
        _seed(p.shape[1]) if p.dropout > 0 and p.lora_A is not None else 0 for p in projections
    )


def _seed(width: int) -> int:
    return int(native.value(ops.draw_seed(width)))


def record_path(layer: nn.Module, path: str) -> None:
    """Notes on a decoder layer how its last forward was computed."""
    object.__setattr__(layer, _PATH, path)


def paths(model: nn.Module) -> dict[str, int]:
    """How many decoder layers took which path in the last forward: ``{"fused": 30}``.

    A layer that was not fused is counted under ``generic: reason``. Layers of architectures that
    are never fused are not listed.
    """
    found = (getattr(module, _PATH, None) for module in model.modules())
    return dict(Counter(path for path in found if path is not None))
