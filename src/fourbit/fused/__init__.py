"""A decoder layer as two operations, attention and feed-forward, each with its own backward.

Saved for backward are the layer's input, the projections' results and what attention needs; norms,
activations and dequantized weights are made again. Everything temporary lives in reused buffers.
"""

from fourbit.fused.attention import AttentionBlock as AttentionBlock
from fourbit.fused.attention import attention_block as attention_block
from fourbit.fused.mlp import MlpBlock as MlpBlock
from fourbit.fused.mlp import mlp_block as mlp_block
from fourbit.fused.parts import Heads as Heads
from fourbit.fused.parts import Norm as Norm
from fourbit.fused.parts import Projection as Projection
from fourbit.fused.parts import observer as observer
from fourbit.fused.parts import paths as paths
from fourbit.fused.parts import record_path as record_path
