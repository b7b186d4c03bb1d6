"""Turns problems into scored groups: prompts, sampling, rewards, selection. No torch."""
