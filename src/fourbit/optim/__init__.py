"""The optimizer of the adapters.

`config` has its settings and the schedule, `adamw` the optimizer, `update` the arithmetic of one
step, `pages` the memory that its state lives in.
"""

from fourbit.optim.adamw import AdamW as AdamW
from fourbit.optim.adamw import Paging as Paging
from fourbit.optim.adamw import resident_bytes as resident_bytes
from fourbit.optim.config import OptimConfig as OptimConfig
from fourbit.optim.config import build_optimizer as build_optimizer
from fourbit.optim.config import lr_factors as lr_factors
