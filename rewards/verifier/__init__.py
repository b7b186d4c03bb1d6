"""Reads answers out of completions and decides whether two answers are equal."""
