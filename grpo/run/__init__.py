"""The environment of a run: directory, ranks, signals, progress output and trackers."""
