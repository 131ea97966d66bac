"""Checkpoints that survive a kill, a power cut, a full disk and a flipped bit.

A checkpoint is a folder ``step-000120`` of safetensors and JSON files with a ``manifest.json``
that holds the size and SHA-256 of each. It is built in a hidden folder, made durable, and only
then given its name, so a folder with that name was whole once; the manifest tells whether it
still is. Nothing here is pickled, and nothing is ordered by a clock.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import safetensors
import safetensors.torch
import torch

from fourbit.errors import EnvironmentFault, InputError, ModelError
from fourbit.files import disk_fault, sha256_of, sync_folder, write_new
from fourbit.shards import DTYPES

FORMAT = "fourbit-checkpoint"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"

_STEP = re.compile(r"step-([0-9]{6,})")
_STAGING = re.compile(r"\.step-[0-9]{6,}\.tmp-[0-9a-f]{32}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.(safetensors|json)")
_MAX_MANIFEST = 16 << 20


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint in memory.

    Attributes:
        step: optimizer steps done when it was written.
        tensors: file name to tensor name to CPU tensor; no file stays mapped. Files that were
            asked for lazily are read tensor by tensor, each time anew.
        documents: file name to what its JSON holds (tuples come back as lists, keys as strings).
        identity: what the run was when it was written; see :func:`require_same_identity`.
    """

    step: int
    tensors: dict[str, Mapping[str, torch.Tensor]]
    documents: dict[str, Any]
    identity: dict[str, Any]


