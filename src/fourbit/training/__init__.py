"""Fine-tuning: the configuration of a run, the loop, and the run around it."""
