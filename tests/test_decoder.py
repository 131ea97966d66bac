"""The native decoder computes what the model computes, token after token."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig

from fourbit import native
from fourbit.decoding import Choice, Decoder, build_decoder
from fourbit.decoding.sampling import choose
from fourbit.generate import Generator, Sampling
from fourbit.integrations.anatomy import cache_argument
from fourbit.integrations.peft import base_model
from fourbit.integrations.transformers import quantize_model
from fourbit.quantize import QuantConfig
from models import tiny_model, tiny_tokenizer

ARCHITECTURES = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "granite", "gpt2"),
)
FORMATS = {
    "nf4": QuantConfig(),
    "fp4-flat": QuantConfig(quant_type="fp4", double_quant=False),
    "int4-32": QuantConfig(quant_type="int4", blocksize=32),
    "nf4-256": QuantConfig(blocksize=256),
    "int8": QuantConfig(quant_type="int8"),
    "plain": None,
}
BOUNDS = {"int8": 3e-2}
"""Rounding activations to 8 bits turns the last bit of a float into a step now and then."""
STEPS = 5
WIDE = {"hidden_size": 128, "intermediate_size": 320}
"""Rows of whole chunks of 64: what the fast products are made for."""

pytestmark = pytest.mark.skipif(not native.supported(), reason="no native library")


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make(name: str, kind: str = "nf4", *, lora: bool = False, **changes: object) -> nn.Module:
    model: nn.Module = tiny_model(name, **changes)
    quant = FORMATS[kind]
    if quant is not None:
        quantize_model(model, quant)
    return with_lora(model) if lora else model.eval()


def with_lora(model: nn.Module, **changes: object) -> nn.Module:
    values = {"r": 5, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    wrapped = get_peft_model(model, LoraConfig(**{**values, **changes}))  # type: ignore[arg-type]
    torch.manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)
    return wrapped.eval()


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]


def decoder_of(model: nn.Module) -> Decoder:
    decoder, reason = build_decoder(model)
    assert decoder is not None, reason
    return decoder


@torch.no_grad()
def assert_same_scores(
    model: nn.Module, rows: list[list[int]], *, bound: float = 1e-4, steps: int = STEPS
) -> None:
    """Every step's scores equal those of the model's own forward with a cache, row by row."""
    decoder = decoder_of(model)
    scores = decoder.prefill(rows, room=steps)
    caches = [DynamicCache() for _ in rows]
    inputs = [torch.tensor([row]) for row in rows]
    for step in range(steps + 1):
        for row, cache in enumerate(caches):
            truth = model(
                input_ids=inputs[row], use_cache=True, **{cache_argument(type(model)): cache}
            )
            expected = truth.logits[0, -1].float()
            assert scores[row].isfinite().all()
            error = (scores[row] - expected).abs().max()
            assert error <= bound * max(1.0, float(expected.abs().max())), (step, row, error)
        if step < steps:
            tokens = scores.argmax(dim=-1)
            inputs = list(tokens[:, None, None])
            scores = decoder.step(tokens)


def transformers_greedy(model: nn.Module, row: list[int], count: int, stop: list[int]) -> list[int]:
    settings = GenerationConfig(max_new_tokens=count, eos_token_id=stop or None, pad_token_id=0)
    ids = torch.tensor([row])
    mask = torch.ones_like(ids)
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)  # type: ignore[operator]
    found = output[0, len(row) :].tolist()
    return found[: next((i for i, token in enumerate(found) if token in stop), len(found))]


@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_scores_as_the_model_does(name, lora, poisoned_empty):
    model = make(name, lora=lora)
    assert_same_scores(model, prompts(9))
    assert_same_scores(model, prompts(9, 4, 14))


@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_format_scores_as_the_model_does(name, kind, lora):
    model = make(name, kind, lora=lora)
    assert_same_scores(model, prompts(9), bound=BOUNDS.get(kind, 1e-4))
    # LLM.int8 looks at all rows of a prompt at once, so only single rows compare
    if kind != "int8":
        assert_same_scores(model, prompts(6, 11, 3, 8, 8))


@pytest.mark.parametrize("isa", native.supported())
def test_every_instruction_set_scores_as_the_model_does(isa, poisoned_empty):
    with native.using(isa):
        for kind in FORMATS:
            model = make("llama", kind, lora=True, num_hidden_layers=1, **WIDE)
            if kind == "int8":
                assert_same_scores(model, prompts(9), bound=BOUNDS[kind])
                continue
            assert_same_scores(model, prompts(9), steps=2)
            assert_same_scores(model, prompts(6, 11, 3, 8, 8, 2), steps=2)


@pytest.mark.parametrize("rows", [(9,), (6, 11, 3)])
@pytest.mark.parametrize("isa", native.supported())
def test_the_number_of_threads_changes_nothing(isa, rows, poisoned_empty):
    with native.using(isa):
        decoder = decoder_of(make("llama", lora=True, **WIDE))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(1)
        scores = [decoder.prefill(prompts(*rows), room=2).clone()]
        torch.set_num_threads(threads)
        scores += [decoder.step(scores[-1].argmax(dim=-1)).clone() for _ in range(2)]
        found.append(torch.stack(scores))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("isa", native.supported())
def test_bf16_models_differ_by_their_rounding(isa):
    """The engine is no further from float32 than the model's own bf16 forward."""
    with native.using(isa), torch.no_grad():
        exact = make("llama", lora=True, **WIDE)
        model = make("llama", lora=True, dtype=torch.bfloat16, **WIDE)
        # the same packed weights, so that only the arithmetic differs
        exact.load_state_dict(model.state_dict())
        for rows in (prompts(12), prompts(12, 7, 9)):
            scores = decoder_of(model).prefill(rows, room=1).clone()
            decoder = decoder_of(model)
            decoder.prefill([row[:-1] for row in rows], room=1)
            stepped = decoder.step(torch.tensor([row[-1] for row in rows])).clone()
            for row, ids in enumerate(rows):
                truth = exact(input_ids=torch.tensor([ids])).logits[0, -1]
                own = model(input_ids=torch.tensor([ids])).logits[0, -1].float()
                allowed = 1.5 * (own - truth).norm()
                assert (scores[row] - truth).norm() <= allowed
                assert (stepped[row] - truth).norm() <= allowed


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_greedy_tokens_are_those_of_transformers(name):
    model = make(name, lora=True)
    rows = prompts(9, 4, 14, 30)
    expected = [transformers_greedy(model, row, 12, []) for row in rows]
    decoder = decoder_of(model)
    assert decoder.generate(rows, max_new_tokens=12) == expected
    # a stop ends its row only, and the others go on without it
    stop = [expected[2][0]]
    cut = [transformers_greedy(model, row, 12, stop) for row in rows]
    assert decoder.generate(rows, max_new_tokens=12, stop=stop) == cut
    assert len(cut[2]) == 0
    assert max(map(len, cut)) == 12


