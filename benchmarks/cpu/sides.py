"""The sides of the training comparison: how each is loaded, and one optimizer step of it.

All take the same ids from the same bf16 weights; all clip to the same norm and use torch's AdamW.
What differs is what the names say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import child
import torch
from torch import Tensor, nn

from trainees import ALPHA, LR, RANK, Trainee, as_batch, lora, own_loss
from trainees import document_starts as document_starts


def from_pretrained(folder: str, **keywords: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, **keywords)
    model.config.use_cache = False
    return model


# fourbit.


def fourbit_native(spec: dict[str, Any]) -> Trainee:
    """As `fourbit train` does it, from the same objects."""
    import fourbit
    from fourbit.integrations.peft import add_adapter
    from fourbit.integrations.transformers import enable_checkpointing
    from fourbit.objective import Objective
    from fourbit.optim import OptimConfig, build_optimizer

    base, _ = fourbit.load(spec["model"], quant=fourbit.QuantConfig())
    if spec.get("checkpointing"):
        enable_checkpointing(base)
    base.requires_grad_(False)
    settings = fourbit.LoraSettings(r=RANK, lora_alpha=ALPHA, lora_dropout=spec.get("dropout", 0.0))
    model = add_adapter(base, settings).train()
    objective = Objective(model)
    packed = spec.get("packed", False)

    def loss(ids: Tensor) -> Tensor:
        batch = as_batch(ids, packed=packed)
        return objective.loss_sum(batch) / batch.num_supervised

    trainee = Trainee(model, loss)
    trainee.optimizer = build_optimizer(trainee.parameters, OptimConfig(lr=LR))
    return trainee


def fourbit_transformers(spec: dict[str, Any]) -> Trainee:
    """transformers and PEFT by hand on our layers: the changed line is the configuration."""
    from peft import get_peft_model

    from fourbit import FourbitConfig

    settings = FourbitConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
    )
    model = from_pretrained(
        spec["model"], dtype=torch.bfloat16, quantization_config=settings, device_map={"": "cpu"}
    )
    model = get_peft_model(model, lora()).train()
    return Trainee(model, own_loss(model))


# bitsandbytes.


def bnb_base(spec: dict[str, Any], *, int8: bool = False) -> Any:
    child.peer("bitsandbytes")
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=not int8,
        load_in_8bit=int8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return from_pretrained(
        spec["model"], dtype=torch.bfloat16, quantization_config=settings, device_map={"": "cpu"}
    )


def bnb(spec: dict[str, Any]) -> Trainee:
    """bitsandbytes and PEFT as their documentation says; `prepare` makes norms and head fp32."""
    from peft import get_peft_model, prepare_model_for_kbit_training

    checkpointing = bool(spec.get("checkpointing"))
    model = prepare_model_for_kbit_training(
        bnb_base(spec),
        use_gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    model = get_peft_model(model, lora()).train()
    return Trainee(model, own_loss(model))


def bnb_expert(spec: dict[str, Any]) -> Trainee:
    """bitsandbytes with everything kept in bf16, the adapters too: what an expert would do."""
    from peft import get_peft_model

    base = bnb_base(spec)
    base.requires_grad_(False)
    if spec.get("checkpointing"):
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    model = get_peft_model(base, lora(), autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    return Trainee(model.train(), own_loss(model))


# torchao.


def torchao(spec: dict[str, Any]) -> Trainee:
    """LoRA on torchao's NF4 tensors, which PEFT sees as the weights of ordinary linear layers."""
    quantization = child.peer("torchao.quantization")
    from peft import get_peft_model

    model = from_pretrained(spec["model"], dtype=torch.bfloat16)
    for module in quantized_by_all(model):
        count = module.weight.numel() // 64
        group = next(size for size in (256, 128, 64, 32, 1) if count % size == 0)
        packed = quantization.to_nf4(module.weight.detach(), 64, group)
        module.weight = nn.Parameter(packed, requires_grad=False)
    model.requires_grad_(False)
    model = get_peft_model(model, lora()).train()
    return Trainee(model, own_loss(model))


# Without quantization, or with its result as plain weights.


def plain(spec: dict[str, Any]) -> Trainee:
    """LoRA on plain weights of ``spec["dtype"]``; ``nf4``: weights after NF4 and back."""
    from peft import get_peft_model

    dtype = getattr(torch, spec["dtype"])
    attention = spec.get("attention", "sdpa")
    load = torch.float32 if spec.get("nf4") else dtype
    model = from_pretrained(spec["model"], dtype=load, attn_implementation=attention)
    if spec.get("nf4"):
        round_to_nf4(model)
        model.to(dtype)
    model.requires_grad_(False)
    model = get_peft_model(
        model, lora(), autocast_adapter_dtype=not spec.get("narrow_adapters", False)
    ).train()
    return Trainee(model, own_loss(model))


def round_to_nf4(model: nn.Module) -> None:
    """Every weight that the 4-bit sides quantize becomes the value they compute with."""
    from fourbit import dequantize_4bit, quantize_4bit

    for module in quantized_by_all(model):
        packed, state = quantize_4bit(module.weight.detach())
        module.weight.data = dequantize_4bit(packed, state).to(module.weight.dtype)


def quantized_by_all(model: Any) -> list[nn.Linear]:
    """Every linear layer but the head."""
    head = model.get_output_embeddings()
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]


SIDES: dict[str, Callable[[dict[str, Any]], Trainee]] = {
    "fourbit": fourbit_native,
    "fourbit-transformers": fourbit_transformers,
    "bnb": bnb,
    "bnb-expert": bnb_expert,
    "torchao": torchao,
    "plain": plain,
}
