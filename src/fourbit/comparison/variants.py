"""Names of methods to settings of runs: ``qlora-fp4-single``, ``lora-r64``, ``full``."""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fourbit.errors import InputError, nearest
from fourbit.methods import READ_BY, quantized_base
from fourbit.settings import load_settings
from fourbit.training.config import SHORT_FORMS, TrainConfig

FULL_RATE = 0.1
"""Full fine-tuning gets this share of the learning rate: every weight moves, not an adapter."""

# Linear layers by their usual names: what lies around them (norms, activations, the block itself)
# cannot carry an adapter.
_ATTENTION = (
    r".*(attn|attention)\.([a-z]+_proj|c_attn|c_proj|query_key_value|dense|[Ww]qkv|W_pack|w[qkvo])"
)
_MLP = (
    r".*(mlp|feed_forward)\.([a-z_]+_proj|c_fc|c_proj|fc1|fc2|fc_in|fc_out|w[123]"
    r"|dense_h_to_4h|dense_4h_to_h)"
)

_PARTS: dict[str, tuple[tuple[str, str], ...]] = {
    "nf4": (("quant.quant_type", "nf4"),),
    "fp4": (("quant.quant_type", "fp4"),),
    "int4": (("quant.quant_type", "int4"),),
    "int8": (("quant.quant_type", "int8"),),
    "double": (("quant.double_quant", "true"),),
    "single": (("quant.double_quant", "false"),),
    "calibrated": (("quant.calibrate", "data"),),
    "attention": (("lora.target_modules", _ATTENTION),),
    "mlp": (("lora.target_modules", _MLP),),
    "rslora": (("lora.use_rslora", "true"),),
    "dora": (("lora.use_dora", "true"),),
    "8bit": (("optim.optim_bits", "8"),),
    "paged": (("optim.paged", "always"),),
    "unpaged": (("optim.paged", "off"),),
}
_METHODS = ("full", "lora", "qlora")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")


@dataclass(frozen=True)
class Variant:
    """One method of a comparison.

    Attributes:
        name: for people and for folders.
        overrides: ``(key, text)`` over the configuration, as on `fourbit train`'s command line.
    """

    name: str
    overrides: tuple[tuple[str, str], ...]

    def config(self, path: Path | None, base: Sequence[tuple[str, str]]) -> TrainConfig:
        """The run's settings: the file's, those of the command line, then the variant's.

        Sections that the variant's method does not read are left at their defaults, and a rank
        keeps the configured ``lora_alpha / r``.

        Raises:
            InputError: a key or value is wrong.
        """
        common = load_settings(
            TrainConfig, path=path, overrides=_for_method(base, "qlora"), short_forms=SHORT_FORMS
        ).value
        method = dict(self.overrides).get("method", common.method)
        values = common.model_dump()
        for section, readers in READ_BY.items():
            if method not in readers:
                values.pop(section, None)
        values["method"] = method
        given = dict(self.overrides)
        if given.get("quant.quant_type") == "int8":
            for name in ("blocksize", "double_quant"):
                values["quant"].pop(name)  # mean nothing there
        if method == "full" and "optim.lr" not in given:
            values["optim"]["lr"] = FULL_RATE * common.optim.lr
        if "lora.r" in given and "lora.lora_alpha" not in given and "lora" in values:
            values["lora"]["lora_alpha"] = (
                common.lora.lora_alpha * int(given["lora.r"]) / (common.lora.r)
            )
        return _overridden(values, self)

    @property
    def method(self) -> str:
        """``full``, ``lora`` or ``qlora``."""
        return dict(self.overrides)["method"]


def _for_method(pairs: Sequence[tuple[str, str]], method: str) -> list[tuple[str, str]]:
    """The base is read as a QLoRA run, whose sections are all that a variant may need."""
    return [*(pair for pair in pairs if pair[0] != "method"), ("method", method)]


