"""A GPU's decoder on a CPU: what it would record is run again, by two stand-ins for the graph.

`rerun` calls the step itself. `Recorder` is stricter and does what a graph does: it notes which
operations ran on which memory, and repeats these and nothing else. A number that reached the host
while it recorded, or a tensor that was made anew, gives the wrong result with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from fourbit import native
from fourbit.decoding import Choice, GraphDecoder, build_decoder
from fourbit.errors import InputError
from fourbit.generate import Generator, Sampling
from fourbit.integrations.anatomy import cache_argument
from fourbit.integrations.transformers import quantize_model
from fourbit.quantize import QuantConfig
from models import tiny_model, tiny_tokenizer
from test_decoder import prompts, transformers_greedy, with_lora

ARCHITECTURES = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi3", "granite"),
    "gpt2",
)
STEPS = 5
END = [256]
"""What the tiny models' own configuration calls the end."""
ROUNDINGS = 1e-4
"""float32 sums in another order, relative to the largest score."""


def rerun(function: Callable[[], None]) -> Callable[[], None]:
    function()
    return function


class Recorder(TorchDispatchMode):
    """Operations with the tensors they ran on; repeated, their results go to the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        known = {t.untyped_storage()._cdata for t in inputs}
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        fresh = [t for t in made if t.untyped_storage()._cdata not in known]
        # a view of something is the same view when it is looked at again
        if fresh or func._schema.is_mutable:
            self.calls.append((func, args, kwargs, fresh))
        return result

    def replay(self) -> None:
        for func, args, kwargs, fresh in self.calls:
            result = func(*args, **kwargs)
            if fresh:
                made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
                for target, source in zip(fresh, made, strict=True):
                    target.copy_(source)


def record(function: Callable[[], None]) -> Callable[[], None]:
    for _ in range(2):
        function()
    recorder = Recorder()
    with recorder:
        function()
    return recorder.replay


def make(name: str, *, lora: bool = False, quantized: bool = True, **changes: object) -> nn.Module:
    model: nn.Module = tiny_model(name, **changes)
    if quantized:
        quantize_model(model, QuantConfig())
    return with_lora(model) if lora else model.eval()


def decoder_of(model: nn.Module, capture: Any = rerun) -> GraphDecoder:
    decoder, reason = build_decoder(model, capture=capture)
    assert isinstance(decoder, GraphDecoder), reason
    return decoder


@pytest.fixture(params=["rerun", "record"])
def capture(request: pytest.FixtureRequest) -> Any:
    """Both stand-ins; what the native library computes cannot be noted, so one goes without it."""
    if request.param == "rerun":
        yield rerun
        return
    with native.using(None):
        yield record


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fourbit.decoding.graphs._LEAST_CAPACITY", 8)


@torch.no_grad()
def assert_same_scores(
    decoder: GraphDecoder, model: nn.Module, rows: list[list[int]], *, bound: float = ROUNDINGS
) -> None:
    """Every step's scores equal those of the model's own forward with a cache, row by row."""
    scores = decoder.prefill(rows, room=STEPS)
    caches = [DynamicCache() for _ in rows]
    inputs = [torch.tensor([row]) for row in rows]
    for step in range(STEPS + 1):
        for row, cache in enumerate(caches):
            truth = model(
                input_ids=inputs[row], use_cache=True, **{cache_argument(type(model)): cache}
            )
            expected = truth.logits[0, -1].float()
            assert scores[row].isfinite().all()
            error = (scores[row] - expected).abs().max()
            assert error <= bound * max(1.0, float(expected.abs().max())), (step, row, error)
        if step < STEPS:
            tokens = scores.argmax(dim=-1)
            inputs = list(tokens[:, None, None])
            scores = decoder.step(tokens)


@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_scores_as_the_model_does(
    name, lora, capture, small_buckets, poisoned_empty
):
    model = make(name, lora=lora)
    decoder = decoder_of(model, capture)
    assert_same_scores(decoder, model, prompts(9))
    # the shortest row crosses a capacity, the longest another
    assert_same_scores(decoder, model, prompts(9, 4, 14))


@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])
def test_greedy_tokens_are_those_of_transformers(name, lora, capture, small_buckets):
    model = make(name, lora=lora)
    rows = prompts(9, 4, 14)
    expected = [transformers_greedy(model, row, 21, END) for row in rows]
    decoder = decoder_of(model, capture)
    assert decoder.generate(rows, max_new_tokens=21, stop=END) == expected
    assert decoder.generate(rows[:1], max_new_tokens=21, stop=END) == expected[:1]
    # rows end at different places, one of them at once, and the others go on
    stop = [*END, expected[1][0], expected[0][9]]
    cut = [transformers_greedy(model, row, 21, stop) for row in rows]
    assert decoder.generate(rows, max_new_tokens=21, stop=stop) == cut
    assert len(cut[1]) == 0


@pytest.mark.parametrize("kind", ["plain", "fp4-flat", "int4-32"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_format_scores_as_the_model_does(name, kind):
    quant = {
        "plain": None,
        "fp4-flat": QuantConfig(quant_type="fp4", double_quant=False),
        "int4-32": QuantConfig(quant_type="int4", blocksize=32),
    }[kind]
    model = tiny_model(name)
    if quant is not None:
        quantize_model(model, quant)
    adapted = with_lora(model)
    assert_same_scores(decoder_of(adapted), adapted, prompts(6, 11, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_16_bits_differ_by_their_rounding(name, dtype):
    """No further from float32 than the model's own forward in the same dtype."""
    with native.using(None):  # whose kernels have no float16
        _assert_rounding(name, dtype, record)
    if dtype == torch.bfloat16:
        _assert_rounding(name, dtype, rerun)


