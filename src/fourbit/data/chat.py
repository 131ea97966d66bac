"""What of a chat the assistant wrote: character spans of its turns in the rendered text.

Most chat templates do not mark the assistant's turns. They are found by rendering: the chat up to
a turn with the generation prompt, and the chat up to and with that turn. What the second has more
than the first is exactly what a model is asked to write at that point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fourbit.data.templates import ChatTemplate, render
from fourbit.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fourbit.data.formats import Example
    from fourbit.data.turns import Message


@dataclass(frozen=True)
class Rendering:
    """A text to train on.

    Args:
        text: the rendered chat.
        spans: half-open character ranges that the assistant wrote, end-of-turn mark included.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


def render_whole(
    example: Example, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> list[Rendering]:
    """Renders a chat that is learned as a whole, whoever wrote its parts.

    Raises:
        InputError: names the row when the template fails on it.
    """
    text = _Pen(example, tokenizer, template).write_all()
    return [Rendering(text, ((0, len(text)),))]


def render_example(
    example: Example, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> list[Rendering]:
    """Renders a chat and finds the assistant's turns in it.

    Some templates show an earlier turn differently once others follow (they drop its thinking, for
    example). Such a turn becomes a rendering of its own that ends with it, as the model met it.

    Args:
        example: a chat.
        tokenizer: gives special tokens to the template.
        template: how to render; without generation marks.

    Returns:
        The whole chat first; further renderings only for turns that it shows differently.

    Raises:
        InputError: names the row when the template fails on it or hides where a turn starts.
    """
    if example.messages is None:
        raise ValueError("raw text has no turns")
    pen = _Pen(example, tokenizer, template)
    full = pen.write_all()
    spans: list[tuple[int, int]] = []
    apart: list[Rendering] = []
    for index, turn in enumerate(example.messages):
        if turn["role"] != "assistant":
            continue
        last = index + 1 == len(example.messages)
        upto = full if last else pen.write(index + 1)
        span = pen.span(index, upto)
        if full.startswith(upto):
            spans.append(span)
        else:
            apart.append(Rendering(upto, (span,)))
    return [Rendering(full, tuple(spans)), *apart] if spans else apart


@dataclass(frozen=True)
class _Pen:
    example: Example
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate

    def write(self, turns: int, *, prompt: bool = False) -> str:
        messages: Sequence[Message] = self.example.messages or ()
        tools: Sequence[dict[str, Any]] | None = self.example.tools
        try:
            return render(
                messages[:turns],
                self.tokenizer,
                self.template,
                tools=tools,
                add_generation_prompt=prompt,
            )
        except InputError as error:
            where = str(self.example.origin)
            raise InputError(error.code, where=where, what=error.what, fix=error.fix) from error

    def write_all(self) -> str:
        text = self.write(len(self.example.messages or ()))
        if not text.strip():
            raise InputError(
                "empty-render",
                where=str(self.example.origin),
                what=f"the chat template ({self.template.name}) renders nothing",
                fix="choose another with data.chat_template",
            )
        return text

    def span(self, index: int, upto: str) -> tuple[int, int]:
        prompt = self.write(index, prompt=True)
        if not upto.startswith(prompt):
            raise InputError(
                "template-prefix",
                where=f"{self.example.origin}, turn {index + 1}",
                what=f"the chat template ({self.template.name}) does not continue its own "
                "generation prompt, so what the assistant wrote cannot be told apart",
                fix="use a template with {% generation %} marks or a built-in one "
                "(data.chat_template), or data.train_on: all",
            )
        # White space after the end-of-turn mark is the template's, not the assistant's.
        return len(prompt), max(len(prompt), len(upto.rstrip()))


def tokens_in_spans(
    offsets: NDArray[np.int64], spans: Sequence[tuple[int, int]]
) -> NDArray[np.bool_]:
    """Which tokens start inside one of the spans.

    A token that straddles the start of a span belongs to the header before it, and so does not
    count; one that straddles the end began as the assistant's, and counts.

    Args:
        offsets: half-open character range of each token, shape [tokens, 2].
        spans: half-open character ranges.
    """
    chosen = np.zeros(len(offsets), dtype=np.bool_)
    for start, end in spans:
        chosen |= (offsets[:, 0] >= start) & (offsets[:, 0] < end)
    return chosen & (offsets[:, 1] > offsets[:, 0])