@pytest.mark.parametrize("isa", native.supported())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sketch_of_the_head_finds_the_same_tokens(isa, dtype):
    with native.using(isa):
        model = make("qwen2", "plain", dtype=dtype, vocab_size=1003)
        decoder = decoder_of(model)
        decoder.prefill(prompts(5), room=64)
        head = decoder._layout.head
        assert head is not None
        # rows so much alike that eight bits cannot tell them apart, and two that are equal
        head[500:520] = head[499] * (1 + 0.002 * torch.randn(20, 1)).to(dtype)
        head[7] = head[905]
        decoder._make_sketch()
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for _ in range(60):
                states = 3 * torch.randn(1, 48) + 2 * head[[499]].float()
                scores, best = decoder._call([0], states=states)
                assert best == [int(scores[0].argmax())]
                assert decoder._call([0], states=states, greedy=True)[1] == best


def test_answering_keeps_nothing_for_a_backward(monkeypatch: pytest.MonkeyPatch):
    model = make("llama", "plain")
    assert any(p.requires_grad for p in model.parameters())
    read, graphs = Decoder._read, []
    monkeypatch.setattr(
        Decoder,
        "_read",
        lambda self, rows: graphs.append(torch.is_grad_enabled()) or read(self, rows),
    )
    decoder_of(model).generate(prompts(5, 6), max_new_tokens=2)
    decoder_of(model).prefill(prompts(5), room=1)
    assert graphs == [False, False]


