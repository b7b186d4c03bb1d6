"""Group-relative advantages: golden numbers first, then what must hold for every group."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.learning.advantages import advantages, has_signal, lengths, to_samples
from grpo.types import Completion, Group, Problem, ScoredGroup

GROUP_KINDS = ("group_std", "none", "leave_one_out", "batch_std", "centered_std")
rewards = st.lists(
    st.one_of(st.none(), st.sampled_from([0.0, 0.1, 0.3, 0.9, 1.0, 1.1])), min_size=1, max_size=12
)


def of_group(rewards_G, kind):
    (found,) = advantages([rewards_G], [[1] * len(rewards_G)], kind)
    return [value for (value,) in found]


def test_golden_numbers():
    # mean 0.5, population std 0.5 -> +-1; mean 0.25, std sqrt(3)/4 = 0.4330 -> 0.75/0.4330 =
    # 1.7320, -0.25/0.4330 = -0.5774
    assert of_group([1, 0, 0, 1], "group_std") == pytest.approx([1, -1, -1, 1], abs=1e-5)
    assert of_group([1, 0, 0, 0], "group_std") == pytest.approx(
        [1.7320, -0.5774, -0.5774, -0.5774], abs=1e-4
    )
    assert of_group([1, 0, 0, 0], "none") == [0.75, -0.25, -0.25, -0.25]
    # the mean of the others is 0 for the first, 1/3 for the rest
    assert of_group([1, 0, 0, 0], "leave_one_out") == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])


def test_batch_std_is_that_of_all_rewards_and_the_baseline_the_groups():
    # all rewards 1 0 0 0 | 1 1 1 0: mean 0.5, std 0.5; group means 0.25 and 0.75
    found = advantages([[1, 0, 0, 0], [1, 1, 1, 0]], [[1] * 4] * 2, "batch_std")
    assert [value for row in found for (value,) in row] == pytest.approx(
        [1.5, -0.5, -0.5, -0.5, 0.5, 0.5, 0.5, -1.5], abs=1e-5
    )


def test_centered_std_is_that_of_what_is_left_of_the_rewards():
    # 1 0 0 0 | 1 1 1 0, less the means 0.25 and 0.75: 0.75 -0.25 x3 | 0.25 x3 -0.75: std sqrt(3)/4
    found = advantages([[1, 0, 0, 0], [1, 1, 1, 0]], [[1] * 4] * 2, "centered_std")
    assert found[0][0][0] == pytest.approx(1.7320, abs=1e-4) and found[1][0][0] == pytest.approx(
        0.5774, abs=1e-4
    )


def test_batch_normalises_the_return_of_every_token():
    # rewards 1 and 0, penalties 0.5 0.5 and 0: returns 0 0.5 and 0: mean 1/6, std sqrt(2)/6
    found = advantages([[1, 0]], [[2, 1]], "batch", [[[0.5, 0.5], [0.0]]])
    assert [*found[0][0], *found[0][1]] == pytest.approx([-0.7071, 1.4142, -0.7071], abs=1e-4)
    assert advantages([[1, None], [1, 1]], [[1, 2], [1, 1]], "batch") == [
        [(0.0,), (0.0, 0.0)],
        [(0.0,), (0.0,)],
    ]


def test_penalties_lower_a_completions_reward_before_the_baseline():
    # rewards 1 - 0.3, 0 - 0.1 -> 0.7, -0.1: mean 0.3
    found = advantages([[1, 0]], [[2, 1]], "none", [[[0.1, 0.2], [0.1]]])
    assert [*found[0][0], *found[0][1]] == pytest.approx([0.4, 0.4, -0.4])


def test_group_of_one_has_zero_advantage():
    for kind in GROUP_KINDS:
        assert of_group([1.0], kind) == [0.0]


def test_equal_rewards_that_floats_cannot_hold_exactly_have_zero_advantage():
    for kind in (*GROUP_KINDS, "batch"):
        assert of_group([0.3] * 12, kind) == [0.0] * 12
        assert of_group([0.1 + 0.2] * 7, kind) == [0.0] * 7


def test_completion_without_a_reward_is_left_out_of_the_baseline():
    with_gap = of_group([1, None, 0, 0], "group_std")
    without = of_group([1, 0, 0], "group_std")
    assert [with_gap[0], *with_gap[2:]] == without and with_gap[1] == 0.0


@given(rewards)
def test_advantages_sum_to_zero_and_keep_the_order_of_rewards(rewards_G):
    for kind in GROUP_KINDS:
        found = of_group(rewards_G, kind)
        assert sum(found) == pytest.approx(0, abs=1e-6)
        pairs = [(r, a) for r, a in zip(rewards_G, found, strict=True) if r is not None]
        assert all(a <= b for r, a in pairs for s, b in pairs if r < s)
        assert has_signal(rewards_G) == any(found)


@given(st.lists(rewards, min_size=1, max_size=4))
def test_unequal_groups_stay_relative_to_themselves(groups):
    found = advantages(groups, [[2] * len(group) for group in groups], "group_std")
    assert found == [advantages([group], [[2] * len(group)], "group_std")[0] for group in groups]


def scored(rewards_G):
    completions = tuple(
        Completion(
            token_ids=(7, 8, 9)[: i + 1],
            logprobs=(-1.0,) * (i + 1),
            text="",
            finish_reason="stop",
            versions=((0, 0, i + 1),),
        )
        for i in range(len(rewards_G))
    )
    group = Group(
        problem=Problem(id="p", question="", answer="", source=""),
        prompt_ids=(5, 6),
        completions=completions,
    )
    none = (None,) * len(rewards_G)
    return ScoredGroup(
        group=group,
        rewards=tuple(rewards_G),
        parts=({},) * len(rewards_G),
        verdicts=none,
        faults=({},) * len(rewards_G),
    )


def test_samples_repeat_the_advantage_over_a_completions_tokens_and_drop_the_undecided():
    groups = [scored([1.0, None, 0.0])]
    values = advantages([groups[0].rewards], lengths(groups), "none")
    samples = to_samples(groups, values)
    assert [sample.token_ids for sample in samples] == [(5, 6, 7), (5, 6, 7, 8, 9)]
    assert [sample.advantages for sample in samples] == [(0.5,), (-0.5, -0.5, -0.5)]
    assert [sample.completion_length for sample in samples] == [1, 3]


def test_a_masked_completion_counts_in_the_baseline_only():
    whole = scored([1.0, 0.0])
    cut = replace(whole.group.completions[1], finish_reason="length")
    groups = [
        replace(whole, group=replace(whole.group, completions=(whole.group.completions[0], cut)))
    ]
    (sample,) = to_samples(
        groups, advantages([whole.rewards], lengths(groups), "none"), mask_truncated=True
    )
    assert sample.advantages == (0.5,)
