"""Templates over the columns of a row, for data of any shape."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from typing import Any

from fourbit.data.rows import RowError
from fourbit.errors import InputError, nearest


class ColumnTemplate:
    """Text with ``{column}`` places; a doubled brace is a literal one.

    Args:
        template: the template.
        key: the setting it came from.
        columns: columns that exist.

    Raises:
        InputError: malformed, without any column, or with one that does not exist.
    """

    def __init__(self, template: str, key: str, columns: Mapping[str, Any]) -> None:
        try:
            parts = list(string.Formatter().parse(template))
        except ValueError as error:
            what = f"{template!r}: {error}"
            raise InputError("bad-template", where=key, what=what, fix="double {{ }}") from None
        self._parts = [(text, name) for text, name, _, _ in parts]
        for _, name, format_spec, conversion in parts:
            if name is not None and (format_spec or conversion):
                what = f"{{{name}…}} has a format; only plain {{column}} is known"
                raise InputError("bad-template", where=key, what=what, fix="double literal braces")
            if name is not None and name not in columns:
                what = f"no column {name!r}; the columns are {', '.join(columns)}"
                raise InputError("no-column", where=key, what=what, fix=nearest(name, columns))
        self.columns = {name for _, name in self._parts if name is not None}
        if not self.columns:
            what = f"{template!r} names no column"
            raise InputError("bad-template", where=key, what=what, fix='such as "{text}"')

    def fill(self, data: Mapping[str, Any]) -> str:
        """The template with a row's values; lists and objects appear as JSON."""
        return "".join(
            text + ("" if name is None else _shown(data, name)) for text, name in self._parts
        )


def _shown(data: Mapping[str, Any], name: str) -> str:
    if name not in data:
        raise RowError(f"has no field {name!r}")
    value = data[name]
    if value is None:
        raise RowError(f"field {name!r} is null; expected a value")
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)
