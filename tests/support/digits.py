"""A user's own reward, as it could lie in a working directory.

The share of digits among twelve characters.
"""

import os


def share(completion, problem):
    return sum(char.isdigit() for char in completion.text) / 12


CALLS = []  # of share_until_the_third in this process


def share_until_the_third(completion, problem):
    """Fails on one of two ranks, after two rollouts and the evaluation before them."""
    CALLS.append(1)
    if os.environ["RANK"] == "1" and len(CALLS) > int(os.environ["CALLS"]):
        raise ValueError("no more")
    return share(completion, problem)
