"""Mixture-of-experts models of transformers on packed experts, through its experts interface.

Hooks used: ``ALL_EXPERTS_FUNCTIONS``, transformers' public registry of experts' forwards; the
attributes that its decorator ``use_experts_implementation`` sets on an experts module; and PEFT's
``ParamWrapper``, its LoRA on a 3-D parameter, of which `LoraExperts` is a subclass with the same
tensors on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.quantizers_utils import should_convert_module

from fourbit.errors import InputError, ModelError
from fourbit.experts import (
    attach_adapter,
    empty_stack_,
    expert_linear,
    pack_stack,
    restore_stack_,
    routes,
)
from fourbit.linear import ExpertStack, expert_stacks
from fourbit.quantize import QuantConfig

_FORWARD = "fourbit"
_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The mixture's output ``[T, H]``.

    Args:
        self: an experts module whose weights are packed.
        hidden_states: ``[T, H]``.
        top_k_index: chosen experts, int ``[T, k]``.
        top_k_weights: their weights ``[T, k]``.
    """
    out = torch.zeros_like(hidden_states)
    for expert, rows, slots in routes(top_k_index, self.num_experts):
        x = hidden_states[rows]
        if self.has_gate:
            inner = self._apply_gate(expert_linear(self, "gate_up_proj", expert, x))
        else:
            inner = self.act_fn(expert_linear(self, "up_proj", expert, x))
        y = expert_linear(self, "down_proj", expert, inner) * top_k_weights[rows, slots, None]
        out.index_add_(0, rows, y.to(out.dtype))
    return out


ALL_EXPERTS_FUNCTIONS.register(_FORWARD, experts_forward)


def replace_experts(
    model: nn.Module, quant: QuantConfig, *, compute_dtype: torch.dtype | None, skip: list[str]
) -> list[str]:
    """Packs every stack of experts that can be packed, in place; on meta only shapes are made.

    Returns:
        The names of the packed parameters. Layouts that `experts_forward` does not compute
        (transposed weights, biases, a norm after each expert) stay as they are.
    """
    replaced = []
    for prefix, module in model.named_modules():
        names = [name for name in _WEIGHTS if _is_stack(module, name)]
        kept = [n for n in names if not should_convert_module(f"{prefix}.{n}", skip)]
        if not names or kept or not _computable(module):
            continue
        for name in names:
            weight = getattr(module, name)
            stack = ExpertStack(quant, tuple(weight.shape), compute_dtype, weight.dtype)
            empty_stack_(module, name, stack)
            if not weight.is_meta:
                packed = pack_stack(stack, weight.detach(), name=f"{prefix}.{name}")
                for ending, tensor in packed.items():
                    module.register_parameter(
                        name + ending, nn.Parameter(tensor, requires_grad=False)
                    )
            replaced.append(f"{prefix}.{name}")
        # Otherwise transformers would draw random numbers into integer parameters.
        module._is_hf_initialized = True  # type: ignore[assignment]
        module.config._experts_implementation = _FORWARD  # type: ignore[union-attr]
    return replaced


def restore_experts(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Makes every packed stack floating again, and its module's forward transformers' own."""
    for module in model.modules():
        for name in list(expert_stacks(module)):
            restore_stack_(module, name, dtype)
            module.config._experts_implementation = "eager"  # type: ignore[union-attr]


def _is_stack(module: nn.Module, name: str) -> bool:
    weight = module._parameters.get(name)
    return weight is not None and weight.dim() == 3


def _computable(module: nn.Module) -> bool:
    marks = module.__dict__
    if "is_transposed" not in marks or "num_experts" not in marks:
        return False
    foreign = ("is_transposed", "has_bias", "has_post_expert_norm")
    return not any(marks.get(mark) for mark in foreign)


class LoraExperts(ParamWrapper):
    """PEFT's LoRA on packed experts (``target_parameters``): per expert ``scaling · B·A`` beside W.

    Same tensors and names as PEFT's own layer, which would add ``B·A`` to the packed bytes.
    """

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        stack = expert_stacks(self.get_base_layer())[self.parameter_name]
        self.num_experts, rows, columns = stack.shape
        self._param_ndim = 3
        return rows, columns

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        names = [name for name in active_adapters or () if name in self.lora_A]
        if not names:
            yield
            return
        if len(names) > 1:
            raise InputError(
                "several-expert-adapters",
                where="active_adapters",
                what=f"{len(names)} adapters at once on packed experts",
                fix="activate one with set_adapter",
            )
        linear_A: Any = self.lora_A[names[0]]
        linear_B: Any = self.lora_B[names[0]]
        a, b = linear_A.weight, linear_B.weight
        a = a.view(self.num_experts, -1, a.shape[-1])
        b = b.view(b.shape[0], -1, self.num_experts)
        scaling = self.scaling[names[0]]
        with attach_adapter(
            self.get_base_layer(),
            self.parameter_name,
            lambda index: (a[index], b[:, :, index], scaling),
        ):
            yield

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: rounding ``W + sBA`` back to few bits would lose most of what was learned."""
        raise ModelError(
            "merge-into-packed-experts",
            where=self.parameter_name,
            what="an adapter cannot be merged into packed experts without losing it",
            fix="keep the adapter beside the base",
        )


# PEFT nests wrappers of several parameters of one module only when it finds this class name.
LoraExperts.__name__ = ParamWrapper.__name__
