"""What the examples share: their command line, and batches of chats."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

DATA = Path(__file__).parent / "data" / "chats.jsonl"


def arguments(description: str | None) -> argparse.Namespace:
    """``--model``, ``--data``, ``--steps`` and ``--output``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="smollm2", help="alias, folder, GGUF file or hub id")
    parser.add_argument("--data", type=Path, default=DATA, help="JSONL with a messages list a row")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", type=Path, help="folder for the adapter")
    return parser.parse_args()


def batches(
    tokenizer: PreTrainedTokenizerBase, path: Path, *, steps: int, size: int = 4
) -> Iterator[dict[str, torch.Tensor]]:
    """Padded batches, the file over and over; only the last answer of a chat is learned."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for step in range(steps):
        chosen = [rows[(step * size + i) % len(rows)]["messages"] for i in range(size)]
        yield _padded([_tokens(tokenizer, messages) for messages in chosen])


def _tokens(tokenizer: PreTrainedTokenizerBase, messages: list[Any]) -> tuple[list[int], list[int]]:
    prompt = tokenizer.apply_chat_template(
        messages[:-1], tokenize=False, add_generation_prompt=True
    )
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids, [-100] * len(asked) + ids[len(asked) :]


def _padded(examples: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
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
