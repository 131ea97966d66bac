"""The proof of a merge: the adapter on its base and the merged folder answer the same rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from fourbit.data import ChatTemplate, prompt_of, read_rows, resolve_template, split, tokenize
from fourbit.errors import FourbitError, VerificationFailed
from fourbit.evaluation import exact_match
from fourbit.generate import Generator, Sampling
from fourbit.training.config import TrainConfig

_MAX_TOKENS = 512
_LOGIT_BYTES = 192 << 20
"""What the kept logits of the first model may take."""
_ASKED = 8
_ANSWER_TOKENS = 96
_TEXTS = (
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Question: A train leaves at 9:40 and arrives at 11:05. How long does it take?\nAnswer:",
    '{"name": "Anna", "items": [{"product": "mug", "quantity": 3}], "paid": true}',
    "Es war einmal ein König, der hatte drei Töchter; die jüngste war so schön, dass",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144,",
    "Dear customer, thank you for your message of 3 May. We are sorry to hear that the parcel",
    "SELECT name, COUNT(*) FROM orders WHERE year = 2024 GROUP BY name ORDER BY 2 DESC;",
)
"""Asked when there are no rows of a run: prose, code, numbers, structure, two languages."""


@dataclass(frozen=True)
class Limits:
    """What rounding may change.

    Attributes:
        max_abs_diff: largest difference of a logit, in standard deviations of the logits.
        kl: mean divergence of the next-token distributions, in nats.
        top1: least share of positions with the same likeliest token.
        loss: change of the mean token loss, in nats.
    """

    max_abs_diff: float
    kl: float
    top1: float
    loss: float


LIMITS = {
    torch.float32: Limits(max_abs_diff=1e-3, kl=1e-6, top1=0.99, loss=1e-4),
    torch.float16: Limits(max_abs_diff=0.1, kl=1e-4, top1=0.97, loss=5e-3),
    torch.bfloat16: Limits(max_abs_diff=0.6, kl=5e-3, top1=0.90, loss=4e-2),
}
"""By the coarsest dtype on the way. float32: only the order of sums differs. float16 and bfloat16
keep 11 and 8 bits of each merged weight; a limit is several times what that rounding was measured
to do, and far below what a wrong or missing adapter does."""


@dataclass(frozen=True)
class Rows:
    """What both models are asked.

    Attributes:
        samples: token ids, and which of them carry the loss.
        prompts: token ids of questions with their reference answers.
        origin: for people.
    """

    samples: tuple[tuple[list[int], list[bool]], ...]
    prompts: tuple[tuple[list[int], str], ...]
    origin: str


@dataclass(frozen=True)
class Measured:
    """One model's answers; ``logits`` ``[positions, vocabulary]`` float32 on the CPU."""

    logits: Tensor
    loss: float
    exact_match: float | None
    texts: tuple[str, ...]
    adapter_kl: float | None = None


@dataclass(frozen=True)
class Parity:
    """How far two models' answers are apart.

    Attributes:
        max_abs_diff: of a logit.
        logit_std: standard deviation of the first model's logits, the scale of that difference.
        kl: mean divergence of the next-token distributions, in nats.
        top1_agreement: share of positions with the same likeliest token.
        loss_before: mean token loss of the first model.
        loss_after: and of the second.
        exact_match_before: share of right answers, where the rows ask for one.
        exact_match_after: and of the second.
        same_answers: share of generated answers that are equal.
        adapter_kl: what the adapter itself changes, for comparison.
        positions: compared.
        rows: asked.
        asked: where the rows come from.
    """

    max_abs_diff: float
    logit_std: float
    kl: float
    top1_agreement: float
    loss_before: float
    loss_after: float
    exact_match_before: float | None
    exact_match_after: float | None
    same_answers: float | None
    adapter_kl: float | None
    positions: int
    rows: int
    asked: str

    def as_dict(self) -> dict[str, Any]:
        """For ``merge.json`` and ``--json``."""
        return asdict(self)

    def lines(self, *, left: str = "with adapter", right: str = "merged") -> list[str]:
        """A table for people."""
        width = max(len(left), len(right), 12)
        lines = [
            f"compared on {self.rows} rows ({self.asked}), {self.positions:,} positions",
            f"{'':16}{left:>{width}}  {right:>{width}}",
            f"{'token loss':16}{self.loss_before:>{width}.5f}  {self.loss_after:>{width}.5f}",
        ]
        if self.exact_match_before is not None and self.exact_match_after is not None:
            before, after = f"{self.exact_match_before:.1%}", f"{self.exact_match_after:.1%}"
            lines.append(f"{'exact match':16}{before:>{width}}  {after:>{width}}")
        lines.append(
            f"logits: max_abs_diff {self.max_abs_diff:.3g} (their spread {self.logit_std:.3g}),"
            f" kl {self.kl:.3g}, top-1 agreement {self.top1_agreement:.2%}"
        )
        if self.adapter_kl is not None:
            lines.append(f"for comparison, the adapter itself: kl {self.adapter_kl:.3g}")
        return lines


