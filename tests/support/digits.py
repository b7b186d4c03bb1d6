"""Reward functions in a user's own module. A config names them as `digits:share`."""

import os

NUM_CHARACTERS = 12  # sampling.max_tokens of tiny_config; most tokens are single characters

_num_calls = 0  # of share_or_fail_on_rank_1 in this process


def share(completion, problem):
    """Returns the number of digits in the completion divided by NUM_CHARACTERS."""
    num_digits = sum(character.isdigit() for character in completion.text)
    return num_digits / NUM_CHARACTERS


def share_or_fail_on_rank_1(completion, problem):
    """Returns `share`, but fails on rank 1 after a number of calls.

    The environment variable CALLS contains the number of calls that succeed.

    Raises:
        ValueError: On rank 1, in every call after the first CALLS calls.
    """
    global _num_calls
    _num_calls += 1
    if os.environ["RANK"] == "1" and _num_calls > int(os.environ["CALLS"]):
        raise ValueError("too many calls")
    return share(completion, problem)