class _OnDemand(Mapping[str, torch.Tensor]):
    """The tensors of a file, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with safetensors.safe_open(path, framework="pt") as file:
            self._names = dict.fromkeys(file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        with safetensors.safe_open(self._path, framework="pt") as file:
            return file.get_tensor(name).clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Difference(NamedTuple):
    """One field in which a saved run and the current one differ; absent values are None."""

    field: str
    saved: Any
    current: Any
    allowed: bool


def save(
    checkpoints_dir: Path,
    *,
    step: int,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    documents: Mapping[str, Any],
    identity: Mapping[str, Any],
    agree: Callable[[], None] = lambda: None,
) -> Path:
    """Writes the checkpoint of a step; a good one that is there already is kept.

    Args:
        checkpoints_dir: the folder of all checkpoints; it is created when missing.
        step: optimizer steps done.
        tensors: file name (``*.safetensors``) to named tensors, on any device.
        documents: file name (``*.json``) to a JSON value; NaN and infinity are kept exactly.
        identity: JSON facts that must hold again when the run is resumed.
        agree: called when all is written and before it counts; what it raises undoes the save.

    Raises:
        EnvironmentFault: the disk refused. The older checkpoints are untouched.
    """
    _check_names(tensors, documents)
    final = checkpoints_dir / step_name(step)
    staging = checkpoints_dir / f".{final.name}.tmp-{uuid.uuid4().hex}"
    try:
        checkpoints_dir.mkdir(parents=True, exist_ok=True)
        if final.is_symlink() or final.exists():
            if not verify(final):
                return final
            _set_aside(final, "bad")
        staging.mkdir()
        _fill(staging, step=step, tensors=tensors, documents=documents, identity=identity)
        agree()
        os.rename(staging, final)
        sync_folder(checkpoints_dir)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise disk_fault(error, where=final) from error
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    _, problems = _read_manifest(final)
    if problems:
        what = f"written, but reads back wrong: {problems[0]}"
        raise EnvironmentFault("disk", where=str(final), what=what, fix="check the disk")
    return final


def verify(path: Path) -> list[str]:
    """What is wrong with a checkpoint, each line naming its file; empty when nothing is."""
    manifest, problems = _read_manifest(path)
    if problems:
        return problems
    for name, entry in manifest["files"].items():
        try:
            if sha256_of(path / name) != entry["sha256"]:
                problems.append(f"{name}: its SHA-256 is not the manifest's")
        except OSError as error:
            problems.append(f"{name}: {error.strerror or error}")
    return problems


def load(path: Path, *, lazily: AbstractSet[str] = frozenset()) -> Checkpoint:
    """Reads a checkpoint after verifying every byte of it.

    Args:
        path: its folder.
        lazily: files whose tensors are read one by one when they are asked for, as long as the
            checkpoint is there: for state that need not fit into memory at once.

    Raises:
        ModelError: naming the file that is wrong.
    """
    problems = verify(path)
    if problems:
        raise _corrupt(path, problems)
    manifest, _ = _read_manifest(path)
    tensors: dict[str, Mapping[str, torch.Tensor]] = {}
    documents: dict[str, Any] = {}
    for name in manifest["files"]:
        try:
            if name.endswith(".json"):
                documents[name] = json.loads((path / name).read_bytes())
            elif name in lazily:
                tensors[name] = _OnDemand(path / name)
            else:
                # Cloned, so that no tensor depends on a file that retention may delete.
                mapped = safetensors.torch.load_file(path / name)
                tensors[name] = {key: tensor.clone() for key, tensor in mapped.items()}
        except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
            raise _corrupt(path, [f"{name}: {error}"]) from error
    return Checkpoint(manifest["step"], tensors, documents, manifest["identity"])


def newest(checkpoints_dir: Path) -> tuple[Path | None, list[str]]:
    """The good checkpoint with the highest step, and why higher ones were skipped.

    Skipped ones stay where they are, for inspection.
    """
    skipped = []
    for _, path in sorted(_steps(checkpoints_dir), reverse=True):
        problems = verify(path)
        if not problems:
            return path, skipped
        skipped.append(f"{path.name}: {problems[0]}")
    return None, skipped


def at_step(checkpoints_dir: Path, *, step: int) -> Path:
    """The checkpoint of one step.

    Raises:
        InputError: there is none; the steps there are, are named.
        ModelError: there is one, and it is corrupt.
    """
    found = dict(_steps(checkpoints_dir))
    if step not in found:
        known = ", ".join(str(known) for known in sorted(found)[-20:]) or "none"
        raise InputError(
            "no-such-checkpoint",
            where=str(checkpoints_dir),
            what=f"there is no checkpoint of step {step}",
            fix=f"steps with a checkpoint: {known}",
        )
    problems = verify(found[step])
    if problems:
        raise _corrupt(found[step], problems)
    return found[step]


def retain(checkpoints_dir: Path, *, limit: int | None, protect: AbstractSet[int]) -> list[Path]:
    """Deletes the oldest checkpoints above a limit.

    The newest one that verifies always stays, and so does every folder without our manifest.

    Args:
        checkpoints_dir: the folder of all checkpoints.
        limit: how many to keep; None keeps all.
        protect: steps that stay whatever the limit, such as the best one.

    Returns:
        The folders that were deleted.

    Raises:
        EnvironmentFault: a folder could not be deleted.
    """
    if limit is None:
        return []
    # A corrupt folder neither counts nor goes: it is evidence, and not a checkpoint.
    ours = [(n, p) for n, p in sorted(_steps(checkpoints_dir)) if not _read_manifest(p)[1]]
    excess = len(ours) - limit
    if excess <= 0:
        return []
    keep, _ = newest(checkpoints_dir)
    deleted = []
    for step, path in ours:
        if len(deleted) < excess and path != keep and step not in protect:
            try:
                _delete(path)
            except OSError as error:
                raise disk_fault(error, where=path) from error
            deleted.append(path)
    return deleted


def set_aside_after(checkpoints_dir: Path, *, step: int) -> list[Path]:
    """Renames checkpoints above a step to ``step-000120.stale-1``, and returns the new paths.

    For a run resumed at an earlier step on purpose: what it once saved beyond is another branch.
    """
    later = [path for number, path in sorted(_steps(checkpoints_dir)) if number > step]
    return [_set_aside(path, "stale") for path in later]


def clean_staging(checkpoints_dir: Path) -> list[Path]:
    """Deletes half-written folders of dead runs; call it only while holding the run's lock."""
    if not checkpoints_dir.is_dir():
        return []
    dead = [
        path
        for path in sorted(checkpoints_dir.iterdir())
        if _STAGING.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]
    for path in dead:
        shutil.rmtree(path)
    return dead


