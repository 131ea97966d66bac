"""`quantize_checkpoint`: reads, quantizes and writes one tensor after another."""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from fourbit import __version__, bnb_format, files
from fourbit import device as devices
from fourbit.data.files import check_regular_file
from fourbit.errors import EnvironmentFault, Interrupted, ModelError
from fourbit.files import human_bytes
from fourbit.integrations.config import FourbitConfig
from fourbit.integrations.transformers import (
    packed,
    plain_layout,
    quantized_layout,
    resolve_skips,
)
from fourbit.linear import QuantizedLinear
from fourbit.loading import load_config, stored_dtype, stored_quantization
from fourbit.quantize import check_finite
from fourbit.quantizing.calibrate import Calibrated, Calibration, as_pattern, calibrate
from fourbit.quantizing.measure import Squares, relative, squares
from fourbit.quantizing.options import QuantizeOptions
from fourbit.quantizing.plan import Plan, Shard, Unit, make_plan
from fourbit.quantizing.staging import Staging, require_target
from fourbit.quantizing.tensors import SourceTensors, open_tensors
from fourbit.shards import INDEX, ShardWriter, index_text
from fourbit.sources import ModelSource, resolve_source
from fourbit.training.progress import Advance, Reporter

_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "*.jinja",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
_LISTED_SHARE = 0.01
_WORST = 5


@dataclass(frozen=True)
class QuantizeResult:
    """What was written.

    Attributes:
        output: the folder.
        quant_type: of the quantized layers.
        bytes_in: of the weight files that were read.
        bytes_out: of the weight files that were written.
        parameters: of the model.
        bits_per_weight: stored bits for each parameter of the model, everything counted.
        quantized_bits_per_weight: the same of the quantized layers alone: codes, scales, tables.
        relative_error: ``|W - Ŵ| / |W|`` (Frobenius) of the quantized layers together.
        worst: the layers with the largest error, ``name`` and ``relative_error``.
        unquantized: tensors above 1% of the output, ``name``, ``bytes`` and ``share``.
        unused: tensors of the source that the architecture does not know.
        peak_host_bytes: highest private memory of the process; None where the system cannot say.
        start_host_bytes: private memory before the work began.
        seconds: of this call; less than the whole when it continued an interrupted one.
        calibration: tokens and losses before and after, where it was calibrated.
    """

    output: str
    quant_type: str
    bytes_in: int
    bytes_out: int
    parameters: int
    bits_per_weight: float
    quantized_bits_per_weight: float
    relative_error: float
    worst: tuple[dict[str, Any], ...]
    unquantized: tuple[dict[str, Any], ...]
    unused: tuple[str, ...]
    peak_host_bytes: int | None
    start_host_bytes: int | None
    seconds: float
    calibration: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            **asdict(self),
            "worst": list(self.worst),
            "unquantized": list(self.unquantized),
            "unused": list(self.unused),
        }

    def lines(self) -> list[str]:
        """The facts for people."""
        lines = [
            f"{self.output}: {human_bytes(self.bytes_in)} -> {human_bytes(self.bytes_out)}",
            f"bits per weight: {self.bits_per_weight:.3f} of the model,"
            f" {self.quantized_bits_per_weight:.3f} of the {self.quant_type} layers"
            " (scales and tables counted)",
            f"relative error: {self.relative_error:.4%}",
            *(f"  {row['relative_error']:.4%}  {row['name']}" for row in self.worst),
        ]
        if self.unquantized:
            lines.append("not quantized:")
        lines += [
            f"  {row['name']}: {human_bytes(row['bytes'])}, {row['share']:.1%}"
            for row in self.unquantized
        ]
        if self.unused:
            lines.append(
                f"left out: {len(self.unused)} tensors that the architecture does not use,"
                f" first: {self.unused[0]}"
            )
        if self.peak_host_bytes is not None:
            above = self.peak_host_bytes - (self.start_host_bytes or 0)
            lines.append(
                f"peak memory: {human_bytes(self.peak_host_bytes)},"
                f" {human_bytes(above)} of it for this work"
            )
        return [*lines, f"time: {self.seconds:.1f} s"]


