"""What a section of this benchmark is, and what all sections are told."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from harness import Case
from rows import Row
from sizes import SHAPES as SIZES

SHAPES = {"1b": "llama-1b", "8b": "llama-8b", "tiny": "tiny"}
"""Names on the command line, and in `sizes.SHAPES`."""
Spec = dict[str, Any]
Found = Iterator[dict[str, Any]]


class Section(Protocol):
    """A module of this package."""

    @property
    def COLUMNS(self) -> Sequence[str]:  # noqa: N802  # a constant of the module
        """What is printed at the end."""
        ...

    def cases(self, options: argparse.Namespace) -> list[Case]:
        """The sides, each run in a process of its own."""
        ...

    def measure(self, spec: Spec) -> Found:
        """In that process: rows."""
        ...

    def faults(self, rows: list[Row]) -> list[str]:
        """What must be true of the rows beyond their speed."""
        ...


def told(options: argparse.Namespace, **more: Any) -> Spec:
    """What every child is told."""
    return {
        "device": options.device,
        "shape": SHAPES[options.shape],
        "tiny": options.shape == "tiny",
        "work": str(options.work),
        **more,
    }


def linears(shape: str) -> dict[str, tuple[int, int]]:
    """``(N, K)`` of the linear layers of a decoder layer, by their names; joint ones too."""
    size = SIZES[shape]
    hidden, inner = size["hidden_size"], size["intermediate_size"]
    head = hidden // size["num_attention_heads"]
    kv = size["num_key_value_heads"] * head
    return {
        "q, o": (hidden, hidden),
        "k, v": (kv, hidden),
        "gate, up": (inner, hidden),
        "down": (hidden, inner),
    }


def needs_gpu(options: argparse.Namespace) -> bool:
    """Whether this is a run in which a figure of a GPU can be had."""
    return options.device == "cuda"
