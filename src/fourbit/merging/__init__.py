"""Merging: an adapter into the weights it was trained on, proven on the run's own rows."""

from fourbit.merging.requantized import Requantized as Requantized
from fourbit.merging.requantized import count_requantized as count_requantized
from fourbit.merging.result import MergeOptions as MergeOptions
from fourbit.merging.result import MergeResult as MergeResult
from fourbit.merging.run import merge as merge
