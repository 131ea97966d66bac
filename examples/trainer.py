"""transformers' Trainer on a 4-bit base: train, be interrupted, resume, load the adapter again."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from chats import arguments, common, compute_dtype, padded, rows, show, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import fourbit


def load_base(name: str) -> PreTrainedModel:
    """As with a ``BitsAndBytesConfig``, by the same names."""
    config = fourbit.FourbitConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype(),
    )
    return AutoModelForCausalLM.from_pretrained(name, quantization_config=config)


def make_trainer(args: argparse.Namespace, receipt: fourbit.ReceiptCallback, steps: int) -> Trainer:
    """A fresh model and a fresh Trainer."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = [tokens(tokenizer, row["messages"]) for row in rows(args.data)]
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return Trainer(
        model=get_peft_model(load_base(args.model), lora),
        args=TrainingArguments(
            **common(args.output),
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=5e-4,
            lr_scheduler_type="constant",
            save_steps=steps,
        ),
        train_dataset=data,
        eval_dataset=data[:8],  # of the training data: whether it learns, not whether it knows
        data_collator=padded,
        callbacks=[receipt],
    )


def main() -> None:
    """Trains half way, begins anew from the checkpoint, saves, reloads."""
    # any hub id or folder that transformers itself can load
    args = arguments(__doc__, model="HuggingFaceTB/SmolLM2-135M-Instruct")
    args.output = args.output or Path("trainer_output")
    half, receipt = max(args.steps // 2, 1), fourbit.ReceiptCallback()
    trainer = make_trainer(args, receipt, half)
    before = trainer.evaluate()
    trainer.train()

    trainer = make_trainer(args, receipt, half + (args.steps + 1) // 2)
    trainer.train(resume_from_checkpoint=str(args.output / f"checkpoint-{half}"))
    trainer.save_model()  # the adapter alone: the base has not changed
    show(receipt, before, trainer.evaluate())

    again = PeftModel.from_pretrained(load_base(args.model), args.output)
    again.load_adapter(args.output, adapter_name="second")
    again.set_adapter("second")
    trained, ids = trainer.model.eval().cpu(), torch.arange(20)[None]
    with torch.no_grad():
        difference = again.eval().cpu()(ids).logits - trained(ids).logits
    print(f"reloaded, the logits differ by at most {difference.abs().max():.1e}")


if __name__ == "__main__":
    main()
