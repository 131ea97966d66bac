"""Decoding on a CPU: one native call for each new token of a batch, where the model is known."""

from fourbit.decoding.engine import Decoder, HeadSketch, build_decoder
from fourbit.decoding.sampling import Choice

__all__ = ["Choice", "Decoder", "HeadSketch", "build_decoder"]