def rows_of_run(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    model_config: PretrainedConfig,
    *,
    count: int,
) -> Rows | None:
    """The evaluation rows of a run; None when its data is no longer there, or it held none out."""
    try:
        rows = read_rows(config.data)
        held_out = rows.eval if rows.eval is not None else split(
            rows.train, config.data, config.seed
        )[1]  # fmt: skip
        if not held_out:
            return None
        examples = held_out[:count]
        text = model_config.get_text_config()
        dataset = tokenize(examples, tokenizer, config.data, vocab_size=text.vocab_size)
        template = _template(tokenizer, config.data.chat_template)
    except FourbitError:
        return None
    samples = tuple(
        (sample.input_ids.tolist()[:_MAX_TOKENS], sample.supervised.tolist()[:_MAX_TOKENS])
        for sample in (dataset[i] for i in range(min(len(dataset), count)))
    )
    prompts = []
    if template is not None:
        maker = Generator(nn.Module(), tokenizer, template)
        found = [p for e in examples[:_ASKED] if (p := prompt_of(e)) is not None]
        prompts = [(maker.prompt_ids(p.messages), p.reference) for p in found]
    return Rows(samples, tuple(prompts), "the run's evaluation rows")


def _template(tokenizer: PreTrainedTokenizerBase, chosen: str | None) -> ChatTemplate | None:
    if chosen is None and not tokenizer.chat_template:
        return None
    return resolve_template(tokenizer, chat_template=chosen)


def fixed_rows(tokenizer: PreTrainedTokenizerBase) -> Rows:
    """The built-in texts."""
    samples = []
    for text in _TEXTS:
        ids = list(tokenizer(text).input_ids)
        samples.append((ids, [False] + [True] * (len(ids) - 1)))
    return Rows(tuple(samples), (), "built-in texts")


@torch.no_grad()
def measure(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    advance: Callable[[int, str], None],
) -> Measured:
    """Asks a model; with an adapter on it, also how much the adapter changes.

    Args:
        model: a causal LM, with or without PEFT around it, in evaluation mode.
        tokenizer: its tokenizer.
        rows: what is asked.
        advance: told the rows done.
    """
    kept: list[Tensor] = []
    losses = tokens = 0.0
    effect: list[Tensor] = []
    chosen = _positions(rows, _vocabulary(model))
    for index, (ids, supervised) in enumerate(rows.samples):
        logits = _logits(model, ids)
        wanted = torch.tensor([place for place, is_target in enumerate(supervised[1:])
                               if is_target], dtype=torch.long)  # fmt: skip
        targets = torch.tensor(ids, dtype=torch.long)[wanted + 1]
        if len(wanted):
            loss = nn.functional.cross_entropy(logits[wanted], targets, reduction="sum")
            losses += float(loss.double())
            tokens += len(wanted)
        here = logits[chosen[index]]
        kept.append(here)
        if isinstance(model, PeftModel) and len(chosen[index]):
            with model.disable_adapter():
                plain = _logits(model, ids)[chosen[index]]
            effect.append(_kl(here, plain))
        advance(index + 1, "")
    texts, score = _answers(model, tokenizer, rows)
    return Measured(
        torch.cat(kept),
        losses / tokens if tokens else math.nan,
        score,
        texts,
        float(torch.cat(effect).mean()) if effect else None,
    )


