"""Undecided completions: their causes as metrics, and the share of them that stops a run."""

import pytest

from grpo.experience.group_metrics import group_metrics
from grpo.experience.plugins import verdict_for_failure
from grpo.experience.undecided import require_few_undecided, shorten
from grpo.rewards import choice
from grpo.rewards.workers.pool import Failure
from grpo.types import Completion, Group, Problem, ScoredGroup, TrainingStoppedError, Verdict

CORRECT = Verdict(value="correct")
WORKER_LOST = verdict_for_failure(Failure(kind="lost", reason="its worker was killed by SIGKILL"))
REWARD_FAILED = verdict_for_failure(Failure(kind="error", reason="KeyError: 'gold answer'"))


def completion(text="some text"):
    return Completion(
        token_ids=(1, 2), logprobs=(), text=text, finish_reason="stop", versions=((0, 0, 2),)
    )


def scored_group(problem_id, *verdicts, answer="4", text="some text"):
    """Returns a group with one completion per verdict. Undecided completions have no reward."""
    problem = Problem(id=problem_id, question="2+2?", answer=answer, source="s")
    completions = tuple(completion(text) for _ in verdicts)
    rewards = tuple(None if verdict.value == "undecided" else 1.0 for verdict in verdicts)
    return ScoredGroup(
        group=Group(problem=problem, prompt_ids=(5,), completions=completions),
        rewards=rewards,
        parts=tuple({"accuracy": reward} for reward in rewards),
        verdicts=verdicts,
        faults=({},) * len(verdicts),
    )


def test_each_cause_that_occurs_is_a_metric():
    no_choice = Problem(
        id="a", question="", answer="E", source="s", meta={"choices": ["Paris", "Berlin"]}
    )
    unreadable_gold = choice.reward(completion(r"\boxed{B}"), no_choice)
    other = Verdict(value="undecided", reason="the judge is asleep")
    groups = [
        scored_group("a", unreadable_gold, unreadable_gold, CORRECT, CORRECT),
        scored_group("b", WORKER_LOST, REWARD_FAILED, other, CORRECT),
    ]
    metrics = group_metrics(groups)
    assert metrics["reward/undecided"] == 5 / 8
    causes = {key: value for key, value in metrics.items() if key.startswith("undecided/")}
    assert causes == {
        "undecided/gold_answer": 2 / 8,
        "undecided/worker_lost": 1 / 8,
        "undecided/reward_failed": 1 / 8,
        "undecided/other": 1 / 8,
    }
    decided = group_metrics([scored_group("a", CORRECT)])
    assert not [key for key in decided if key.startswith("undecided/")]


def test_a_share_of_undecided_completions_above_the_limit_stops_with_the_first_case():
    groups = [scored_group(f"p{i}", *[CORRECT] * 8) for i in range(4)]
    groups[1] = scored_group("p1", CORRECT, REWARD_FAILED, *[CORRECT] * 6, answer="7" * 5000)
    groups[3] = scored_group("p3", *[WORKER_LOST] * 2, *[CORRECT] * 6)
    require_few_undecided(groups, 3 / 32)
    require_few_undecided(groups, 1.0)
    with pytest.raises(TrainingStoppedError) as caught:
        require_few_undecided(groups, 0.05)
    message = str(caught.value)
    assert (
        "3 of the rollout's 32 completions (9.4%) are undecided (worker lost: 2, reward failed: "
        "1), more than reward_pool.max_failed=0.05"
    ) in message
    assert f"problem p1, gold answer '{'7' * 80}... (5,000 characters)'" in message
    assert "reward failed: KeyError: 'gold answer'" in message
    assert "completion 'some text'" in message
    assert "\n" not in message


def test_the_completions_of_a_single_problem_never_stop_a_run():
    bad_row = scored_group("p0", *[REWARD_FAILED] * 8)
    require_few_undecided([bad_row], 0.05)
    require_few_undecided([bad_row, bad_row, scored_group("p1", CORRECT)], 0.05)
    with pytest.raises(TrainingStoppedError):
        require_few_undecided([bad_row, scored_group("p1", CORRECT, WORKER_LOST)], 0.05)


def test_a_long_text_is_shortened_to_its_beginning_and_its_length():
    assert shorten("1234", 4) == "1234"
    assert shorten("1234567", 3) == "123... (7 characters)"
