"""Prompts through the model's own forward: keys and values of all, the last state of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from fourbit.integrations.anatomy import cache_argument

_SHARED_PREFIX = 8
"""From this length on a beginning that all prompts have in common is computed once."""


def read_prompts(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, tokens: int
) -> tuple[DynamicCache, Tensor]:
    """Runs the prompts, shorter ones padded on the right.

    Args:
        model: whose inner model is called.
        prompts: token ids, at least one each.
        tokens: of one forward: bounds its activations.

    Returns:
        A cache whose layers hold ``[B, kv_heads, T, head_dim]``, good up to each prompt's length,
        and the states before the head at each prompt's last token, float32 ``[B, D]``.
    """
    inner: Any = model.base_model
    table: Any = model.get_input_embeddings()
    device: torch.device = table.weight.device
    # Padding goes to the right, where no token of a prompt looks, so no mask is needed.
    lengths = [len(prompt) for prompt in prompts]
    cache, shared = DynamicCache(), _shared_prefix(prompts)
    kept = {cache_argument(type(inner)): cache}
    for start in range(0, shared, tokens):
        part = torch.tensor([prompts[0][start : min(start + tokens, shared)]], device=device)
        inner(input_ids=part, use_cache=True, **kept)
    if shared and len(prompts) > 1:
        cache.batch_repeat_interleave(len(prompts))
    ids = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    ids = ids.to(device)
    width = max(64, tokens // len(prompts))
    states: list[Tensor] = [torch.empty(0)] * len(prompts)
    for start in range(shared, ids.shape[1], width):
        part = ids[:, start : start + width]
        hidden = inner(input_ids=part, use_cache=True, **kept).last_hidden_state
        for row, length in enumerate(lengths):
            if start < length <= start + part.shape[1]:
                states[row] = hidden[row, length - 1 - start].float()
    return cache, torch.stack(states)


def _shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many first tokens are the same in all prompts, if it is worth a forward of their own."""
    if len(prompts) == 1:
        return 0
    shortest = min(map(len, prompts))
    count = 0
    while count < shortest - 1 and len({prompt[count] for prompt in prompts}) == 1:
        count += 1
    return count if count >= _SHARED_PREFIX else 0
