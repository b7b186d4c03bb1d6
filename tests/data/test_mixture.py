"""The order of the problems of a mixture.

It is a pure function of (seed, position) and gives each source its exact share.
"""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.data.common.mixture import BLOCK, Mixture, positions_per_block, stable_hash
from grpo.types import Problem, UserError


def make_problems(source: str, count: int) -> list[Problem]:
    return [
        Problem(id=f"{source}/train/{i}", question="?", answer="0", source=source)
        for i in range(count)
    ]


SOURCES = {
    "a": make_problems("a", 7),
    "b": make_problems("b", 300),
    "c": make_problems("c", 1000),
}
WEIGHTS = {"a": 0.1, "b": 2.0, "c": 0.9}


def test_stable_hash_is_the_same_in_every_process():
    # The expected value is the output of: printf grpo | b2sum -l 64
    assert stable_hash("grpo") == 13950393823889859883


def test_positions_are_distributed_by_largest_remainder_with_at_least_one_per_source():
    assert positions_per_block({"a": 2, "b": 1}) == {"a": 667, "b": 333}
    assert positions_per_block({"a": 1, "b": 1, "c": 1}) == {"a": 334, "b": 333, "c": 333}
    assert positions_per_block({"a": 1e9, "b": 1e-9}) == {"a": 999, "b": 1}


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=50))
def test_the_positions_of_all_sources_add_up_to_a_block(weights):
    counts = positions_per_block({str(i): weight for i, weight in enumerate(weights)})
    assert sum(counts.values()) == BLOCK
    assert min(counts.values()) >= 1


def test_every_block_has_the_exact_shares_in_a_different_order():
    mixture = Mixture(SOURCES, WEIGHTS, seed=3)
    sources_per_block = []
    for block in range(3):
        problems = mixture.take(block * BLOCK, BLOCK)
        sources_per_block.append([problem.source for problem in problems])
    for sources in sources_per_block:
        # The weights are 0.1, 2 and 0.9 of 3: the shares of 1000 are 33.3, 666.7 and 300.
        assert Counter(sources) == {"a": 33, "b": 667, "c": 300}
    assert sources_per_block[0] != sources_per_block[1]
    assert sources_per_block[1] != sources_per_block[2]


def test_epochs_of_a_source_are_different_permutations():
    mixture = Mixture({"b": SOURCES["b"]}, {"b": 1.0}, seed=0)
    source_ids = sorted(problem.id for problem in SOURCES["b"])
    ids_per_epoch = []
    for epoch in range(4):
        problems = mixture.take(300 * epoch, 300)
        ids_per_epoch.append([problem.id for problem in problems])
    for ids in ids_per_epoch:
        assert sorted(ids) == source_ids
    for ids, next_ids in pairwise(ids_per_epoch):
        assert ids != next_ids


def test_every_source_of_a_mixture_is_traversed_completely_before_it_repeats():
    problems = Mixture(SOURCES, WEIGHTS, seed=1).take(0, 5000)
    ids = [problem.id for problem in problems if problem.source == "b"]
    for start in range(0, len(ids) - 300, 300):
        assert len(set(ids[start : start + 300])) == 300


@settings(max_examples=30)
@given(st.integers(0, 2**40), st.integers(0, 5))
def test_a_problem_depends_only_on_seed_and_position(position, seed):
    expected = Mixture(SOURCES, WEIGHTS, seed=seed)[position]
    # The order of the sources and earlier accesses to other positions have no effect.
    mixture = Mixture(dict(reversed(SOURCES.items())), WEIGHTS, seed=seed)
    mixture.take(position + 990, 20)
    mixture.take(0, 5)
    assert mixture[position] == expected
    assert mixture.take(position, 3)[0] == expected


def test_different_seeds_give_different_orders():
    first = Mixture(SOURCES, WEIGHTS, seed=0).take(0, 50)
    second = Mixture(SOURCES, WEIGHTS, seed=1).take(0, 50)
    assert first != second


@pytest.mark.parametrize(
    ("sources", "weights", "message"),
    [
        ({}, {}, "no sources"),
        ({"a": []}, {"a": 1.0}, "data.a: no problems"),
        ({"a": SOURCES["a"]}, {"a": 0.0}, "data.a: weight is 0.0"),
        ({"a": SOURCES["a"]}, {"a": float("nan")}, "data.a: weight is nan"),
        ({"a": SOURCES["a"]}, {"b": 1.0}, "weights name b, but the sources are a"),
    ],
)
def test_invalid_sources_and_weights_raise_a_user_error(sources, weights, message):
    with pytest.raises(UserError, match=message):
        Mixture(sources, weights, seed=0)


def test_a_negative_position_raises_an_index_error():
    with pytest.raises(IndexError):
        Mixture(SOURCES, WEIGHTS, seed=0)[-1]


def test_a_curriculum_sorts_only_the_first_epoch():
    problems = [
        Problem(id=str(i), question="", answer="", source="s", meta={"level": i % 3})
        for i in range(30)
    ]
    mixture = Mixture({"s": problems}, {"s": 1.0}, seed=0, curriculum="level")
    levels_of_first_epoch = [problem.meta["level"] for problem in mixture.take(0, 30)]
    levels_of_second_epoch = [problem.meta["level"] for problem in mixture.take(30, 30)]
    assert levels_of_first_epoch == sorted(levels_of_first_epoch)
    assert levels_of_second_epoch != sorted(levels_of_second_epoch)
    # The first 10 problems are those of level 0, in shuffled order.
    level_0_ids = [problem.id for problem in problems if problem.meta["level"] == 0]
    assert [problem.id for problem in mixture.take(0, 10)] != level_0_ids
    with pytest.raises(UserError, match="problem 0 of s has no number 'difficulty' in its meta"):
        Mixture({"s": problems}, {"s": 1.0}, seed=0, curriculum="difficulty")
