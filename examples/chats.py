"""What the examples share: their command line, batches of chats, and what a trainer needs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
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


def precision() -> dict[str, bool]:
    """A trainer's flags for this machine; TRL would ask for bf16 everywhere."""
    cuda = torch.cuda.is_available()
    bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    return {"use_cpu": not cuda, "bf16": bf16, "fp16": cuda and not bf16}


def show(receipt: fourbit.Receipt | None) -> None:
    """The two lines every example ends with; a receipt that failed has raised before."""
    assert receipt is not None
    print("base unchanged: " + next(c.detail for c in receipt.checks if c.name == "base_unchanged"))
    first, last = receipt.facts["train_loss_first"], receipt.facts["train_loss_last"]
    print(f"loss {first:.4f} -> {last:.4f}")


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
