"""`fourbit merge`: an adapter into the base it was trained on, tensor by tensor, with a proof."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fourbit import device as devices
from fourbit import files
from fourbit.data import resolve_template
from fourbit.errors import FourbitError, InputError, ModelError, VerificationFailed
from fourbit.linear import QuantizedLinear, keep_dequantized
from fourbit.loading import LoadOptions, load_config, load_model, load_tokenizer, stored_dtype
from fourbit.merging.adapter import Changes, apply_update, attach, find_changes
from fourbit.merging.base import Base, make_skeleton, open_base
from fourbit.merging.card import merged_card
from fourbit.merging.metadata import config_for, copy_metadata, write_generation_config
from fourbit.merging.proof import (
    Measured,
    Parity,
    Rows,
    compare,
    fixed_rows,
    measure,
    require_parity,
    rows_of_run,
)
from fourbit.merging.requantized import MOST_LOST, Requantized, count_requantized
from fourbit.merging.result import MergeOptions, MergeResult
from fourbit.merging.trained import Trained, find_trained, require_digests, require_same_model
from fourbit.merging.writer import (
    PROOF,
    folder_bytes,
    require_free_target,
    require_space,
    staged,
)
from fourbit.quantize import QuantConfig
from fourbit.quantizing import QuantizeOptions, quantize_checkpoint
from fourbit.shards import Entry, parse_size, write_shards
from fourbit.sources import ModelSource, resolve_source
from fourbit.training.progress import Reporter

_NAMES = {dtype: name for name, dtype in devices.DTYPES.items()}
_TOKENIZER = "tokenizer_config.json"
_LOUD = 0.1
"""Share of the adapter's own effect above which rounding is worth a warning."""


def merge(
    path: str | Path,
    output: str | Path,
    *,
    options: MergeOptions | None = None,
    reporter: Reporter | None = None,
) -> MergeResult:
    """Merges an adapter into its base and proves that the result answers the same.

    Args:
        path: a run directory, or an adapter folder together with ``options.model``.
        output: the folder to write; it appears only when everything has succeeded.
        options: the base, the dtype and the proof.
        reporter: receives progress.

    Raises:
        ModelError: a base or adapter that cannot be used, or that do not belong together.
        VerificationFailed: the merged model answers differently.
        EnvironmentFault: the disk refuses or is too small.
    """
    chosen = options or MergeOptions()
    target = Path(output)
    limit = parse_size(chosen.max_shard_size)
    require_free_target(target, overwrite=chosen.overwrite)
    trained = find_trained(Path(path), model=chosen.model, quant=chosen.quant)
    return _Merge(trained, target, chosen, limit, reporter or Reporter()).run()


