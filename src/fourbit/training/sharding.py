"""FSDP2: each process holds a part of every decoder layer, and gathers a layer when it is its turn.

What is gathered are packed bytes and the bits of scales, so a quarter of what 16-bit weights would
move, and nothing that mixed precision could round. Embeddings, the last norm and the head stay
whole in every process: the chunked loss reads the head's weight outside of a layer's turn.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from fourbit.distributed import Ranks, is_shard, local
from fourbit.distributed.gradients import exchanged
from fourbit.errors import InputError
from fourbit.integrations.anatomy import FUSED_FROM
from fourbit.integrations.peft import base_model
from fourbit.integrations.transformers import decoder_layers


class Sharding:
    """The decoder layers of a model, divided among the processes.

    Args:
        model: with its adapters, whole in every process; changed in place.
        ranks: the processes.
        device: where the parts shall be.

    Raises:
        InputError: an architecture whose layers are not known.
    """

    def __init__(self, model: nn.Module, ranks: Ranks, device: torch.device) -> None:
        base = base_model(model)
        layers = decoder_layers(base)
        if not layers:
            raise InputError(
                "no-layers-to-divide",
                where="parallel",
                what=f"the layers of {base.config.model_type} are not known, so none can be"
                " divided",
                fix="use parallel: ddp",
            )
        # our fused layers return a view; nothing is added to it in place
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view", UserWarning)
        self._ranks = ranks
        self._gather = _Gather(ranks)
        self._sums: list[_OrderedScatter] = []
        self._divided: list[Tensor] = []
        mesh = init_device_mesh(device.type, (ranks.size,))
        for layer in layers:
            self._divide(layer, mesh)
        self._divided = [p for layer in layers for p in layer.parameters()]
        outside = {p for p in base.base_model.parameters() if not is_shard(p)}
        # the root brings the layers' turns into one order; it has no parameters of its own
        fully_shard(base.base_model, mesh=mesh, ignored_params=outside)
        for tensor in (*model.parameters(), *model.buffers()):
            if not is_shard(tensor):
                tensor.data = tensor.data.to(device)

    def _divide(self, layer: nn.Module, mesh: DeviceMesh) -> None:
        before = type(layer)
        divided = fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        assert isinstance(divided, FSDPModule)
        # FSDP2 makes a subclass of the layer's class, under which ours must know it again
        if FUSED_FROM in vars(before):
            setattr(type(layer), FUSED_FROM, vars(before)[FUSED_FROM])
        total = _OrderedScatter(self._ranks)
        self._sums.append(total)
        divided.set_custom_all_gather(self._gather)
        divided.set_custom_reduce_scatter(total)
        # a sum, and no mean over the processes
        divided.set_gradient_divide_factor(1.0)
        divided.set_force_sum_reduction_for_comms(True)

    @property
    def own_bytes(self) -> int:
        """Of the divided layers, what lies in this process."""
        return sum(_bytes(local(p)) for p in self._divided)

    @property
    def all_bytes(self) -> int:
        """The divided layers whole."""
        return sum(_bytes(p) for p in self._divided)

    @property
    def moved(self) -> int:
        """Bytes this process has sent so far."""
        return self._gather.moved + sum(total.moved for total in self._sums)

    def begin_round(self, active: int, *, first: bool) -> None:
        """Prepares for one micro-batch of each process.

        Args:
            active: how many processes' micro-batches count.
            first: whether it is the step's first.
        """
        for total in self._sums:
            total.active = active
            if first:
                total.sum = None
        for parameter in self._divided:
            parameter.grad = None  # what comes is the sum of all rounds so far


class _Gather(AllGather):
    """All-gather that counts what it moves, and during which others may be waited for."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.moved = 0

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        self.moved += _bytes(input_tensor) * (self._ranks.size - 1)
        parts = list(output_tensor.view(self._ranks.size, -1).unbind())
        with self._ranks.waiting():
            return dist.all_gather(parts, input_tensor.view(-1), group=group, async_op=async_op)


class _OrderedScatter(ReduceScatter):
    """Adds one layer's gradients in the order of the micro-batches, as one process would."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.active = ranks.size
        self.sum: Tensor | None = None
        self.moved = 0

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: object,
        async_op: bool = False,
    ) -> dist.Work | None:
        theirs = exchanged(self._ranks, input_tensor)
        self.moved += _bytes(input_tensor) * (self._ranks.size - 1) // self._ranks.size
        for part in theirs[: self.active]:
            self.sum = part.clone() if self.sum is None else self.sum.add_(part)
        assert self.sum is not None
        output_tensor.copy_(self.sum)
        return None


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
