"""Decoding where the model is known: a native call per token on a CPU, a CUDA graph on a GPU."""

from fourbit.decoding.build import AnyDecoder, build_decoder
from fourbit.decoding.engine import Decoder, HeadSketch
from fourbit.decoding.graphs import GraphDecoder
from fourbit.decoding.sampling import Choice

__all__ = ["AnyDecoder", "Choice", "Decoder", "GraphDecoder", "HeadSketch", "build_decoder"]
