"""What a step, a token or a copy must take on a card at least, from its measured ceilings.

Arithmetic of a Llama shape, S tokens a sequence, causal. Floating-point operations of a token:
forward 2 for each weight of a linear layer and of the head, and 2·S·D a layer for attention (half
of all scores); backward the same products for the gradient of the input, and 5/2 of attention's;
the adapters 6 for each of their parameters. Bytes that must move: 4-bit weights read and 16-bit
ones written twice; each elementwise operation's inputs and results once; what the adapters'
products read; the chunks of logits written and read twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from sizes import SHAPES

BYTES_4BIT = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of an NF4 weight with double quantization."""


@dataclass(frozen=True)
class Ceiling:
    """What a card does: sustained FLOP/s of large products, bytes/s of a copy (read and write)."""

    flops: float
    bytes_per_second: float


@dataclass(frozen=True)
class Model:
    """Sizes of a shape.

    Attributes:
        hidden: D.
        inner: of the feed-forward part.
        queries: columns of all query heads.
        keys: columns of all key heads.
        layers: decoder layers.
        vocabulary: of the head.
        rank: of the adapters on every linear layer.
    """

    hidden: int
    inner: int
    queries: int
    keys: int
    layers: int
    vocabulary: int
    rank: int = 16

    @classmethod
    def of(cls, shape: str, rank: int = 16) -> Model:
        size = SHAPES[shape]
        hidden = size["hidden_size"]
        head = hidden // size["num_attention_heads"]
        return cls(
            hidden=hidden,
            inner=size["intermediate_size"],
            queries=hidden,
            keys=size["num_key_value_heads"] * head,
            layers=size["num_hidden_layers"],
            vocabulary=size["vocab_size"],
            rank=rank,
        )

    @property
    def linear(self) -> int:
        """Weights of the linear layers, without the head."""
        attention = self.hidden * (2 * self.queries + 2 * self.keys)
        return self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def head(self) -> int:
        return self.hidden * self.vocabulary

    @property
    def adapters(self) -> int:
        """Parameters of LoRA on every linear layer."""
        d, f, q, k = self.hidden, self.inner, self.queries, self.keys
        sides = 2 * (d + q) + 2 * (d + k) + 3 * (d + f)
        return self.layers * self.rank * sides

    def adapter_shapes(self) -> list[tuple[int, int]]:
        """Of A and B of every linear layer."""
        d, f, q, k, r = self.hidden, self.inner, self.queries, self.keys, self.rank
        pairs = [(q, d), (k, d), (k, d), (d, q), (f, d), (f, d), (d, f)]
        return [s for n, m in pairs for s in ((r, m), (n, r))] * self.layers

    def flops_per_token(self, length: int) -> float:
        """Of a training step without recomputation, sequences of ``length``."""
        attention = 2 * length * self.queries * self.layers
        forward = 2 * self.linear + 2 * self.head + attention
        backward = 2 * self.linear + 2 * self.head + 2.5 * attention
        return forward + backward + 6 * self.adapters

    def bytes_per_token(self) -> float:
        """That elementwise operations, adapters and the loss move, in 16 bits."""
        d, f, q, k = self.hidden, self.inner, self.queries, self.keys
        elementwise = 16 * d + 9 * f + 4 * (q + k)
        adapters = 2 * (2 * d + q + f) + (q + 2 * k) + 2 * d + 2 * f
        return 2 * (self.layers * (elementwise + adapters) + 4 * self.vocabulary)

    def step_seconds(self, tokens: int, length: int, ceiling: Ceiling) -> float:
        """A training step of ``tokens`` that computes and moves nothing more than it must."""
        weights = 2 * self.linear * (BYTES_4BIT + 2)
        moved = weights + tokens * self.bytes_per_token()
        return (
            tokens * self.flops_per_token(length) / ceiling.flops + moved / ceiling.bytes_per_second
        )

    def decode_bytes(self, context: int, bytes_per_weight: float = BYTES_4BIT) -> float:
        """Read for one new token of one sequence: weights, head in 16 bits, cache."""
        cache = 2 * 2 * self.keys * self.layers * context
        return self.linear * bytes_per_weight + 2 * self.head + cache
