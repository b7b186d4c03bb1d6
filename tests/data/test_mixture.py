"""The mixture is a pure function of (seed, position)."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.common.mixture import BLOCK, Mixture, positions_per_block, stable_hash
from grpo.types import Problem, UserError


def source(name: str, count: int) -> list[Problem]:
    return [
        Problem(id=f"{name}/train/{i}", question="?", answer="0", source=name) for i in range(count)
    ]


SOURCES = {"a": source("a", 7), "b": source("b", 300), "c": source("c", 1000)}
WEIGHTS = {"a": 0.1, "b": 2.0, "c": 0.9}


def test_stable_hash_is_the_same_in_every_process():
    assert stable_hash("grpo") == 13950393823889859883  # printf grpo | b2sum -l 64


def test_positions_are_distributed_by_largest_remainder_and_never_zero():
    assert positions_per_block({"a": 2, "b": 1}) == {"a": 667, "b": 333}
    assert positions_per_block({"a": 1, "b": 1, "c": 1}) == {"a": 334, "b": 333, "c": 333}
    assert positions_per_block({"a": 1e9, "b": 1e-9}) == {"a": 999, "b": 1}


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=50))
def test_the_positions_of_all_sources_add_up_to_a_block(weights):
    counts = positions_per_block({str(i): weight for i, weight in enumerate(weights)})
    assert sum(counts.values()) == BLOCK
    assert min(counts.values()) >= 1


def test_every_block_has_the_exact_shares_in_a_different_order():
    stream = Mixture(SOURCES, WEIGHTS, seed=3)
    blocks = [
        [problem.source for problem in stream.take(block * BLOCK, BLOCK)] for block in range(3)
    ]
    for names in blocks:
        assert Counter(names) == {"a": 33, "b": 667, "c": 300}
    assert blocks[0] != blocks[1] != blocks[2]


def test_epochs_of_a_source_are_different_permutations():
    stream = Mixture({"b": SOURCES["b"]}, {"b": 1.0}, seed=0)
    epochs = [[problem.id for problem in stream.take(300 * epoch, 300)] for epoch in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(problem.id for problem in SOURCES["b"])
    assert all(epoch != next_epoch for epoch, next_epoch in pairwise(epochs))


def test_every_source_of_a_mixture_is_traversed_completely_before_it_repeats():
    ids = [
        problem.id
        for problem in Mixture(SOURCES, WEIGHTS, seed=1).take(0, 5000)
        if problem.source == "b"
    ]
    for start in range(0, len(ids) - 300, 300):
        assert len(set(ids[start : start + 300])) == 300


@settings(max_examples=30)
@given(st.integers(0, 2**40), st.integers(0, 5))
def test_a_problem_depends_only_on_seed_and_position(position, seed):
    fresh = Mixture(SOURCES, WEIGHTS, seed=seed)[position]
    used = Mixture(dict(reversed(SOURCES.items())), WEIGHTS, seed=seed)
    used.take(position + 990, 20)
    used.take(0, 5)
    assert used[position] == fresh
    assert used.take(position, 3)[0] == fresh


def test_seeds_give_different_streams():
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
    stream = Mixture({"s": problems}, {"s": 1.0}, 0, "level")
    first_epoch = [problem.meta["level"] for problem in stream.take(0, 30)]
    second_epoch = [problem.meta["level"] for problem in stream.take(30, 30)]
    assert first_epoch == sorted(first_epoch)
    assert second_epoch != sorted(second_epoch)
    # Within a level the order is shuffled.
    easiest = [problem.id for problem in problems if problem.meta["level"] == 0]
    assert [problem.id for problem in stream.take(0, 10)] != easiest
    with pytest.raises(UserError, match="problem 0 of s has no number 'difficulty' in its meta"):
        Mixture({"s": problems}, {"s": 1.0}, 0, "difficulty")
