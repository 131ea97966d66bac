"""Chat templates: the tokenizer's own, a built-in one or a file, and rendering with them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from fourbit.data.files import check_regular_file
from fourbit.data.turns import text_of
from fourbit.errors import InputError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fourbit.data.turns import Message

MAX_TEMPLATE_BYTES = 2**20

_CHATML = """\
{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

_LLAMA3 = """\
<|begin_of_text|>{% for message in messages %}\
<|start_header_id|>{{ message['role'] }}<|end_header_id|>

{{ message['content'] | trim }}<|eot_id|>{% endfor %}\
{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

_ZEPHYR = """\
{% for message in messages %}<|{{ message['role'] }}|>
{{ message['content'] }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""

_ALPACA = """\
{% for message in messages %}{% if message['role'] == 'assistant' %}### Response:
{{ message['content'] }}{{ eos_token }}

{% elif message['role'] == 'user' %}### Instruction:
{{ message['content'] }}

{% elif message['role'] == 'tool' %}### Input:
{{ message['content'] }}

{% else %}{{ message['content'] }}

{% endif %}{% endfor %}{% if add_generation_prompt %}### Response:
{% endif %}"""

_PLAIN = """\
{% for message in messages %}{{ message['content'] }}\
{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"""

BUILT_IN = {
    "chatml": _CHATML,
    "llama3": _LLAMA3,
    "zephyr": _ZEPHYR,
    "alpaca": _ALPACA,
    "plain": _PLAIN,
}
"""Templates that can be named instead of a file."""

_NEEDED_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
# Arithmetic and types that go wrong inside a template come out as plain Python errors.
TEMPLATE_FAULTS = (TemplateError, TypeError, ValueError, KeyError, ArithmeticError)
"""What rendering a chat may raise."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and where it came from.

    Args:
        name: ``tokenizer``, a built-in's name or a path.
        source: the Jinja text.
    """

    name: str
    source: str

    @property
    def marks_generation(self) -> bool:
        """Whether the template itself marks what the assistant writes."""
        return _GENERATION.search(self.source) is not None

    @property
    def knows_tools(self) -> bool:
        """Whether tool schemas given to the template can appear in its text."""
        return re.search(r"\btools\b", self.source) is not None

    @property
    def knows_tool_calls(self) -> bool:
        """Whether structured calls in a turn can appear in its text."""
        return "tool_calls" in self.source

    def sha256(self) -> str:
        """Hash of the Jinja text."""
        return hashlib.sha256(self.source.encode()).hexdigest()


def resolve_template(
    tokenizer: PreTrainedTokenizerBase, *, chat_template: str | None = None
) -> ChatTemplate:
    """Finds the template that chats are rendered with; there is no silent default.

    Args:
        tokenizer: the model's tokenizer.
        chat_template: the setting ``data.chat_template``.

    Raises:
        InputError: none exists, or the wanted one does not fit the vocabulary.
    """
    if chat_template is None:
        return _own_template(tokenizer)
    if chat_template in BUILT_IN:
        missing = _missing_tokens(tokenizer, chat_template)
        if missing:
            raise InputError(
                "template-tokens",
                where="data.chat_template",
                what=f"{chat_template} needs {', '.join(missing)}, unknown to this tokenizer",
                fix=f"one that fits: {', '.join(fitting_templates(tokenizer))}, or a .jinja file",
            )
        return ChatTemplate(chat_template, _with_bos(tokenizer, BUILT_IN[chat_template]))
    if not os.path.lexists(chat_template) and not chat_template.endswith((".jinja", ".j2")):
        what = f"{chat_template!r} is neither a built-in template nor a file"
        fix = nearest(chat_template, BUILT_IN)
        raise InputError("no-template", where="data.chat_template", what=what, fix=fix)
    return ChatTemplate(chat_template, _read_template(chat_template))


def fitting_templates(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Built-in templates whose special tokens the tokenizer has."""
    return [name for name in BUILT_IN if not _missing_tokens(tokenizer, name)]


def _own_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if own:
        return ChatTemplate("tokenizer", own)
    raise InputError(
        "no-template",
        where="data.chat_template",
        what="the tokenizer has no chat template and none is set",
        fix=f"set one that fits: {', '.join(fitting_templates(tokenizer))}, or a .jinja file",
    )


def _missing_tokens(tokenizer: PreTrainedTokenizerBase, name: str) -> list[str]:
    if name not in _NEEDED_TOKENS:
        return [] if tokenizer.eos_token else ["an end-of-text token"]
    known = tokenizer.get_vocab()
    return [token for token in _NEEDED_TOKENS[name] if token not in known]


def _with_bos(tokenizer: PreTrainedTokenizerBase, source: str) -> str:
    """Rendered chats are tokenized without special tokens, so the start must be in the text."""
    if tokenizer.bos_token is None or source.startswith("<|begin_of_text|>"):
        return source
    starts = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return "{{ bos_token }}" + source if starts else source


def _read_template(path: str) -> str:
    size = check_regular_file(path, key="data.chat_template")
    if size > MAX_TEMPLATE_BYTES:
        what = f"{size} bytes; a template has at most {MAX_TEMPLATE_BYTES}"
        raise InputError("too-large", where=path, what=what, fix="is it a template?")
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        what = f"cannot be read as UTF-8 text: {error}"
        raise InputError("bad-template", where=path, what=what, fix="correct it") from None


def render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    *,
    tools: Sequence[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """The text of a chat, by transformers' sandboxed rendering.

    Args:
        messages: the turns.
        tokenizer: gives the special tokens that templates print.
        template: how to render.
        tools: schemas passed on to the template.
        add_generation_prompt: end with what precedes an assistant turn.

    Raises:
        InputError: the template fails; carries the template's own message.
    """
    try:
        text = tokenizer.apply_chat_template(
            turns_for(messages, template),
            tools=list(tools) if tools and template.knows_tools else None,
            chat_template=template.source,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
    except TEMPLATE_FAULTS as error:
        raise template_fault(template, error, where="chat template") from error
    return str(text)


def template_fault(template: ChatTemplate, error: Exception, *, where: str) -> InputError:
    """A template's own complaint as one line."""
    return InputError(
        "template-failed",
        where=where,
        what=f"the chat template ({template.name}) fails: {error or type(error).__name__}",
        fix="choose another with data.chat_template, or correct the data",
    )


def turns_for(messages: Sequence[Message], template: ChatTemplate) -> list[Message]:
    """Turns as the template can show them: calls of tools as text where it knows no calls."""
    if template.knows_tool_calls:
        return list(messages)
    return [_flat(turn) if turn.get("tool_calls") else turn for turn in messages]


def _flat(turn: Message) -> Message:
    rest = {name: value for name, value in turn.items() if name != "tool_calls"}
    return {**rest, "content": text_of(turn)}
