"""Writes a random bfloat16 checkpoint of a known shape, tensor by tensor: numbers, not a model.

    python benchmarks/shapes.py llama-7b DIR [--shard-size 5GB]

Weights are normal with the spread of trained ones, so that quantization errors are realistic. The
tokenizer maps bytes. Memory stays below a few hundred MB whatever the shape.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from fourbit.quantizing.options import QuantizeOptions
from fourbit.quantizing.shards import Entry, ShardWriter

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "tinyllama-1.1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "llama-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llama-13b": {
        "vocab_size": 32000,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
}
SPREAD = 0.02
PIECE = 1 << 22


def entries(config: LlamaConfig) -> Iterator[Entry]:
    """Every tensor of a Llama of this shape, in the order of the layers."""
    hidden, wide = config.hidden_size, config.intermediate_size
    heads = hidden // config.num_attention_heads * config.num_key_value_heads
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (heads, hidden),
        "self_attn.v_proj": (heads, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    yield Entry("model.embed_tokens.weight", torch.bfloat16, (config.vocab_size, hidden))
    for layer in range(config.num_hidden_layers):
        for name, shape in shapes.items():
            yield Entry(f"model.layers.{layer}.{name}.weight", torch.bfloat16, shape)
    yield Entry("model.norm.weight", torch.bfloat16, (hidden,))
    yield Entry("lm_head.weight", torch.bfloat16, (config.vocab_size, hidden))


def pieces(entry: Entry, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Random values of one tensor; norms are ones."""
    count = entry.bytes // 2
    # one block of random numbers, shifted for each piece: drawing 13 billion would take an hour
    block = torch.empty(PIECE, dtype=torch.bfloat16).normal_(0, SPREAD, generator=generator)
    for start in range(0, count, PIECE):
        size = min(PIECE, count - start)
        if len(entry.shape) == 1:
            yield torch.ones(size, dtype=torch.bfloat16)
        else:
            yield block.roll(7919 * (start // PIECE + 1))[:size]


def write(shape: str, folder: Path, shard_bytes: int) -> None:
    """The whole checkpoint."""
    config = LlamaConfig(
        **SHAPES[shape],
        architectures=["LlamaForCausalLM"],
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        dtype="bfloat16",
        bos_token_id=None,
        eos_token_id=256,
    )
    folder.mkdir(parents=True, exist_ok=True)
    groups: list[list[Entry]] = [[]]
    for entry in entries(config):
        if groups[-1] and sum(e.bytes for e in groups[-1]) + entry.bytes > shard_bytes:
            groups.append([])
        groups[-1].append(entry)
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        writer = ShardWriter(folder / name, group)
        for entry in group:
            writer.put_pieces(entry.name, pieces(entry, generator))
            index[entry.name] = name
        writer.finish()
        print(f"{name}: {sum(e.bytes for e in group) / 1e9:.2f} GB", flush=True)
    total = sum(entry.bytes for group in groups for entry in group)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
    )
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shard-size", default="5GB")
    arguments = parser.parse_args()
    size = QuantizeOptions(max_shard_size=arguments.shard_size).shard_bytes
    write(arguments.shape, arguments.folder, size)


if __name__ == "__main__":
    main()
