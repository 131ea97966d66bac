"""Text from a model: batched by length, greedy or sampled, for scripts, chats and scores."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from fourbit import device as devices
from fourbit.data import ChatTemplate, render, resolve_template
from fourbit.decoding import AnyDecoder, Choice, HeadSketch, build_decoder
from fourbit.errors import InputError, ModelError
from fourbit.integrations.peft import base_model
from fourbit.integrations.prompts import generation_inputs, prompted, require_prompt_fits
from fourbit.linear import keep_dequantized
from fourbit.loading import LoadOptions, load_model, load_tokenizer
from fourbit.quantize import QuantConfig, check_finite
from fourbit.receipt import packed_digest
from fourbit.sources import check_safetensors, resolve_source

_ADAPTER_FAULTS = (
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OSError,
    SafetensorError,
)
"""What PEFT raises for an adapter's files."""
_BATCH_TOKENS = 16384
"""Positions (prompt and new) of one batch: bounds the KV cache."""
_PROCESSED = (
    "min_length",
    "min_new_tokens",
    "num_beams",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "sequence_bias",
    "typical_p",
    "min_p",
    "top_h",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "guidance_scale",
    "watermarking_config",
    "penalty_alpha",
    "dola_layers",
    "stop_strings",
    "max_time",
)
"""What a model's generation_config may ask for and only transformers does."""
_TOP_K = 50
"""transformers' own when neither the model nor the caller names one."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 is greedy.

    Attributes:
        max_new_tokens: upper bound per answer.
        temperature: 0 takes the likeliest token.
        top_p: smallest set of tokens with this probability; 1 keeps all.
        seed: of the sampling.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """One generated text and the number of its tokens."""

    text: str
    tokens: int


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills sequences: the tokenizer's padding or end, else 0. It is never learned."""
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(found, int):
            return found
    return 0


