"""Graphics cards by name: how much memory they have and where to start on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fourbit.device import Precision
from fourbit.errors import InputError, nearest
from fourbit.planning.shape import Kernels

_ATTENTION = r".*\.(self_)?att(n|ention)\.\w*(proj|c_attn|dense|query_key_value)"
_ATTENTION_MLP = r".*\.(self_)?(att(n|ention)|mlp)\.\w*(proj|c_\w+|dense\w*|query_key_value|fc\w*)"


@dataclass(frozen=True)
class Preset:
    """A device to plan for.

    Attributes:
        name: as it is asked for.
        memory: bytes the driver reports.
        precision: of activations; T4 has no bf16.
        batch_size: sequences to start with.
        lora: adapters to start with, by their settings' names.
    """

    name: str
    memory: int
    precision: Precision
    batch_size: int
    lora: dict[str, Any]

    @property
    def kernels(self) -> Kernels:
        """Whose serve there; cards without bf16 are too old for what Triton compiles."""
        return "none" if self.precision == "fp16" else "gpu"


def _preset(
    name: str, mebibytes: int, r: int, batch: int, where: str, precision: Precision = "bf16"
) -> Preset:
    lora = {"r": r, "lora_alpha": 2 * r, "target_modules": where}
    return Preset(name, mebibytes << 20, precision, batch, lora)


PRESETS = {
    preset.name: preset
    for preset in (
        _preset("T4", 15_360, 8, 1, _ATTENTION, "fp16"),
        _preset("L4", 23_034, 16, 2, _ATTENTION),
        _preset("RTX4090", 24_564, 16, 2, _ATTENTION),
        _preset("A100-40", 40_960, 32, 4, _ATTENTION_MLP),
        _preset("A100-80", 81_920, 32, 4, _ATTENTION_MLP),
        _preset("H100", 81_559, 64, 8, "all-linear"),
        _preset("H200", 143_771, 64, 8, "all-linear"),
    )
}


def preset_of(name: str) -> Preset | None:
    """The card called ``name``, upper or lower case; None for this machine's ``cpu`` and ``cuda``.

    Raises:
        InputError: no such device.
    """
    found = {key.lower(): preset for key, preset in PRESETS.items()}.get(name.lower())
    if found is None and name.lower().partition(":")[0] not in ("cpu", "cuda"):
        names = [*PRESETS, "cpu", "cuda"]
        raise InputError(
            "unknown-device",
            where="device",
            what=f"'{name}' is no device that is known here",
            fix=f"{nearest(name, names)} or give its memory: --budget 24GB",
        )
    return found
