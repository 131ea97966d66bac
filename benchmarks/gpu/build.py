"""Models of a shape with random weights, made on the device layer by layer.

No checkpoint is read and no 16-bit model exists beside the packed one. Values depend on the name of
a tensor and the kind of device alone, so all sides of a comparison hold the same model.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, nn

STD = 0.02


def dtype_for(device: torch.device) -> torch.dtype:
    """Of activations and unquantized weights: what fourbit itself chooses."""
    from fourbit.device import resolve_precision

    return resolve_precision("auto", device)


def fourbit_model(shape: str, device: torch.device, *, quantized: bool = True) -> Any:
    """As `fourbit.load` leaves it: packed or plain weights, fused layers where kernels serve."""
    from fourbit import QuantConfig, quantize_model
    from fourbit.integrations.fused import use_fast_paths
    from fourbit.linear import Linear4bit

    model = _empty(shape, dtype_for(device))
    if quantized:
        quantize_model(model, QuantConfig())
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            shape_of = (module.out_features, module.in_features)
            weight = random(f"{name}.weight", shape_of, device, dtype_for(device))
            module.original_dtype = weight.dtype
            module.replace_(module.quantized(weight, name=name))
    _fill(model, device)
    use_fast_paths(model)
    return model.eval()


def bnb_model(shape: str, device: torch.device, *, attention: str = "sdpa") -> Any:
    """As transformers leaves it with `BitsAndBytesConfig`: NF4, double quantization, plain head."""
    from inside import imported

    layers = imported("bitsandbytes").nn
    dtype = dtype_for(device)
    model = _empty(shape, dtype, attention)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        for own, child in list(module.named_children()):
            if type(child) is not nn.Linear or child is head:
                continue
            full = f"{name}.{own}"
            layer = layers.Linear4bit(
                child.in_features, child.out_features, bias=False, compute_dtype=dtype,
                compress_statistics=True, quant_type="nf4", device="meta",
            )  # fmt: skip
            weight = random(f"{full}.weight", tuple(child.weight.shape), device, dtype)
            layer.weight = layers.Params4bit(
                weight, requires_grad=False, compress_statistics=True, quant_type="nf4",
                module=layer,
            )  # fmt: skip
            setattr(module, own, layer.to(device))
    _fill(model, device)
    model.is_loaded_in_4bit = True  # by which PEFT knows what to put its adapters on
    return model.eval()


def plain_model(shape: str, device: torch.device, *, attention: str = "sdpa") -> Any:
    """transformers' own model in 16 bits."""
    model = _empty(shape, dtype_for(device), attention)
    _fill(model, device)
    return model.eval()


def _empty(shape: str, dtype: torch.dtype, attention: str | None = None) -> Any:
    from transformers import AutoModelForCausalLM

    from shapes import configuration

    chosen = {} if attention is None else {"attn_implementation": attention}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configuration(shape), dtype=dtype, **chosen)
    model.config.use_cache = False
    return model


def random(name: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The weight of this name."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    weight = torch.empty(shape, device=device, dtype=dtype)
    return weight.normal_(0, STD, generator=generator)


def _fill(model: Any, device: torch.device) -> None:
    """Everything that is still without memory: norms are ones, the rest is random."""
    for name, module in model.named_modules():
        for own, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_meta:
                continue
            size, dtype = tuple(parameter.shape), parameter.dtype
            if len(size) == 1:
                made = torch.ones(size, device=device, dtype=dtype)
            else:
                made = random(f"{name}.{own}", size, device, dtype)
            module._parameters[own] = nn.Parameter(made, requires_grad=False)
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    model.tie_weights()