def _overridden(values: dict[str, Any], variant: Variant) -> TrainConfig:
    # one reader for every setting: what a user wrote is checked as on the command line
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(_plain(values)), encoding="utf-8")
        try:
            config = load_settings(
                TrainConfig, path=path, overrides=variant.overrides, short_forms=SHORT_FORMS
            ).value
        except InputError as error:
            where = error.where.replace(str(path), "the configuration")
            raise InputError(
                error.code, where=f"{variant.name}, {where}", what=error.what, fix=error.fix
            ) from None
    return config


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def parse_variants(methods: str, variants: Sequence[str] = ()) -> list[Variant]:
    """The methods of a comparison, the first being what the others are compared with.

    Args:
        methods: names with commas between them: ``full``, ``lora`` or ``qlora``, each with parts
            such as ``-fp4``, ``-single``, ``-r8``, ``-attention``, ``-paged``.
        variants: ``NAME=METHOD --key value …`` each.

    Raises:
        InputError: a name or a part that does not exist, or one name twice.
    """
    found = [_named(name.strip()) for name in methods.split(",") if name.strip()]
    found += [_spelled(text) for text in variants]
    names = [variant.name for variant in found]
    if len(found) < 2:
        raise InputError("too-few-methods", where="--methods", what="a comparison needs two",
                         fix="--methods lora,qlora")  # fmt: skip
    for name in names:
        if names.count(name) > 1:
            raise InputError("bad-argument", where=f"--methods {name}", what="is named twice",
                             fix="give one of them another name with --variant")  # fmt: skip
    return found


def _named(name: str) -> Variant:
    method, *parts = name.split("-")
    if method not in _METHODS:
        raise InputError("unknown-method", where=f"--methods {name}", what="is no method",
                         fix=nearest(method, _METHODS))  # fmt: skip
    overrides = [("method", method)]
    for part in parts:
        rank = re.fullmatch(r"r(\d{1,5})", part)
        if rank:
            overrides.append(("lora.r", rank[1]))
        elif part in _PARTS:
            overrides += _PARTS[part]
        else:
            raise InputError(
                "unknown-method", where=f"--methods {name}", what=f"'{part}' is no part of a name",
                fix=nearest(part, [*_PARTS, "r16"]),
            )  # fmt: skip
    for key, _ in overrides[1:]:
        section = key.split(".")[0]
        if section in READ_BY and method not in READ_BY[section]:
            raise InputError(
                "unknown-method", where=f"--methods {name}", what=f"method {method} has no {key}",
                fix=f"leave that part out: --methods {method}",
            )  # fmt: skip
    return Variant(name, tuple(overrides))


def _spelled(text: str) -> Variant:
    name, equals, rest = text.partition("=")
    name = name.strip()
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise InputError("bad-argument", where=f"--variant {name}", what=str(error)) from None
    if not equals or not words or not _NAME.fullmatch(name):
        raise InputError("bad-argument", where="--variant", what=f"{text!r} is no variant",
                         fix="--variant 'NAME=full --optim.lr 1e-5'")  # fmt: skip
    base = _named(words.pop(0))
    pairs: list[tuple[str, str]] = []
    while words:
        key = words.pop(0)
        if not key.startswith("-") or not words:
            raise InputError("missing-value", where=f"--variant {name}, {key}",
                             what="is no --key value", fix="--key VALUE")  # fmt: skip
        pairs.append((key.lstrip("-").replace("-", "_"), words.pop(0)))
    given = tuple((SHORT_FORMS.get(key, key), value) for key, value in pairs)
    return Variant(name, (*base.overrides, *given))


def held(config: TrainConfig) -> str:
    """How the run holds its base, in a word, the same for runs whose bases are equal."""
    if not quantized_base(config.method):
        return "none"
    quant = config.quant
    double = "double" if quant.double_quant else "single"
    return f"{quant.quant_type}-{quant.blocksize}-{double}"


def has_own_base(config: TrainConfig) -> bool:
    """Whether a run makes its base for itself, in its own folder."""
    return quantized_base(config.method) and config.quant.calibrate is not None
