"""The training receipt: proof that exactly the adapters were trained, and that they were.

`watch` gathers the evidence around any training loop, ours included; `fourbit verify` reads a
run's files again (`fourbit.training.verification`) and does not trust this verdict.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fourbit.distributed import ALONE, Ranks, local, whole
from fourbit.errors import InputError, VerificationFailed
from fourbit.files import sha256_of
from fourbit.fused import observer
from fourbit.integrations.experts import LoraExperts
from fourbit.integrations.peft import (
    lora_layers,
    plain_name,
    saved_modules,
    trained_token_count,
)
from fourbit.integrations.prompts import prompt_count, prompt_state, prompted
from fourbit.linear import parameter_counts

START = ".lora_start_"
_SECOND = (".lora_A.", ".lora_embedding_B.")
"""The half of an adapter whose gradient is zero until the other half, which starts at 0, moved."""
_PERHAPS = ".trainable_tokens_delta."
"""Trained values of single tokens: no gradient before such a token occurs."""
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Check:
    """One line of the receipt."""

    name: str
    ok: bool
    detail: str

    def as_dict(self) -> dict[str, Any]:
        """For ``receipt.json`` and ``--json``."""
        return {"name": self.name, "ok": self.ok, "detail": self.detail}


@dataclass
class Receipt:
    """Checks that must hold, findings that are worth knowing, and the figures behind them."""

    checks: list[Check] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether there are checks and every one of them holds."""
        return bool(self.checks) and all(check.ok for check in self.checks)

    def add(self, name: str, ok: bool, detail: str) -> None:
        """Records one check."""
        self.checks.append(Check(name, bool(ok), detail))

    def as_dict(self) -> dict[str, Any]:
        """For ``receipt.json``."""
        return {
            "ok": self.ok,
            "checks": [check.as_dict() for check in self.checks],
            "findings": self.findings,
            **self.facts,
        }

    def require(self, *, where: str) -> None:
        """Raises when a check does not hold.

        Raises:
            VerificationFailed: naming the failed checks.
        """
        failed = [check for check in self.checks if not check.ok]
        if failed or not self.checks:
            raise VerificationFailed(
                "receipt",
                where=where,
                what="; ".join(f"{c.name}: {c.detail}" for c in failed) or "nothing was checked",
                fix="see `fourbit doctor` and the receipt; do not use this adapter",
            )


