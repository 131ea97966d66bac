"""`fourbit compare`: the same data through several methods, with several seeds."""

from fourbit.comparison.run import CompareOptions as CompareOptions
from fourbit.comparison.run import compare as compare
from fourbit.comparison.variants import Variant as Variant
from fourbit.comparison.variants import parse_variants as parse_variants
