"""TRL's SFTTrainer on a 4-bit base: chats packed together, loss on the assistant's words only."""

from __future__ import annotations

from pathlib import Path

from chats import arguments, common, rows, show
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import fourbit

TEMPLATE = Path(__file__).parent / "data" / "chatml_training.jinja"
"""ChatML with ``{% generation %}`` around what the assistant says; TRL brings such templates for
Llama 3, Qwen, Gemma, Phi and others by itself, but not for SmolLM2."""


def main() -> None:
    """Loads in 4 bits and leaves the rest to TRL."""
    args = arguments(__doc__)
    model, tokenizer = fourbit.load(args.model, quant=fourbit.QuantConfig())
    data = Dataset.from_list(rows(args.data))
    receipt = fourbit.ReceiptCallback()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **common(args.output or Path("sft_output")),
            max_steps=args.steps,
            per_device_train_batch_size=2,
            learning_rate=5e-4,
            max_length=256,
            packing=True,
            assistant_only_loss=True,
            chat_template_path=str(TEMPLATE),
            save_strategy="no",
        ),
        train_dataset=data,
        eval_dataset=data.select(range(8)),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[receipt],
    )
    before = trainer.evaluate()
    trainer.train()
    trainer.save_model()
    show(receipt, before, trainer.evaluate())


if __name__ == "__main__":
    main()
