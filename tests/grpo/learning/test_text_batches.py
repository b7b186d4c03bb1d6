"""Micro-batches of supervised training: complete, within the limit, the same number per update."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.learning.text_batches import MicroBatchSampler

MAX_TOKENS = 40


def num_tokens(rows, lengths, packed):
    """Returns the number of tokens of a micro-batch, including padding."""
    row_lengths = [lengths[row] for row in rows]
    return sum(row_lengths) if packed else len(rows) * max(row_lengths)


@given(
    st.lists(st.lists(st.integers(1, MAX_TOKENS), min_size=12, max_size=12), min_size=1),
    st.sampled_from([1, 2, 3]),
    st.booleans(),
)
def test_every_update_has_the_same_number_of_micro_batches_with_each_row_once(
    updates, num_ranks, packed
):
    lengths = [length for update in updates for length in update]
    sampler = MicroBatchSampler(
        lengths, rows_per_update=12, max_tokens=MAX_TOKENS, packed=packed, num_ranks=num_ranks
    )
    micro_batches = list(sampler)
    count = sampler.num_per_update * num_ranks
    assert len(micro_batches) == len(sampler) == count * len(updates)
    for update in range(len(updates)):
        parts = micro_batches[update * count : (update + 1) * count]
        assert parts == [rows for round_ in sampler.rounds(update) for rows in round_]
        assert sorted(row for rows in parts for row in rows) == list(
            range(12 * update, 12 * update + 12)
        )
        for rows in parts:
            assert 0 < num_tokens(rows, lengths, packed) <= MAX_TOKENS


@pytest.mark.parametrize(
    ("packed", "lengths", "expected"),
    [
        # A micro-batch without padding holds 30 + 10 and 20 + 20 tokens.
        (True, [10, 20, 30, 20], [[0, 2], [1, 3]]),
        # Padded to the longest: 30, 2 x 20, and 10 tokens.
        (False, [10, 20, 30, 20], [[1, 3], [2], [0]]),
        # The second update needs one micro-batch and gets two like the first.
        (True, [10, 20, 30, 20, 9, 8, 7, 6], [[0, 2], [1, 3], [4, 5], [6, 7]]),
    ],
)
def test_golden_micro_batches(packed, lengths, expected):
    sampler = MicroBatchSampler(lengths, rows_per_update=4, max_tokens=MAX_TOKENS, packed=packed)
    assert list(sampler) == expected


def test_ranks_take_turns_with_the_longest_micro_batch():
    lengths = [40, 30, 20, 35]
    sampler = MicroBatchSampler(
        lengths, rows_per_update=4, max_tokens=MAX_TOKENS, packed=True, num_ranks=2
    )
    assert list(sampler.rounds(0)) == [[[0], [3]], [[2], [1]]]
    assert sampler.num_per_update == 2


def test_64_solutions_of_real_lengths_need_one_micro_batch_where_the_maximum_needs_64():
    """Sized by the maximum of 4,096 tokens, each solution had a micro-batch of its own."""
    lengths = [40 + i for i in range(64)]
    sampler = MicroBatchSampler(lengths, rows_per_update=64, max_tokens=8192, packed=True)
    assert sampler.num_per_update == 1