def test_a_sketch_is_made_once_and_anew_when_the_head_changes():
    model = make("qwen2", "plain")
    first = decoder_of(model)
    expected = transformers_greedy(model, prompts(6)[0], 20, [])
    assert first.generate(prompts(6), max_new_tokens=20) == [expected]
    again, _ = build_decoder(model, sketch=first.sketch)
    assert again is not None
    assert again.sketch is first.sketch is not None
    with torch.no_grad():
        model.get_output_embeddings().weight.neg_()
    changed, _ = build_decoder(model, sketch=first.sketch)
    assert changed is not None
    assert changed.sketch is None
    expected = transformers_greedy(model, prompts(6)[0], 20, [])
    assert changed.generate(prompts(6), max_new_tokens=20) == [expected]


def test_a_common_beginning_and_long_prompts_change_nothing(monkeypatch):
    model = make("mistral", lora=True)
    start = prompts(20)[0]
    rows = [start + tail for tail in prompts(3, 40, 1)]
    expected = [transformers_greedy(model, row, 6, []) for row in rows]
    assert decoder_of(model).generate(rows, max_new_tokens=6) == expected
    monkeypatch.setattr("fourbit.decoding.engine._PREFILL_TOKENS", 7)
    long = prompts(150)
    assert decoder_of(model).generate(long, max_new_tokens=6) == [
        transformers_greedy(model, long[0], 6, [])
    ]


def test_rows_are_independent_of_their_company():
    model = make("llama", **WIDE)
    decoder = decoder_of(model)
    rows = prompts(9, 4, 14)
    together = decoder.prefill(rows, room=1).clone()
    for row, alone in zip(rows, together, strict=True):
        assert torch.allclose(decoder.prefill([row], room=1)[0], alone, atol=1e-4)


def test_tokens_are_told_as_they_come():
    decoder = decoder_of(make("llama"))
    told: list[dict[int, int]] = []
    found = decoder.generate(prompts(5, 6), max_new_tokens=4, on_tokens=told.append)
    assert [[part[row] for part in told] for row in range(2)] == found


def test_sampling_is_reproducible_and_keeps_to_the_likely_tokens():
    decoder = decoder_of(make("llama"))
    choice = Choice(temperature=1.5, top_p=0.9)

    def draw(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return decoder.generate(prompts(5, 7), max_new_tokens=12, choice=choice)

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize(
    "choice",
    [
        Choice(temperature=0.7),
        Choice(temperature=1.0, top_p=0.6),
        Choice(temperature=2.0, top_k=5),
        Choice(temperature=1.3, top_p=0.8, top_k=20),
        Choice(repetition_penalty=1.7),
    ],
)
def test_choices_are_those_of_transformers(choice):
    scores = torch.randn(3, 50) * 3
    seen = [[1, 2, 3], [4, 4], [7]]
    model = tiny_model("llama")
    settings = GenerationConfig(
        do_sample=choice.temperature > 0,
        top_p=choice.top_p,
        top_k=choice.top_k,
        repetition_penalty=choice.repetition_penalty,
        temperature=choice.temperature or None,
    )
    expected = []
    for row, ids in enumerate(seen):
        processors = model._get_logits_processor(
            settings, input_ids_seq_length=len(ids), device="cpu"
        )
        expected.append(processors(torch.tensor([ids]), scores[row : row + 1].clone())[0])
    theirs = torch.stack(expected)
    if choice.temperature == 0:
        assert torch.equal(choose(scores, choice, seen=seen), theirs.argmax(-1))
        return
    torch.manual_seed(5)
    drawn = torch.stack([choose(scores.clone(), choice, seen=seen) for _ in range(200)])
    torch.manual_seed(5)
    wanted = torch.stack(
        [torch.multinomial(theirs.softmax(-1), num_samples=1)[:, 0] for _ in range(200)]
    )
    assert torch.equal(drawn, wanted)


def scaled(model: nn.Module) -> nn.Module:
    model.get_submodule("model.layers.0.mlp").register_forward_hook(lambda *_: None)
    return model


REFUSED = {
    "unknown architecture": (lambda: make("gpt_neox", "plain"), "no architecture"),
    "mixture": (lambda: make("mixtral", "plain"), "no architecture"),
    "DoRA": (lambda: with_lora(make("llama"), use_dora=True), "another kind of LoRA"),
    "IA3": (
        lambda: get_peft_model(make("llama"), ia3()).eval(),  # type: ignore[arg-type]
        "carries a",
    ),
    "prompt tuning": (
        lambda: get_peft_model(
            make("llama"),  # type: ignore[arg-type]
            PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        ).eval(),
        "learned prompt",
    ),
    "training": (lambda: make("llama").train(), "training mode"),
    "hooks": (lambda: scaled(make("llama")), "hook"),
    "longer rotation": (
        lambda: make(
            "llama",
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        ),
        "rotation",
    ),
}


def ia3():
    from peft import IA3Config

    return IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    )


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_engine_does_not_know_is_refused_with_a_reason(case):
    build, reason = REFUSED[case]
    decoder, told = build_decoder(build())
    assert decoder is None
    assert reason in told


