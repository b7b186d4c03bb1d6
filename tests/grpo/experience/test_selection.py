"""Selection: the problems that are drawn, and the groups that the update uses."""

import pytest

from grpo.config.algorithm import AlgorithmSettings
from grpo.experience.selection import MAX_EXCLUDED, Selection, has_training_signal, pass_rate
from grpo.run.directory import RunDirectory
from grpo.types import Completion, Group, Problem, ScoredGroup, TrainingStoppedError, Verdict

PROBLEMS = [Problem(id=str(i), question=f"{i}+1", answer=str(i + 1), source="s") for i in range(8)]
REWARDS = {"correct": 1.0, "wrong": 0.0, "undecided": None}


def scored_group(problem: Problem, *values: str | float | None) -> ScoredGroup:
    """Returns a group of one completion per value.

    Args:
        problem: The problem of the group.
        values: A verdict ("correct", "wrong", "undecided"), or a reward without a verdict.
    """
    completion = Completion(
        token_ids=(1, 2),
        logprobs=(-0.5, -0.25),
        text="ab",
        finish_reason="stop",
        versions=((3, 0, 2),),
    )
    verdicts = []
    rewards = []
    for value in values:
        if isinstance(value, str):
            verdicts.append(Verdict(value=value))
            rewards.append(REWARDS[value])
        else:
            verdicts.append(None)
            rewards.append(value)
    return ScoredGroup(
        group=Group(problem=problem, prompt_ids=(7,), completions=(completion,) * len(values)),
        rewards=tuple(rewards),
        parts=tuple({"accuracy": reward} for reward in rewards),
        verdicts=tuple(verdicts),
        faults=({},) * len(values),
    )


def make_selection(**algorithm) -> Selection:
    """Returns a selection of two groups per rollout."""

    def take(position: int, count: int) -> list[Problem]:
        return [PROBLEMS[(position + i) % len(PROBLEMS)] for i in range(count)]

    return Selection(algorithm=AlgorithmSettings(**algorithm), num_groups=2, take_problems=take)


@pytest.mark.parametrize(
    ("values", "max_reward", "rate", "has_signal"),
    [
        (("correct", "wrong", "wrong", "undecided"), None, 1 / 3, True),
        (("correct", "correct"), None, 1.0, False),
        (("correct", "wrong"), 0.0, 0.5, True),  # verdicts take precedence over max_reward
        (("wrong", "undecided"), None, 0.0, False),
        (("undecided", "undecided"), None, None, False),
        (("undecided", "undecided"), 1.0, None, False),
        # Without verdicts, only max_reward tells which completions are correct.
        ((0.5, 0.2, None, 0.5), None, None, True),
        ((0.5, 0.5), None, None, False),
        ((0.5, 0.2, None, 0.5), 0.5, 2 / 3, True),
        ((0.5, 0.5), 0.5, 1.0, False),
        ((0.5, 0.5), 1.0, 0.0, False),
        ((0.7 + 0.1, 0.1), 0.8, 0.5, True),  # the sum is 0.7999999999999999
    ],
)
def test_pass_rate_and_training_signal_of_a_group(values, max_reward, rate, has_signal):
    group = scored_group(PROBLEMS[0], *values)
    assert pass_rate(group, max_reward) == pytest.approx(rate)
    assert has_training_signal(group) == has_signal


@pytest.mark.parametrize(
    ("max_reward", "recorded", "drawn"),
    [(1.0, {"0": 1.0, "1": 7 / 8}, ["1", "2"]), (None, {}, ["0", "1"])],
)
def test_problems_solved_by_a_reward_without_verdicts_are_not_drawn_again(
    max_reward, recorded, drawn
):
    selection = make_selection(drop_solved=0.9, max_reward=max_reward)
    rewards = {"0": [1.0] * 8, "1": [1.0] * 7 + [0.0]}

    def sample(problems, number):
        return [scored_group(problem, *rewards[problem.id]) for problem in problems]

    selection.collect(sample)
    assert selection.pass_rates == recorded
    selection.position = 0
    assert [problem.id for problem in selection.draw(2)] == drawn


def test_resampling_continues_until_enough_groups_have_a_training_signal():
    selection = make_selection(no_signal="resample")
    num_drawn = []

    def sample(problems, number):
        num_drawn.append(len(problems))
        values = ("correct", "correct") if number == 0 else ("correct", "wrong")
        return [scored_group(problem, *values) for problem in problems]

    selected = selection.collect(sample)
    # The first two groups have no signal, so the second round draws a full rollout of two groups.
    assert num_drawn == [2, 2]
    assert len(selected.sampled) == 4
    assert [scored.group.problem.id for scored in selected.used] == ["2", "3"]
    assert selection.carried == []


def test_too_few_groups_with_a_training_signal_end_the_run():
    selection = make_selection(no_signal="resample", max_rounds=3)

    def sample(problems, number):
        return [scored_group(problem, "wrong", "wrong") for problem in problems]

    with pytest.raises(
        TrainingStoppedError, match=r"6 groups in 3 rounds gave only 0 of 2 .*\(6 have no reward"
    ):
        selection.collect(sample)
    assert len(selection.sampled) == 6


def test_solved_problems_are_not_drawn_again_and_the_run_ends_if_all_are_solved():
    selection = make_selection(drop_solved=1.0)
    selection.pass_rates = {"0": 1.0, "1": 0.9, "2": 1.0}
    assert [problem.id for problem in selection.draw(3)] == ["1", "3", "4"]
    assert selection.position == 5
    selection.pass_rates = {problem.id: 1.0 for problem in PROBLEMS}
    with pytest.raises(TrainingStoppedError, match=f"excluded {MAX_EXCLUDED} problems in a row"):
        selection.draw(1)


def test_the_state_is_restored_from_a_checkpoint(tmp_path):
    saved = make_selection(drop_solved=1.0)
    saved.position = 5
    saved.pass_rates = {"0": 0.5}
    saved.carried = [
        scored_group(PROBLEMS[0], "correct", "undecided"),
        scored_group(PROBLEMS[1], 0.5, None),
    ]
    run = RunDirectory(str(tmp_path / "run"), resume=False)
    run.save_checkpoint(1, saved.state(), lambda folder: None)
    restored = make_selection(drop_solved=1.0)
    restored.load(run.read_last_checkpoint()[1])
    assert restored.state() == saved.state()
