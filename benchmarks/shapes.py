"""Random models in the shapes of real ones, written tensor by tensor: for memory and speed.

    python benchmarks/shapes.py llama-7b DIR [--seed 0] [--max-shard-size 5GB]

Writes config.json, bf16 safetensors shards (13.5 GB for llama-7b) and a byte-level tokenizer.
With --adapter DIR2 also a PEFT adapter of rank --r on every linear layer, with random B.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from fourbit.data.templates import BUILT_IN
from fourbit.merging.base import make_skeleton
from fourbit.shards import Entry, parse_size, write_shards
from sizes import SHAPES as SHAPES

STD = 0.02


def configuration(shape: str) -> LlamaConfig:
    common = {
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 256,
        "dtype": "bfloat16",
    }
    return LlamaConfig(**{**common, **SHAPES[shape]})


def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
    )
    found.chat_template = BUILT_IN["chatml"]
    return found


def write_model(folder: Path, shape: str, *, seed: int = 0, max_shard_size: str = "5GB") -> Path:
    """One tensor in memory at a time."""
    config = configuration(shape)
    shapes = {name: tuple(t.shape) for name, t in make_skeleton(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    entries = [Entry(name, torch.bfloat16, size) for name, size in shapes.items()]
    generator = torch.Generator().manual_seed(seed)

    def tensor(name: str) -> Tensor:
        if "norm" in name:
            return torch.ones(shapes[name], dtype=torch.bfloat16)
        return torch.empty(shapes[name]).normal_(0, STD, generator=generator).bfloat16()

    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder, entries, parse_size(max_shard_size), tensor)
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_adapter(folder: Path, shape: str, *, r: int = 16, seed: int = 1) -> Path:
    """A PEFT adapter on every linear layer but the head."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {}
    targets = set()
    for name, weight in make_skeleton(configuration(shape)).state_dict().items():
        if not name.endswith("_proj.weight"):
            continue
        module = name.removesuffix(".weight")
        targets.add(module.rsplit(".", 1)[-1])
        sizes[f"base_model.model.{module}.lora_A.weight"] = (r, weight.shape[1])
        sizes[f"base_model.model.{module}.lora_B.weight"] = (weight.shape[0], r)
    entries = [Entry(name, torch.float32, size) for name, size in sizes.items()]

    def tensor(name: str) -> Tensor:
        std = sizes[name][1] ** -0.5 if "lora_A" in name else 1e-3
        return torch.empty(sizes[name]).normal_(0, std, generator=generator)

    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder, entries, sys.maxsize, tensor)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": 2 * r,
              "target_modules": sorted(targets), "inference_mode": True}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(values, indent=2))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-shard-size", default="5GB")
    parser.add_argument("--adapter", type=Path, default=None)
    parser.add_argument("--r", type=int, default=16)
    options = parser.parse_args()
    write_model(
        options.folder, options.shape, seed=options.seed, max_shard_size=options.max_shard_size
    )
    if options.adapter is not None:
        write_adapter(options.adapter, options.shape, r=options.r)


if __name__ == "__main__":
    main()
