"""Every claim about GPUs beside its peers, and against what the same card can do at all."""
