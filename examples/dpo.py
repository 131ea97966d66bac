"""TRL's DPOTrainer on a 4-bit base: the reference is the same model with its adapter off."""

from __future__ import annotations

from chats import DATA, arguments, precision, rows, show
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

import fourbit


def main() -> None:
    """Loads one model in 4 bits; no second copy is needed for the reference."""
    args = arguments(__doc__, data=DATA.with_name("preferences.jsonl"))
    model, tokenizer = fourbit.load(args.model, quant=fourbit.QuantConfig())
    receipt = fourbit.ReceiptCallback()
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(args.output or "dpo_output"),
            max_steps=args.steps,
            per_device_train_batch_size=2,
            learning_rate=5e-4,
            beta=0.1,
            max_length=256,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **precision(),
        ),
        train_dataset=Dataset.from_list(rows(args.data)),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[receipt],
    )
    trainer.train()
    trainer.save_model()
    # before the first step policy and reference are the same model: ln 2 = 0.6931
    print(f"first loss {trainer.state.log_history[0]['loss']:.4f}")
    show(receipt.receipt)


if __name__ == "__main__":
    main()