def read_receipt(path: Path) -> Receipt:
    """A receipt as it was written.

    Raises:
        InputError: missing or unreadable.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        checks = [Check(c["name"], c["ok"], c["detail"]) for c in values["checks"]]
        findings = list(values["findings"])
    except FileNotFoundError as error:
        raise InputError(
            "no-receipt",
            where=str(path),
            what="no receipt: the run has not ended",
            fix="finish it with --resume auto",
        ) from error
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError("bad-receipt", where=str(path), what=f"unreadable ({error})") from error
    facts = {k: v for k, v in values.items() if k not in ("ok", "checks", "findings")}
    return Receipt(checks, findings, facts)


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, shape and dtype."""
    data = whole(tensor).detach().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(data.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def frozen_digests(model: nn.Module) -> dict[str, str]:
    """SHA-256 of every parameter that is not trained and of every buffer, by name.

    Names are those of the plain model, without PEFT's wrapping, so that a base loaded again
    without adapters gives the same table.
    """
    inner = _model_of(model)
    tensors = {name: p for name, p in inner.named_parameters() if not p.requires_grad}
    persistent = inner.state_dict(keep_vars=True).keys()
    tensors |= {name: b for name, b in inner.named_buffers() if name in persistent}
    return {
        plain_name(name): tensor_digest(tensor)
        for name, tensor in tensors.items()
        # the fixed half of a PiSSA or OLoRA adapter: saved with it, no part of the base
        if START not in name
    }


def _model_of(model: nn.Module) -> nn.Module:
    """What holds the frozen weights: a learned prompt stands beside the model, not inside it."""
    wrapper = prompted(model)
    return model if wrapper is None else wrapper.get_base_model()


def packed_digest(model: nn.Module) -> str:
    """One SHA-256 over the packed weights and scales of a 4-bit model, in any precision."""
    return combined_digest(
        {
            plain_name(name): tensor_digest(parameter)
            for name, parameter in _model_of(model).named_parameters()
            if not parameter.is_floating_point()
        }
    )


def combined_digest(digests: Mapping[str, str]) -> str:
    """One SHA-256 over a table of digests."""
    return hashlib.sha256(json.dumps(dict(sorted(digests.items()))).encode()).hexdigest()


def _is_second(name: str) -> bool:
    return any(part in name for part in _SECOND)


def adapter_count(model: nn.Module) -> int:
    """Trainable parameters by formula: r * (in + out) for each adapter, plus what is saved whole.

    A learned prompt has one row of the embedding's width per virtual token, plus its encoder.

    Computed from ranks and layer shapes, not from the tensors, so that a stray trainable tensor
    cannot hide in it.
    """
    count = prompt_count(model) or 0
    for layer in lora_layers(model).values():
        in_features, out_features = layer.in_features or 0, layer.out_features or 0
        if isinstance(layer, LoraExperts):
            in_features, out_features = (layer.num_experts * n for n in (in_features, out_features))
        for name in (*layer.lora_A, *layer.lora_embedding_A):
            count += layer.r[name] * (in_features + out_features)
            # DoRA's magnitude and a LoRA bias have one value per output
            extras = (name in layer.lora_magnitude_vector) + bool(layer.lora_bias.get(name))
            count += extras * out_features
            # AdaLoRA's singular values
            count += layer.r[name] * (name in getattr(layer, "lora_E", ()))
    count += trained_token_count(model)
    for wrapper in saved_modules(model).values():
        for name in wrapper.active_adapters:
            count += sum(p.numel() for p in wrapper.modules_to_save[name].parameters())
    return count


class Watch:
    """Evidence gathered while an optimizer trains a model; `finish` turns it into a receipt.

    Args:
        model: as it will be trained, adapters injected.
        optimizer: holds the trainable parameters; its steps are observed through torch's hooks.
        where: how errors call the run.
        ranks: the processes that train it together; each of them watches.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        where: str = "training",
        ranks: Ranks = ALONE,
    ) -> None:
        self.model, self.optimizer, self.where = model, optimizer, where
        self._ranks = ranks
        self.base_before = frozen_digests(model)
        self.initial = {name: tensor_digest(p) for name, p in self._trainable()}
        self.first_gradient: dict[str, int] = {}
        self.steps = 0
        self.idle_steps = 0
        self.moving_steps = 0
        self.losses: list[float] = []
        self.supervised: int | None = None
        self._called: set[str] = set()
        self._handles: list[Any] = []

    def _trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield name, parameter

    def start(self) -> None:
        """Registers the hooks."""
        self._handles.append(self.optimizer.register_step_pre_hook(self._before_step))
        self._handles.append(
            self.model.register_forward_hook(self._after_forward, with_kwargs=True)
        )
        for name, layer in lora_layers(self.model).items():
            assert isinstance(layer, nn.Module)
            hook = self._called_hook(name)
            self._handles.append(layer.register_forward_pre_hook(hook))

    def _called_hook(self, name: str) -> Any:
        def note(_module: nn.Module, _inputs: Any) -> None:
            self._called.add(name)

        return observer(note)

    def stop(self) -> None:
        """Removes the hooks."""
        while self._handles:
            self._handles.pop().remove()

    def state(self) -> dict[str, Any]:
        """The evidence so far, JSON-ready, for a checkpoint."""
        return {
            "initial": self.initial,
            "first_gradient": self.first_gradient,
            "steps": self.steps,
            "idle_steps": self.idle_steps,
            "moving_steps": self.moving_steps,
            "losses": self.losses[:1] + self.losses[1:][-1:],
            "supervised": self.supervised,
            "base_before": combined_digest(self.base_before),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over the evidence of the part of the run before an interruption.

        Raises:
            VerificationFailed: the base is not the one the run began with.
        """
        if state["base_before"] != combined_digest(self.base_before):
            raise VerificationFailed(
                "base-changed",
                where=self.where,
                what="the base's bytes are not those the run began with",
                fix="resume with the same base model, quantization and precision",
            )
        self.initial = dict(state["initial"])
        self.first_gradient = dict(state["first_gradient"])
        self.steps, self.moving_steps = state["steps"], state["moving_steps"]
        self.idle_steps = state.get("idle_steps", 0)
        self.losses = list(state["losses"])
        self.supervised = state["supervised"]

    def observe(self, *, loss: float, supervised: int) -> None:
        """Notes the loss and the supervised tokens of one step."""
        # First and last are what the receipt compares; a long run keeps no list.
        self.losses = [*self.losses[:1], loss]
        self.supervised = (self.supervised or 0) + supervised

    def _after_forward(
        self, _module: nn.Module, _args: Any, kwargs: Mapping[str, Any], output: Any
    ) -> None:
        labels, loss = kwargs.get("labels"), getattr(output, "loss", None)
        if isinstance(labels, Tensor) and isinstance(loss, Tensor) and self.model.training:
            self.observe(loss=float(loss.detach()), supervised=int((labels != -100).sum()))

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.steps += 1
        open_ones = [(n, p) for n, p in self._trainable() if n not in self.first_gradient]
        pending = False
        if open_ones:
            names, reached = [n for n, _p in open_ones], self._gradients_of(open_ones)
            for found, is_there in zip(names, reached, strict=True):
                if is_there:
                    self.first_gradient[found] = self.steps
                else:
                    pending = True
        if pending:
            if self._is_idle():
                self.idle_steps += 1
                return
            self._require_gradients()
        if any(group["lr"] > 0 for group in optimizer.param_groups):
            self.moving_steps += 1

    def _gradients_of(self, parameters: list[tuple[str, nn.Parameter]]) -> list[bool]:
        """Which of them have a gradient that is not zero, in any process's part of them."""
        return self._ranks.any_of(
            [p.grad is not None and bool(local(p.grad).any()) for _, p in parameters]
        )

    def _is_idle(self) -> bool:
        """Whether every gradient is there and zero, as when all rewards of a batch are equal.

        Such a step says nothing about where gradients flow.
        """
        trained = list(self._trainable())
        there = all(p.grad is not None for _, p in trained)
        return there and not any(self._gradients_of(trained))

    def without_gradient(self) -> list[str]:
        """Trainable parameters that should have had a gradient by now and had none.

        B (and whatever is trained whole) by step 2; A, whose gradient is zero while B is, by the
        second step after the first update with a learning rate above zero. Steps in which every
        gradient is zero do not count. Layers of a mixture-of-experts model that no token was
        routed to are excepted.
        """
        if self.steps - self.idle_steps < 2:
            return []
        spared = self._unrouted()
        missing = []
        for name, _ in self._trainable():
            if name in self.first_gradient or any(layer in name for layer in spared):
                continue
            if _PERHAPS in name or _is_second(name) and self.moving_steps < 2:
                continue
            missing.append(name)
        return missing

    def _unrouted(self) -> set[str]:
        config = getattr(self.model, "config", None)
        if not any(getattr(config, key, None) for key in _EXPERT_COUNTS):
            return set()
        called = {name for names in self._ranks.gather(sorted(self._called)) for name in names}
        return {name + "." for name in lora_layers(self.model) if name not in called}

    def _require_gradients(self) -> None:
        missing = self.without_gradient()
        if missing:
            raise VerificationFailed(
                "no-gradient",
                where=f"{self.where}, step {self.steps}",
                what=f"{len(missing)} trainable tensors have no gradient,"
                f" first: {plain_name(missing[0])}",
                fix="check that the layer takes part in the forward pass and is not detached",
            )

    def finish(self, *, adapter_dir: Path | None = None, save_dtype: torch.dtype) -> Receipt:
        """All checks, the base hashed again.

        Args:
            adapter_dir: where the adapter was saved; it is read back and compared.
            save_dtype: dtype of the saved tensors.
        """
        self.stop()
        receipt = Receipt()
        self._check_base(receipt)
        self._check_optimizer(receipt)
        self._check_count(receipt)
        self._check_movement(receipt)
        self._check_labels(receipt)
        if adapter_dir is not None:
            self._check_saved(receipt, adapter_dir, save_dtype)
        self._findings(receipt)
        return receipt

    def _check_base(self, receipt: Receipt) -> None:
        after = frozen_digests(self.model)
        changed = [n for n, digest in self.base_before.items() if after.get(n) != digest]
        # A tensor that was frozen at the start and is trainable now has left the table too.
        detail = f"{len(after)} frozen tensors, SHA-256 equal before and after"
        if changed:
            detail = f"{len(changed)} frozen tensors changed, first: {changed[0]}"
        receipt.add("base_unchanged", not changed, detail)
        receipt.facts["base_sha256"] = combined_digest(after)
        receipt.facts["base_tensors"] = len(after)
        receipt.facts["packed_sha256"] = packed_digest(self.model)

    def _check_optimizer(self, receipt: Receipt) -> None:
        held = [id(p) for group in self.optimizer.param_groups for p in group["params"]]
        trainable = {id(p) for _, p in self._trainable()}
        missing, stray = trainable - set(held), set(held) - trainable
        ok = not missing and not stray and len(held) == len(set(held)) and bool(held)
        detail = f"the optimizer holds exactly the {len(trainable)} trainable tensors"
        if not ok:
            detail = (
                f"the optimizer holds {len(held)} tensors, {len(trainable)} are trainable"
                f" ({len(missing)} missing, {len(stray)} foreign)"
            )
        receipt.add("optimizer_owns_adapters", ok, detail)

    def _check_count(self, receipt: Receipt) -> None:
        actual, total = parameter_counts(self.model)
        receipt.facts.update(trainable_parameters=actual, parameters=total)
        learned = prompt_count(self.model) is not None
        if not learned and not lora_layers(self.model):
            receipt.add("trainable_count", actual > 0, f"{actual:,} of {total:,}, no adapters")
            return
        expected = adapter_count(self.model)
        rule = "the prompt's settings give" if learned else "r and the layer shapes give"
        detail = f"{actual:,} of {total:,}, as {rule}"
        if actual != expected:
            detail = f"{actual:,} trainable, but {rule} {expected:,}"
        receipt.add("trainable_count", actual == expected, detail)

    def _check_movement(self, receipt: Receipt) -> None:
        now = {name: tensor_digest(p) for name, p in self._trainable()}
        still = [n for n in now if self.initial.get(n) == now[n]]
        spared = self._unrouted()
        stuck = [
            name
            for name in still
            if not (_PERHAPS in name or _is_second(name) or any(layer in name for layer in spared))
        ]
        moved = len(now) - len(still)
        detail = f"{moved} of {len(now)} trainable tensors changed"
        if stuck:
            detail = f"{len(stuck)} did not move, first: {plain_name(stuck[0])}"
        receipt.add("adapters_moved", bool(now) and not stuck, detail)
        missing = self.without_gradient()
        detail = f"gradients reached {len(self.first_gradient)} of {len(now)} tensors"
        if missing:
            detail += f"; none at {plain_name(missing[0])}"
        reached = bool(now) and bool(self.first_gradient) and not missing
        receipt.add("gradients_reached", reached, detail)
        unrouted = len(spared)
        if unrouted:
            receipt.findings.append(f"{unrouted} expert layers were never routed to")
        receipt.facts["steps"] = self.steps

    def _check_labels(self, receipt: Receipt) -> None:
        if self.supervised is None:
            receipt.findings.append("labels were not passed to the model: masks not checked")
            return
        receipt.add(
            "labels_supervised",
            self.supervised > 0,
            f"{self.supervised:,} supervised tokens" if self.supervised else "all labels masked",
        )

    def _check_saved(self, receipt: Receipt, folder: Path, save_dtype: torch.dtype) -> None:
        state, whole_model = _saved_state(self.model)
        if not self._ranks.first:
            return  # the first process has written it, perhaps on another host
        problems, facts = _compare(state, folder, save_dtype=save_dtype, complete=not whole_model)
        receipt.facts.update(facts)
        detail = f"read back and equal: {facts.get('adapter_bytes', 0):,} bytes"
        receipt.add("adapter_saved", not problems, problems[0] if problems else detail)

    def _findings(self, receipt: Receipt) -> None:
        if not self.losses:
            return
        first, last = self.losses[0], self.losses[-1]
        receipt.facts.update(train_loss_first=first, train_loss_last=last)
        fell = last < first
        receipt.facts["loss_fell"] = fell
        verb = "fell" if fell else "did not fall"
        receipt.findings.append(f"the training loss {verb}: {first:.4f} to {last:.4f}")


def compare_saved(
    model: nn.Module, folder: Path, *, save_dtype: torch.dtype
) -> tuple[list[str], dict[str, Any]]:
    """Reads a saved adapter back and compares it with the model's, value by value.

    Returns:
        Problems (empty when equal) and facts: bytes and SHA-256 of the file.
    """
    state, whole_model = _saved_state(model)
    return _compare(state, folder, save_dtype=save_dtype, complete=not whole_model)


def _saved_state(model: nn.Module) -> tuple[dict[str, Tensor], bool]:
    """What of the model is in its file, put together, and whether the file holds more."""
    from peft import PeftModel, get_peft_model_state_dict

    if isinstance(model, PeftModel):
        # embeddings would be looked up on the hub; what we train is saved by name
        state = prompt_state(model)
        if state is None:
            state = get_peft_model_state_dict(model, save_embedding_layers=False)
        return {name: whole(tensor) for name, tensor in state.items()}, False
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {name: whole(p) for name, p in trained}, True


def _compare(
    state: Mapping[str, Tensor], folder: Path, *, save_dtype: torch.dtype, complete: bool
) -> tuple[list[str], dict[str, Any]]:
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        return [f"no safetensors in {folder.name}/"], {}
    saved: dict[str, Tensor] = {}
    for path in paths:
        saved |= load_file(path)
    found = state.keys() == saved.keys() if complete else state.keys() <= saved.keys()
    facts = {
        "adapter_bytes": sum(path.stat().st_size for path in paths),
        "adapter_sha256": sha256_of(paths[0]),
        "adapter_tensors": len(saved),
    }
    if not found:
        return [f"{len(saved)} tensors in the file, {len(state)} in the model"], facts
    for name, tensor in state.items():
        wanted = tensor.detach().cpu()
        wanted = wanted.to(save_dtype) if wanted.is_floating_point() else wanted
        if not torch.equal(wanted, saved[name]):
            return [f"{name} differs from the file"], facts
    return [], facts


@contextmanager
def watch(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, adapter_dir: Path | str | None = None
) -> Iterator[Receipt]:
    """The receipt's checks around anyone's own training loop.

    >>> with fourbit.watch(model, optimizer) as receipt:
    ...     train()
    >>> receipt.ok

    Args:
        model: adapters injected, before the first step.
        optimizer: the one that will train it.
        adapter_dir: where the loop saves its fp32 adapter; it is read back and compared.

    Raises:
        VerificationFailed: a check does not hold at the end, or gradients do not flow by the
            second step.
    """
    observer = Watch(model, optimizer)
    receipt = Receipt()
    observer.start()
    try:
        yield receipt
    finally:
        observer.stop()
    folder = None if adapter_dir is None else Path(adapter_dir)
    result = observer.finish(adapter_dir=folder, save_dtype=torch.float32)
    receipt.checks, receipt.findings, receipt.facts = result.checks, result.findings, result.facts
    receipt.require(where="fourbit.watch")
