"""One token of each row through a whole model, in operations that a graph can hold.

Nothing here looks at a number on the host: tokens and places are tensors, and a step reads and
writes only tensors that stay where they are. What Triton does on a GPU stands beside the plain
PyTorch form, which is the truth and serves elsewhere.

Legend: R rows, K columns of an input, N of a result, C positions of a cache, V tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fourbit import ops
from fourbit.decoding.parts import Layer, Linear, Parts, UnknownModel
from fourbit.fused.parts import Heads, Norm
from fourbit.fused.primitives import activate, normalize, rotate_, statistics_like
from fourbit.linear import Linear4bit, Linear8bit
from fourbit.ops.triton import serves


@dataclass(frozen=True)
class State:
    """What a step reads and writes.

    Attributes:
        tokens: int64 ``[R]``, read; then the likeliest next ones.
        places: int64 ``[R]``, where they stand; then one more.
        logits: float32 ``[R, V]``, written.
        caches: key and value of each layer, ``[R, kv_heads, C, head_dim]``.
        tables: cos and sin of each kind of rotation, ``[at least C, rotary]``.
    """

    tokens: Tensor
    places: Tensor
    logits: Tensor
    caches: list[tuple[Tensor, Tensor]]
    tables: dict[str | None, tuple[Tensor, Tensor]]

    @property
    def capacity(self) -> int:
        """C."""
        return self.caches[0][0].shape[2]


class Network:
    """A model whose weights are pointed to, its norms and adapters copied in its dtype.

    Args:
        parts: the model.

    Raises:
        UnknownModel: a weight is held in a form that is not computed here.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts, self.dtype = parts, parts.dtype
        self._layers = [_Block(layer, self.dtype) for layer in parts.layers]
        self._last = _held(parts.last, self.dtype)
        self._head = Product((parts.head,), self.dtype)

    @property
    def vocabulary(self) -> int:
        """V."""
        return self._head.width

    def step(self, state: State) -> None:
        """Appends the tokens at their places."""
        # a row that has ended may be anywhere
        places = state.places.clamp(max=state.capacity - 1)
        x = functional.embedding(state.tokens, self.parts.table.weight)
        if self.parts.ends.embedding_scale != 1:
            x = x * self.parts.ends.embedding_scale
        if self.parts.positions is not None:
            table = self.parts.positions.weight
            x = x + functional.embedding(places.clamp(max=len(table) - 1), table)
        angles = {
            kind: (cos.index_select(0, places), sin.index_select(0, places))
            for kind, (cos, sin) in state.tables.items()
        }
        visible = _Visible(places, state.capacity)
        for block, cache in zip(self._layers, state.caches, strict=True):
            x = block(x, cache, angles.get(block.layer.kind), visible)
        state.logits.copy_(self.score(_normed(x, self._last)))
        state.tokens.copy_(state.logits.argmax(dim=-1))
        state.places.add_(1)

    def score(self, states: Tensor) -> Tensor:
        """Logits, float32 ``[R, V]``, of what the last norm gave, ``[R, D]``."""
        ends = self.parts.ends
        logits = self._head(states).float()
        if ends.logit_scale != 1:
            logits = logits * ends.logit_scale
        if ends.logit_softcap:
            logits = torch.tanh(logits / ends.logit_softcap) * ends.logit_softcap
        return logits


class _Visible:
    """Which positions each row sees, as masks that layers share.

    Args:
        places: int64 ``[R]``, of the newest token.
        capacity: C.
    """

    def __init__(self, places: Tensor, capacity: int) -> None:
        self.places, self._capacity = places, capacity
        self._hidden: dict[int | None, Tensor] = {}

    def hidden(self, window: int | None) -> Tensor:
        """Bool ``[R, 1, 1, C]``, True where nothing is seen."""
        if window not in self._hidden:
            at, places = torch.arange(self._capacity, device=self.places.device), self.places
            hidden = at > places[:, None]
            if window is not None:
                hidden = hidden | (at <= places[:, None] - window)
            self._hidden[window] = hidden[:, None, None]
        return self._hidden[window]


