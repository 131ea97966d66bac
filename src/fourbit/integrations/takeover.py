"""Scripts written for bitsandbytes on our layers, without a changed line.

Hooks used until `TakeOver.undo`: transformers' registry of quantizers (``AUTO_QUANTIZER_MAPPING``),
in which the entries of bitsandbytes are replaced, and ``AutoHfQuantizer``'s choice of the
configuration of a checkpoint; tested in ``tests/integrations/test_takeover.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer

from fourbit.integrations.config import FourbitConfig
from fourbit.integrations.transformers import FourbitQuantizer

_METHODS = ("bitsandbytes_4bit", "bitsandbytes_8bit")


class _TakeOverQuantizer(FourbitQuantizer):
    """Our quantizer for a ``BitsAndBytesConfig``."""

    def __init__(self, quantization_config: BitsAndBytesConfig, **kwargs: Any) -> None:
        super().__init__(FourbitConfig.from_bitsandbytes(quantization_config), **kwargs)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        model = super()._process_model_after_weight_loading(model, **kwargs)
        # a script may ask; TRL then casts adapters to bfloat16, as it would for bitsandbytes
        model.is_loaded_in_4bit = self.quantization_config.load_in_4bit  # type: ignore[assignment]
        model.is_loaded_in_8bit = self.quantization_config.load_in_8bit  # type: ignore[assignment]
        return model


def _of_checkpoint(stored: Mapping[str, Any]) -> FourbitConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the checkpoint names everything
        return FourbitConfig().of_checkpoint(stored)


class TakeOver:
    """A take-over in force; ``with`` ends it, and so does `undo`."""

    def __init__(self) -> None:
        self._before: dict[str, Any] = {name: AUTO_QUANTIZER_MAPPING[name] for name in _METHODS}
        self._merge = merge = AutoHfQuantizer.merge_quantization_configs

        def merge_taken(quantization_config: Any, quantization_config_from_args: Any) -> Any:
            stored, given = quantization_config, quantization_config_from_args
            ours = given is None or isinstance(given, BitsAndBytesConfig)
            if ours and isinstance(stored, dict) and stored.get("quant_method") == "bitsandbytes":
                return _of_checkpoint(stored)
            return merge(stored, given)

        AUTO_QUANTIZER_MAPPING.update(dict.fromkeys(_METHODS, _TakeOverQuantizer))
        AutoHfQuantizer.merge_quantization_configs = staticmethod(merge_taken)  # type: ignore[method-assign]

    def undo(self) -> None:
        """Gives ``BitsAndBytesConfig`` back to bitsandbytes; models already loaded stay ours."""
        AUTO_QUANTIZER_MAPPING.update(self._before)
        AutoHfQuantizer.merge_quantization_configs = staticmethod(self._merge)  # type: ignore[method-assign]

    def __enter__(self) -> TakeOver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()


def take_over_bitsandbytes() -> TakeOver:
    """From now on transformers gives our layers to whoever asks for bitsandbytes'.

    ``BitsAndBytesConfig`` in ``from_pretrained`` and checkpoints saved with bitsandbytes load as
    `Linear4bit` and `Linear8bit`; bitsandbytes need not be installed. Its optimizers are not
    replaced.

    >>> fourbit.take_over_bitsandbytes()                    # for the whole script
    >>> with fourbit.take_over_bitsandbytes(): ...          # or for one load

    Returns:
        What ends it: `TakeOver.undo`, or leaving the ``with`` block.
    """
    return TakeOver()
