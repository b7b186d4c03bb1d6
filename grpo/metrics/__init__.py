"""What numbers mean: diagnosis of a run, statistics of evaluations, bounds of the machine."""
