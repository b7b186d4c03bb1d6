"""Judges programs by tests of their functions, without trusting the program.

Two processes in two sandboxes: the judge has the tests and the verdict, the program's process has
the program. They exchange values (`values.py`) over a socket (`peer.py`). `judging.py` starts both.
"""
