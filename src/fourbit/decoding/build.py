"""Which decoder a loaded model gets, or why none."""

from __future__ import annotations

from torch import nn

from fourbit import native
from fourbit.decoding.capture import Capture, CudaCapture
from fourbit.decoding.engine import Decoder, HeadSketch
from fourbit.decoding.graphs import GraphDecoder
from fourbit.decoding.parts import UnknownModel, read_model
from fourbit.integrations.peft import base_model
from fourbit.integrations.prompts import prompted

AnyDecoder = Decoder | GraphDecoder
"""They continue sequences in the same way; what is asked of one may be asked of the other."""


def build_decoder(
    model: nn.Module, *, sketch: HeadSketch | None = None, capture: Capture | None = None
) -> tuple[AnyDecoder | None, str]:
    """A decoder for a loaded model, or None and the reason why there is none.

    Args:
        model: a causal LM on one device, PEFT's wrapper included. Its weights are pointed to, its
            adapter and norms copied: after training them, build anew.
        sketch: `Decoder.sketch` of an earlier decoder; used if the head is still the same.
        capture: records a token's step; None takes CUDA graphs on a GPU and the native engine on
            a CPU.
    """
    if prompted(model) is not None:
        return None, "a learned prompt stands before the text"
    if model.training:
        return None, "the model is in training mode"
    devices = {parameter.device.type for parameter in model.parameters()}
    places = {parameter.device for parameter in model.parameters()}
    if capture is None and devices == {"cpu"} and native.isa() is None:
        return None, "there is no native library"
    if len(places) > 1 or (capture is None and not devices <= {"cpu", "cuda"}):
        return None, f"it lies on {', '.join(sorted(map(str, places)))}"
    try:
        parts = read_model(base_model(model))
        if capture is None and devices == {"cpu"}:
            return Decoder(parts, sketch), ""
        return GraphDecoder(parts, capture or CudaCapture()), ""
    except UnknownModel as error:
        return None, str(error)
