"""Extracts answers from completions and decides whether two answers are equal."""