class _Block:
    def __init__(self, layer: Layer, dtype: torch.dtype) -> None:
        norms = layer.before_attention, layer.after_attention, layer.before_mlp, layer.after_mlp
        self.layer = layer
        self._norms = [None if norm is None else _held(norm, dtype) for norm in norms]
        self._head_norms = [_held(norm, dtype) for norm in layer.head_norms or ()]
        self._qkv, self._out, self._up, self._down = (
            Product(members, dtype) for members in (layer.qkv, layer.out, layer.up, layer.down)
        )

    def __call__(
        self,
        x: Tensor,
        cache: tuple[Tensor, Tensor],
        angles: tuple[Tensor, Tensor] | None,
        visible: _Visible,
    ) -> Tensor:
        before, after, before_mlp, after_mlp = self._norms
        qkv = self._qkv(_normed(x, before))
        self._position_(qkv, angles)
        query, key, value = qkv.split(self.layer.heads.widths, dim=1)
        _keep(cache[0], key, visible.places)
        _keep(cache[1], value, visible.places)
        o = attend(query, cache, visible, self.layer.heads)
        x = self._added(x, self._out, o, after)
        wide = self._up(_normed(x, before_mlp))
        h = wide.new_empty(wide.shape[0], wide.shape[1] // (2 if self.layer.gated else 1))
        activate(wide, h, kind=self.layer.activation, gated=self.layer.gated)
        return self._added(x, self._down, h, after_mlp)

    def _position_(self, qkv: Tensor, angles: tuple[Tensor, Tensor] | None) -> None:
        heads = self.layer.heads
        query, key, _ = heads.widths
        if self._head_norms:
            places = slice(0, query), slice(query, query + key)
            counts = heads.heads, heads.kv_heads
            for columns, norm, count in zip(places, self._head_norms, counts, strict=True):
                part = qkv[:, columns]
                normalize(part, norm, part, statistics_like(part, norm, groups=count), groups=count)
        if self.layer.rotary:
            assert angles is not None
            count = heads.heads + heads.kv_heads
            rotate_(qkv[:, : query + key], *angles, heads=count)

    def _added(self, x: Tensor, product: Product, inner: Tensor, norm: Norm | None) -> Tensor:
        if norm is None and self.layer.residual == 1:
            return product(inner, added=x)
        y = product(inner) if norm is None else _normed(product(inner), norm)
        return torch.add(x, y, alpha=self.layer.residual)


def _held(norm: Norm, dtype: torch.dtype) -> Norm:
    bias = None if norm.bias is None else norm.bias.detach().to(dtype)
    return replace(norm, weight=norm.weight.detach().to(dtype), bias=bias)


def _normed(x: Tensor, norm: Norm | None) -> Tensor:
    assert norm is not None
    y = torch.empty_like(x)
    normalize(x, norm, y, statistics_like(x, norm))
    return y


def _keep(cache: Tensor, new: Tensor, places: Tensor) -> None:
    """Writes ``[R, kv_heads * head_dim]`` into a cache at each row's place."""
    rows = torch.arange(len(places), device=places.device)
    parts = new.unflatten(1, (cache.shape[1], cache.shape[3]))
    cache.transpose(1, 2).index_put_((rows, places), parts)


def attend(query: Tensor, cache: tuple[Tensor, Tensor], visible: _Visible, heads: Heads) -> Tensor:
    """Attention of one query a row over its part of a cache.

    Args:
        query: ``[R, heads * head_dim]``, elements of a row side by side.
        cache: keys and values, ``[R, kv_heads, C, head_dim]``.
        visible: up to where.
        heads: shape and scores.

    Returns:
        ``[R, heads * head_dim]``.
    """
    keys, values = cache
    if serves(query, keys, values):
        from fourbit.ops.triton import decoding

        return decoding.attend(
            query,
            keys,
            values,
            visible.places,
            scale=heads.scale,
            softcap=heads.softcap,
            window=heads.sliding_window,
        )
    q = query.unflatten(1, (heads.kv_heads, -1, heads.head_dim))
    scores = q.float() @ keys.float().transpose(-1, -2) * heads.scale
    if heads.softcap:
        scores = torch.tanh(scores / heads.softcap) * heads.softcap
    scores = scores.masked_fill(visible.hidden(heads.sliding_window), -torch.inf)
    return (scores.softmax(dim=-1) @ values.float()).to(q.dtype).flatten(1)


class Product:
    """Linear layers with the same input, their results side by side, adapters added to them.

    On a GPU packed layers of the same form are multiplied in one launch. Adapters are one pair of
    factors: their A one under another, their B, scaled, as blocks of a matrix that is zero
    elsewhere.

    Args:
        members: the layers, in the order of their columns.
        dtype: of activations.

    Raises:
        UnknownModel: a weight is held in a form that is not computed here.
    """

    def __init__(self, members: tuple[Linear, ...], dtype: torch.dtype) -> None:
        self._members, self.width = members, sum(member.shape[0] for member in members)
        for member in members:
            _check(member, dtype)
        packed = [member.base for member in members if isinstance(member.base, Linear4bit)]
        self._packed = packed if len(packed) == len(members) else []
        if len({(p.quant_type, p.blocksize, p.double_quant) for p in packed}) > 1:
            self._packed = []
        if any(p.compute_dtype not in (None, dtype) for p in packed):
            self._packed = []
        self._bias = self._joined_bias(dtype)
        self._reduce, self._expand = self._joined_adapters(dtype)

    def __call__(self, x: Tensor, *, added: Tensor | None = None) -> Tensor:
        """``[R, K]`` to ``[R, N]``, plus ``added`` of that shape."""
        low = None if self._reduce is None else x @ self._reduce
        y = self._at_once(x, low, added)
        if y is not None:
            return y
        parts = [_multiplied(x, member) for member in self._members]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if low is None and added is None:
            return y
        total = y.float()
        if low is not None and self._expand is not None:
            total = torch.addmm(total, low.float(), self._expand.float())
        return (total if added is None else total + added.float()).to(x.dtype)

    def _at_once(self, x: Tensor, low: Tensor | None, added: Tensor | None) -> Tensor | None:
        """The whole by the GPU's kernel; None where it does not serve."""
        if not self._packed or not serves(x, *(layer.weight for layer in self._packed)):
            return None
        from fourbit.ops.triton import decoding

        return decoding.linear_group(
            x,
            [layer.scales for layer in self._packed],
            [layer.out_features for layer in self._packed],
            blocksize=self._packed[0].blocksize,
            quant_type=self._packed[0].quant_type,
            bias=self._bias,
            thin=None if low is None or self._expand is None else (low, self._expand),
            added=added,
        )

    def _joined_bias(self, dtype: torch.dtype) -> Tensor | None:
        if all(member.bias is None for member in self._members):
            return None
        device = self._members[0].base.weight.device
        parts = [
            torch.zeros(member.shape[0], dtype=dtype, device=device)
            if member.bias is None
            else member.bias.to(dtype)
            for member in self._members
        ]
        return torch.cat(parts)

    def _joined_adapters(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """``[K, r]`` and ``[r, N]`` of all adapters together."""
        device = self._members[0].base.weight.device
        reduce, expand, start = [], [], 0
        for member in self._members:
            width, _ = member.shape
            if member.adapter is not None:
                A, B, scaling = member.adapter
                block = torch.zeros(A.shape[0], self.width, dtype=dtype, device=device)
                block[:, start : start + width] = (B.float() * scaling).t()
                reduce.append(A.to(device=device, dtype=dtype))
                expand.append(block)
            start += width
        if not reduce:
            return None, None
        return torch.cat(reduce).t(), torch.cat(expand)


def _check(member: Linear, dtype: torch.dtype) -> None:
    if isinstance(member.base, Linear8bit):
        # which columns are multiplied in 16 bits is decided on the host
        raise UnknownModel(f"{member.name} is in INT8")
    weight = member.base.weight
    if not isinstance(member.base, Linear4bit) and weight.dtype != dtype:
        raise UnknownModel(f"{member.name} is {weight.dtype} and the token table {dtype}")


def _multiplied(x: Tensor, member: Linear) -> Tensor:
    base, bias = member.base, member.bias
    bias = None if bias is None else bias.to(x.dtype)
    if isinstance(base, Conv1D):
        return x @ base.weight if bias is None else torch.addmm(bias, x, base.weight)
    if not isinstance(base, Linear4bit):
        return functional.linear(x, base.weight, bias)
    wanted = x if base.compute_dtype is None else x.to(base.compute_dtype)
    y = ops.linear_4bit(
        wanted,
        base.scales,
        bias if bias is None else bias.to(wanted.dtype),
        blocksize=base.blocksize,
        quant_type=base.quant_type,
        out_features=base.out_features,
    )
    return y.to(x.dtype)