def quantize_checkpoint(
    model: str,
    output: str | Path,
    *,
    options: QuantizeOptions | None = None,
    reporter: Reporter | None = None,
) -> QuantizeResult:
    """Writes a quantized copy of a checkpoint without ever holding the model in memory.

    The tensors are those that ``from_pretrained(..., quantization_config=FourbitConfig(...))``
    and ``save_pretrained`` give. An interrupted call keeps its finished files beside ``output``;
    the same call again continues with them and writes the same bytes.

    Args:
        model: folder of safetensors, GGUF file, hub id, or an alias.
        output: the folder to create.
        options: how; None for NF4 with double quantization.
        reporter: shows progress; None shows none.

    Raises:
        InputError: an output that is taken, or settings that do not fit together.
        ModelError: a model that cannot be read or is quantized already, NaN or Inf.
        EnvironmentFault: the disk is too small or refuses.
        Interrupted: Ctrl-C; what is finished is kept.
    """
    began = time.perf_counter()
    options = options or QuantizeOptions()
    reporter = reporter or Reporter(quiet=True)
    with devices.PeakMemory() as memory:
        source = resolve_source(model, revision=options.revision)
        target = require_target(Path(output), source.path, overwrite=options.overwrite)
        work = _Work.prepare(source, target, options)
        work.run(reporter)
    return work.result(str(output), memory, time.perf_counter() - began)


