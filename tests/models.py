"""Tiny folders of real architectures: a config, random weights, a byte-level tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

from fourbit.data import Batch
from fourbit.data.templates import BUILT_IN
from fourbit.linear import Linear4bit
from fourbit.training.config import TrainConfig
from fourbit.training.run import TrainResult, train

VOCAB = 264

_SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

# Sizes on purpose not divisible by the block of 64; 75 makes a weight with an odd last dimension.
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_SHAPE, "tie_word_embeddings": True},
    "qwen2": {**_SHAPE, "tie_word_embeddings": False},
    "qwen3": {**_SHAPE, "head_dim": 16, "intermediate_size": 75},
    "mistral": {**_SHAPE, "sliding_window": 6},
    "gemma": {**_SHAPE, "head_dim": 20},
    "gemma2": {
        **_SHAPE,
        "head_dim": 20,
        "query_pre_attn_scalar": 20,
        "sliding_window": 6,
        "final_logit_softcapping": 2.0,
        "attn_logit_softcapping": 5.0,
    },
    "gemma3_text": {**_SHAPE, "head_dim": 20, "sliding_window": 6, "sliding_window_pattern": 2},
    "phi": {**_SHAPE, "num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "phi3": {**_SHAPE, "pad_token_id": 0},
    "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gpt_neox": {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "rotary_pct": 0.5,
    },
    "opt": {
        "hidden_size": 48,
        "ffn_dim": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 48,
        "dropout": 0.0,
    },
    "cohere": {**_SHAPE, "logit_scale": 0.25},
    "granite": {
        **_SHAPE,
        "logits_scaling": 4.0,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
    },
    "falcon": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False},
    "bloom": {"hidden_size": 48, "n_layer": 2, "n_head": 4},
    "mixtral": {**_SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **_SHAPE,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 48,
    },
    "mamba": {"hidden_size": 48, "num_hidden_layers": 2, "state_size": 4},
}

TIED = {"llama", "gemma", "gemma2", "gemma3_text", "gpt2", "opt", "cohere", "falcon", "bloom"}
"""Whose head is the embedding."""

PACKABLE = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "gpt2",
    "gpt_neox",
    "cohere",
    "granite",
)
"""Keep packed documents apart, which the isolation probe proves."""

UNPACKABLE = ("opt", "falcon", "bloom")
"""Build their mask, or their positions, from something else than ``position_ids``."""


def tiny_config(name: str, **changes: Any) -> PretrainedConfig:
    """The configuration of one tiny architecture."""
    values = {**_CONFIGS[name], "vocab_size": VOCAB, **changes}
    values.setdefault("tie_word_embeddings", name in TIED)
    if "n_positions" not in values:
        values.setdefault("max_position_embeddings", 256)
    return AutoConfig.for_model(name, bos_token_id=None, eos_token_id=256, **values)


def tiny_model(
    name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """A model whose logits differ enough between tokens for a fault to show."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **changes), dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "A_log" not in key:
                embedding = "embed" in key or "wte" in key or "wpe" in key
                parameter.normal_(0, 0.5 if embedding else 1.5 * parameter.shape[-1] ** -0.5)
            elif key.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif "norm" in key or "ln_" in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.tie_weights()
    return model.to(dtype).eval()


def tiny_tokenizer(template: str | None = BUILT_IN["chatml"]) -> PreTrainedTokenizerFast:
    """Every byte is a token; ChatML's marks are the only specials."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def write_model(
    folder: Path,
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **changes: Any,
) -> Path:
    """Saves a tiny model and its tokenizer."""
    tiny_model(name, dtype=dtype, **changes).save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_chats(path: Path, count: int = 8) -> Path:
    """Short question-and-answer rows of different lengths."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{i} plus {i}?"},
                {"role": "assistant", "content": str(2 * i) + "!" * (i % 5)},
            ]
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def train_tiny(
    model: Path, chats: Path, output: Path, **changes: Any
) -> tuple[TrainResult, TrainConfig]:
    """Two steps through the public entry."""
    values: dict[str, Any] = {
        "max_steps": 2,
        "batch_size": 2,
        "grad_accum": 1,
        "samples": 0,
        **changes,
    }
    if values.get("method", "qlora") in ("qlora", "lora"):
        values.setdefault("lora", {"r": 4})
    rows = {"train": str(chats), "eval": 0, "max_length": 64, **values.pop("data", {})}
    config = TrainConfig(model=str(model), output=str(output), data=rows, **values)
    return train(config), config


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that multiplies by a weight, quantized or not."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }


@torch.no_grad()
def plain_twin(quantized: PreTrainedModel, source: Path) -> PreTrainedModel:
    """The same architecture in float32, its weights replaced by the dequantized ones."""
    twin = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, module in quantized.named_modules():
        if isinstance(module, Linear4bit):
            target = twin.get_submodule(name)
            weight = module.dequantize(torch.float32)
            target.weight.copy_(weight.t() if isinstance(target, Conv1D) else weight)
    return twin.eval()


def make_batch(rows: list[list[list[int]]], *, pad_id: int = 0) -> Batch:
    """A batch of packs of documents, every token but each document's first supervised."""
    width = max(sum(map(len, row)) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    positions, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for line, row in enumerate(rows):
        at = 0
        for document in row:
            end = at + len(document)
            ids[line, at:end] = labels[line, at:end] = torch.tensor(document)
            labels[line, at] = -100
            positions[line, at:end] = torch.arange(len(document))
            at = end
        positions[line, at:] = torch.arange(width - at)
    return Batch(ids, positions, labels, int((labels != -100).sum()), rows=[])


def documents(count: int, *, seed: int = 0) -> list[list[int]]:
    """Random documents of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(5, 15, (count,), generator=generator).tolist()
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in sizes]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of everything that is trained."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
