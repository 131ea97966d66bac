"""QLoRA in a loop of your own, with the three usual checks and the receipt around it."""

from __future__ import annotations

import torch
from chats import arguments, batches
from peft import LoraConfig, get_peft_model

import fourbit


def main() -> None:
    """Loads in 4 bits, adds adapters, trains, checks."""
    args = arguments(__doc__)
    base, tokenizer = fourbit.load(args.model, quant=fourbit.QuantConfig())
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()

    # 1: few parameters are trained
    model.print_trainable_parameters()
    # 2: the optimizer holds exactly these
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-4)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    # 3: afterwards the base is what it was
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}

    with fourbit.watch(model, optimizer) as receipt:
        for batch in batches(tokenizer, args.data, steps=args.steps):
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    after = dict(model.named_parameters())
    assert all(torch.allclose(after[name], tensor) for name, tensor in frozen.items())
    for check in receipt.checks:
        print(f"{'ok' if check.ok else 'FAILED'}  {check.name}: {check.detail}")
    print("base unchanged")
    facts = receipt.facts
    print(f"loss {facts['train_loss_first']:.4f} -> {facts['train_loss_last']:.4f}")
    if args.output:
        model.save_pretrained(args.output)


if __name__ == "__main__":
    main()
