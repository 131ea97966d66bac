"""P-tuning on a 4-bit base: a small network writes the virtual tokens."""

from __future__ import annotations

import torch
from chats import arguments, batches
from peft import PromptEncoderConfig, get_peft_model

import fourbit


def main() -> None:
    """Loads in 4 bits, lets a prompt encoder write what stands before every prompt, trains."""
    args = arguments(__doc__)
    base, tokenizer = fourbit.load(args.model, quant=fourbit.QuantConfig())
    config = PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=16, encoder_hidden_size=128
    )
    model = get_peft_model(base, config).train()
    model.print_trainable_parameters()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

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
