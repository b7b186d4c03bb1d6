"""Commands that make a run, one file each, and what they share."""
