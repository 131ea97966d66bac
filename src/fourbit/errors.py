"""The one error family: a stable code, where it happened, what is wrong and how to fix it.

A user's mistake never shows a traceback; it shows the single line of :meth:`FourbitError.line`
and ends the process with the documented exit code of its class.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable

_MAX_LINE = 1200
_BIDI_CONTROLS = frozenset(
    "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c"
)


class FourbitError(Exception):
    """Base of every error a user can cause or meet.

    Args:
        code: stable slug for scripts and searches, such as ``unknown-key``.
        where: ``file:line``, a configuration key, a tensor name or a path.
        what: what is wrong, in one sentence without a final full stop.
        fix: what to do about it; empty when nothing can be done.
    """

    exit_code = 2

    def __init__(self, code: str, *, where: str, what: str, fix: str = "") -> None:
        super().__init__(code, where, what, fix)
        self.code = code
        self.where = where
        self.what = what
        self.fix = fix

    told = False
    """Whether a process of ours has printed the line already."""

    def line(self) -> str:
        """The error as the single line that is printed on stderr."""
        text = f"error[{self.code}] {self.where}: {self.what}"
        if self.fix:
            text += f"; fix: {self.fix}"
        return one_line(text)

    def __str__(self) -> str:
        return self.line()

    def as_dict(self) -> dict[str, str]:
        """The same facts for ``--json``."""
        return {"code": self.code, "where": self.where, "what": self.what, "fix": self.fix}


class InputError(FourbitError):
    """Bad data, configuration or command line (exit code 2)."""

    exit_code = 2


class ModelError(FourbitError):
    """A model or adapter file that cannot be used (exit code 3)."""

    exit_code = 3


class EnvironmentFault(FourbitError):
    """Disk, memory, device or network (exit code 4)."""

    exit_code = 4


class NumericStop(FourbitError):
    """Training stopped because of NaN, Inf or gradients that do not flow (exit code 5)."""

    exit_code = 5


class LockHeld(FourbitError):
    """Another process owns the run directory (exit code 6)."""

    exit_code = 6


class VerificationFailed(FourbitError):
    """A receipt or checksum does not hold (exit code 7)."""

    exit_code = 7


class Preempted(FourbitError):
    """SIGTERM: the run was saved and can be resumed (exit code 75)."""

    exit_code = 75


class Interrupted(FourbitError):
    """SIGINT: the run was saved and can be resumed (exit code 130)."""

    exit_code = 130


def one_line(text: str) -> str:
    """Escapes what would break or disguise a line: controls, bidirectional marks, surrogates."""
    out = []
    for char in text:
        if char in _BIDI_CONTROLS or unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp"):
            out.append(char.encode("unicode_escape", "backslashreplace").decode("ascii"))
        else:
            out.append(char)
    joined = "".join(out)
    return joined if len(joined) <= _MAX_LINE else joined[: _MAX_LINE - 1] + "…"


def nearest(name: str, options: Iterable[str]) -> str:
    """``did you mean 'x'?`` for the closest option, or a list of all when none is close."""
    known = sorted(set(options))
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.55)
    if not close:
        # A key typed with or without its section is the commonest slip after a typo.
        tail = name.rsplit(".", 1)[-1]
        close = [option for option in known if option.rsplit(".", 1)[-1] == tail]
    if close:
        return f"did you mean '{close[0]}'?"
    return "known: " + ", ".join(known[:40])
