"""Statistics against independent computations.

Enumeration for pass@k, the normal interval for the bootstrap, coverage by simulation.
"""

import itertools
import math
import random

import numpy as np
import pytest

from grpo.experience.describing import sample_rows
from grpo.metrics.statistics import interval, majority, paired, pass_at_k
from grpo.stages.eval import summary
from grpo.types import Completion, Group, Problem, ScoredGroup, Verdict


@pytest.mark.parametrize(
    ("n", "right", "k"), [(6, 2, 1), (6, 2, 3), (6, 0, 2), (6, 6, 4), (5, 1, 5)]
)
def test_pass_at_k_equals_drawing_every_subset(n, right, k):
    subsets = list(itertools.combinations(range(n), k))
    assert pass_at_k(n, right, k) == pytest.approx(
        sum(min(subset) < right for subset in subsets) / len(subsets)
    )


def test_majority_and_its_tie_rule():
    assert majority(["5", "5", "7"], [True, True, False]) == 1.0
    assert majority(["5", "7", "7"], [True, False, False]) == 0.0
    assert majority(["5", "7", None], [True, False, False]) == 0.5  # drawn between the two
    assert majority([None, None], [False, False]) == 0.0
    assert majority(["1/2", "7", "0.5", "7", "7"], [True, False, True, False, False]) == 0.0
    # one answer, spelled in two ways
    assert majority(["1/2", "7", "0.5", "7", None], [True, False, True, False, False]) == 0.5


def test_majority_equals_drawing_among_the_most_frequent():
    chance = random.Random(0)
    for _ in range(50):
        answers = [chance.choice(["5", "6", "7", None]) for _ in range(chance.randint(1, 7))]
        right = [answer == "5" for answer in answers]
        given = [answer for answer in answers if answer]
        drawn = (
            [max(chance.sample(given, len(given)), key=given.count) == "5" for _ in range(1000)]
            if given
            else [False]
        )
        assert majority(answers, right) == pytest.approx(sum(drawn) / len(drawn), abs=0.06)


def test_the_interval_is_the_normal_one_for_many_problems():
    values = np.random.default_rng(0).random(500) < 0.3
    low, high = interval(values)
    half = 1.96 * math.sqrt(values.mean() * (1 - values.mean()) / 500)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.006)
    assert interval(values) == (low, high)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    draw = np.random.default_rng(1)
    covered = [
        low <= 0.4 <= high for low, high in (interval(draw.random(100) < 0.4) for _ in range(100))
    ]
    assert 88 <= sum(covered) <= 100


def test_paired_comparison_sees_what_two_intervals_hide():
    draw = np.random.default_rng(2)
    a = draw.random(200)
    found = paired(a, a + 0.02 + 0.01 * draw.standard_normal(200))
    assert found["low"] > 0 and found["p"] < 0.01 and found["better"] > 190
    same = paired(a, a)
    assert same["difference"] == 0 and same["p"] == 1.0 and same["equal"] == 200


def test_an_evaluations_summary():
    texts = ["<answer>5</answer>", "<answer>5</answer>", "<answer>6</answer>", "nothing"]
    completions = tuple(
        Completion(
            token_ids=(1,) * (i + 1),
            logprobs=(),
            text=text,
            finish_reason="stop",
            versions=((0, 0, 1),),
        )
        for i, text in enumerate(texts)
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
    found = summary(sample_rows([scored]))
    assert (
        found["accuracy"] == 0.5
        and 0 <= found["accuracy/low"] <= 0.5 <= found["accuracy/high"] <= 1
    )
    # 2 of 4 right: pass@1 1/2, pass@2 1 - C(2,2)/C(4,2) = 5/6, pass@4 1
    assert (found["pass@1"], found["pass@2"], found["pass@4"], found["maj@4"]) == pytest.approx(
        (0.5, 5 / 6, 1.0, 1.0)
    )
    assert (
        found["undecided"] == 0.25 and found["length/right"] == 1.5 and found["length/wrong"] == 3.5
    )
