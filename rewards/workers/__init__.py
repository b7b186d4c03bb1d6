"""Processes for code that must not run in the trainer: slow verifiers and untrusted programs."""
