"""Tensors of which every process holds a part (FSDP2's), beside ordinary ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_shard(tensor: Tensor) -> bool:
    """Whether this process holds only a part of the tensor."""
    if type(tensor) is Tensor or type(tensor) is nn.Parameter:
        return False  # without the import, which is not needed in one process
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part that lies in this process, sharing its memory; an ordinary tensor is its own."""
    if not is_shard(tensor):
        return tensor
    return tensor.detach().to_local()  # type: ignore[attr-defined]  # of a DTensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor put together from all processes, each of which has to ask for it."""
    if not is_shard(tensor):
        return tensor
    return tensor.detach().full_tensor()  # type: ignore[attr-defined]  # of a DTensor


def whole_of(like: Tensor, part: Tensor) -> Tensor:
    """As `whole`, of parts that are divided as ``like`` is and belong together with it."""
    if not is_shard(like):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        like.device_mesh,  # type: ignore[attr-defined]  # of a DTensor
        like.placements,  # type: ignore[attr-defined]
        shape=like.shape,
        stride=like.stride(),
    ).full_tensor()


def shard_of(like: Tensor, value: Tensor) -> Tensor:
    """The part of ``value`` that belongs where `local` of ``like`` lies; nothing is exchanged.

    Args:
        like: says how it is divided.
        value: whole, in the whole shape of ``like``.
    """
    if not is_shard(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    value = value.to(local(like).device)
    return distribute_tensor(value, mesh, placements, src_data_rank=None).to_local()


@torch.no_grad()
def assign_(tensor: Tensor, value: Tensor) -> None:
    """Copies a whole ``value`` into ``tensor``, of a divided one this process's part."""
    local(tensor).copy_(shard_of(tensor, value))
