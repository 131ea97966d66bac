"""What the examples share: their command line, batches of chats, and what a trainer needs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

import fourbit

DATA = Path(__file__).parent / "data" / "chats.jsonl"


def arguments(
    description: str | None, *, data: Path = DATA, model: str = "smollm2"
) -> argparse.Namespace:
    """``--model``, ``--data``, ``--steps`` and ``--output``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default=model, help="alias, folder, GGUF file or hub id")
    parser.add_argument("--data", type=Path, default=data, help="JSONL, see the default file")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", type=Path, help="folder for the adapter")
    return parser.parse_args()


def rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def compute_dtype() -> str:
    """What this machine multiplies fast in."""
    if not torch.cuda.is_available():
        return "float32"
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if bf16 else "float16"


def common(output: Path) -> dict[str, Any]:
    """What every trainer here is told: where, in which precision, and to be quiet."""
    dtype = compute_dtype()
    return {
        "output_dir": str(output),
        "use_cpu": dtype == "float32",
        "bf16": dtype == "bfloat16",  # TRL would ask for it everywhere
        "fp16": dtype == "float16",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }


def show(
    watched: fourbit.ReceiptCallback, before: Mapping[str, float], after: Mapping[str, float]
) -> None:
    """What the examples with a trainer end with; a receipt that failed has raised before."""
    assert watched.receipt is not None
    checks = {check.name: check.detail for check in watched.receipt.checks}
    print(f"base unchanged: {checks['base_unchanged']}")
    print(f"loss {before['eval_loss']:.4f} -> {after['eval_loss']:.4f}")


def batches(
    tokenizer: PreTrainedTokenizerBase, path: Path, *, steps: int, size: int = 4
) -> Iterator[dict[str, torch.Tensor]]:
    """Padded batches, the file over and over; only the last answer of a chat is learned."""
    chats = [row["messages"] for row in rows(path)]
    for step in range(steps):
        chosen = [chats[(step * size + i) % len(chats)] for i in range(size)]
        yield padded([tokens(tokenizer, messages) for messages in chosen])


def tokens(tokenizer: PreTrainedTokenizerBase, messages: list[Any]) -> tuple[list[int], list[int]]:
    """Ids of a chat and its labels, -100 before the last answer."""
    prompt = tokenizer.apply_chat_template(
        messages[:-1], tokenize=False, add_generation_prompt=True
    )
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids, [-100] * len(asked) + ids[len(asked) :]


def padded(examples: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """One batch of chats of different lengths."""
    shape = len(examples), max(len(ids) for ids, _ in examples)
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, -100),
    }
    for row, (ids, labels) in enumerate(examples):
        batch["input_ids"][row, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][row, : len(ids)] = 1
        batch["labels"][row, : len(ids)] = torch.tensor(labels)
    return batch
