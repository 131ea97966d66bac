"""The model card beside an adapter: what it is, what it needs, how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fourbit import __version__
from fourbit.methods import quantized_base
from fourbit.sources import ModelSource
from fourbit.training.config import TrainConfig

_LOAD = """```python
import fourbit, peft

base, tokenizer = fourbit.load({base}{quant})
model = peft.PeftModel.from_pretrained(base, "PATH/TO/THIS/FOLDER")
```"""


def model_card(config: TrainConfig, source: ModelSource, facts: Mapping[str, Any]) -> str:
    """Markdown with the YAML header that hubs read."""
    front = {"library_name": "peft", "tags": ["fourbit", config.method]}
    if "/" in source.name and source.revision:
        front["base_model"] = source.name
    header = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    base = f"`{source.name}`" + (f" at revision `{source.revision}`" if source.revision else "")
    stored = "16/32-bit weights"
    quant = ""
    if quantized_base(config.method):
        q = config.quant
        stored = f"{q.quant_type}, blocksize {q.blocksize}, double_quant {q.double_quant}"
        quant = (
            f", quant=fourbit.QuantConfig(quant_type={q.quant_type!r},"
            f" blocksize={q.blocksize}, double_quant={q.double_quant})"
        )
    losses = ""
    if facts.get("eval_loss_before") is not None and facts.get("eval_loss_after") is not None:
        losses = (
            f"- evaluation loss: {facts['eval_loss_before']:.4f} before,"
            f" {facts['eval_loss_after']:.4f} after\n"
        )
    what = "Model" if config.method == "full" else "Adapter"
    adapter = _adapter_line(config)
    return (
        f"---\n{header}\n---\n# {what} trained with fourbit {__version__}\n\n"
        f"- base: {base}\n- base held as: {stored}\n- method: {config.method}\n{adapter}"
        f"- steps: {facts.get('steps')}\n{losses}- seed: {config.seed}\n\n"
        + ("" if config.method == "full" else _LOAD.format(base=repr(source.name), quant=quant))
        + "\n"
    )


def _adapter_line(config: TrainConfig) -> str:
    if config.method == "full":
        return ""
    prompt = config.prompt
    if config.method == "prompt_tuning":
        start = prompt.prompt_tuning_init
        return f"- {prompt.num_virtual_tokens} virtual tokens, started from {start}\n"
    if config.method == "p_tuning":
        network = prompt.encoder_reparameterization_type
        return f"- {prompt.num_virtual_tokens} virtual tokens, made by an {network} not kept here\n"
    return f"- r {config.lora.r}, lora_alpha {config.lora.lora_alpha:g}\n"
