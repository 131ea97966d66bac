"""Kernels for NVIDIA GPUs in Triton, registered as the ops' CUDA kernels where Triton is installed.

Triton is imported when the first kernel is called, not before. Every kernel computes what the plain
PyTorch one beside it does; without a GPU the tests run them in Triton's interpreter.
"""

from __future__ import annotations

from fourbit.ops.triton.registry import imagined as imagined
from fourbit.ops.triton.registry import imagining as imagining
from fourbit.ops.triton.registry import serves as serves
