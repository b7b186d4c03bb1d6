"""Processes that run what must not run here: slow verifiers, and hostile programs."""
