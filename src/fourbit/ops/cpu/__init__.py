"""CPU kernels of the ops, from the library that `fourbit.native` finds; importing registers them.

One module a family of ops. A kernel takes what its native function was made for and leaves the
rest (another dtype, an odd layout) to the plain PyTorch one.
"""

from fourbit.ops.cpu import attention as attention
from fourbit.ops.cpu import dropout as dropout
from fourbit.ops.cpu import loss as loss
from fourbit.ops.cpu import quantize as quantize
