"""Commands that look at a run or a config, and never make a run."""
