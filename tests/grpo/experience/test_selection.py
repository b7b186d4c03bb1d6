"""Which problems are drawn, and which groups are learned from."""

import pytest

from grpo.config.algorithm import Algorithm
from grpo.experience.selection import MAX_EXCLUDED, Selection, has_training_signal, pass_rate
from grpo.run.directory import RunDirectory
from grpo.types import Completion, Exhausted, Group, Problem, ScoredGroup, Verdict

PROBLEMS = [Problem(id=str(i), question=f"{i}+1", answer=str(i + 1), source="s") for i in range(8)]


def scored(problem: Problem, *values: str | float | None) -> ScoredGroup:
    """A group with a verdict ("correct", "wrong", "undecided") or a reward per completion."""
    completion = Completion(
        token_ids=(1, 2),
        logprobs=(-0.5, -0.25),
        text="ab",
        finish_reason="stop",
        versions=((3, 0, 2),),
    )
    verdicts = tuple(Verdict(value=value) if isinstance(value, str) else None for value in values)
    reward_of = {"correct": 1.0, "wrong": 0.0, "undecided": None}
    rewards = tuple(reward_of.get(value, value) for value in values)
    return ScoredGroup(
        group=Group(problem=problem, prompt_ids=(7,), completions=(completion,) * len(values)),
        rewards=rewards,
        parts=tuple({"accuracy": reward} for reward in rewards),
        verdicts=verdicts,
        faults=({},) * len(values),
    )


def selection(size: int = 2, **algorithm) -> Selection:
    def take(position: int, count: int) -> list[Problem]:
        return [PROBLEMS[(position + i) % len(PROBLEMS)] for i in range(count)]

    return Selection(algorithm=Algorithm(**algorithm), size=size, take=take)


@pytest.mark.parametrize(
    ("values", "rate", "has_signal"),
    [
        (("correct", "wrong", "wrong", "undecided"), 1 / 3, True),
        (("correct", "correct"), 1.0, False),
        (("wrong", "undecided"), 0.0, False),
        (("undecided", "undecided"), 0.0, False),
        ((0.5, 0.2, None, 0.5), 2 / 3, True),  # without verdicts the highest reward is right
        ((0.5, 0.5), 0.0, False),
    ],
)
def test_pass_rate_and_signal_of_a_group(values, rate, has_signal):
    group = scored(PROBLEMS[0], *values)
    assert pass_rate(group) == pytest.approx(rate)
    assert has_training_signal(group) == has_signal


def test_resampling_continues_until_enough_groups_have_a_signal_and_carries_the_surplus():
    chosen = selection(no_signal="resample")
    sizes = []

    def sample(problems, number):
        sizes.append(len(problems))
        values = ("correct", "correct") if number == 0 else ("correct", "wrong")
        return [scored(problem, *values) for problem in problems]

    selected = chosen.collect(sample)
    # none of the first two has a signal, so the second round draws as many as a rollout needs
    assert sizes == [2, 2] and len(selected.sampled) == 4
    assert [each.group.problem.id for each in selected.used] == ["2", "3"]
    assert chosen.carried == []


def test_too_few_groups_with_a_signal_end_the_run():
    chosen = selection(no_signal="resample", max_rounds=3)
    with pytest.raises(
        Exhausted, match=r"6 groups in 3 rounds gave only 0 of 2 .*\(6 have no reward"
    ):
        chosen.collect(lambda problems, _: [scored(each, "wrong", "wrong") for each in problems])
    assert len(chosen.sampled) == 6


def test_a_solved_problem_is_not_drawn_again_and_without_others_the_run_ends():
    chosen = selection(drop_solved=1.0)
    chosen.pass_rates = {"0": 1.0, "1": 0.9, "2": 1.0}
    assert [problem.id for problem in chosen.draw(3)] == ["1", "3", "4"] and chosen.position == 5
    chosen.pass_rates = {problem.id: 1.0 for problem in PROBLEMS}
    with pytest.raises(Exhausted, match=f"exclude the last {MAX_EXCLUDED} problems"):
        chosen.draw(1)


def test_the_state_survives_a_checkpoint(tmp_path):
    before = selection(drop_solved=1.0)
    before.position = 5
    before.pass_rates = {"0": 0.5}
    before.carried = [scored(PROBLEMS[0], "correct", "undecided"), scored(PROBLEMS[1], 0.5, None)]
    after = selection(drop_solved=1.0)
    run = RunDirectory(str(tmp_path / "run"), resume=False)
    run.save(1, before.state(), lambda folder: None)
    after.load(run.last_state()[1])
    assert after.state() == before.state()
