"""transformers' Trainer on a 4-bit base: train, stop half way, resume, load the adapter again."""

from __future__ import annotations

from pathlib import Path

import torch
from chats import arguments, padded, precision, rows, show, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import fourbit


def load_base(name: str) -> torch.nn.Module:
    """As with a ``BitsAndBytesConfig``, by the same names."""
    flags = precision()
    config = fourbit.FourbitConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=(
            "bfloat16" if flags["bf16"] else "float16" if flags["fp16"] else "float32"
        ),
    )
    return AutoModelForCausalLM.from_pretrained(name, quantization_config=config)


def main() -> None:
    """Trains in two parts, as after an interruption; the second resumes the first."""
    # any hub id or folder that transformers itself can load
    args = arguments(__doc__, model="HuggingFaceTB/SmolLM2-135M-Instruct")
    output = args.output or Path("trainer_output")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = [tokens(tokenizer, row["messages"]) for row in rows(args.data)]
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    half = max(args.steps // 2, 1)

    for steps, resume in ((half, False), (args.steps, True)):
        receipt = fourbit.ReceiptCallback()
        trainer = Trainer(
            model=get_peft_model(load_base(args.model), lora),
            args=TrainingArguments(
                output_dir=str(output),
                max_steps=steps,
                per_device_train_batch_size=4,
                learning_rate=5e-4,
                lr_scheduler_type="constant",
                logging_steps=1,
                save_steps=half,
                report_to="none",
                disable_tqdm=True,
                **precision(),
            ),
            train_dataset=data,
            data_collator=padded,
            callbacks=[receipt],
        )
        trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()  # the adapter alone: the base has not changed
    show(receipt.receipt)

    trained, again = trainer.model, PeftModel.from_pretrained(load_base(args.model), output)
    again.load_adapter(output, adapter_name="second")
    batch = {k: v.to(trained.device) for k, v in padded(data[:2]).items()}
    with torch.no_grad():
        expected = trained.eval()(**batch).loss
        for name in ("default", "second"):
            again.set_adapter(name)
            print(f"adapter {name}: {again.to(trained.device).eval()(**batch).loss - expected:+.1e}")


if __name__ == "__main__":
    main()