def compare_identity(
    saved: Mapping[str, Any], current: Mapping[str, Any], *, warn_only: AbstractSet[str]
) -> list[Difference]:
    """Every leaf in which two identities differ, in the order of their dotted names.

    Args:
        saved: the identity in a checkpoint.
        current: the identity of the run that wants to resume.
        warn_only: dotted names that may change; a section's name covers all below it.
    """
    old, new = dict(_flat(saved, "")), dict(_flat(current, ""))
    found = []
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new or old[name] != new[name]:
            parts = name.split(".")
            allowed = any(".".join(parts[:n]) in warn_only for n in range(1, len(parts) + 1))
            found.append(Difference(name, old.get(name), new.get(name), allowed))
    return found


def require_same_identity(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    *,
    warn_only: AbstractSet[str],
    where: str,
) -> list[str]:
    """Refuses a resume with something else than was saved.

    Returns:
        One ``field old -> new`` for each allowed difference, to be shown as a warning.

    Raises:
        InputError: a field that may not change has changed.
    """
    differences = compare_identity(saved, current, warn_only=warn_only)
    refused = [_change(difference) for difference in differences if not difference.allowed]
    if refused:
        allowed = ", ".join(sorted(warn_only)) or "nothing"
        raise InputError(
            "identity-changed",
            where=where,
            what=f"this is not the run that was saved: {'; '.join(refused)}",
            fix=f"restore the old values or start a new run (allowed to change: {allowed})",
        )
    return [_change(difference) for difference in differences]


def step_name(step: int) -> str:
    """``step-000120``."""
    if step < 0:
        raise ValueError(f"a step is not negative: {step}")
    return f"step-{step:06d}"


def step_of(path: Path) -> int | None:
    """The step in a checkpoint folder's name, or None when it is not one."""
    match = _STEP.fullmatch(path.name)
    # Exactly the name we would write, so that no step has two folders.
    return int(match[1]) if match and step_name(int(match[1])) == path.name else None


def _check_names(tensors: Mapping[str, Any], documents: Mapping[str, Any]) -> None:
    for names, ending in ((tensors, ".safetensors"), (documents, ".json")):
        for name in names:
            if not (_FILE_NAME.fullmatch(name) and name.endswith(ending)) or name == MANIFEST:
                raise ValueError(f"not a file name for a checkpoint: {name!r}")


def _fill(
    staging: Path,
    *,
    step: int,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    documents: Mapping[str, Any],
    identity: Mapping[str, Any],
) -> None:
    files = {}
    for name, named in tensors.items():
        files[name] = _write(staging / name, lambda out, named=named: _put_tensors(out, named))
    for name, document in documents.items():
        data = json.dumps(document).encode()
        files[name] = _write(staging / name, lambda out, data=data: out.write(data))
    earlier = [path.name for n, path in sorted(_steps(staging.parent)) if n < step]
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": step,
        "parent": earlier[-1] if earlier else None,
        "identity": dict(identity),
        "files": files,
    }
    data = _canonical(manifest | {"digest": _digest(manifest)})
    _write(staging / MANIFEST, lambda out: out.write(data))
    sync_folder(staging)