class _Merge:
    """The phases of one merge and what they share."""

    tokenizer: PreTrainedTokenizerBase
    model_config: PretrainedConfig
    changes: Changes
    base: Base
    dtype: torch.dtype

    def __init__(
        self,
        trained: Trained,
        output: Path,
        options: MergeOptions,
        limit: int,
        reporter: Reporter,
    ) -> None:
        self.trained, self.output, self.options = trained, output, options
        self.limit, self.say = limit, reporter
        self.findings: list[str] = []
        self.rounded = Requantized()
        self.checked = "nothing: no run recorded it" if trained.config is None else ""

    def run(self) -> MergeResult:
        """All phases; the output appears at the end or not at all."""
        began = time.perf_counter()
        self.prepare()
        entries = self.entries()
        size = sum(entry.bytes for entry in entries)
        require_space(self.output.absolute().parent, size)
        rows = self.rows() if self.options.proof else None
        before = trained = None
        if rows is not None:
            before, trained = self.ask_adapter(rows)
        with staged(self.output) as staging:
            self.write(staging, entries)
            if self.options.requantize:
                self.require_kept()
            if rows is None and self.trained.facts:
                self.check_written()
            proof = difference = None
            if rows is not None and before is not None:
                after = self.ask_merged(staging, rows)
                proof = compare(before, after, rows)
                difference = None if trained is None else compare(trained, after, rows)
                self.require(proof)
            difference_4bit = None
            if self.options.requantize:
                self.pack(staging)
                if rows is not None and before is not None:
                    difference_4bit = compare(before, self.ask_merged(staging, rows), rows)
            result = MergeResult(
                output=str(self.output),
                model=self.trained.source.name,
                revision=self.trained.source.revision,
                base="dequantized" if self.base.dequantize else "original",
                dtype=_NAMES[self.dtype],
                bytes=folder_bytes(staging),
                tensors=len(entries),
                updated=len(self.changes.updates),
                replaced=len(self.changes.replaced),
                seconds=round(time.perf_counter() - began, 2),
                peak_host_bytes=devices.peak_memory(torch.device("cpu")),
                proof=proof,
                trained_difference=difference,
                base_checked=self.checked,
                requantized=self.rounded if self.options.requantize else None,
                requantized_difference=difference_4bit,
                findings=self.findings,
            )
            self.sign(staging, result)
        return result

    # What is known before a weight is read.

    def prepare(self) -> None:
        """Configuration, tokenizer, and what the adapter changes where."""
        trained, source = self.trained, self.trained.source
        trust = trained.trust_remote_code
        self.model_config = load_config(source, trust_remote_code=trust)
        self.changes = find_changes(
            make_skeleton(self.model_config, trust_remote_code=trust), trained.adapter
        )
        kind = self.options.base
        if kind == "dequantized" and trained.quant is None:
            raise InputError(
                "base-not-quantized",
                where="--base",
                what="the adapter was trained on 16 or 32-bit weights, nothing was quantized",
                fix="leave --base out",
            )
        dequantize = trained.quant is not None and kind != "original"
        if self.options.requantize and (
            trained.quant is None or trained.quant.is_int8 or not dequantize
        ):
            raise InputError(
                "nothing-to-requantize",
                where="--requantize",
                what="the merged weights do not come out of 4 bits",
                fix="leave --requantize out; fourbit quantize packs any model",
            )
        self.base = open_base(
            source,
            self.model_config,
            quant=trained.quant,
            dequantize=dequantize,
            held=None if kind == "original" else trained.dtype,
            trust_remote_code=trust,
        )
        if self.base.parts and not dequantize:
            raise InputError(
                "base-quantized",
                where="--base",
                what="the base on disk is quantized itself, there is no original",
                fix="leave --base out, or give the 16-bit model with --model",
            )
        self.dtype = self._output_dtype()
        if trained.facts and not self.options.proof:
            self.base.hashed = trained.dtype
        self._untie()
        self._open_tokenizer()
        if trained.adapter.changes_nothing():
            self.finding("the adapter changes nothing: every lora_B is zero")

    def finding(self, text: str) -> None:
        """A warning that also stays in the record."""
        self.findings.append(text)
        self.say.warn(text)

    def _output_dtype(self) -> torch.dtype:
        if self.options.dtype != "auto":
            return devices.DTYPES[self.options.dtype]
        stored = stored_dtype(self.trained.source)
        return stored if stored != torch.float32 else torch.bfloat16

    def _untie(self) -> None:
        """A tied weight that the adapter changes at one of its names becomes two weights."""
        touched = {*self.changes.updates, *self.changes.replaced}
        for name, source in dict(self.base.tied).items():
            if name in touched or source in touched:
                del self.base.tied[name]
                self.base.slots[name] = self.base.slots[source]

    def _open_tokenizer(self) -> None:
        trained = self.trained
        place = trained.source
        if trained.config is None and (trained.adapter.folder / _TOKENIZER).is_file():
            place = ModelSource(str(trained.adapter.folder), "folder", trained.adapter.folder)
        self.tokenizer_source = place
        self.tokenizer = load_tokenizer(place, trust_remote_code=trained.trust_remote_code)
        config = trained.config
        self.own_template = config is not None and config.data.chat_template is not None
        if config is not None and self.own_template:
            template = resolve_template(self.tokenizer, chat_template=config.data.chat_template)
            self.tokenizer.chat_template = template.source
        rows = self.changes.vocabulary or self.model_config.get_text_config().vocab_size
        highest = max(self.tokenizer.get_vocab().values(), default=0)
        if highest >= rows:
            raise ModelError(
                "vocabulary",
                where=place.name,
                what=f"the tokenizer has tokens up to id {highest}, the embedding {rows} rows",
                fix="give the tokenizer's own model, or the adapter with its resized embedding",
            )

    def entries(self) -> list[Entry]:
        """Every tensor of the output, in the order of the base's files."""
        shapes = {
            name: tuple(tensor.shape)
            for name, tensor in make_skeleton(
                self.model_config, trust_remote_code=self.trained.trust_remote_code
            ).state_dict().items()
        }  # fmt: skip
        adapter = self.trained.adapter
        shapes |= {name: adapter.shapes[key] for name, key in self.changes.replaced.items()}
        rows = self.changes.vocabulary
        entries = []
        for name, slot in self.base.slots.items():
            floating = slot.floating or name in self.base.layers
            dtype = self.dtype if floating else slot.read().dtype
            entries.append(Entry(name, dtype, shapes[name]))
        if rows is not None:
            self._require_all_resized(entries, rows)
        return entries

    def _require_all_resized(self, entries: list[Entry], rows: int) -> None:
        old = self.model_config.get_text_config().vocab_size
        for entry in entries:
            if entry.name.endswith((".embed_tokens.weight", "lm_head.weight")) and (
                entry.shape[0] == old
            ):
                raise ModelError(
                    "vocabulary",
                    where=str(self.trained.adapter.folder),
                    what=f"it resizes the vocabulary to {rows}, but {entry.name} keeps {old} rows",
                    fix="save the adapter with both embeddings (modules_to_save)",
                )

    # The merge itself.

    def write(self, staging: Path, entries: list[Entry]) -> None:
        """All files but the record and the card."""
        with self.say.task("merging", total=len(entries)) as advance:
            done = iter(range(1, len(entries) + 1))

            def tensor(name: str) -> Tensor:
                merged = self.merged(name)
                advance(next(done), name)
                return merged

            write_shards(staging, entries, self.limit, tensor)
        devices.release_memory()
        self.write_metadata(staging)

    @torch.no_grad()
    def merged(self, name: str) -> Tensor:
        """One tensor of the output: computed in float32, rounded once.

        Raises:
            InputError: a value that the output's dtype cannot hold.
        """
        adapter, changes = self.trained.adapter, self.changes
        if name in changes.replaced:
            value = adapter.tensor(changes.replaced[name])
            if self.trained.facts and not self.options.proof:
                self.base.weight(name)  # counts towards the digest of the base
        else:
            value = self.base.weight(name)
            if not value.is_floating_point():
                return value
        update, bias = changes.updates.get(name), changes.biases.get(name)
        if update is not None:
            before = value
            value = apply_update(_own_float32(value), update, adapter.tensor)
            if self.options.requantize and self.trained.quant is not None:
                self.rounded += count_requantized(before.float(), value, self.trained.quant)
        if bias is not None:
            value = _own_float32(value).add_(adapter.tensor(bias[0]), alpha=bias[1])
        result = value.to(self.dtype).contiguous()
        if self.dtype == torch.float16 and not torch.isfinite(result).all():
            raise InputError(
                "overflow",
                where=name,
                what=f"a value of {float(value.abs().max()):.3g} does not fit float16",
                fix="--dtype bf16",
            )
        return result

    def require_kept(self) -> None:
        """Refuses to round away what was learned.

        Raises:
            VerificationFailed: naming the loss and the limit.
        """
        self.say.line(self.rounded.line())
        if self.rounded.lost_share > MOST_LOST and not self.options.force:
            raise VerificationFailed(
                "requantize-loses-update",
                where=str(self.output),
                what=f"rounding back to 4 bits makes an error of {self.rounded.lost_share:.2f} of"
                f" the update (limit {MOST_LOST}), {self.rounded.unmoved_share:.1%} of the codes"
                " do not move",
                fix="merge without --requantize, or keep the adapter beside the base (--force)",
            )

    def pack(self, staging: Path) -> None:
        """The merged 16-bit folder into the run's 4 bits, in its place."""
        assert self.trained.quant is not None
        packed = staging.with_name(staging.name + "-4bit")
        shutil.rmtree(packed, ignore_errors=True)
        options = QuantizeOptions(
            quant=self.trained.quant, max_shard_size=self.options.max_shard_size
        )
        try:
            quantize_checkpoint(str(staging), packed, options=options, reporter=self.say)
            for path in staging.glob("*.safetensors*"):
                path.unlink()
            for path in packed.iterdir():
                path.replace(staging / path.name)
        finally:
            shutil.rmtree(packed, ignore_errors=True)

    def check_written(self) -> None:
        """Without a proof no model is loaded: the base was hashed as its weights passed by.

        Raises:
            ModelError: the base is not the one of the run.
        """
        base, quantized = self.base, self.trained.quant is not None
        skeleton = make_skeleton(
            self.model_config, trust_remote_code=self.trained.trust_remote_code
        )
        parameters = {name for name, _ in skeleton.named_parameters()}
        # Buffers on disk are hashed by the run in dtypes that only a loaded model has.
        exact = parameters == base.packed_names() | base.others.keys()
        self.checked = require_digests(
            self.trained,
            base.packed_sha256() if quantized else None,
            base.every_sha256 if exact else None,
        )

    def write_metadata(self, staging: Path) -> None:
        """Configuration, tokenizer and generation settings."""
        skeleton = make_skeleton(
            self.model_config, trust_remote_code=self.trained.trust_remote_code
        )
        raw = self.trained.source.metadata / "config.json"
        values = config_for(
            json.loads(raw.read_text(encoding="utf-8")),
            architecture=type(skeleton).__name__,
            dtype=self.dtype,
            tied=bool(self.base.tied),
            rows=self.changes.vocabulary,
        )
        files.replace_file(staging / "config.json", (json.dumps(values, indent=2) + "\n").encode())
        copy_metadata(
            self.trained.source,
            self.tokenizer_source,
            staging,
            own_code=self.trained.trust_remote_code,
        )
        if self.own_template:
            self.tokenizer.save_pretrained(staging)
        write_generation_config(self.trained.source, self.model_config, staging)

    # The proof.

    def rows(self) -> Rows:
        """What both models are asked."""
        config, rows = self.trained.config, None
        if config is not None:
            rows = rows_of_run(
                config, self.tokenizer, self.model_config, count=self.options.proof_rows
            )
            if rows is None:
                self.finding("the run's evaluation rows are not there: built-in texts are asked")
        return rows or fixed_rows(self.tokenizer)

    def ask_adapter(self, rows: Rows) -> tuple[Measured, Measured | None]:
        """The adapter on the base it is merged into, and as it was trained where that differs.

        It differs when the original base is taken, and for INT8, which rounds activations too.
        """
        quant = self.trained.quant
        if quant is None or (self.base.dequantize and not quant.is_int8):
            return self._ask_adapter(rows, quant), None
        trained = self._ask_adapter(rows, quant)
        inner = quant if self.base.dequantize else None
        return self._ask_adapter(rows, inner, check=False, plain=True), trained

    def _ask_adapter(
        self, rows: Rows, quant: QuantConfig | None, *, check: bool = True, plain: bool = False
    ) -> Measured:
        device, dtype = self._proof_place()
        options = LoadOptions(
            quant=quant,
            dtype=(self.trained.dtype or dtype) if check else dtype,
            device=device,
            trust_remote_code=self.trained.trust_remote_code,
        )
        self.say.line("loading the base with the adapter")
        model = load_model(self.trained.source, options)
        if check and self.trained.facts:
            self.checked = require_same_model(self.trained, model)
        nn.Module.to(model, dtype)  # packed weights are integers and stay
        for layer in model.modules():
            if isinstance(layer, QuantizedLinear):
                # Products in the proof's dtype, whatever the run's hardware had.
                layer.compute_dtype = None
        if plain and quant is not None:
            restored = model.dequantize(dtype)
            assert isinstance(restored, PreTrainedModel)
            model = restored
        model = attach(model, self.trained.adapter)
        budget = devices.free_memory(device) // 2
        with (
            keep_dequantized(model, dtype, budget=budget),
            self.say.task("asking the adapter", total=len(rows.samples)) as advance,
        ):
            measured = measure(model, self.tokenizer, rows, advance=advance)
        del model
        devices.release_memory()
        return measured

    def _proof_place(self) -> tuple[torch.device, torch.dtype]:
        """float32 where the merged model fits the memory in it, else the dtype it is written in."""
        device = devices.default_device()
        size = sum(torch.Size(slot.shape).numel() for slot in self.base.slots.values())
        fits = 4 * size <= devices.free_memory(device) // 2
        return device, torch.float32 if fits else self.dtype

    def ask_merged(self, staging: Path, rows: Rows) -> Measured:
        """The merged folder, read back from the disk."""
        device, dtype = self._proof_place()
        self.say.line("loading the merged model")
        with _called(self.output):
            source = resolve_source(str(staging))
            options = LoadOptions(
                dtype=dtype,
                device=device,
                trust_remote_code=self.trained.trust_remote_code,
            )
            model: nn.Module = load_model(source, options)
            tokenizer = load_tokenizer(source, trust_remote_code=self.trained.trust_remote_code)
        self._require_same_tokenizer(tokenizer, rows)
        with self.say.task("asking the merged model", total=len(rows.samples)) as advance:
            return measure(model, tokenizer, rows, advance=advance)

    def _require_same_tokenizer(self, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> None:
        texts = [str(self.tokenizer.decode(ids)) for ids, _ in rows.samples[:8]]
        same = tokenizer.get_vocab() == self.tokenizer.get_vocab() and all(
            tokenizer(text).input_ids == self.tokenizer(text).input_ids for text in texts
        )
        if not same or tokenizer.chat_template != self.tokenizer.chat_template:
            raise ModelError(
                "tokenizer-changed",
                where=str(self.output),
                what="the tokenizer read back from the output is not the one of the base",
                fix="report it, with the base's tokenizer files",
            )

    def require(self, proof: Parity) -> None:
        """Shows the table when the proof fails too."""
        _, computed = self._proof_place()
        coarse = max((self.dtype, computed), key=lambda dtype: torch.finfo(dtype).eps)
        try:
            require_parity(proof, coarse, where=str(self.output))
        except FourbitError:
            for text in proof.lines():
                self.say.line(text)
            raise
        if proof.adapter_kl is not None and proof.kl > _LOUD * proof.adapter_kl:
            self.finding(
                f"rounding to {_NAMES[self.dtype]} changes the answers by kl {proof.kl:.3g}, the"
                f" adapter itself by {proof.adapter_kl:.3g}; --dtype fp32 keeps more of it"
            )

    def sign(self, staging: Path, result: MergeResult) -> None:
        """The record and the card, last of all."""
        record = result.record()
        source = self.trained.source
        hub = source.name if "/" in source.name and source.revision else None
        files.replace_file(staging / "README.md", merged_card(record, hub_base=hub).encode())
        text = files.valid_json(record, indent=2) + "\n"
        files.replace_file(staging / PROOF, text.encode())


def _own_float32(value: Tensor) -> Tensor:
    """A float32 copy that may be changed: what lies in a mapped file may not."""
    return value.to(torch.float32, copy=True)


@contextmanager
def _called(output: Path) -> Iterator[None]:
    """Inside, what is wrong with the folder just written is an error of ours, named by its output.

    Raises:
        ModelError: the folder does not load.
    """
    try:
        yield
    except ModelError as error:
        raise ModelError(
            "merge-unreadable",
            where=str(output),
            what=f"the merged folder does not load ({error.what}); nothing was kept",
            fix="report it, with the base's config.json",
        ) from error
