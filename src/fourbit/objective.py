"""What a model is trained on: the summed loss of a batch, and proofs that it is the right one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from fourbit.data import Batch
from fourbit.device import keep_freed_memory
from fourbit.errors import InputError
from fourbit.integrations.fused import has_fused_layers
from fourbit.integrations.peft import base_model, head_weight
from fourbit.integrations.prompts import prompt_length, prompted, with_prompt
from fourbit.integrations.transformers import decoder_layers, enable_checkpointing
from fourbit.linear import row_by_row
from fourbit.loss import (
    LogitTransform,
    linear_cross_entropy,
    logits_cross_entropy,
    shift_labels,
    token_losses,
)
from fourbit.methods import Method, quantized_base
from fourbit.offload import Offload

_PROBE_TOKENS = 24


def mixed_precision(model: nn.Module, dtype: torch.dtype, method: Method) -> torch.dtype | None:
    """What `Objective` needs as ``autocast_dtype`` where activations shall be ``dtype``.

    Quantized and fused layers cast what enters and leaves their adapters themselves.
    """
    outside = any(
        parameter.requires_grad
        and not any(part in name for part in (".lora_A.", ".lora_B.", "prompt_encoder."))
        for name, parameter in model.named_parameters()
    )
    alone = quantized_base(method) or has_fused_layers(model)
    return None if dtype == torch.float32 or (alone and not outside) else dtype


@dataclass
class Objective:
    """Loss of a batch through the chunked head, or through full logits where that is not exact.

    Args:
        model: a causal LM, with or without PEFT around it.
        autocast_dtype: dtype of mixed precision; None when everything already has one dtype.
        chunked: whether logits are made chunk by chunk.
        offload: where what lies between recomputed layers waits for backward; None: here.
    """

    model: nn.Module
    autocast_dtype: torch.dtype | None = None
    chunked: bool = True
    offload: Offload | None = None

    def __post_init__(self) -> None:
        self.base: PreTrainedModel = base_model(self.model)
        self._positions = "position_ids" in inspect.signature(self.base.forward).parameters
        self._transform = _logit_transform(self.base.config)
        self._wrapper = prompted(self.model)
        if self.device.type == "cpu":
            keep_freed_memory()

    @property
    def device(self) -> torch.device:
        """Where batches must be."""
        return self.base.device

    @property
    def separates_documents(self) -> bool:
        """Whether the architecture takes positions, from which the block mask is derived."""
        return self._positions

    @contextmanager
    def untouched(self) -> Iterator[nn.Module]:
        """Inside, a learned prompt is left out; yields the model that answers so.

        LoRA adapters start as no change at all, a prompt changes every answer before its first
        step.
        """
        wrapper, self._wrapper = self._wrapper, None
        try:
            yield self.model if wrapper is None else self.base
        finally:
            self._wrapper = wrapper

    @property
    def _skipped(self) -> int:
        """Leading positions of every output that belong to the prompt."""
        return 0 if self._wrapper is None else prompt_length(self._wrapper)

    def inputs_of(self, batch: Batch) -> dict[str, Tensor]:
        """What the model is given for a batch."""
        ids = batch.input_ids.to(self.device)
        if self._wrapper is not None:
            # One document a row, padded at its end: nothing that counts sees the padding.
            return {"inputs_embeds": with_prompt(self._wrapper, ids)}
        if self._positions:
            return {"input_ids": ids, "position_ids": batch.position_ids.to(self.device)}
        # Without positions there is one document a row, then padding: the ordinary mask.
        positions = batch.position_ids
        padding = (positions[:, 1:] <= positions[:, :-1]).cumsum(1) > 0
        mask = torch.ones_like(positions)
        mask[:, 1:][padding] = 0
        return {"input_ids": ids, "attention_mask": mask.to(self.device)}

    def recompute_activations(self) -> bool:
        """From now on activations are recomputed in backward; False when they already are."""
        layers = decoder_layers(self.base)
        if self.base.is_gradient_checkpointing and all(
            getattr(layer, "gradient_checkpointing", True) for layer in layers
        ):
            return False
        enable_checkpointing(self.base)
        return True

    def autocast(self) -> AbstractContextManager[object]:
        """The mixed-precision context of a forward pass."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def offload_activations(self, folder: Path | None = None) -> None:
        """From now on what lies between layers waits elsewhere, and the rest is recomputed.

        Args:
            folder: of the file, where the model is on a CPU.
        """
        self.recompute_activations()
        width = self.base.config.get_text_config().hidden_size
        self.offload = Offload(width, self.device, folder=folder)

    def offload_to_host(self) -> bool:
        """The same into host memory; False where that is no other memory, or already done."""
        if self.offload is not None or self.device.type == "cpu":
            return False
        self.offload_activations()
        return True

    @contextmanager
    def _forward(self) -> Iterator[None]:
        away = self.offload is not None and torch.is_grad_enabled()
        with self.autocast(), self.offload.saving() if away and self.offload else nullcontext():
            yield

    def hidden(self, batch: Batch) -> Tensor:
        """``[B, T, H]``: what the head is given, at the positions of the text."""
        return self.hidden_of(self.inputs_of(batch))

    def hidden_of(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The same of what the model is given."""
        backbone = self.base.base_model
        with self._forward():
            return backbone(**inputs, use_cache=False)[0][:, self._skipped :]

    def logits(self, batch: Batch) -> Tensor:
        """``[B, T, V]``, materialised."""
        return self._logits(self.inputs_of(batch))

    def _logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        with self._forward():
            return self.base(**inputs, use_cache=False).logits[:, self._skipped :]

    def loss_sum(self, batch: Batch) -> Tensor:
        """Sum of token losses over the supervised positions, float32 scalar."""
        return self.loss_of(self.inputs_of(batch), shift_labels(batch.labels).to(self.device))

    def loss_of(self, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """The same of what the model is given and of labels that are aligned already."""
        head = self._head()
        if head is None:
            return logits_cross_entropy(self._logits(inputs), labels)
        weight, bias = head
        hidden = self._narrowed(self.hidden_of(inputs))
        return linear_cross_entropy(hidden, weight, labels, bias=bias, transform=self._transform)

    @torch.no_grad()
    def token_losses(
        self, inputs: Mapping[str, Tensor], positions: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What single tokens cost, from one forward pass.

        Args:
            inputs: what the model is given.
            positions: int64 ``[N]``, of the rows laid end to end: which outputs predict.
            labels: int64 ``[N]``, what each of them is asked for.

        Returns:
            Losses in nats, float32 ``[N]``, and whether each label is the likeliest token.
        """
        head = self._head()
        if head is None:
            logits = self._logits(inputs).flatten(0, 1)[positions].float()
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            return losses, logits.argmax(-1) == labels
        weight, bias = head
        hidden = self._narrowed(self.hidden_of(inputs)).flatten(0, 1)[positions]
        return token_losses(hidden, weight, labels, bias=bias, transform=self._transform)

    def _head(self) -> tuple[Tensor, Tensor | None] | None:
        module = self.base.get_output_embeddings() if self.chunked else None
        return None if module is None else head_weight(module)

    def _narrowed(self, hidden: Tensor) -> Tensor:
        return hidden if self.autocast_dtype is None else hidden.to(self.autocast_dtype)

    @torch.no_grad()
    def choose_head(self, batch: Batch) -> bool:
        """Keeps the chunked loss only if it equals the loss from the model's own logits.

        An architecture may do to its logits what no config declares; then full logits are used.

        Returns:
            Whether the chunked loss is used.
        """
        probe = _first_tokens(batch, _PROBE_TOKENS)
        training = self.model.training
        self.model.eval()
        exact = logits_cross_entropy(self.logits(probe), shift_labels(probe.labels).to(self.device))
        ours = self.loss_sum(probe)
        self.model.train(training)
        tolerance = 1e-3 if self.base.dtype == torch.float32 else 2e-2
        self.chunked = bool((ours - exact).abs() <= tolerance * exact.abs().clamp(min=1.0))
        return self.chunked

    @torch.no_grad()
    def require_isolation(self, batch: Batch) -> None:
        """Proves on the loaded model that documents of one pack do not see each other.

        The second document's output may not change by a single bit when the first is replaced.
        INT8's choice of outlier columns, which all rows of a batch share, is left aside: it is
        the same with separate rows.

        Raises:
            InputError: the architecture lets documents leak into each other.
        """
        leak = InputError(
            "packing-leaks",
            where="data.packing",
            what=f"{self.base.config.model_type} does not keep packed documents apart",
            fix="set data.packing: false",
        )
        if not self._positions:
            raise leak
        length = max(2, min(8, batch.input_ids.shape[1] // 2))
        ids = batch.input_ids[:1, :length]
        other = (ids + 1) % self.base.config.get_text_config().vocab_size
        positions = torch.arange(length)[None]
        packs = [torch.cat((first, ids), 1) for first in (ids, other)]
        training = self.model.training
        self.model.eval()
        with row_by_row(self.base):
            outputs = [
                self.hidden(
                    _batch(pack, torch.cat((positions, positions), 1), torch.full_like(pack, -100))
                )[:, length:]
                for pack in packs
            ]
        self.model.train(training)
        if not torch.equal(outputs[0], outputs[1]):
            raise leak


def _logit_transform(config: PretrainedConfig) -> LogitTransform:
    text = config.get_text_config()
    scale = 1.0
    if getattr(text, "logit_scale", None):  # Cohere multiplies
        scale = float(text.logit_scale)
    if getattr(text, "logits_scaling", None):  # Granite divides
        scale = 1.0 / float(text.logits_scaling)
    return LogitTransform(scale, getattr(text, "final_logit_softcapping", None))


def _first_tokens(batch: Batch, length: int) -> Batch:
    """A short batch for probing: the first row's first tokens, all of them supervised."""
    ids = batch.input_ids[:1, :length]
    return _batch(ids, torch.arange(ids.shape[1])[None], ids.clone())


def _batch(ids: Tensor, positions: Tensor, labels: Tensor) -> Batch:
    return Batch(ids, positions, labels, num_supervised=0, rows=[])
