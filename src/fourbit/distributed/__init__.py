"""Several processes as one run: who is there, what they exchange, and who is missing.

Everything here does nothing where there is one process, so its callers need not ask.
"""

from fourbit.distributed.gradients import OrderedSum as OrderedSum
from fourbit.distributed.ranks import ALONE as ALONE
from fourbit.distributed.ranks import Ranks as Ranks
from fourbit.distributed.session import joined as joined
from fourbit.distributed.session import restarts as restarts
from fourbit.distributed.tensors import assign_ as assign_
from fourbit.distributed.tensors import is_shard as is_shard
from fourbit.distributed.tensors import local as local
from fourbit.distributed.tensors import shard_of as shard_of
from fourbit.distributed.tensors import whole as whole
from fourbit.distributed.tensors import whole_of as whole_of
