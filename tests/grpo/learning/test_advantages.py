"""Tests of group-relative advantages: golden numbers, and properties of arbitrary groups."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.config.algorithm import NORMALIZED_ADVANTAGES
from grpo.learning.advantages import (
    advantages,
    completion_lengths,
    normalized_rewards,
    rewards_differ,
    to_samples,
)
from grpo.types import Completion, Group, Problem, ScoredGroup

GROUP_KINDS = ("group_std", "none", "leave_one_out", "batch_std", "centered_std", "group_mean")
group_rewards = st.lists(
    st.one_of(st.none(), st.sampled_from([0.0, 0.1, 0.3, 0.9, 1.0, 1.1])), min_size=1, max_size=12
)


def group_advantages(rewards_G, kind):
    """Returns the advantages [G] of a single group whose completions have one token each."""
    [advantages_GL] = advantages([rewards_G], [[1] * len(rewards_G)], kind)
    return [advantage for (advantage,) in advantages_GL]


def test_golden_numbers_of_one_group():
    # The mean of 1 0 0 1 is 0.5 and the population std is 0.5, so the advantages are +1 and -1.
    assert group_advantages([1, 0, 0, 1], "group_std") == pytest.approx([1, -1, -1, 1], abs=1e-5)

    # The mean of 1 0 0 0 is 0.25 and the population std is sqrt(3)/4 = 0.4330:
    # 0.75 / 0.4330 = 1.7320 and -0.25 / 0.4330 = -0.5774.
    assert group_advantages([1, 0, 0, 0], "group_std") == pytest.approx(
        [1.7320, -0.5774, -0.5774, -0.5774], abs=1e-4
    )
    assert group_advantages([1, 0, 0, 0], "none") == [0.75, -0.25, -0.25, -0.25]

    # The mean of the other three rewards is 0 for the first completion and 1/3 for the others.
    assert group_advantages([1, 0, 0, 0], "leave_one_out") == pytest.approx(
        [1, -1 / 3, -1 / 3, -1 / 3]
    )


def test_batch_std_subtracts_the_group_mean_and_divides_by_the_std_of_all_rewards():
    # The rewards of both groups, 1 0 0 0 and 1 1 1 0, have std 0.5. The group means are 0.25 and
    # 0.75.
    first, second = advantages([[1, 0, 0, 0], [1, 1, 1, 0]], [[1] * 4] * 2, "batch_std")
    assert [advantage for (advantage,) in first] == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert [advantage for (advantage,) in second] == pytest.approx([0.5, 0.5, 0.5, -1.5], abs=1e-5)


def test_centered_std_divides_by_the_std_of_all_centered_rewards():
    # 1 0 0 0 minus its mean 0.25 is 0.75 -0.25 -0.25 -0.25, and 1 1 1 0 minus its mean 0.75 is
    # 0.25 0.25 0.25 -0.75. The std of these eight values is sqrt(3)/4 = 0.4330:
    # 0.75 / 0.4330 = 1.7320 and 0.25 / 0.4330 = 0.5774.
    first, second = advantages([[1, 0, 0, 0], [1, 1, 1, 0]], [[1] * 4] * 2, "centered_std")
    assert first[0][0] == pytest.approx(1.7320, abs=1e-4)
    assert second[0][0] == pytest.approx(0.5774, abs=1e-4)


def test_batch_normalizes_the_return_of_each_token():
    # Reward 1 with penalties 0.5 and 0.5 gives the returns 0 and 0.5. Reward 0 with penalty 0 gives
    # the return 0. The three returns have mean 1/6 and std sqrt(2)/6.
    [[first, second]] = advantages([[1, 0]], [[2, 1]], "batch", [[[0.5, 0.5], [0.0]]])
    assert [*first, *second] == pytest.approx([-0.7071, 1.4142, -0.7071], abs=1e-4)

    # Equal returns have advantage 0, and so have the tokens of a completion without a reward.
    assert advantages([[1, None], [1, 1]], [[1, 2], [1, 1]], "batch") == [
        [(0.0,), (0.0, 0.0)],
        [(0.0,), (0.0,)],
    ]


def test_centered_batch_normalizes_the_centered_reward_over_tokens():
    # The centered rewards are 0.5 and -0.5, with 1 and 3 tokens: the mean over the four tokens is
    # -0.25, and the std is sqrt(3)/4 = 0.4330. 0.75 / 0.4330 = 1.7320, -0.25 / 0.4330 = -0.5774.
    [[first, second]] = advantages([[1, 0]], [[1, 3]], "centered_batch")
    assert [*first, *second] == pytest.approx([1.7320, -0.5774, -0.5774, -0.5774], abs=1e-4)

    # A group with equal rewards has advantage 0, but its four tokens count: the mean over eight
    # tokens is -0.125, and the std is sqrt(1/8 - 1/64) = 0.3307. 0.625 / 0.3307 = 1.8898.
    actual = advantages([[1, 0], [1, 1]], [[1, 3], [2, 2]], "centered_batch")
    assert actual[0][0] == pytest.approx([1.8898], abs=1e-4)
    assert actual[1] == [(0.0, 0.0), (0.0, 0.0)]


def test_group_mean_divides_by_the_mean_reward():
    # The mean of 1 0 0 0 is 0.25: 0.75 / 0.25 = 3. The rarer the success, the larger its weight.
    assert group_advantages([1, 0, 0, 0], "group_mean") == [3, -1, -1, -1]
    assert group_advantages([1, 1, 0, 0], "group_mean") == [1, 1, -1, -1]
    assert group_advantages([0, 0, 0, 0], "group_mean") == [0] * 4
    # Penalties can make the mean 0 or negative: no advantage.
    assert group_advantages([1, -1, 0, 0], "group_mean") == [0] * 4
    assert group_advantages([1, -2, 0, 0], "group_mean") == [0] * 4


def test_per_reward_normalizes_each_reward_before_the_sum():
    # Accuracy 1 0 0 0 is normalized to 1.7320 and three times -0.5774, format 1 1 0 0 to
    # 1 1 -1 -1. With weights 1 and 0.5 the sums are 2.2320, -0.0774, -1.0774 and -1.0774.
    parts_G = [
        {"accuracy": 1.0, "format": 1.0},
        {"accuracy": 0.0, "format": 1.0},
        {"accuracy": 0.0, "format": 0.0},
        {"accuracy": 0.0, "format": 0.0},
    ]
    weights = {"accuracy": 1.0, "format": 0.5}
    rewards_PG = normalized_rewards([[1.5, 0.5, 0.0, 0.0]], [parts_G], weights)
    sums_G = [2.2320, -0.0774, -1.0774, -1.0774]
    assert rewards_PG == [pytest.approx(sums_G, abs=1e-4)]
    # Their std is sqrt((2.2320^2 + 0.0774^2 + 2 x 1.0774^2) / 4) = 1.3518.
    [actual] = advantages(rewards_PG, [[1] * 4], "per_reward")
    expected = [value / 1.3518 for value in sums_G]
    assert [advantage for (advantage,) in actual] == pytest.approx(expected, abs=1e-4)


def test_per_reward_excludes_completions_without_a_reward():
    # The first completion is undecided. Reward b does not apply to the second, so it is normalized
    # among the last two, and constant rewards add nothing.
    parts_G = [
        {"a": 5.0, "b": 9.0, "constant": 0.1},
        {"a": 1.0, "b": None, "constant": 0.1},
        {"a": 0.0, "b": 1.0, "constant": 0.1},
        {"a": 0.0, "b": 0.0, "constant": 0.1},
    ]
    weights = {"a": 0.0, "b": 1.0, "constant": 1.0}
    [rewards_G] = normalized_rewards([[None, 1.1, 1.1, 0.1]], [parts_G], weights)
    assert rewards_G == [None, 0.0, pytest.approx(1, abs=1e-5), pytest.approx(-1, abs=1e-5)]
    # Groups in which no reward differs have exactly the advantage 0.
    equal = normalized_rewards([[0.3] * 3], [[{"a": 0.1, "b": 0.2}] * 3], {"a": 1.0, "b": 1.0})
    assert advantages(equal, [[1] * 3], "per_reward") == [[(0.0,)] * 3]


def test_penalties_are_subtracted_from_the_reward_before_the_baseline():
    # The penalized rewards are 1 - 0.3 = 0.7 and 0 - 0.1 = -0.1, with mean 0.3.
    [[first, second]] = advantages([[1, 0]], [[2, 1]], "none", [[[0.1, 0.2], [0.1]]])
    assert [*first, *second] == pytest.approx([0.4, 0.4, -0.4])


@pytest.mark.parametrize("kind", NORMALIZED_ADVANTAGES)
def test_penalties_are_subtracted_after_a_division_by_a_std(kind):
    penalties_PGL = [[[1e-5, 2e-5], [3e-5, 0.0], [0.0]]]
    # Penalties alone are no reason for an advantage of +-1.
    [equal] = advantages([[1, 1, None]], [[2, 2, 1]], kind, penalties_PGL)
    assert [list(tokens) for tokens in equal] == [
        pytest.approx([-3e-5, -2e-5]),
        pytest.approx([-3e-5, 0.0]),
        [0.0],
    ]
    [first, second, _] = advantages([[1, 0, None]], [[2, 2, 1]], kind, penalties_PGL)[0]
    assert [*first, *second] == pytest.approx([1 - 3e-5, 1 - 2e-5, -1 - 3e-5, -1], abs=2.1e-6)


def test_teacher_advantages_are_negated_penalties_up_to_10():
    [[tokens]] = advantages([[None]], [[4]], "teacher", [[[0.5, -2.0, 30.0, -math.inf]]])
    assert tokens == (-0.5, 2.0, -10.0, 10.0)
    # The update of a teacher without finite logprobs must fail.
    [[(token,)]] = advantages([[None]], [[1]], "teacher", [[[math.nan]]])
    assert math.isnan(token)


def test_group_of_one_has_zero_advantage():
    for kind in GROUP_KINDS:
        assert group_advantages([1.0], kind) == [0.0]


def test_equal_rewards_with_rounding_error_have_zero_advantage():
    for kind in (*GROUP_KINDS, "batch", "centered_batch"):
        assert group_advantages([0.3] * 12, kind) == [0.0] * 12
        assert group_advantages([0.1 + 0.2] * 7, kind) == [0.0] * 7


def test_completion_without_reward_is_excluded_from_the_baseline():
    actual = group_advantages([1, None, 0, 0], "group_std")
    expected = group_advantages([1, 0, 0], "group_std")
    assert [actual[0], *actual[2:]] == expected
    assert actual[1] == 0.0


def assert_higher_rewards_have_no_lower_advantages(rewards_G, advantages_G):
    pairs = []
    for reward, advantage in zip(rewards_G, advantages_G, strict=True):
        if reward is not None:
            pairs.append((reward, advantage))
    for low_reward, advantage_of_low in pairs:
        for high_reward, advantage_of_high in pairs:
            if low_reward < high_reward:
                assert advantage_of_low <= advantage_of_high


@given(group_rewards)
def test_advantages_sum_to_zero_and_keep_the_order_of_rewards(rewards_G):
    for kind in GROUP_KINDS:
        advantages_G = group_advantages(rewards_G, kind)
        assert sum(advantages_G) == pytest.approx(0, abs=1e-6)
        assert_higher_rewards_have_no_lower_advantages(rewards_G, advantages_G)
        assert rewards_differ(rewards_G) == any(advantages_G)


@given(st.lists(group_rewards, min_size=1, max_size=4))
def test_group_std_advantages_do_not_depend_on_other_groups(rewards_PG):
    actual = advantages(rewards_PG, [[2] * len(rewards_G) for rewards_G in rewards_PG], "group_std")
    for rewards_G, advantages_GL in zip(rewards_PG, actual, strict=True):
        assert [advantages_GL] == advantages([rewards_G], [[2] * len(rewards_G)], "group_std")


def completion_of_length(length):
    return Completion(
        token_ids=(7, 8, 9)[:length],
        logprobs=(-1.0,) * length,
        text="",
        finish_reason="stop",
        versions=((0, 0, length),),
    )


def scored_group(rewards_G):
    """Returns a group with prompt (5, 6) and completions (7,), (7, 8) and (7, 8, 9)."""
    num_completions = len(rewards_G)
    group = Group(
        problem=Problem(id="p", question="", answer="", source=""),
        prompt_ids=(5, 6),
        completions=tuple(completion_of_length(i + 1) for i in range(num_completions)),
    )
    return ScoredGroup(
        group=group,
        rewards=tuple(rewards_G),
        parts=({},) * num_completions,
        verdicts=(None,) * num_completions,
        faults=({},) * num_completions,
    )


def test_samples_repeat_the_advantage_per_token_and_skip_completions_without_reward():
    groups = [scored_group([1.0, None, 0.0])]
    advantages_PGL = advantages([groups[0].rewards], completion_lengths(groups), "none")
    samples = to_samples(groups, advantages_PGL)
    assert [sample.token_ids for sample in samples] == [(5, 6, 7), (5, 6, 7, 8, 9)]
    assert [sample.advantages for sample in samples] == [(0.5,), (-0.5, -0.5, -0.5)]
    assert [sample.completion_length for sample in samples] == [1, 3]


def test_a_masked_completion_counts_only_in_the_baseline():
    scored = scored_group([1.0, 0.0])
    completion, last_completion = scored.group.completions
    truncated = replace(last_completion, finish_reason="length")
    group = replace(scored.group, completions=(completion, truncated))
    groups = [replace(scored, group=group)]
    advantages_PGL = advantages([scored.rewards], completion_lengths(groups), "none")
    [sample] = to_samples(groups, advantages_PGL, mask_truncated=True)
    assert sample.advantages == (0.5,)