def test_two_active_adapters_are_refused_and_disabled_ones_ignored():
    model = with_lora(make("llama"))
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
    model.base_model.set_adapter(["default", "second"])
    assert build_decoder(model)[1] == "more than one adapter is active"
    model.base_model.set_adapter("default")
    with model.disable_adapter():
        assert_same_scores(model, prompts(6))
    assert_same_scores(model, prompts(6))


def test_a_trained_head_and_embedding_are_used():
    model = with_lora(make("qwen2"), modules_to_save=["lm_head", "embed_tokens"])
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    assert_same_scores(model, prompts(6, 3))


def test_adapters_that_start_from_the_weights_are_used():
    assert_same_scores(with_lora(make("llama"), init_lora_weights="pissa"), prompts(6, 3))


def without_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fourbit.generate.build_decoder", lambda _model, **_: (None, "a test"))


def test_the_generator_answers_the_same_without_the_engine(monkeypatch):
    model = make("llama", lora=True)
    generator = Generator(model, tiny_tokenizer(), None)
    rows, sampling = prompts(9, 4, 14), Sampling(max_new_tokens=9)
    native_answers = generator.answers(rows, sampling)
    base_model(model).generation_config.repetition_penalty = 1.3
    penalized = generator.answers(rows, sampling)
    without_engine(monkeypatch)
    assert generator.answers(rows, sampling) == penalized != native_answers
    base_model(model).generation_config.repetition_penalty = None
    assert generator.answers(rows, sampling) == native_answers


@pytest.mark.parametrize("engine", [True, False])
def test_answers_are_streamed_in_whole_characters(engine, monkeypatch):
    if not engine:
        without_engine(monkeypatch)
    tokenizer = tiny_tokenizer()
    generator = Generator(make("llama"), tokenizer, None)
    pieces: list[str] = []
    answer = generator.answers(
        prompts(5),
        Sampling(max_new_tokens=30, temperature=1.0),
        on_text=lambda _number, piece: pieces.append(piece),
    )[0]
    assert "".join(pieces) == answer.text
    assert len(pieces) > 3


def test_what_only_transformers_does_is_left_to_it(monkeypatch):
    model = make("llama")
    base_model(model).generation_config.no_repeat_ngram_size = 2
    monkeypatch.setattr(
        "fourbit.generate.build_decoder", lambda _model, **_: pytest.fail("the engine was asked")
    )
    calls: list[int] = []
    real = type(model).generate

    def counted(*args: object, **kwargs: object) -> Tensor:
        calls.append(1)
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(type(model), "generate", counted)
    Generator(model, tiny_tokenizer(), None).answers(prompts(4), Sampling(max_new_tokens=2))
    assert calls