def _assert_rounding(name: str, dtype: torch.dtype, capture: Any) -> None:
    exact, model = make(name, lora=True), make(name, lora=True, dtype=dtype)
    for key, parameter in model.named_parameters():
        if "lora_" in key:  # PEFT's own are float32; products take them in 16 bits
            parameter.data = parameter.data.to(dtype).float()
    exact.load_state_dict(model.state_dict())
    decoder, rows = decoder_of(model, capture), prompts(12, 7, 9, 15, 11, 8, 13, 10)
    with torch.no_grad():
        decoder.prefill([row[:-2] for row in rows], room=2)
        decoder.step(torch.tensor([row[-2] for row in rows]))
        scores = decoder.step(torch.tensor([row[-1] for row in rows])).clone()
        assert scores.dtype == torch.float32
        inputs = [torch.tensor([ids]) for ids in rows]
        truth = torch.stack([exact(input_ids=ids).logits[0, -1] for ids in inputs])
        own = torch.stack([model(input_ids=ids).logits[0, -1].float() for ids in inputs])
    # of all rows together: one alone may be twice as far by chance
    assert (scores - truth).norm() <= 1.3 * (own - truth).norm()


def test_steps_are_recorded_once_for_each_capacity_and_number_of_rows(small_buckets):
    recorded: list[int] = []

    def counted(function: Callable[[], None]) -> Callable[[], None]:
        recorded.append(1)
        return rerun(function)

    model = make("llama")
    decoder = decoder_of(model, counted)
    rows = prompts(5, 3)
    expected = [transformers_greedy(model, row, 20, []) for row in rows]
    assert decoder.generate(rows, max_new_tokens=20) == expected
    assert len(recorded) == 3, "caches of 8, 16 and 32 positions"
    assert decoder.generate(rows, max_new_tokens=20) == expected
    assert len(recorded) == 3
    decoder.generate(prompts(5, 3, 4), max_new_tokens=20)
    decoder.generate(prompts(5, 3, 4, 2), max_new_tokens=20)
    assert len(recorded) == 6, "three rows are computed as four"
    # the memory of the larger batch is there for the smaller one too, but its rows lie elsewhere
    assert decoder.generate(rows, max_new_tokens=20) == expected
    decoder.release()
    count = len(recorded)
    decoder.generate(rows, max_new_tokens=2)
    assert len(recorded) == count + 1


def test_more_rows_than_a_step_takes_are_answered_in_parts(monkeypatch):
    monkeypatch.setattr("fourbit.decoding.graphs._MOST_ROWS", 2)
    model = make("llama")
    decoder, rows = decoder_of(model), prompts(9, 4, 14, 2, 6)
    told: list[dict[int, int]] = []
    found = decoder.generate(rows, max_new_tokens=4, on_tokens=told.append)
    assert found == [transformers_greedy(model, row, 4, []) for row in rows]
    said = {row: [part[row] for part in told if row in part] for row in range(5)}
    assert [said[row] for row in range(5)] == found


def test_rows_can_be_continued_apart(small_buckets):
    """Rows that are left out, wherever they stand, find their cache as it was."""
    model = make("mistral", lora=True)
    decoder, rows = decoder_of(model), prompts(20, 4)
    decoder.prefill(rows, room=6)
    more = prompts(30)[0]
    for token in more[:4]:
        alone = decoder.step(torch.tensor([token]), rows=torch.tensor([1])).clone()
    late = decoder.step(torch.tensor([more[9]]), rows=torch.tensor([0])).clone()
    with torch.no_grad():
        for scores, ids in ((alone, rows[1] + more[:4]), (late, rows[0] + more[9:10])):
            truth = model(input_ids=torch.tensor([ids])).logits[0, -1]
            assert torch.allclose(scores[0], truth, atol=1e-4 * float(truth.abs().max()))


@pytest.mark.skipif(not native.supported(), reason="no native library")
@pytest.mark.parametrize(
    "choice", [Choice(temperature=1.5, top_p=0.9), Choice(repetition_penalty=1.7)]
)
def test_choices_are_those_of_the_other_decoder(choice):
    model = make("llama")
    other, reason = build_decoder(model)
    assert other is not None, reason
    found = []
    for decoder in (other, decoder_of(model)):
        torch.manual_seed(4)
        found.append(
            decoder.generate(prompts(5, 7, 3), max_new_tokens=14, choice=choice, stop=range(40))
        )
    assert found[0] == found[1]
    assert len({len(row) for row in found[0]}) > 1, "rows were to end at different places"


