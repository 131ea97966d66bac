"""Data sets of the Hugging Face hub, through the optional package ``datasets``."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from fourbit.data.rows import Origin, Row
from fourbit.errors import EnvironmentFault, InputError

_HUB_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?::(?P<config>[\w.-]+))?(?:#(?P<split>[\w.\[\]:%-]+))?"
)
_OFFLINE = ("offline", "connection", "resolve", "timed out", "timeout", "couldn't reach")


class HubName(NamedTuple):
    """A hub data set: repository, configuration (or None) and split."""

    repo: str
    config: str | None
    split: str


def parse_hub_name(name: str) -> HubName | None:
    """Reads ``org/name``, ``org/name:config`` or either with ``#split``; None for anything else."""
    match = _HUB_NAME.fullmatch(name)
    if match is None:
        return None
    return HubName(match["repo"], match["config"], match["split"] or "train")


def load_hub_rows(name: str, hub: HubName) -> Any:
    """Loads one split, never running code from the repository.

    Raises:
        InputError: the data set does not exist, or consists of a loading script.
        EnvironmentFault: the package is missing or the hub cannot be reached.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise EnvironmentFault(
            "missing-extra",
            where=name,
            what="no such local file, and hub data sets need the package datasets",
            fix="pip install 'fourbit[data]', or correct the path",
        ) from None
    try:
        return datasets.load_dataset(hub.repo, hub.config, split=hub.split)
    # The package raises some twenty types from four libraries; all mean that nothing was loaded.
    except Exception as error:
        raise _hub_fault(name, error) from error


def _hub_fault(name: str, error: Exception) -> InputError | EnvironmentFault:
    text = f"{type(error).__name__}: {error}"
    first = text.splitlines()[0][:300]
    lower = text.lower()
    if "script" in lower and "support" in lower:
        return InputError(
            "loading-script",
            where=name,
            what="the data set consists of a loading script, which is never run",
            fix="use its Parquet files (branch refs/convert/parquet on the hub) as local files",
        )
    if "not found" in lower or "doesn't exist" in lower:
        what = "neither a local file nor a data set that the hub shows"
        return InputError("no-data-set", where=name, what=what, fix=f"check the name ({first})")
    if any(word in lower for word in _OFFLINE):
        what = f"the hub cannot be reached: {first}"
        return EnvironmentFault("offline", where=name, what=what, fix="use a local file")
    return InputError("hub", where=name, what=first, fix="check its name, configuration and split")


def read_hub_rows(name: str, table: Any, digest: hashlib._Hash) -> Iterator[Row]:
    """Yields rows and feeds them to a digest, since a hub data set has no one file to hash."""
    for number, record in enumerate(table, start=1):
        digest.update(json.dumps(record, sort_keys=True, default=str).encode())
        yield Row(record, Origin(name, number))
