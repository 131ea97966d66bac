"""Scripts written for bitsandbytes on our layers, without a changed line.

Hook used: transformers' registry of quantizers (``AUTO_QUANTIZER_MAPPING``), in which the entries
of bitsandbytes are replaced until `TakeOver.undo`; tested in
``tests/integrations/test_takeover.py``.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from fourbit.integrations.config import FourbitConfig
from fourbit.integrations.transformers import FourbitQuantizer

_METHODS = ("bitsandbytes_4bit", "bitsandbytes_8bit")


class _TakeOverQuantizer(FourbitQuantizer):
    """Our quantizer for a ``BitsAndBytesConfig``."""

    def __init__(self, quantization_config: BitsAndBytesConfig, **kwargs: Any) -> None:
        super().__init__(FourbitConfig.from_bitsandbytes(quantization_config), **kwargs)


class TakeOver:
    """A take-over in force; ``with`` ends it, and so does `undo`."""

    def __init__(self) -> None:
        self._before: dict[str, Any] = {name: AUTO_QUANTIZER_MAPPING[name] for name in _METHODS}
        AUTO_QUANTIZER_MAPPING.update(dict.fromkeys(_METHODS, _TakeOverQuantizer))

    def undo(self) -> None:
        """Gives ``BitsAndBytesConfig`` back to bitsandbytes; models already loaded stay ours."""
        AUTO_QUANTIZER_MAPPING.update(self._before)

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
