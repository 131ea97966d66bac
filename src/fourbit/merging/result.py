"""What a merge is asked for and what it gives back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fourbit import __version__, files
from fourbit.merging.proof import Parity
from fourbit.merging.requantized import Requantized
from fourbit.quantize import QuantConfig

BaseKind = Literal["auto", "dequantized", "original"]
OutputDtype = Literal["auto", "bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class MergeOptions:
    """How a merge is made.

    Attributes:
        model: where the base lies; needed for an adapter without its run.
        base: ``dequantized`` adds to the weights that the run's 4 bits restore, ``original`` to
            those on disk; ``auto`` takes what the adapter was trained on.
        quant: how the base was held, for an adapter without its run.
        dtype: of the output; ``auto`` is the base's 16-bit dtype, else bf16.
        max_shard_size: bytes of one file, such as ``5GB``.
        proof: compare the merged folder with the adapter on its base.
        proof_rows: evaluation rows asked at most.
        overwrite: replace an earlier merge in the folder.
        requantize: round the merged weights back into the 4 bits of the run.
        force: keep what is requantized however much of the update is lost.
    """

    model: str | None = None
    base: BaseKind = "auto"
    quant: QuantConfig | None = None
    dtype: OutputDtype = "auto"
    max_shard_size: str = "5GB"
    proof: bool = True
    proof_rows: int = 32
    overwrite: bool = False
    requantize: bool = False
    force: bool = False


@dataclass(frozen=True)
class MergeResult:
    """What `merge` returns, and the keys of ``fourbit merge --json``."""

    output: str
    model: str
    revision: str | None
    base: str
    dtype: str
    bytes: int
    tensors: int
    updated: int
    replaced: int
    seconds: float
    peak_host_bytes: int | None
    proof: Parity | None
    trained_difference: Parity | None
    base_checked: str
    requantized: Requantized | None = None
    requantized_difference: Parity | None = None
    findings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; the figures of the proof stand beside the others."""
        values = asdict(self)
        proof = values.pop("proof")
        empty = {"max_abs_diff": None, "kl": None, "top1_agreement": None}
        return {**values, "proven": proof is not None, **(proof or empty)}

    def record(self) -> dict[str, Any]:
        """For ``merge.json``."""
        values = asdict(self)
        values.pop("output")
        return {"format": 1, "fourbit": __version__, "proven": self.proof is not None, **values}

    def lines(self) -> list[str]:
        """For people."""
        lines = [
            f"{self.tensors} tensors, {files.human_bytes(self.bytes)}, {self.dtype};"
            f" {self.updated} updated, {self.replaced} replaced whole; {self.seconds:.1f} s",
        ]
        if self.proof is not None:
            lines += self.proof.lines()
        if self.trained_difference is not None:
            lines.append("difference from the model as it was trained:")
            lines += self.trained_difference.lines(left="trained", right="merged")[1:]
        if self.requantized is not None:
            lines.append(self.requantized.line())
        if self.requantized_difference is not None:
            lines.append("difference by rounding back to 4 bits:")
            lines += self.requantized_difference.lines(left="adapter", right="4 bits")[1:]
        return [*lines, f"merged model: {self.output}"]
