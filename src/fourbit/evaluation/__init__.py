"""What a model can do, measured: likelihoods, answers, and their standard errors."""

from fourbit.evaluation.answers import ExactMatch as ExactMatch
from fourbit.evaluation.answers import exact_match as exact_match
from fourbit.evaluation.answers import score_examples as score_examples