def _vocabulary(model: nn.Module) -> int:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return int(inner.config.get_text_config().vocab_size)  # type: ignore[union-attr]


def _positions(rows: Rows, vocabulary: int) -> list[Tensor]:
    """Which positions' logits are kept, spread evenly over all, as many as memory allows."""
    places = [
        (index, place)
        for index, (_, supervised) in enumerate(rows.samples)
        for place, is_target in enumerate(supervised[1:])
        if is_target
    ]
    limit = max(_LOGIT_BYTES // (4 * vocabulary), 16)
    if len(places) > limit:
        places = [places[i * len(places) // limit] for i in range(limit)]
    return [
        torch.tensor([place for row, place in places if row == index], dtype=torch.long)
        for index in range(len(rows.samples))
    ]


def _logits(model: nn.Module, ids: Sequence[int]) -> Tensor:
    device = next(model.parameters()).device
    output = model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)
    return output.logits[0].float().cpu()


def _answers(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Rows
) -> tuple[tuple[str, ...], float | None]:
    if not rows.prompts:
        return (), None
    references = [reference for _, reference in rows.prompts]
    longest = max(len(tokenizer(reference).input_ids) for reference in references)
    sampling = Sampling(max_new_tokens=min(longest + 8, _ANSWER_TOKENS))
    generator = Generator(model, tokenizer, _template(tokenizer, None))
    answers = generator.answers([ids for ids, _ in rows.prompts], sampling)
    texts = tuple(answer.text for answer in answers)
    return texts, exact_match(texts, references).score


def _kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second) of each position, in float64 because it can be 1e-9."""
    parts = []
    for a, b in zip(first.split(64), second.split(64), strict=True):
        p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
        parts.append((p.exp() * (p - q)).sum(-1).clamp(min=0))
    return torch.cat(parts)


def compare(before: Measured, after: Measured, rows: Rows) -> Parity:
    """The figures of the proof."""
    a, b = before.logits, after.logits
    same = None
    if before.texts:
        equal = [x == y for x, y in zip(before.texts, after.texts, strict=True)]
        same = sum(equal) / len(equal)
    return Parity(
        max_abs_diff=float((a - b).abs().max()),
        logit_std=float(a.std()),
        kl=float(_kl(a, b).mean()),
        top1_agreement=float((a.argmax(-1) == b.argmax(-1)).double().mean()),
        loss_before=before.loss,
        loss_after=after.loss,
        exact_match_before=before.exact_match,
        exact_match_after=after.exact_match,
        same_answers=same,
        adapter_kl=before.adapter_kl,
        positions=len(a),
        rows=len(rows.samples),
        asked=rows.origin,
    )


def require_parity(parity: Parity, dtype: torch.dtype, *, where: str) -> None:
    """Raises when the answers are further apart than rounding to ``dtype`` explains.

    Raises:
        VerificationFailed: naming the figure and its limit.
    """
    limits = LIMITS[dtype]
    change = abs(parity.loss_after - parity.loss_before)
    figures = (
        ("max_abs_diff", parity.max_abs_diff, limits.max_abs_diff * max(parity.logit_std, 1e-6)),
        ("kl", parity.kl, limits.kl),
        # Two near ties may fall the other way however few the positions are.
        (
            "1 - top1_agreement",
            1 - parity.top1_agreement,
            max(1 - limits.top1, 2.001 / parity.positions),
        ),
        ("change of the token loss", change, limits.loss),
    )
    for name, value, limit in figures:
        if not value <= limit:  # NaN fails too
            kind = str(dtype).removeprefix("torch.")
            raise VerificationFailed(
                "merge-differs",
                where=where,
                what=f"the merged model does not answer as the adapter does: {name} is"
                f" {value:.3g}, the limit for {kind} is {limit:.3g}; nothing was kept",
                fix="merge with --dtype fp32; if that fails too, report it",
            )
