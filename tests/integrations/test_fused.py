"""Fused decoder layers compute what transformers' own compute, or leave it to them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from fourbit import native
from fourbit.fused import observer, paths
from fourbit.fused.scratch import SCRATCH, Scratch
from fourbit.integrations.anatomy import CACHE_ARGUMENTS, FUSED_FROM, known_layers
from fourbit.integrations.attention import NAME, register
from fourbit.integrations.fused import _signature, fused_class, use_fast_paths
from fourbit.integrations.transformers import (
    FourbitConfig,
    enable_checkpointing,
    quantize_model,
)
from fourbit.quantize import QuantConfig
from models import tiny_model

KNOWN = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "granite",
]
pytestmark = pytest.mark.skipif(not native.supported(), reason="no compiled kernels")


@pytest.fixture(autouse=True)
def _poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a block leaves unwritten in a reused buffer shows."""
    take = Scratch.take

    def poisoned(self: Scratch, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return take(self, name, shape, like).fill_(float("nan"))

    monkeypatch.setattr(Scratch, "take", poisoned)


@pytest.fixture(params=native.supported())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.using(request.param):
        yield request.param


def build(
    name: str, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32, quant: bool = True
) -> nn.Module:
    """A quantized model with trained-looking adapters, in training mode, its own dropout off."""
    base = tiny_model(name, dtype=dtype)
    for value in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        if hasattr(base.config, value):
            setattr(base.config, value, 0.0)
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    base.requires_grad_(False)
    if quant:
        quantize_model(base, QuantConfig())
    unfuse(base)
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data = 0.1 * torch.randn_like(parameter)
        if "lora_" in key:
            parameter.data = parameter.data.float()
    return model.train()


def inner(model: nn.Module) -> PreTrainedModel:
    return model.get_base_model()  # type: ignore[operator]


def unfuse(base: PreTrainedModel) -> None:
    """transformers' own layers again, to compare with."""
    for layer in known_layers(base):
        layer.__class__ = vars(type(layer)).get(FUSED_FROM, type(layer))
    base.set_attn_implementation("eager")


def fuse(model: nn.Module) -> nn.Module:
    """Our layers whatever the instruction set, which `use_fast_paths` may find too slow."""
    base = inner(model)
    register()
    base.set_attn_implementation(NAME)
    for layer in known_layers(base):
        layer.__class__ = fused_class(type(layer))
    return model


def run(model: nn.Module, ids: Tensor, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and gradients of a loss that weighs every logit."""
    model.zero_grad()
    torch.manual_seed(5)
    logits = model(input_ids=ids, use_cache=False, **inputs).logits.float()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weights).mean().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), grads


def error(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert got.keys() == wanted.keys()
    return max(float((got[k] - wanted[k]).norm() / (wanted[k].norm() + 1e-20)) for k in wanted)


@pytest.mark.parametrize("name", KNOWN)
def test_known_architectures_equal_transformers_forward_and_backward(name: str):
    ids = torch.randint(0, 256, (2, 11))
    model = build(name, dropout=0.2)
    logits, grads = run(model, ids)
    fused_logits, fused_grads = run(fuse(model), ids)
    assert paths(model) == {"fused": 2}
    torch.testing.assert_close(fused_logits, logits, rtol=1e-4, atol=1e-4)
    assert error(fused_grads, grads) < 1e-4
    assert len(grads) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["gemma3_text", "gpt2"])
def test_every_instruction_set_gives_the_same(name: str, isa: str):
    ids = torch.randint(0, 256, (1, 9))
    model = build(name)
    logits, grads = run(model, ids)
    fused_logits, fused_grads = run(fuse(model), ids)
    assert paths(model) == {"fused": 2}
    torch.testing.assert_close(fused_logits, logits, rtol=1e-4, atol=1e-4)
    assert error(fused_grads, grads) < 1e-4


def test_without_a_library_the_blocks_are_plain_pytorch(monkeypatch: pytest.MonkeyPatch):
    ids = torch.randint(0, 256, (2, 9))
    model = build("gemma3_text", dropout=0.2)
    logits, grads = run(model, ids)
    fuse(model)
    monkeypatch.setattr(native, "isa", lambda: None)
    fused_logits, fused_grads = run(model, ids)
    assert paths(model) == {"fused": 2}
    torch.testing.assert_close(fused_logits, logits, rtol=1e-4, atol=1e-4)
    assert error(fused_grads, grads) < 1e-4


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_packed_documents_do_not_see_each_other(name: str):
    ids = torch.randint(0, 256, (1, 20))
    positions = torch.cat((torch.arange(7), torch.arange(13)))[None]
    model = build(name)
    logits, grads = run(model, ids, position_ids=positions)
    fused_logits, fused_grads = run(fuse(model), ids, position_ids=positions)
    assert paths(model) == {"fused": 2}
    torch.testing.assert_close(fused_logits, logits, rtol=1e-4, atol=1e-4)
    assert error(fused_grads, grads) < 1e-4
    other = ids.clone()
    other[0, :7] = (ids[0, :7] + 1) % 256
    again, _ = run(model, other, position_ids=positions)
    assert torch.equal(again[0, 7:], fused_logits[0, 7:])


def test_padding_is_left_out():
    ids = torch.randint(0, 256, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    model = build("llama")
    logits, _ = run(model, ids, attention_mask=mask)
    fused_logits, _ = run(fuse(model), ids, attention_mask=mask)
    assert paths(model) == {"fused": 2}
    seen = mask.bool()
    torch.testing.assert_close(fused_logits[seen], logits[seen], rtol=1e-4, atol=1e-4)


def test_checkpointing_recomputes_the_same_bits():
    ids = torch.randint(0, 256, (2, 9))
    model = fuse(build("llama", dropout=0.3))
    logits, grads = run(model, ids)
    enable_checkpointing(inner(model))
    again, recomputed = run(model, ids)
    assert paths(model) == {"fused": 2}
    assert torch.equal(logits, again)
    assert all(torch.equal(grads[key], recomputed[key]) for key in grads)


def test_bf16_is_as_near_to_the_truth_as_transformers():
    ids = torch.randint(0, 256, (2, 33))
    exact, exact_grads = run(build("llama"), ids)
    model = build("llama", dtype=torch.bfloat16)
    logits, grads = run(model, ids)
    fused_logits, fused_grads = run(fuse(model), ids)
    assert paths(model) == {"fused": 2}
    assert (fused_logits - exact).norm() < 1.1 * (logits - exact).norm()
    ours = torch.cat([(fused_grads[k] - exact_grads[k]).flatten() for k in grads]).norm()
    theirs = torch.cat([(grads[k] - exact_grads[k]).flatten() for k in grads]).norm()
    assert ours < 1.1 * theirs


def test_nothing_floating_of_the_weights_is_kept_for_backward():
    model = fuse(build("llama"))
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    ids = torch.randint(0, 256, (1, 16))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hidden = inner(model).base_model(input_ids=ids, use_cache=False)[0]
    assert hidden.requires_grad
    # A layer keeps, as floats: two inputs (48 each), q k v (96), o (48), gate and up (160), the
    # 7 adapters' reduced inputs (4 each), two inverse deviations, and one logarithm a head (4).
    per_layer = 16 * (48 + 48 + 96 + 48 + 160 + 28 + 2 + 4) * 4
    scratch = {b.untyped_storage()._cdata for b in SCRATCH._buffers.values()}
    assert not scratch & kept.keys()
    # beside them the final norm's, and tables of positions
    assert sum(kept.values()) <= 2 * per_layer + 16 * (48 * 6 + 24) * 4


Change = Callable[[nn.Module], object]


def hook_inside(model: nn.Module) -> object:
    attention = known_layers(model)[0].self_attn
    assert isinstance(attention, nn.Module)
    return attention.q_proj.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]


def second_adapter(model: nn.Module) -> object:
    model.add_adapter("two", LoraConfig(r=2, target_modules=["q_proj"]))  # type: ignore[operator]
    for key, parameter in model.named_parameters():
        if ".two." in key:
            value = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
            parameter.data = 0.1 * value
    return model.base_model.set_adapter(["default", "two"])  # type: ignore[operator, union-attr]


def train_norms(model: nn.Module) -> object:
    norm = known_layers(model)[0].input_layernorm
    assert isinstance(norm, nn.Module)
    return norm.requires_grad_(True)


def attention_dropout(model: nn.Module) -> object:
    layer = known_layers(model)[0]
    layer.self_attn.attention_dropout = 0.5  # type: ignore[union-attr]
    return layer


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook_inside, "hooks inside"),
        (second_adapter, "adapters that are no single LoRA"),
        (train_norms, "a norm in another dtype, or trained"),
        (attention_dropout, "dropout of the architecture"),
    ],
)
def test_what_the_blocks_do_not_compute_is_left_to_transformers(change: Change, reason: str):
    ids = torch.randint(0, 256, (1, 9))
    model, plain = fuse(build("llama")), build("llama")
    for each in (model, plain):
        change(each)
    logits, grads = run(model, ids)
    assert f"generic: {reason}" in paths(model)
    wanted, wanted_grads = run(plain, ids)
    if reason != "dropout of the architecture":
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
        assert error(grads, wanted_grads) < 1e-4


def test_merged_and_disabled_adapters():
    ids = torch.randint(0, 256, (1, 9))
    model, plain = fuse(build("llama")).eval(), build("llama").eval()
    with model.disable_adapter(), plain.disable_adapter():  # type: ignore[operator]
        torch.testing.assert_close(
            run_plain(model, ids), run_plain(plain, ids), rtol=1e-4, atol=1e-4
        )
        assert paths(model) == {"fused": 2}
    for each in (model, plain):
        each.merge_adapter()  # type: ignore[operator]
    torch.testing.assert_close(run_plain(model, ids), run_plain(plain, ids), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def run_plain(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def test_observers_are_told_and_change_nothing():
    seen = []
    model = fuse(build("llama"))
    layer = known_layers(model)[1].mlp.down_proj  # type: ignore[union-attr]
    layer.register_forward_pre_hook(observer(lambda module, _: seen.append(module)))  # type: ignore[union-attr]
    run(model, torch.randint(0, 256, (1, 5)))
    assert paths(model) == {"fused": 2}
    assert seen == [layer]


def test_adapters_on_some_layers_only_and_16_bit_bases():
    ids = torch.randint(0, 256, (2, 7))
    for targets, quant in ((["q_proj", "down_proj"], True), ("all-linear", False)):
        base = tiny_model("llama")
        base.requires_grad_(False)
        if quant:
            quantize_model(base, QuantConfig(quant_type="fp4", double_quant=False))
        unfuse(base)
        model = get_peft_model(base, LoraConfig(r=4, target_modules=targets)).train()
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.data = 0.1 * torch.randn_like(parameter)
        logits, grads = run(model, ids)
        fused_logits, fused_grads = run(fuse(model), ids)
        assert paths(model) == {"fused": 2}
        torch.testing.assert_close(fused_logits, logits, rtol=1e-4, atol=1e-4)
        assert error(fused_grads, grads) < 1e-4


def test_a_fused_model_can_be_copied_and_pickled():
    ids = torch.randint(0, 256, (1, 5))
    base = tiny_model("llama")
    quantize_model(base, QuantConfig())
    use_fast_paths(base)
    wanted = run_plain(base, ids)
    for other in (copy.deepcopy(base), pickle.loads(pickle.dumps(base))):
        assert torch.equal(run_plain(other, ids), wanted)
        assert type(known_layers(other)[0]) is type(known_layers(base)[0])
        assert type(known_layers(base)[0]).__name__ == "LlamaDecoderLayer"


def test_generation_with_a_cache_is_unchanged():
    ids = torch.randint(0, 256, (2, 5))
    model, plain = fuse(build("llama")).eval(), build("llama").eval()
    inputs = {"input_ids": ids, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**inputs), plain.generate(**inputs))  # type: ignore[operator]


@pytest.mark.parametrize("wanted", [True, False])
def test_from_pretrained_fuses_unless_told_not_to(
    wanted: bool, model_folder: Callable[[str], Path]
):
    config = FourbitConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype="float32",
        fused_layers=wanted,
    )
    model = AutoModelForCausalLM.from_pretrained(
        model_folder("llama"), quantization_config=config, dtype=torch.float32
    )
    run_plain(model, torch.randint(0, 256, (1, 5)))
    assert paths(model) == ({"fused": 2} if wanted and native.isa() != "scalar" else {})
    assert "fused_layers" not in model.config.quantization_config.to_dict()


def test_an_argument_of_a_later_release_is_not_passed_over(monkeypatch: pytest.MonkeyPatch):
    now = LlamaDecoderLayer.forward

    def later(
        self: Any, hidden_states: Tensor, *args: Any, scale: float | None = None, **kwargs: Any
    ):
        return now(self, hidden_states, *args, **kwargs) * (1.0 if scale is None else scale)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", later)
    _signature.cache_clear()
    model = fuse(build("llama")).eval()
    layer, x = known_layers(model)[0], torch.randn(1, 5, 48)
    tables = (torch.ones(1, 5, 12), torch.zeros(1, 5, 12))
    with torch.no_grad():
        wanted = layer(x, position_embeddings=tables, scale=None)
        assert paths(layer) == {"fused": 1}
        torch.testing.assert_close(layer(x, position_embeddings=tables, scale=2.0), 2 * wanted)
    assert paths(layer) == {"generic: an unknown argument: scale": 1}
    _signature.cache_clear()


@pytest.mark.parametrize("name", CACHE_ARGUMENTS)
def test_a_cache_is_filled_by_whichever_name(name: str):
    layer = known_layers(fuse(build("llama")).eval())[0]
    x = torch.randn(1, 5, 48)
    tables = (torch.ones(1, 5, 12), torch.zeros(1, 5, 12))
    cache = DynamicCache()
    with torch.no_grad():
        layer(x, position_embeddings=tables, **{name: cache})
    assert cache.get_seq_length(0) == 5
