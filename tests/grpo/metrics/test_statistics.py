"""Tests the statistics of evaluations against independent computations: enumeration for pass@k,
simulation for maj@n, and the normal interval and simulated coverage for the bootstrap.
"""

import itertools
import math
import random

import numpy as np
import pytest

from grpo.experience.group_metrics import sample_rows
from grpo.metrics.statistics import (
    average_interval,
    bootstrap_interval,
    majority_accuracy,
    paired_comparison,
    pass_at_k,
)
from grpo.stages.eval_table import evaluation_metrics
from grpo.types import Completion, Group, Problem, ScoredGroup, Verdict


@pytest.mark.parametrize(
    ("n", "right", "k"), [(6, 2, 1), (6, 2, 3), (6, 0, 2), (6, 6, 4), (5, 1, 5)]
)
def test_pass_at_k_equals_the_share_of_subsets_with_a_correct_completion(n, right, k):
    subsets = list(itertools.combinations(range(n), k))
    # Completions 0 to right - 1 are the correct ones.
    num_solved = sum(min(subset) < right for subset in subsets)
    assert pass_at_k(n, right, k) == pytest.approx(num_solved / len(subsets))


def test_majority_and_its_tie_rule():
    assert majority_accuracy(["5", "5", "7"], [True, True, False]) == 1.0
    assert majority_accuracy(["5", "7", "7"], [True, False, False]) == 0.0
    # A tie between a correct and a wrong answer.
    assert majority_accuracy(["5", "7", None], [True, False, False]) == 0.5
    assert majority_accuracy([None, None], [False, False]) == 0.0
    # "1/2" and "0.5" are both correct and count as one answer with two votes.
    assert (
        majority_accuracy(["1/2", "7", "0.5", "7", "7"], [True, False, True, False, False]) == 0.0
    )
    assert (
        majority_accuracy(["1/2", "7", "0.5", "7", None], [True, False, True, False, False]) == 0.5
    )


def simulated_majority(votes, generator):
    """Returns how often "5" is the most frequent vote in 1000 draws, ties broken at random."""
    if not votes:
        return 0.0
    num_correct = 0
    for _ in range(1000):
        shuffled = generator.sample(votes, len(votes))
        winner = max(shuffled, key=votes.count)  # the first of tied votes
        if winner == "5":
            num_correct += 1
    return num_correct / 1000


def test_majority_equals_a_simulation_with_random_tie_breaks():
    generator = random.Random(0)
    for _ in range(50):
        num_answers = generator.randint(1, 7)
        answers = [generator.choice(["5", "6", "7", None]) for _ in range(num_answers)]
        right = [answer == "5" for answer in answers]
        votes = [answer for answer in answers if answer]
        expected = simulated_majority(votes, generator)
        assert majority_accuracy(answers, right) == pytest.approx(expected, abs=0.06)


def test_the_interval_equals_the_normal_interval_for_many_problems():
    values = np.random.default_rng(0).random(500) < 0.3
    mean = values.mean()
    low, high = bootstrap_interval(values)
    half_width = 1.96 * math.sqrt(mean * (1 - mean) / 500)
    assert (low, high) == pytest.approx((mean - half_width, mean + half_width), abs=0.006)
    assert bootstrap_interval(values) == (low, high)  # the resampling has a fixed seed


def test_the_interval_covers_the_true_mean_with_the_stated_probability():
    generator = np.random.default_rng(1)
    num_covered = 0
    for _ in range(100):
        low, high = bootstrap_interval(generator.random(100) < 0.4)
        if low <= 0.4 <= high:
            num_covered += 1
    assert 88 <= num_covered <= 100


def test_the_interval_of_an_average_resamples_the_problems_of_each_set():
    # The first set always has the mean 1. The resamples of the second have the means 0, 0.5 and 1
    # with the probabilities 1/4, 1/2 and 1/4, so the average is 0.5, 0.75 or 1.
    assert average_interval([[1.0] * 4, [0.0, 1.0]]) == (0.5, 1.0)
    assert average_interval([[1.0] * 4, [0.25, 0.25]]) == (0.625, 0.625)
    # Three sets of one pair: an average of 0 needs three means of 0, with a probability of 1/64,
    # which is below 2.5 %; an average of 1/6 or less has 7/64.
    low, high = average_interval([[0.0, 1.0]] * 3)
    assert (low, high) == pytest.approx((1 / 6, 5 / 6))


def test_the_interval_of_an_average_is_unweighted():
    # The variances of the means are 0.25 / 400 and 0.25 / 100; that of their average is a quarter
    # of the sum. 1.96 standard deviations are 0.0548. Pooled problems would give 0.0438.
    half_right = [0.0, 1.0]
    low, high = average_interval([half_right * 200, half_right * 50])
    assert low == pytest.approx(0.5 - 0.0548, abs=0.003)
    assert high == pytest.approx(0.5 + 0.0548, abs=0.003)
    # One set is the same as its own interval.
    assert average_interval([half_right * 50]) == bootstrap_interval(half_right * 50)


def test_paired_comparison_detects_a_difference_that_is_small_against_the_spread():
    generator = np.random.default_rng(2)
    a = generator.random(200)
    b = a + 0.02 + 0.01 * generator.standard_normal(200)
    comparison = paired_comparison(a, b)
    assert comparison["low"] > 0
    assert comparison["p"] < 0.01
    assert comparison["better"] > 190
    comparison_with_itself = paired_comparison(a, a)
    assert comparison_with_itself["difference"] == 0
    assert comparison_with_itself["p"] == 1.0
    assert comparison_with_itself["equal"] == 200


def test_the_summary_of_an_evaluation():
    texts = ["<answer>5</answer>", "<answer>5</answer>", "<answer>6</answer>", "nothing"]
    completions = tuple(
        Completion(
            token_ids=(1,) * length,
            logprobs=(),
            text=text,
            finish_reason="stop",
            versions=((0, 0, 1),),
        )
        for length, text in enumerate(texts, start=1)
    )
    verdicts = tuple(Verdict(value=value) for value in ("correct", "correct", "wrong", "undecided"))
    group = Group(
        problem=Problem(id="p", question="", answer="5", source=""),
        prompt_ids=(),
        completions=completions,
    )
    scored = ScoredGroup(
        group=group,
        rewards=(1.0, 1.0, 0.0, None),
        parts=({},) * 4,
        verdicts=verdicts,
        faults=({},) * 4,
    )
    metrics = evaluation_metrics(sample_rows([scored]))
    assert metrics["accuracy"] == 0.5
    assert 0 <= metrics["accuracy/low"] <= 0.5 <= metrics["accuracy/high"] <= 1
    # Two of four completions are correct. They have 1 and 2 tokens, the others 3 and 4.
    assert metrics["pass@1"] == pytest.approx(0.5)
    assert metrics["pass@2"] == pytest.approx(5 / 6)  # 1 - C(2, 2) / C(4, 2)
    assert metrics["pass@4"] == pytest.approx(1.0)
    # The votes are 5, 5 and 6.
    assert metrics["maj@4"] == pytest.approx(1.0)
    assert metrics["undecided"] == 0.25
    assert metrics["length/right"] == 1.5
    assert metrics["length/wrong"] == 3.5
