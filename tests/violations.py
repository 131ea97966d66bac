"""Plants one violation of each receipt check through public calls; run as a child process.

Prints one JSON object: scenario -> what caught it ("ok" when nothing did).
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from torch import Tensor

import fourbit

IDS = torch.arange(1, 25).reshape(2, 12)


def fresh(folder: str) -> peft.PeftModel:
    torch.manual_seed(0)
    base, _ = fourbit.load(folder, quant=fourbit.QuantConfig(), dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(base, config)


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def run(
    model: peft.PeftModel,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int = 3,
    labels: Tensor = IDS,
    during: Callable[[], None] = lambda: None,
    adapter_dir: Path | None = None,
    save: Callable[[], None] = lambda: None,
) -> str:
    """Trains under `fourbit.watch`; the line of the error that came, or ``ok``."""
    model.train()
    try:
        with fourbit.watch(model, optimizer, adapter_dir=adapter_dir):
            for _ in range(steps):
                model(input_ids=IDS, labels=labels).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            during()
            save()
    except fourbit.FourbitError as error:
        return f"{error.exit_code} {error.line()}"
    return "ok"


def adamw(parameters: list[torch.nn.Parameter], lr: float = 1e-2) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=lr)


def layer(model: peft.PeftModel) -> torch.nn.Module:
    return model.base_model.model.model.layers[0].self_attn.q_proj


def honest(folder: str) -> str:
    model = fresh(folder)
    with tempfile.TemporaryDirectory() as place:
        return run(
            model,
            adamw(trained(model)),
            adapter_dir=Path(place),
            save=lambda: model.save_pretrained(place),
        )


def base_changed(folder: str) -> str:
    model = fresh(folder)

    def flip_a_byte() -> None:
        layer(model).base_layer.weight.data[0, 0] ^= 1

    return run(model, adamw(trained(model)), during=flip_a_byte)


def foreign_parameter(folder: str) -> str:
    model = fresh(folder)
    stray = torch.nn.Parameter(torch.zeros(3))
    return run(model, adamw([*trained(model), stray]))


def forgotten_parameter(folder: str) -> str:
    model = fresh(folder)
    return run(model, adamw(trained(model)[1:]))


def stray_trainable(folder: str) -> str:
    model = fresh(folder)
    model.base_model.model.model.norm.weight.requires_grad_(True)
    return run(model, adamw(trained(model)))


def nothing_moves(folder: str) -> str:
    model = fresh(folder)
    return run(model, adamw(trained(model), lr=0.0))


def gradient_cut(folder: str) -> str:
    model = fresh(folder)
    layer(model).register_forward_hook(lambda _module, _inputs, output: output.detach())
    return run(model, adamw(trained(model)))


def gradient_zeroed(folder: str) -> str:
    model = fresh(folder)
    layer(model).lora_B["default"].weight.register_hook(torch.zeros_like)
    return run(model, adamw(trained(model)))


def lora_a_dead(folder: str) -> str:
    model = fresh(folder)
    layer(model).lora_A["default"].weight.register_hook(torch.zeros_like)
    return run(model, adamw(trained(model)))


def all_masked(folder: str) -> str:
    model = fresh(folder)
    return run(model, adamw(trained(model)), steps=1, labels=torch.full_like(IDS, -100))


def saved_is_another(folder: str) -> str:
    model = fresh(folder)

    def save_then_go_on(place: str) -> None:
        model.save_pretrained(place)
        layer(model).lora_B["default"].weight.data.add_(1.0)

    with tempfile.TemporaryDirectory() as place:
        return run(
            model,
            adamw(trained(model)),
            adapter_dir=Path(place),
            save=lambda: save_then_go_on(place),
        )


def nothing_saved(folder: str) -> str:
    model = fresh(folder)
    with tempfile.TemporaryDirectory() as place:
        return run(model, adamw(trained(model)), adapter_dir=Path(place))


SCENARIOS = {
    "honest": honest,
    "base_changed": base_changed,
    "foreign_parameter": foreign_parameter,
    "forgotten_parameter": forgotten_parameter,
    "stray_trainable": stray_trainable,
    "nothing_moves": nothing_moves,
    "gradient_cut": gradient_cut,
    "gradient_zeroed": gradient_zeroed,
    "lora_a_dead": lora_a_dead,
    "all_masked": all_masked,
    "saved_is_another": saved_is_another,
    "nothing_saved": nothing_saved,
}

if __name__ == "__main__":
    print(json.dumps({name: plant(sys.argv[1]) for name, plant in SCENARIOS.items()}))
