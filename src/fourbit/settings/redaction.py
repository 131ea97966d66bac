"""Hides secrets in what is shown, logged or written."""

from __future__ import annotations

import re

HIDDEN = "***"
_SECRET_KEY = re.compile(
    r"(^|[._])(hf_token|access_token|auth_token|api_key|password|passwd|secret)$|(^|\.)token$", re.I
)
_ASSIGNED = re.compile(
    r"(?<![\w-])([\w-]*?(?:token|password|passwd|secret|api[_-]?key))"
    r"([\"']?\s*=\s*[\"']?|[\"']?\s*:\s*[\"']?(?=[^\s\"'&,;]{8}))([^\s\"'&,;]+)",
    re.I,
)
_SPECIAL_TOKEN = re.compile(r"(pad|eos|bos|unk|sep|cls|mask)_token", re.I)
_SECRETS = (
    (re.compile(r"\b(authorization[\"']?\s*[:=]\s*[\"']?(?:bearer|basic|token)?)\s*\S+", re.I),
     r"\1 " + HIDDEN),
    (re.compile(r"\b(bearer)\s+[A-Za-z0-9._~+/=-]{8,}", re.I), r"\1 " + HIDDEN),
    (re.compile(r"\b(hf_)[A-Za-z0-9]{12,}"), r"\1" + HIDDEN),
    (re.compile(r"\b(sk-)[A-Za-z0-9_-]{12,}"), r"\1" + HIDDEN),
    (re.compile(r"\b(wandb_v1_)\w+"), r"\1" + HIDDEN),
    (re.compile(r"(wandb[^\s:=]*[\s:=]+(?:login\s+)?[\"']?)(?:local-)?[0-9a-f]{40}\b", re.I),
     r"\1" + HIDDEN),
    (re.compile(r"(://)[^\s/?#]+@"), r"\1" + HIDDEN + "@"),
)  # fmt: skip


def redact(text: str) -> str:
    """Hides secrets: hub, OpenAI and wandb keys, ``token=…``, bearer headers, URL passwords.

    Forty bare hexadecimal digits are hidden only next to the word wandb: elsewhere they are a
    commit, which a record of a run must show.
    """
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return _ASSIGNED.sub(_hide_assigned, text)


def _hide_assigned(match: re.Match[str]) -> str:
    if _SPECIAL_TOKEN.fullmatch(match[1]):
        return match[0]
    return f"{match[1]}{match[2]}{HIDDEN}"


def is_secret_key(key: str) -> bool:
    """Whether a dotted key names a secret, whatever its value looks like."""
    return _SECRET_KEY.search(key) is not None
