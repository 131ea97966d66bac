"""The models of the benchmark, made once in the work folder: plain weights, text, GGUF files.

Peers need an ordinary folder of bf16 safetensors; it is made from whatever fourbit can load. The
1.1B shape has random weights. llama.cpp gets the same weights as F16, which its own function then
quantizes.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import protocol

ROPE_KEYS = ("q_proj", "k_proj")
GGUF_KINDS = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7}
"""llama.h: enum llama_ftype."""
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def small(options: argparse.Namespace) -> dict[str, Any]:
    """What a child must know of the small model; made on first use."""
    name = Path(options.model).stem
    folder = options.work / f"{name}-bf16"
    text = options.data_dir or protocol.REPOSITORY
    ids = options.work / f"{name}-{text.resolve().name}.pt"
    _make("plain", {"model": options.model, "to": str(folder)}, folder / "config.json", options)
    told = {"folder": str(folder), "text": str(text.resolve()), "to": str(ids)}
    _make("tokenize", told, ids, options)
    return {"model": str(folder), "ids": str(ids), "size": "small"}


def large(options: argparse.Namespace) -> dict[str, Any]:
    """What a child must know of the 1.1B shape; made on first use."""
    folder = options.large or options.work / "tinyllama-1.1b"
    _make("random", {"to": str(folder)}, folder / "config.json", options)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    return {"model": str(folder.resolve()), "vocabulary": vocabulary, "size": "large"}


def gguf(folder: str, kind: str, options: argparse.Namespace) -> Path | None:
    """The model as llama.cpp quantizes it; None when llama.cpp is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    plain = options.work / f"{Path(folder).name}.f16.gguf"
    made = options.work / f"{Path(folder).name}.{kind}.gguf"
    _make("f16", {"folder": folder, "to": str(plain)}, plain, options)
    told = {"from": str(plain), "to": str(made), "kind": kind}
    _make("quantize", told, made, options)
    return made


def _make(kind: str, told: dict[str, Any], made: Path, options: argparse.Namespace) -> None:
    """In a child, so that the measuring process stays small; whole or not at all."""
    if made.exists():
        return
    protocol.say(f"making {made}")
    options.work.mkdir(parents=True, exist_ok=True)
    protocol.run_child(__file__, {"make": kind, **told}, options, {})


# Children.


def make_plain(spec: dict[str, Any]) -> None:
    import torch

    import fourbit

    model, tokenizer = fourbit.load(spec["model"], dtype=torch.bfloat16)
    with Staged(Path(spec["to"])) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def make_random(spec: dict[str, Any]) -> None:
    sys.path.insert(0, str(protocol.HERE.parent))
    import shapes

    with Staged(Path(spec["to"])) as folder:
        shapes.write_model(folder, "tinyllama-1.1b")


def make_tokenize(spec: dict[str, Any]) -> None:
    import torch
    from transformers import AutoTokenizer

    root = Path(spec["text"])
    endings = ("*.md", "*.txt", "*.txt.gz", "docs/**/*.md")
    found = sorted({path for ending in endings for path in root.glob(ending)})
    if not found:
        raise SystemExit(f"--data-dir: no *.txt, *.txt.gz or *.md in {root}")
    texts = [
        gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
        for path in found
    ]
    ids = AutoTokenizer.from_pretrained(spec["folder"])("\n".join(texts)[: 1 << 21]).input_ids
    torch.save(torch.tensor(ids), spec["to"])


def make_f16(spec: dict[str, Any]) -> None:
    """The GGUF file of a Llama folder. It has no vocabulary: the benchmark speaks in ids."""
    import gguf
    import torch
    from safetensors.torch import load_file

    folder = Path(spec["folder"])
    config = json.loads((folder / "config.json").read_text())
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    rope = config.get("rope_parameters") or {}
    partial = Path(spec["to"]).with_suffix(".partial")
    writer = gguf.GGUFWriter(str(partial), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope.get("rope_theta") or config.get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(1)
    for path in sorted(folder.glob("*.safetensors")):
        for name, value in load_file(path).items():
            if name.endswith(tuple(f"{key}.weight" for key in ROPE_KEYS)):
                value = interleaved(value, heads if "q_proj" in name else groups)
            dtype = torch.float32 if value.dim() == 1 else torch.float16
            writer.add_tensor(gguf_name(name), value.to(dtype).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(spec["to"])


def interleaved(weight: Any, heads: int) -> Any:
    """Rows as llama.cpp rotates them: pairs (0, 1), (2, 3), ... instead of halves."""
    rows, columns = weight.shape
    return (
        weight.view(heads, 2, rows // heads // 2, columns)
        .transpose(1, 2)
        .reshape(rows, columns)
        .contiguous()
    )


def gguf_name(name: str) -> str:
    """A tensor's name in llama.cpp's files."""
    if name.startswith("model.layers."):
        _, _, index, rest = name.split(".", 3)
        return f"blk.{index}.{NAMES[rest.removesuffix('.weight')]}.weight"
    ends = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    return ends[name]


def make_quantize(spec: dict[str, Any]) -> None:
    import llama_cpp

    partial = Path(spec["to"]).with_suffix(".partial")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = GGUF_KINDS[spec["kind"]]
    settings.nthread = spec["threads"]
    code = llama_cpp.llama_model_quantize(spec["from"].encode(), str(partial).encode(), settings)
    if code != 0:
        raise SystemExit(f"llama_model_quantize answered {code}")
    partial.replace(spec["to"])


class Staged:
    """A folder that appears only when it is complete."""

    def __init__(self, target: Path) -> None:
        self.target, self.partial = target, target.with_name(target.name + ".partial")

    def __enter__(self) -> Path:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return self.partial

    def __exit__(self, kind: object, *_rest: object) -> None:
        if kind is None:
            self.partial.replace(self.target)


def child(spec: dict[str, Any]) -> None:
    makers = {
        "plain": make_plain,
        "random": make_random,
        "tokenize": make_tokenize,
        "f16": make_f16,
        "quantize": make_quantize,
    }
    makers[spec["make"]](spec)
    print("\n" + json.dumps({"made": spec["to"]}))


if __name__ == "__main__":
    child(json.loads(sys.argv[2]))
