"""Interprets numbers: rules that diagnose a run, statistics of evaluations, hardware bounds."""
