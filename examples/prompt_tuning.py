"""Prompt tuning on a 4-bit base: a few virtual tokens are all that is trained."""

from __future__ import annotations

import torch
from chats import arguments, batches
from peft import PromptTuningConfig, get_peft_model

import fourbit


def main() -> None:
    """Loads in 4 bits, puts trained embeddings in front of every prompt, trains."""
    args = arguments(__doc__)
    base, tokenizer = fourbit.load(args.model, quant=fourbit.QuantConfig())
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16)
    model = get_peft_model(base, config).train()
    model.print_trainable_parameters()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    with fourbit.watch(model, optimizer) as receipt:
        for batch in batches(tokenizer, args.data, steps=args.steps):
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    # watch raises when a check fails, so the base is proven to be what it was
    print("base unchanged: " + next(c.detail for c in receipt.checks if c.name == "base_unchanged"))
    facts = receipt.facts
    print(f"loss {facts['train_loss_first']:.4f} -> {facts['train_loss_last']:.4f}")
    if args.output:
        model.save_pretrained(args.output)


if __name__ == "__main__":
    main()