class Generator:
    """Generates with a loaded model.

    Args:
        model: a causal LM, adapters included.
        tokenizer: its tokenizer.
        template: the chat template to render messages with; None for plain text only.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatTemplate | None,
    ) -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self._stop = self._stop_ids()
        self._sketch: HeadSketch | None = None
        self._warned = False

    def _stop_ids(self) -> list[int]:
        """Every id that ends an answer: the model's, the tokenizer's, the template's."""
        configured = getattr(self.model, "generation_config", None)
        ids: set[int] = set()
        for found in (getattr(configured, "eos_token_id", None), self.tokenizer.eos_token_id):
            listed = found if isinstance(found, (list, tuple)) else (found,)
            ids |= {token for token in listed if isinstance(token, int)}
        if self.template is not None:
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            text = render(turns, self.tokenizer, self.template)
            tail = self.tokenizer(
                text.rpartition("b")[2].strip(), add_special_tokens=False
            ).input_ids
            special = set(self.tokenizer.all_special_ids)
            ids |= {token for token in tail[:1] if token in special}
        return sorted(ids)

    def prompt_ids(self, prompt: str | Sequence[dict[str, object]]) -> list[int]:
        """Token ids of a plain text, or of messages rendered for the assistant to answer."""
        if isinstance(prompt, str):
            return self.tokenizer(prompt).input_ids
        if self.template is None:
            raise InputError(
                "no-chat-template",
                where="tokenizer",
                what="the model has no chat template, so messages cannot be rendered",
                fix="give plain text (--raw), or --chat-template chatml",
            )
        text = render(prompt, self.tokenizer, self.template, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def answers(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        *,
        progress: Callable[[int, str], None] | None = None,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Answer]:
        """One answer per prompt, in the order given.

        Args:
            prompts: token ids.
            sampling: how tokens are chosen.
            progress: told how many prompts are done.
            on_text: told the number of a prompt and the next piece of its answer, as it comes;
                the pieces make up the answer's text.
        """
        was_training = self.model.training
        self.model.eval()
        results: dict[int, Answer] = {}
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        torch.manual_seed(sampling.seed)
        choice = self._choice(sampling)
        decoder = None if choice is None else self._decoder()
        with self._expanded() if decoder is None else _released(decoder):
            for batch in _batches(order, prompts, sampling.max_new_tokens):
                asked = [prompts[i] for i in batch]
                said = None if on_text is None else _Saying(self.tokenizer, batch, on_text)
                if decoder is None or choice is None:
                    outputs = self._run(asked, sampling, said)
                else:
                    outputs = self._decode(decoder, asked, sampling, choice, said)
                for index, ids in zip(batch, outputs, strict=True):
                    text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
                    results[index] = Answer(text, len(ids))
                    if said is not None:
                        said.end(index, text)
                if progress is not None:
                    progress(len(results), "")
        self.model.train(was_training)
        return [results[index] for index in range(len(prompts))]

    def _decoder(self) -> AnyDecoder | None:
        """A decoder where the model is known; on a GPU it is said once why there is none."""
        decoder, reason = build_decoder(self.model, sketch=self._sketch)
        on_gpu = next(self.model.parameters()).device.type == "cuda"
        if decoder is None and on_gpu and not self._warned:
            self._warned = True
            warnings.warn(f"transformers generates: {reason}", stacklevel=3)
        return decoder

    def _choice(self, sampling: Sampling) -> Choice | None:
        """How tokens are chosen, the model's own generation_config considered as transformers does.

        None where it asks for something that is left to transformers.
        """
        configured = base_model(self.model).generation_config
        usual = all(getattr(configured, name, None) in (None, False, 0, 1) for name in _PROCESSED)
        forced = ("forced_bos_token_id", "forced_eos_token_id")
        if not usual or any(getattr(configured, name, None) is not None for name in forced):
            return None
        top_k = configured.top_k
        return Choice(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=_TOP_K if top_k is None else top_k,
            repetition_penalty=configured.repetition_penalty or 1.0,
        )

    def _decode(
        self,
        decoder: AnyDecoder,
        prompts: list[list[int]],
        sampling: Sampling,
        choice: Choice,
        said: _Saying | None,
    ) -> list[list[int]]:
        found = decoder.generate(
            prompts,
            max_new_tokens=sampling.max_new_tokens,
            stop=self._stop,
            choice=choice,
            on_tokens=None if said is None else said.tokens,
        )
        self._sketch = decoder.sketch
        return found

    @contextmanager
    def _expanded(self) -> Iterator[None]:
        """Inside, transformers generates from weights that are dequantized once."""
        with (
            keep_dequantized(self.model, self._dtype(), budget=self._budget()),
            _contiguous_head(self.model),
        ):
            yield

    def _dtype(self) -> torch.dtype:
        floating = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        return next(floating, torch.float32)

    def _budget(self) -> int:
        """Half of the free memory may hold expanded weights while generating."""
        device = next(self.model.parameters()).device
        if device.type == "cuda":
            return torch.cuda.mem_get_info(device)[0] // 2
        return devices.host_memory()[1] // 2

    @torch.no_grad()
    def _run(
        self, prompts: list[list[int]], sampling: Sampling, said: _Saying | None = None
    ) -> list[list[int]]:
        device = next(self.model.parameters()).device
        width = max(map(len, prompts))
        pad = pad_id(self.tokenizer)
        # Padding goes to the left, so that every prompt ends where generation begins.
        ids = torch.full((len(prompts), width), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        settings = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=sampling.temperature > 0,
            eos_token_id=self._stop or None,
            pad_token_id=pad,
        )
        if sampling.temperature > 0:
            settings.temperature, settings.top_p = sampling.temperature, sampling.top_p
        ids, mask = ids.to(device), mask.to(device)
        model, inputs, skipped = self.model, {"input_ids": ids, "attention_mask": mask}, width
        wrapper = prompted(self.model)
        if wrapper is not None:
            # Given embeddings, transformers returns the new tokens alone.
            model, inputs, skipped = base_model(wrapper), generation_inputs(wrapper, ids, mask), 0
        # transformers streams single rows only
        streamer = _Streamer(said, set(self._stop)) if said and len(prompts) == 1 else None
        output = model.generate(  # type: ignore[operator]
            **inputs, generation_config=settings, streamer=streamer
        )
        return [self._until_stop(row[skipped:].tolist()) for row in output]

    def _until_stop(self, ids: list[int]) -> list[int]:
        for place, token in enumerate(ids):
            if token in self._stop:
                return ids[:place]
        return ids


@contextmanager
def _released(decoder: AnyDecoder) -> Iterator[None]:
    """Frees the decoder's memory at the end."""
    try:
        yield
    finally:
        decoder.release()


class _Saying:
    """Turns tokens into pieces of text, each as soon as no later token can change it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        numbers: Sequence[int],
        on_text: Callable[[int, str], None],
    ) -> None:
        self._tokenizer, self._numbers, self._on_text = tokenizer, numbers, on_text
        self._ids: dict[int, list[int]] = {number: [] for number in numbers}
        self._told = dict.fromkeys(numbers, "")

    def tokens(self, fresh: dict[int, int]) -> None:
        """Takes the next token of rows of the batch."""
        for row, token in fresh.items():
            number = self._numbers[row]
            self._ids[number].append(token)
            text = str(self._tokenizer.decode(self._ids[number], skip_special_tokens=True))
            # an unfinished character decodes to the replacement character
            if not text.endswith("\ufffd"):
                self.end(number, text)

    def end(self, number: int, text: str) -> None:
        """Tells what is new in ``text``."""
        if text.startswith(self._told[number]) and text != self._told[number]:
            self._on_text(number, text[len(self._told[number]) :])
            self._told[number] = text


class _Streamer(BaseStreamer):
    """What transformers tells while it generates one row."""

    def __init__(self, said: _Saying, stop: Set[int]) -> None:
        self._said, self._stop, self._begun = said, stop, False

    def put(self, value: Tensor) -> None:
        """The prompt first, then token after token."""
        if self._begun:
            for token in value.tolist():
                if token not in self._stop:
                    self._said.tokens({0: token})
        self._begun = True

    def end(self) -> None:
        """Nothing more comes."""


@contextmanager
def _contiguous_head(model: nn.Module) -> Iterator[None]:
    """Inside, the head is given a contiguous input.

    After a prompt transformers hands it the last position as a strided slice; for such an input
    torch expands the head's weight once per row of the batch, gigabytes for a large vocabulary.
    """
    head = base_model(model).get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    try:
        yield
    finally:
        handle.remove()


def _batches(
    order: Sequence[int], prompts: Sequence[list[int]], new_tokens: int
) -> list[list[int]]:
    batches: list[list[int]] = []
    for index in order:
        width = len(prompts[index]) + new_tokens
        if batches and (len(batches[-1]) + 1) * width <= _BATCH_TOKENS:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def find_adapter(path: Path) -> Path:
    """The PEFT folder at ``path``: itself, or ``adapter/`` of a run directory.

    Raises:
        ModelError: there is none.
    """
    for folder in (path, path / "adapter"):
        if (folder / "adapter_config.json").is_file():
            if not (folder / "adapter_model.safetensors").is_file():
                raise ModelError(
                    "adapter-without-weights",
                    where=str(folder),
                    what="adapter_model.safetensors is missing",
                    fix="pickled adapters (.bin) are never loaded; save it as safetensors",
                )
            return folder
    what = "no adapter (adapter_config.json) there" if path.exists() else "no such folder"
    raise ModelError(
        "no-adapter", where=str(path), what=what, fix="give a run directory or its adapter/ folder"
    )


def open_generator(
    model: str,
    *,
    adapter: Path | None = None,
    quant: QuantConfig | None,
    chat_template: str | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Generator:
    """Loads a model, and an adapter on it, for generation.

    Args:
        model: as for `fourbit.load`.
        adapter: a PEFT folder or a run directory.
        quant: 4-bit storage of the base; None for plain weights.
        chat_template: built-in name or file instead of the tokenizer's template.
        dtype: of activations and unquantized weights; None chooses by hardware.
        trust_remote_code: run the model repository's own code.

    Raises:
        ModelError: a model or adapter that cannot be used, or an adapter of another base.
    """
    folder = None if adapter is None else find_adapter(adapter)
    source = resolve_source(model)
    options = LoadOptions(quant=quant, dtype=dtype, trust_remote_code=trust_remote_code)
    loaded: nn.Module = load_model(source, options)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    if folder is not None:
        if quant is not None:
            _require_same_base(loaded, folder, model)
        loaded = _with_adapter(loaded, folder)
    has_template = chat_template is not None or bool(tokenizer.chat_template)
    template = resolve_template(tokenizer, chat_template=chat_template) if has_template else None
    return Generator(loaded.eval(), tokenizer, template)


def _with_adapter(model: nn.Module, folder: Path) -> nn.Module:
    header = check_safetensors(folder / "adapter_model.safetensors")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations between PEFT and transformers
            wrapped = PeftModel.from_pretrained(model, str(folder))  # type: ignore[arg-type]
            require_prompt_fits(wrapped)
    except _ADAPTER_FAULTS as error:
        message = next((line for line in str(error).splitlines() if line.strip()), "")
        raise _adapter_mismatch(
            folder, f"the adapter does not fit this model: {message.strip()}"
        ) from error
    _require_whole_adapter(wrapped, header.keys() - {"__metadata__"}, folder)
    return wrapped


def _require_whole_adapter(model: PeftModel, stored: Set[str], folder: Path) -> None:
    """PEFT leaves what a file lacks at its random start, and what it does not know out."""
    # by default PEFT would ask the hub for the vocabulary of the base that the adapter names
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    base = base_model(model)
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    vocabulary = {f"{n}.weight" for n, m in model.named_modules() if m in ends}
    stored = stored - (vocabulary - wanted.keys())
    for kind, names in (("lacks", wanted.keys() - stored), ("knows", stored - wanted.keys())):
        if names:
            first = ", ".join(sorted(names)[:5])
            what = (
                f"{len(names)} tensors of the adapter are missing: {first}"
                if kind == "lacks"
                else f"{len(names)} tensors belong to no layer that carries it: {first}"
            )
            raise _adapter_mismatch(folder, what)
    for name, tensor in wanted.items():
        check_finite(tensor, name=f"{folder.name}/adapter_model.safetensors {name}")
    zeros = [not tensor.any() for name, tensor in wanted.items() if "lora_B" in name]
    if zeros and all(zeros):
        warnings.warn(f"{folder}: the adapter changes nothing, every lora_B is zero", stacklevel=2)


def _adapter_mismatch(folder: Path, what: str) -> ModelError:
    return ModelError(
        "adapter-mismatch",
        where=str(folder),
        what=what,
        fix="give the base model it was trained on",
    )


def _require_same_base(model: nn.Module, folder: Path, name: str) -> None:
    """A run's receipt knows the bytes of its base; another 4-bit base would be silently worse."""
    receipt = folder.parent / "receipt.json"
    if not receipt.is_file():
        return
    try:
        wanted = json.loads(receipt.read_text(encoding="utf-8")).get("packed_sha256")
    except (OSError, ValueError):
        return  # a damaged receipt is `verify`'s business
    if wanted is not None and packed_digest(model) != wanted:
        raise ModelError(
            "other-base",
            where=str(folder),
            what=f"the adapter was not trained on these bytes of {name}",
            fix="give the base and --quant of its config.yaml",
        )
