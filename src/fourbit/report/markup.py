"""Pieces of HTML from untrusted values: escaped, with invisible characters written out."""

from __future__ import annotations

import html
import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from fourbit.files import human_bytes
from fourbit.report.charts import finite

_SHORT = 280
LONGEST = 20_000
# Joiners shape words in several scripts and build emoji; hiding them would damage honest text.
_HARMLESS_FORMAT = frozenset("\u200c\u200d")
_MARKED = re.compile("\ue000([^\ue001]*)\ue001")


def html_section(title: str, body: str) -> str:
    """A part of the page; empty without a body."""
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>" if body else ""


def html_page(title: str, *, maker: str, lead: str, body: str, css: str) -> str:
    """A whole page that needs no network: ``lead``, ``body`` and ``css`` are HTML and CSS of ours.

    Args:
        title: of the page; escaped.
        maker: what made it, above the title.
        lead: what matters most, under the title.
        body: the sections.
        css: the look.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{plain(title)}</title>\n<style>{css}</style>\n</head>\n<body>\n"
        f'<header>\n<p class="maker">{maker}</p>\n<h1>{shown_text(title)}</h1>\n'
        f"{lead}\n</header>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def figure(caption: str, picture: str, *, wide: bool = False) -> str:
    """A picture under its caption; empty without a picture."""
    if not picture:
        return ""
    style = ' class="wide"' if wide else ""
    return f"<figure{style}><figcaption>{caption}</figcaption>{picture}</figure>"


def remark(words: str) -> str:
    """A sentence beside the facts; ``words`` are ours and not escaped."""
    return f'<p class="note">{words}</p>'


def html_table(
    caption: str, headers: Sequence[str], rows: Sequence[Sequence[str]], *, style: str = "facts"
) -> str:
    """A table of cells that are HTML already; empty without rows."""
    if not rows:
        return ""
    # Narrow screens stack the cells, which takes the table meaning from assistive tools: the
    # explicit roles keep it, and data-label shows the column's name again.
    head = "".join(f'<th role="columnheader" scope="col">{name}</th>' for name in headers)
    body = "".join(
        '<tr role="row">'
        + "".join(
            f'<td role="cell" data-label="{name}"><div dir="auto">{cell}</div></td>'
            for name, cell in zip(headers, row, strict=True)
        )
        + "</tr>\n"
        for row in rows
    )
    return (
        f'<table role="table" class="{style}"><caption>{caption}</caption>'
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>\n'
        f'<tbody role="rowgroup">{body}</tbody></table>'
    )


def facts_table(facts: Mapping[str, Any], caption: str) -> str:
    """Two columns, nested facts under dotted names."""
    flat = _flatten(facts)
    rows = [[plain(spoken(key)), long_text(value_text(key, value), LONGEST)] for key, value in flat]
    return html_table(caption, ("fact", "value"), rows)


def _flatten(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows = []
    for key, value in facts.items():
        if isinstance(value, Mapping) and value:
            rows += _flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value))
    return rows


def value_text(key: str, value: Any) -> str:
    """A value as people write it; the key tells bytes and shares."""
    number = finite(value)
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
        return ", ".join(value) or "none"
    if number is not None and re.search("memory|bytes", key) and number >= 1e5:
        return human_bytes(number)
    if isinstance(value, float) and re.search("share|efficiency", key):
        return f"{value:.1%}"
    if isinstance(value, int) and not isinstance(value, bool) and "seed" not in key:
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value, ensure_ascii=False, default=str)


def spoken(key: str) -> str:
    """A key as words."""
    return key.replace("_", " ")


def significant(value: float, digits: int) -> str:
    """So many digits that mean something, without an exponent for what people can read."""
    if not 10 ** (digits - 1) <= abs(value) < 1e9:
        return f"{value:.{digits}g}"
    return f"{round(value, digits - 1 - math.floor(math.log10(abs(value)))):,.0f}"


def duration(seconds: float) -> str:
    """Seconds in the units people use."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def long_text(value: Any, limit: int) -> str:
    """A text in full, or its beginning with the whole (up to ``limit`` characters) to unfold."""
    text = "" if value is None else value if isinstance(value, str) else value_text("", value)
    if not text:
        return '<span class="note">empty</span>'
    if len(text) <= _SHORT * 1.2:
        return f'<span class="text">{shown_text(text)}</span>'
    rest = len(text) - limit
    cut = remark(f"{rest:,} more characters are not in this report.") if rest > 0 else ""
    return (
        f'<span class="text">{shown_text(text[:_SHORT])}…</span><details><summary>all'
        f' {len(text):,} characters</summary><span class="text">{shown_text(text[:limit])}</span>'
        f"{cut}</details>"
    )


def _visible(text: str, *, keep: str = "\n\t") -> str:
    """Marks what cannot be seen or could disguise the text, between private-use signs."""
    out = []
    for char in text:
        category = unicodedata.category(char)
        hidden = category in ("Cc", "Cs", "Zl", "Zp") or char in "\ue000\ue001"
        hidden = hidden or (category == "Cf" and char not in _HARMLESS_FORMAT)
        if hidden and char not in keep:
            code = char.encode("unicode_escape", "backslashreplace").decode("ascii")
            out.append(f"\ue000{code}\ue001")
        else:
            out.append(char)
    return "".join(out).replace("\ue001\ue000", "")


def shown_text(text: str) -> str:
    """Escaped, with invisible characters written out and set apart."""
    return _MARKED.sub(r'<span class="hidden">\1</span>', html.escape(_visible(text)))


def plain(text: str) -> str:
    """Escaped on one line, where no markup may stand."""
    return _MARKED.sub(r"\1", html.escape(_visible(text, keep="")))