@dataclass
class _Work:
    """One checkpoint on its way."""

    source: ModelSource
    config: PretrainedConfig
    quantization: FourbitConfig
    dtype: torch.dtype
    model: PreTrainedModel
    tensors: SourceTensors
    plan: Plan
    staging: Staging
    fingerprint: list[Any]
    options: QuantizeOptions
    calibrated: Calibrated | None = None

    @classmethod
    def prepare(cls, source: ModelSource, target: Path, options: QuantizeOptions) -> _Work:
        """Everything that can be decided, and refused, from headers."""
        shard_bytes = options.shard_bytes
        _refuse_quantized(source)
        options.quantization(None)
        config, dtype = load_config(source), stored_dtype(source)
        tensors = open_tensors(source, config)
        skip = resolve_skips(plain_layout(config, dtype=dtype), options.skip)
        quantization = options.quantization(skip)
        model = quantized_layout(config, quantization, dtype=dtype)
        plan = make_plan(tensors, model, dtype=dtype, shard_bytes=shard_bytes)
        fingerprint = _fingerprint(source, tensors.files)
        identity = {
            "fourbit": __version__,
            "source": fingerprint,
            "quantization": quantization.to_dict(),
            "plan": plan.digest(),
            "calibration": _calibration_identity(options.calibrate),
        }
        staging = Staging(target, identity)
        return cls(
            source, config, quantization, dtype, model, tensors, plan, staging, fingerprint, options
        )

    def run(self, reporter: Reporter) -> None:
        """Writes what is not yet written, and gives the folder its name."""
        self.staging.open()
        if self.staging.restarted:
            reporter.line(
                f"{self.staging.home.name} was made from another source or with other settings:"
                " starting over"
            )
        elif self.staging.finished:
            done, count = len(self.staging.finished), len(self.plan.shards)
            reporter.line(f"continuing: {done} of {count} files are finished")
        try:
            self.staging.require_space(self.plan.bytes)
            if self.options.calibrate is not None:
                self._calibrate(self.options.calibrate, reporter)
            self._write_shards(reporter)
            self._require_unchanged()
            self._write_metadata()
            self.staging.publish()
        except ModelError:
            self.staging.discard()
            raise
        except KeyboardInterrupt:
            raise self._interrupted() from None
        finally:
            self.tensors.close()
            self.staging.close()

    def _calibrate(self, wanted: Calibration, reporter: Reporter) -> None:
        units = {
            unit.parameter.removesuffix(".weight"): unit
            for unit in self.plan.units
            if unit.layer is not None
        }

        def weight(name: str) -> Tensor:
            unit = units[name]
            assert unit.layer is not None
            found = self.tensors.whole(unit.source).to(unit.dtype)
            return found.t() if unit.layer.transposed_source else found

        self.calibrated = calibrate(
            self.source,
            self.quantization.quant,
            skip=self.quantization.modules_to_not_convert,
            options=wanted,
            weight=weight,
            folder=self.staging.layers,
            reporter=reporter,
        )

    def _write_shards(self, reporter: Reporter) -> None:
        units = self.plan.units
        total = sum(_source_bytes(unit, self.tensors) for unit in units)
        finished = [u for s in self.plan.shards if s.name in self.staging.finished for u in s.units]
        progress = _Progress(total, len(finished))
        progress.skip(sum(_source_bytes(unit, self.tensors) for unit in finished))
        with reporter.task("tensors", total=len(units), start=len(finished)) as advance:
            for shard in self.plan.shards:
                if shard.name not in self.staging.finished:
                    facts = self._write_shard(shard, progress, advance)
                    self._require_unchanged()
                    self.staging.keep(shard.name, facts)

    def _write_shard(self, shard: Shard, progress: _Progress, advance: Advance) -> dict[str, Any]:
        path = self.staging.folder / f"{shard.name}.part"
        final = self.staging.folder / shard.name
        layers: dict[str, tuple[float, float, int]] = {}
        try:
            writer = ShardWriter(path, shard.entries)
            try:
                for unit in shard.units:
                    if unit.layer is None:
                        self._copy(unit, writer)
                    else:
                        layers[unit.name] = self._quantize(unit, unit.layer, writer)
                    progress.add(_source_bytes(unit, self.tensors))
                    advance(progress.tensors, progress.note())
                size = writer.finish()
            except BaseException:
                writer.close()
                path.unlink(missing_ok=True)
                raise
            os.replace(path, final)
            files.sync_folder(self.staging.folder)
        except OSError as error:
            raise files.disk_fault(error, where=final) from error
        devices.release_memory()
        return {"bytes": size, "data": writer.data_bytes, "layers": layers}

    def _copy(self, unit: Unit, writer: ShardWriter) -> None:
        def checked() -> Iterator[Tensor]:
            for piece in self.tensors.pieces(unit.source):
                if piece.is_floating_point() and not torch.isfinite(piece.sum()):
                    # slow, but this names the place in the whole tensor; a sum may overflow
                    check_finite(self.tensors.whole(unit.source), name=unit.source)
                yield piece

        writer.put_pieces(unit.entries[0].name, checked())

    def _quantize(
        self, unit: Unit, pattern: QuantizedLinear, writer: ShardWriter
    ) -> tuple[float, float, int]:
        """Error and norm, both squared, and the bytes written."""
        weight = self.tensors.whole(unit.source).to(unit.dtype)
        if self.calibrated is None:
            layer = copy.deepcopy(pattern)
            layer.replace_(packed(layer, weight, name=unit.source))
        else:
            module = self.calibrated.model.get_submodule(unit.parameter.removesuffix(".weight"))
            assert isinstance(module, QuantizedLinear)
            layer = as_pattern(pattern, module)
            layer.original_dtype = weight.dtype
        prefix = unit.name.removesuffix("weight")
        size = 0
        for key, tensor in bnb_format.to_disk(layer).items():
            writer.put(prefix + key, tensor)
            size += tensor.nbytes
        return (*squares(layer, weight.t() if layer.transposed_source else weight), size)

    def _write_metadata(self) -> None:
        folder = self.staging.folder
        metadata = self.source.metadata
        try:
            for pattern in _COPIED:
                for path in sorted(metadata.glob(pattern)):
                    if path.is_file() and path.suffix not in (".safetensors", ".gguf", ".bin"):
                        shutil.copyfile(path, folder / path.name)
            if len(self.plan.shards) > 1:
                (folder / INDEX).write_text(self._index(), encoding="utf-8")
            (folder / "config.json").write_text(self._config_text(), encoding="utf-8")
        except OSError as error:
            raise files.disk_fault(error, where=folder) from error

    def _index(self) -> str:
        entries = {e.name: shard.name for shard in self.plan.shards for e in shard.entries}
        return index_text(
            entries,
            total_parameters=self._parameters(),
            total_size=sum(facts["data"] for facts in self.staging.finished.values()),
        )

    def _config_text(self) -> str:
        config = copy.deepcopy(self.config)
        config.architectures = [type(self.model).__name__]
        config.dtype = self.dtype
        config.quantization_config = self.quantization.to_dict()
        return config.to_json_string(use_diff=True)

    def _parameters(self) -> int:
        return sum(_numel(self.tensors.shapes[unit.source]) for unit in self.plan.units)

    def _require_unchanged(self) -> None:
        if _fingerprint(self.source, self.tensors.files) != self.fingerprint:
            raise ModelError(
                "source-changed",
                where=self.source.name,
                what="its files changed while they were being read",
                fix="wait until they are complete, then start again",
            )

    def _interrupted(self) -> Interrupted:
        done, count = len(self.staging.finished), len(self.plan.shards)
        what = f"stopped with {done} of {count} files finished"
        if done:
            what += f"; they are kept in {self.staging.home}"
        return Interrupted(
            "interrupted",
            where=str(self.staging.output),
            what=what,
            fix="the same command again continues" if done else "the same command starts again",
        )

    def result(self, output: str, memory: devices.PeakMemory, seconds: float) -> QuantizeResult:
        """The numbers of the finished work, those of continued files included."""
        finished = self.staging.finished
        bytes_out = sum(facts["bytes"] for facts in finished.values())
        layers = {n: row for facts in finished.values() for n, row in facts["layers"].items()}
        errors: dict[str, Squares] = {name: (row[0], row[1]) for name, row in layers.items()}
        data = sum(facts["data"] for facts in finished.values())
        units, parameters = self.plan.units, self._parameters()
        quantized = [unit for unit in units if unit.layer is not None]
        weights = sum(_numel(self.tensors.shapes[unit.source]) for unit in quantized)
        worst = sorted(((relative({n: p}), n) for n, p in errors.items()), reverse=True)[:_WORST]
        plain = sorted((u for u in units if u.layer is None), key=lambda unit: -unit.bytes)
        return QuantizeResult(
            output=output,
            quant_type=self.quantization.quant.quant_type,
            bytes_in=sum(path.stat().st_size for path in self.tensors.files),
            bytes_out=bytes_out,
            parameters=parameters,
            bits_per_weight=8 * data / parameters,
            quantized_bits_per_weight=8 * sum(row[2] for row in layers.values()) / weights,
            relative_error=relative(errors),
            worst=tuple({"name": name, "relative_error": error} for error, name in worst),
            unquantized=tuple(
                {"name": unit.name, "bytes": unit.bytes, "share": unit.bytes / data}
                for unit in plain
                if unit.bytes > _LISTED_SHARE * data
            ),
            unused=self.plan.unused,
            peak_host_bytes=memory.peak,
            start_host_bytes=memory.start,
            seconds=seconds,
            calibration=None if self.calibrated is None else self.calibrated.facts,
        )