def test_a_step_that_cannot_be_recorded_is_launched_and_that_is_said_once(small_buckets):
    def refuse(function: Callable[[], None]) -> Callable[[], None]:
        function()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model = make("llama")
    decoder, row = decoder_of(model, refuse), prompts(5)
    with pytest.warns(UserWarning, match="cannot be recorded.*not permitted") as told:
        found = decoder.generate(row, max_new_tokens=20)
    assert len(told) == 1
    assert found == [transformers_greedy(model, row[0], 20, [])]


def test_learned_positions_end_in_one_line_and_not_before():
    model = make("gpt2", n_positions=24)
    decoder, row = decoder_of(model), prompts(10)
    whole = transformers_greedy(model, row[0], 15, [])
    assert decoder.generate(row, max_new_tokens=15) == [whole]
    # eight steps at a time would go past the last position
    stop = [whole[13]]
    cut = transformers_greedy(model, row[0], 15, stop)
    assert decoder.generate(row, max_new_tokens=60, stop=stop) == [cut]
    with pytest.raises(InputError, match="24 positions"):
        decoder.generate(row, max_new_tokens=60)
    with pytest.raises(InputError, match="24 positions"):
        decoder.prefill(prompts(25), room=1)


REFUSED = {
    "unknown architecture": (lambda: make("gpt_neox", quantized=False), "no architecture"),
    "INT8": (lambda: int8(), "INT8"),
    "a head in another dtype": (lambda: other_head(), "float32"),
    "training": (lambda: make("llama").train(), "training mode"),
    "two devices": (lambda: on_two_devices(), "meta"),
}


def int8() -> nn.Module:
    model = tiny_model("llama")
    quantize_model(model, QuantConfig(quant_type="int8"))
    return model


def other_head() -> nn.Module:
    model = make("qwen2", dtype=torch.bfloat16)
    model.get_output_embeddings().float()  # type: ignore[operator]
    return model


def on_two_devices() -> nn.Module:
    model = make("qwen2")
    model.get_output_embeddings().to("meta")  # type: ignore[operator]
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_is_refused_with_a_reason(case):
    build, reason = REFUSED[case]
    decoder, told = build_decoder(build(), capture=rerun)
    assert decoder is None
    assert reason in told


def through_graphs(monkeypatch: pytest.MonkeyPatch, capture: Any) -> list[GraphDecoder]:
    built: list[GraphDecoder] = []

    def build(model: nn.Module, **_: object) -> tuple[GraphDecoder, str]:
        built.append(decoder_of(model, capture))
        return built[-1], ""

    monkeypatch.setattr("fourbit.generate.build_decoder", build)
    return built


def test_the_generator_answers_the_same_with_it(monkeypatch):
    model = make("llama", lora=True)
    generator, rows = Generator(model, tiny_tokenizer(), None), prompts(9, 4, 14)
    truth = generator.answers(rows, Sampling(max_new_tokens=9))
    drawn = generator.answers(rows, Sampling(max_new_tokens=9, temperature=1.0, seed=3))
    built = through_graphs(monkeypatch, rerun)
    assert generator.answers(rows, Sampling(max_new_tokens=9)) == truth
    assert generator.answers(rows, Sampling(max_new_tokens=9, temperature=1.0, seed=3)) == drawn
    pieces: list[str] = []
    said = generator.answers(
        rows[:1], Sampling(max_new_tokens=9), on_text=lambda _row, piece: pieces.append(piece)
    )
    assert said == truth[:1]
    assert "".join(pieces) == said[0].text
    assert len(built) == 3
    assert all(decoder._memory is None for decoder in built), "memory is given back"


def test_on_a_gpu_it_is_said_once_why_transformers_generates(monkeypatch):
    generator = Generator(make("gpt_neox", quantized=False), tiny_tokenizer(), None)
    parameter = next(generator.model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert generator._decoder() is None  # on a CPU nothing is said
    monkeypatch.setattr(type(parameter), "device", torch.device("cuda", 0))
    with pytest.warns(UserWarning, match="transformers generates: .* no architecture") as told:
        decoders = [generator._decoder(), generator._decoder()]
    assert decoders == [None, None]
    assert len(told) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])
def test_recorded_steps_on_a_gpu(name, dtype):
    model = make(name, lora=True, dtype=dtype, hidden_size=128, intermediate_size=320)
    model = model.to("cuda")
    decoder, reason = build_decoder(model)
    assert isinstance(decoder, GraphDecoder), reason
    plain = decoder_of(model, rerun)
    rows = prompts(9, 4, 250)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a recording that failed
        found = decoder.generate(rows, max_new_tokens=21)
    assert found == plain.generate(rows, max_new_tokens=21)


CHILD = Path(__file__).parent / "ops" / "triton" / "decode.py"


@pytest.mark.parametrize("group", ["product", "attention", "model"])
def test_steps_through_the_gpus_kernels_in_the_interpreter(group):
    pytest.importorskip("triton")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, CHILD, group, "cpu"],
        capture_output=True, text=True, env=environment, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"{group}: equal" in done.stdout
