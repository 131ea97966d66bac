"""What a user says about a quantized checkpoint, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from fourbit.errors import InputError
from fourbit.integrations.config import FourbitConfig
from fourbit.quantize import QuantConfig
from fourbit.quantizing.calibrate import Calibration
from fourbit.shards import parse_size


@dataclass(frozen=True)
class QuantizeOptions:
    """How `quantize_checkpoint` writes.

    Attributes:
        quant: data type, block size, double quantization; ``allow_unquantized`` too.
        storage: dtype as which packed 4-bit weights are declared in the files.
        skip: modules left plain besides the output head; names, beginnings, ends, or with ``*``.
        max_shard_size: bytes of the largest file, as ``2GB``; a bigger tensor has its own.
        overwrite: replace a model that is already in the output folder.
        revision: branch, tag or commit of a hub model.
        calibrate: text to choose scales and codes for; None: each weight by itself.
    """

    quant: QuantConfig = field(default_factory=QuantConfig)
    storage: str = "uint8"
    skip: tuple[str, ...] = ()
    max_shard_size: str = "2GB"
    overwrite: bool = False
    revision: str | None = None
    calibrate: Calibration | None = None

    @property
    def shard_bytes(self) -> int:
        """``max_shard_size`` in bytes.

        Raises:
            InputError: it is no size.
        """
        return parse_size(self.max_shard_size)

    def quantization(self, skip: list[str] | None) -> FourbitConfig:
        """What config.json will say; ``skip`` is the complete list of what stays plain.

        Raises:
            InputError: a storage dtype that does not exist.
        """
        names: dict[str, Any] = {
            "llm_int8_skip_modules": skip,
            "allow_unquantized": self.quant.allow_unquantized,
            # stacks of experts are made while loading, which a tensor-by-tensor copy does not do
            "quantize_experts": False,
        }
        if self.quant.is_int8:
            names |= {"load_in_8bit": True, "llm_int8_threshold": self.quant.llm_int8_threshold}
            if self.storage != "uint8":
                raise InputError(
                    "bad-value",
                    where="--storage",
                    what="means nothing for int8",
                    fix="leave it out",
                )
        else:
            compute = self.quant.compute_dtype
            names |= {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": self.quant.quant_type,
                "bnb_4bit_use_double_quant": self.quant.double_quant,
                "bnb_4bit_compute_dtype": "bfloat16" if compute == "auto" else compute,
                "bnb_4bit_quant_storage": self.storage,
                "blocksize": self.quant.blocksize,
            }
        return FourbitConfig(**names)


def quant_config(**given: Any) -> QuantConfig:
    """A `QuantConfig` from what the command line was given; None keeps a default.

    Raises:
        InputError: a value that is not legal, or means nothing for the data type.
    """
    try:
        return QuantConfig(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        where = str(first["loc"][0]) if first["loc"] else "quant"
        what = str(first["msg"]).removeprefix("Value error, ")
        raise InputError("bad-value", where=where, what=what, fix="see --help") from None