class _Progress:
    """How far the work is: tensors, bytes, and bytes a second of this process."""

    def __init__(self, total: int, tensors: int) -> None:
        self.total, self.tensors = total, tensors
        self.bytes = self._skipped = 0
        self._began = time.perf_counter()

    def skip(self, size: int) -> None:
        """Bytes that an earlier process did."""
        self.bytes = self._skipped = size

    def add(self, size: int) -> None:
        """One more tensor."""
        self.tensors += 1
        self.bytes += size

    def note(self) -> str:
        """What stands beside the bar."""
        rate = (self.bytes - self._skipped) / max(time.perf_counter() - self._began, 1e-9)
        return f"{human_bytes(self.bytes)} of {human_bytes(self.total)}, {human_bytes(rate)}/s"


def _calibration_identity(options: Calibration | None) -> list[Any] | None:
    if options is None:
        return None
    size = check_regular_file(str(options.path), key="--calibrate")
    return [
        [size, files.sha256_of(options.path)],
        options.tokens,
        options.length,
        options.damping,
    ]


def _refuse_quantized(source: ModelSource) -> None:
    stored = stored_quantization(source)
    if stored is not None:
        raise ModelError(
            "already-quantized",
            where=source.name,
            what=f"the checkpoint is quantized already ({stored.quant.quant_type})",
            fix="start from the 16-bit checkpoint; this one loads as it is",
        )


def _fingerprint(source: ModelSource, paths: list[Path]) -> list[Any]:
    """Changes when a file of the source does, as far as its size, time and header show."""
    try:
        facts: list[Any] = [
            [path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths
        ]
        config = source.metadata / "config.json"
        return [*facts, hashlib.sha256(config.read_bytes()).hexdigest()]
    except OSError as error:
        raise EnvironmentFault(
            "unreadable",
            where=str(error.filename or source.name),
            what=error.strerror or str(error),
            fix="check the path and its permissions",
        ) from error


def _source_bytes(unit: Unit, tensors: SourceTensors) -> int:
    return _numel(tensors.shapes[unit.source]) * unit.dtype.itemsize


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
