"""What one run is around its work: its directory, its ranks, its signals, and what it shows."""
