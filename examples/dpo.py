"""TRL's DPOTrainer on a 4-bit base: the reference is the same model with its adapter off."""

from __future__ import annotations

from pathlib import Path

from chats import DATA, arguments, common, rows, show
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

import fourbit


def main() -> None:
    """Loads one model in 4 bits; no second copy is needed for the reference."""
    args = arguments(__doc__, data=DATA.with_name("preferences.jsonl"))
    model, tokenizer = fourbit.load(args.model, quant=fourbit.QuantConfig())
    data = Dataset.from_list(rows(args.data))
    receipt = fourbit.ReceiptCallback()
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            **common(args.output or Path("dpo_output")),
            max_steps=args.steps,
            per_device_train_batch_size=2,
            learning_rate=5e-4,
            beta=0.1,
            max_length=256,
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
    before = trainer.evaluate()  # policy and reference are the same model: ln 2 = 0.6931
    trainer.train()
    trainer.save_model()
    show(receipt, before, trainer.evaluate())


if __name__ == "__main__":
    main()
