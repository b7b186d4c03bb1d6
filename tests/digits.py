"""A user's own reward, as it could lie in a working directory: the share of digits among twelve characters."""

import os


def share(completion, problem):
    return sum(char.isdigit() for char in completion.text) / 12


def share_until_the_third(completion, problem, calls=[]):  # noqa: B006 - counts the calls of a process
    """Fails on one of two ranks, after two rollouts and the evaluation before them."""
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) > int(os.environ["CALLS"]):
        raise ValueError("no more")
    return share(completion, problem)