class _HashingFile:
    """Hashes what passes through it, so that no file is read a second time to be hashed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> None:
        self._file.write(data)
        self.digest.update(data)
        self.size += len(data)


def _write(path: Path, put: Any) -> dict[str, Any]:
    entry = {}

    def hashed(file: BinaryIO) -> None:
        out = _HashingFile(file)
        put(out)
        entry.update(size=out.size, sha256=out.digest.hexdigest())

    write_new(path, hashed)
    return entry


def _put_tensors(out: _HashingFile, tensors: Mapping[str, torch.Tensor]) -> None:
    # Written here and not by safetensors: one device tensor at a time is in host memory, views of
    # one buffer are welcome, and a full disk is an OSError.
    kinds = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}
    order = sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name))
    header: dict[str, Any] = {}
    offset = 0
    for name in order:
        dtype, shape = kinds[name]
        if dtype not in DTYPES:
            raise ValueError(f"tensor {name!r} has a dtype no checkpoint holds: {dtype}")
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)
    out.write(len(data).to_bytes(8, "little"))
    out.write(data)
    for name in order:
        host = tensors[name].detach().cpu().contiguous()
        out.write(host.reshape(-1).view(torch.uint8).numpy().data)


def _canonical(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(manifest)).hexdigest()


def _read_manifest(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The manifest and what is wrong with it or with the sizes of the files it names."""
    if path.is_symlink() or not path.is_dir():
        return {}, [f"{path.name}: is not a folder"]
    size, problem = _size(path / MANIFEST)
    if problem or size > _MAX_MANIFEST:
        return {}, [f"{MANIFEST}: {problem or f'{size} bytes is too large'}"]
    try:
        data = (path / MANIFEST).read_bytes()
        manifest = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        return {}, [f"{MANIFEST}: is not JSON ({error})"]
    problem = _manifest_problem(manifest, data, path)
    if problem:
        return {}, [f"{MANIFEST}: {problem}"]
    problems = []
    for name, entry in manifest["files"].items():
        size, problem = _size(path / name)
        if not problem and size != entry["size"]:
            problem = f"has {size} bytes, the manifest says {entry['size']}"
        if problem:
            problems.append(f"{name}: {problem}")
    return manifest, problems


def _manifest_problem(manifest: Any, data: bytes, path: Path) -> str:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return "is not a manifest of fourbit"
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        return f"format version {version!r}, this fourbit reads {FORMAT_VERSION}"
    body = {key: value for key, value in manifest.items() if key != "digest"}
    # Compared as bytes, so that even a changed blank is found.
    if manifest.get("digest") != _digest(body) or data != _canonical(manifest):
        return "its digest does not match its content"
    if manifest.get("step") != step_of(path):
        return f"is of step {manifest.get('step')!r}"
    files, identity = manifest.get("files"), manifest.get("identity")
    if not isinstance(files, dict) or not isinstance(identity, dict):
        return "has no list of files or no identity"
    for name, entry in files.items():
        if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
            return f"names a file that cannot be in a checkpoint: {name!r}"
        if not isinstance(entry, dict) or {"size", "sha256"} - entry.keys():
            return f"has no size or no SHA-256 for {name}"
    return ""


def _size(path: Path) -> tuple[int, str]:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return 0, "is missing"
    except OSError as error:
        return 0, error.strerror or str(error)
    return status.st_size, "" if stat.S_ISREG(status.st_mode) else "is not a regular file"


def _steps(checkpoints_dir: Path) -> list[tuple[int, Path]]:
    if not checkpoints_dir.is_dir():
        return []
    found = ((step_of(path), path) for path in checkpoints_dir.iterdir())
    return [(step, path) for step, path in found if step is not None]


def _set_aside(path: Path, reason: str) -> Path:
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.{reason}-{number}")):
        number += 1
    os.rename(path, aside)
    sync_folder(path.parent)
    return aside


def _delete(path: Path) -> None:
    # Renamed first: a kill in the middle leaves staging to clean, never half a checkpoint.
    doomed = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _flat(value: Any, name: str) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping) and (value or not name):
        return [
            leaf
            for key, below in value.items()
            for leaf in _flat(below, f"{name}.{key}" if name else str(key))
        ]
    # A tuple comes back from JSON as a list.
    return [(name, list(value) if isinstance(value, tuple) else value)]


def _change(difference: Difference) -> str:
    return f"{difference.field} {_shown(difference.saved)} -> {_shown(difference.current)}"


def _shown(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _corrupt(path: Path, problems: list[str]) -> ModelError:
    more = f" (+{len(problems) - 1} more)" if len(problems) > 1 else ""
    return ModelError(
        "corrupt-checkpoint",
        where=str(path),
        what=problems[0] + more,
        fix="resume from an earlier step (--resume auto takes the newest good one)",
    )
