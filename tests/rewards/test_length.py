"""The length reward: DAPO's overlong punishment."""

import pytest

from grpo.rewards.length import prepare, reward
from grpo.types import Completion, Problem, UserError

PROBLEM = Problem(id="t/0", question="?", answer="", source="t")


def completion(num_tokens: int, text: str = "") -> Completion:
    return Completion(
        token_ids=(0,) * num_tokens, logprobs=(), text=text, finish_reason="stop", versions=()
    )


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (500, -1.0)],
)
def test_the_length_reward_falls_from_0_to_minus_1_within_the_buffer(num_tokens, expected):
    """DAPO Eq. 13 with L_max = 100 and L_cache = 20: (80 - num_tokens) / 20, clipped to [-1, 0]."""
    assert reward(completion(num_tokens), PROBLEM, max_tokens=100, buffer=20) == pytest.approx(
        expected
    )


def test_tokens_that_decode_to_nothing_count():
    """Special tokens are in `token_ids` and not in the text."""
    assert reward(completion(90, text="2"), PROBLEM, max_tokens=100, buffer=20) == -0.5


@pytest.mark.parametrize(("max_tokens", "buffer"), [(100, 0), (100, 101), (0, 0), (100, -5)])
def test_invalid_options_raise_a_user_error(max_tokens, buffer):
    with pytest.raises(UserError, match="expected 0 < buffer <= max_tokens"):
        prepare(max_tokens=max_tokens, buffer=buffer)
