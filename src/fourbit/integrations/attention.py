"""TEMPORARY stand-in, replaced by the attention branch."""

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "fourbit"


def _m(*a, **k):
    return None


AttentionInterface.register(NAME, sdpa_attention_forward)
AttentionMaskInterface.register(NAME, _m)


def use_native_attention(model):
    model.set_attn_implementation(NAME)
    return True
