"""The sides of the training sections: how each is made on random weights of the same values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu import build
from inside import Skipped, imported, seed_adapter
from trainees import LR, RANK, Trainee, as_batch, lora, own_loss

B_STD = 0.01
"""Of the adapters' B: at zero no gradient would reach A."""
Spec = dict[str, Any]


def trainee(spec: Spec, device: torch.device) -> Trainee:
    """The side that ``spec["side"]`` names.

    Raises:
        Skipped: a library of it is not here, or takes no such device.
    """
    made = MAKERS[spec["side"]](spec, device)
    seed_adapter(made.model, std_b=B_STD)
    return made


def fourbit(spec: Spec, device: torch.device) -> Trainee:
    """What `fourbit train` assembles, from the same objects.

    ``quantized`` false: LoRA on the 16-bit model. ``paged``, ``rank`` and ``recompute`` (all,
    offload) are the settings of these names.
    """
    from fourbit import LoraSettings
    from fourbit.integrations.peft import add_adapter
    from fourbit.integrations.transformers import enable_checkpointing
    from fourbit.objective import Objective, mixed_precision
    from fourbit.optim import OptimConfig, build_optimizer

    quantized, rank = spec.get("quantized", True), spec.get("rank", RANK)
    base = build.fourbit_model(spec["shape"], device, quantized=quantized)
    if spec.get("recompute"):
        enable_checkpointing(base)
    base.requires_grad_(False)
    settings = LoraSettings(r=rank, lora_alpha=2 * rank, lora_dropout=0.0)
    model = add_adapter(base, settings).train()
    method = "qlora" if quantized else "lora"
    objective = Objective(model, mixed_precision(model, build.dtype_for(device), method))
    if spec.get("recompute") == "offload":
        objective.offload_activations()

    def loss(ids: Tensor) -> Tensor:
        batch = as_batch(ids.cpu(), packed=False)
        return objective.loss_sum(batch) / batch.num_supervised

    made = Trainee(model, loss)
    optim = OptimConfig(lr=LR, paged=spec.get("paged", "off"))
    made.optimizer = build_optimizer(made.parameters, optim)
    return made


def bnb(spec: Spec, device: torch.device) -> Trainee:
    """bitsandbytes and PEFT as their documentation says, under the autocast of ``bf16=True``."""
    from peft import get_peft_model, prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(
        build.bnb_model(spec["shape"], device),
        use_gradient_checkpointing=bool(spec.get("recompute")),
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    model = get_peft_model(model, lora()).train()
    plain = own_loss(model)

    def loss(ids: Tensor) -> Tensor:
        dtype = build.dtype_for(device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            return plain(ids)

    return Trainee(model, loss)


def bnb_expert(spec: Spec, device: torch.device) -> Trainee:
    """bitsandbytes with everything kept in 16 bits, the adapters too: what an expert would do."""
    from peft import get_peft_model

    base = build.bnb_model(spec["shape"], device)
    base.requires_grad_(False)
    if spec.get("recompute"):
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    model = get_peft_model(base, lora(), autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(build.dtype_for(device))
    return Trainee(model.train(), own_loss(model))


def liger(spec: Spec, device: torch.device) -> Trainee:
    """The same with Liger's kernels for norms, rotation, SwiGLU, and head with loss."""
    kernels = imported("liger_kernel.transformers")
    if device.type != "cuda":
        raise Skipped("Liger's kernels run on a GPU only")
    kernels.apply_liger_kernel_to_llama()
    return bnb_expert(spec, device)


def unsloth(spec: Spec, device: torch.device) -> Trainee:
    """Unsloth as its documentation says; it loads files, so its random weights are others."""
    if device.type != "cuda":
        raise Skipped("Unsloth runs on a GPU only")
    loader = imported("unsloth").FastLanguageModel
    import shapes

    folder = Path(spec["work"]) / spec["shape"]
    if not (folder / "config.json").exists():
        shapes.write_model(folder, spec["shape"])
    model, _ = loader.from_pretrained(
        str(folder), max_seq_length=spec["length"], load_in_4bit=True, dtype=build.dtype_for(device)
    )
    named = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = loader.get_peft_model(
        model, r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, bias="none", target_modules=named,
        use_gradient_checkpointing="unsloth" if spec.get("recompute") else False,
    )  # fmt: skip
    return Trainee(model.train(), own_loss(model))


MAKERS: dict[str, Callable[[Spec, torch.device], Trainee]] = {
    "fourbit": fourbit,
    "bnb": bnb,
    "bnb-expert": bnb_expert,
    "liger": liger,
    "unsloth": unsloth,
}
