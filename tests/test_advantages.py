"""Group-relative advantages: golden numbers first, then what must hold for every group."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.advantages import group_advantages, has_signal, to_samples
from grpo.types import Completion, Group, Problem, ScoredGroup

rewards = st.lists(st.one_of(st.none(), st.sampled_from([0.0, 0.1, 0.3, 0.9, 1.0, 1.1])), min_size=1, max_size=12)


def test_golden_numbers():
    # mean 0.5, population std 0.5 -> +-1; mean 0.25, std sqrt(3)/4 = 0.4330 -> 0.75/0.4330 = 1.7320, -0.25/0.4330 = -0.5774
    assert group_advantages([1, 0, 0, 1], "group_std") == pytest.approx([1, -1, -1, 1], abs=1e-5)
    assert group_advantages([1, 0, 0, 0], "group_std") == pytest.approx([1.7320, -0.5774, -0.5774, -0.5774], abs=1e-4)
    assert group_advantages([1, 0, 0, 0], "none") == [0.75, -0.25, -0.25, -0.25]


def test_group_of_one_has_zero_advantage():
    assert group_advantages([1.0], "group_std") == [0.0]


def test_equal_rewards_that_floats_cannot_hold_exactly_have_zero_advantage():
    assert group_advantages([0.3] * 12, "group_std") == [0.0] * 12
    assert group_advantages([0.1 + 0.2] * 7, "none") == [0.0] * 7


def test_completion_without_a_reward_is_left_out_of_the_baseline():
    with_gap = group_advantages([1, None, 0, 0], "group_std")
    without = group_advantages([1, 0, 0], "group_std")
    assert [with_gap[0], *with_gap[2:]] == without and with_gap[1] == 0.0


@given(rewards)
def test_advantages_sum_to_zero_and_keep_the_order_of_rewards(rewards_G):
    for kind in ("group_std", "none"):
        advantages = group_advantages(rewards_G, kind)
        assert sum(advantages) == pytest.approx(0, abs=1e-6)
        pairs = [(r, a) for r, a in zip(rewards_G, advantages, strict=True) if r is not None]
        assert all(a <= b for r, a in pairs for s, b in pairs if r < s)
        assert has_signal(rewards_G) == any(advantages)


def scored(rewards_G):
    completions = tuple(
        Completion(token_ids=(7, 8, 9)[: i + 1], logprobs=(-1.0,) * (i + 1), text="", finish_reason="stop", versions=((0, 0, i + 1),))
        for i in range(len(rewards_G))
    )
    group = Group(problem=Problem(id="p", question="", answer="", source=""), prompt_ids=(5, 6), completions=completions)
    none = (None,) * len(rewards_G)
    return ScoredGroup(group=group, rewards=tuple(rewards_G), parts=({},) * len(rewards_G), verdicts=none, faults=({},) * len(rewards_G))


def test_samples_repeat_the_advantage_over_a_completions_tokens_and_drop_the_undecided():
    samples = to_samples([scored([1.0, None, 0.0])], "none")
    assert [sample.token_ids for sample in samples] == [(5, 6, 7), (5, 6, 7, 8, 9)]
    assert [sample.advantages for sample in samples] == [(0.5,), (-0.5, -0.5, -0.5)]
    assert [sample.completion_length for sample in samples] == [1, 3]
