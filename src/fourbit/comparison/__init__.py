"""`fourbit compare`: the same data through several methods, with several seeds."""

from typing import TYPE_CHECKING

from fourbit.comparison.variants import Variant as Variant
from fourbit.comparison.variants import parse_variants as parse_variants
from fourbit.lazy import lazily

if TYPE_CHECKING:
    from fourbit.comparison.run import CompareOptions as CompareOptions
    from fourbit.comparison.run import compare as compare

_HOMES = {"CompareOptions": "fourbit.comparison.run", "compare": "fourbit.comparison.run"}
__getattr__, __dir__ = lazily(__name__, _HOMES)
