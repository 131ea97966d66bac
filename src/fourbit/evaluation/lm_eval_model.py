"""Our models as lm-eval asks them. Imports lm-eval, so it is imported only where that is wanted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from fourbit.evaluation.scoring import Question, Scorer, Tokens
from fourbit.evaluation.tasks import encode_pair
from fourbit.generate import Generator, Sampling
from fourbit.training.progress import Reporter

_TOKENS = 256
"""lm-eval's own bound of an answer where a task names none."""


def _arguments(requests: list[Instance]) -> Iterator[tuple[Any, ...]]:
    for request in requests:
        yield request.args


class AskedModel(TemplateLM):
    """One of our models behind lm-eval's interface; questions of one beginning are asked together.

    Args:
        generator: for answers that are generated, and for its tokenizer.
        scorer: for likelihoods.
        reporter: progress.
    """

    backend = "causal"

    def __init__(self, generator: Generator, scorer: Scorer, reporter: Reporter) -> None:
        super().__init__()
        self._generator, self._scorer, self._reporter = generator, scorer, reporter

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        found = self._generator.tokenizer.eos_token_id
        return found if isinstance(found, int) else 0

    @property
    def prefix_token_id(self) -> int:
        """What a text is begun with where nothing is given."""
        found = self._generator.tokenizer.bos_token_id
        return found if isinstance(found, int) else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """For its caches."""
        return self._generator.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids, special ones as the tokenizer adds them unless told otherwise."""
        tokenizer = self._generator.tokenizer
        if add_special_tokens is None:
            return tokenizer(string).input_ids
        return tokenizer(string, add_special_tokens=add_special_tokens).input_ids

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Of each continuation behind its context."""
        pairs = []
        for context, rest in _arguments(requests):
            if context:
                pairs.append(encode_pair(self._generator.tokenizer, context, rest))
            else:
                ids = self.tok_encode(rest, add_special_tokens=False)
                pairs.append(([self.prefix_token_id], ids))
        return self._score([(tuple(a), tuple(b)) for a, b in pairs], "likelihoods")

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        return self._score([(tuple(a), tuple(b)) for _, a, b in requests], "likelihoods")

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts, in lm-eval's windows."""
        windows, owners = [], []
        for number, (text,) in enumerate(_arguments(requests)):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._scorer.max_length,
                context_len=1,
            )
            for window in rolling:
                beginning, rest = make_disjoint_window(window)
                windows.append((tuple(beginning), tuple(rest)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (total, _) in zip(owners, self._score(windows, "text"), strict=True):
            totals[owner] += total
        return totals

    def _score(
        self, pairs: Sequence[tuple[Tokens, Tokens]], title: str
    ) -> list[tuple[float, bool]]:
        groups: dict[Tokens, list[int]] = {}
        for index, (beginning, _) in enumerate(pairs):
            groups.setdefault(beginning, []).append(index)
        questions = [
            Question(beginning, tuple(pairs[index][1] for index in indices))
            for beginning, indices in groups.items()
        ]
        with self._reporter.task(title, total=len(questions)) as advance:
            found = self._scorer.score(questions, progress=advance)
        answers: dict[int, tuple[float, bool]] = {}
        for indices, likelihoods in zip(groups.values(), found, strict=True):
            for index, likelihood in zip(indices, likelihoods, strict=True):
                answers[index] = (likelihood.total, likelihood.greedy)
        return [answers[index] for index in range(len(pairs))]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, cut at the first of each request's stop texts."""
        texts = []
        with self._reporter.task("answers", total=len(requests)) as advance:
            for number, (context, wanted) in enumerate(_arguments(requests)):
                texts.append(self._until(context, wanted))
                advance(number + 1, "")
        return texts

    def _until(self, context: str, wanted: Mapping[str, Any]) -> str:
        sampled = bool(wanted.get("do_sample"))
        sampling = Sampling(
            max_new_tokens=int(wanted.get("max_gen_toks", _TOKENS)),
            temperature=float(wanted.get("temperature", 0.0)) if sampled else 0.0,
        )
        text = self._generator.answers([self._generator.prompt_ids(context)], sampling)[0].text
        stops = wanted.get("until") or []
        for stop in [stops] if isinstance(stops, str) else stops:
            text = text.split(stop)[0] if stop else text
        return text
