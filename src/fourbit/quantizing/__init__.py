"""A checkpoint into few bits, file to file: one tensor in memory at a time."""

from __future__ import annotations

from fourbit.quantizing.options import QuantizeOptions as QuantizeOptions
from fourbit.quantizing.run import QuantizeResult as QuantizeResult
from fourbit.quantizing.run import quantize_checkpoint as quantize_checkpoint
