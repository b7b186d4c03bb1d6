"""Micro-batches of supervised training: complete, within the limit, the same number per update."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.learning.text_batches import MicroBatchSampler

MAX_TOKENS = 40
ROWS = 12  # per update


def num_tokens(rows, lengths, padded):
    """Returns the number of tokens of a micro-batch, including padding."""
    row_lengths = [lengths[row] for row in rows]
    return len(rows) * max(row_lengths) if padded else sum(row_lengths)


@given(
    st.lists(st.lists(st.integers(1, MAX_TOKENS), min_size=ROWS, max_size=ROWS), min_size=1),
    st.sampled_from([1, 2, 3]),
    st.booleans(),
)
def test_every_update_has_the_same_number_of_micro_batches_with_each_row_once(
    updates, num_ranks, padded
):
    lengths = [length for update in updates for length in update]
    sampler = MicroBatchSampler(
        lengths, rows_per_update=ROWS, max_tokens=MAX_TOKENS, padded=padded, num_ranks=num_ranks
    )
    micro_batches = list(sampler)
    count = sampler.num_per_update * num_ranks
    assert len(micro_batches) == len(sampler) == count * len(updates)
    for update in range(len(updates)):
        of_update = micro_batches[update * count : (update + 1) * count]
        assert of_update == [rows for ranks in sampler.rounds(update) for rows in ranks]
        rows = sorted(row for rows in of_update for row in rows)
        assert rows == list(range(ROWS * update, ROWS * (update + 1)))
        for rows in of_update:
            assert 0 < num_tokens(rows, lengths, padded) <= MAX_TOKENS


@given(
    st.lists(st.integers(1, MAX_TOKENS), min_size=ROWS, max_size=ROWS), st.sampled_from([1, 2, 3])
)
def test_without_padding_the_micro_batches_are_few(lengths, num_ranks):
    """Of two micro-batches that first-fit makes, the rows never fit one."""
    sampler = MicroBatchSampler(
        lengths, rows_per_update=ROWS, max_tokens=MAX_TOKENS, padded=False, num_ranks=num_ranks
    )
    most = max(1, 2 * sum(lengths) / MAX_TOKENS)
    assert sampler.num_per_update <= math.ceil(most / num_ranks)


@pytest.mark.parametrize(
    ("padded", "lengths", "expected"),
    [
        # A micro-batch without padding holds 30 + 10 and 20 + 20 tokens.
        (False, [10, 20, 30, 20], [[0, 2], [1, 3]]),
        # Padded to the longest: 2 x 20, 30, and 10 tokens.
        (True, [10, 20, 30, 20], [[1, 3], [2], [0]]),
        # The second update needs one micro-batch. It gets two like the first, of 15 tokens each.
        (False, [10, 20, 30, 20, 9, 8, 7, 6], [[0, 2], [1, 3], [4, 7], [5, 6]]),
        # Its two micro-batches of equal rows are halves.
        (True, [20, 20, 20, 20, 5, 5, 5, 5], [[0, 1], [2, 3], [4, 5], [6, 7]]),
        # All of its rows fit a micro-batch of the size of the longest row: the largest is halved.
        (False, [30, 10, 30, 10, 30, 1, 1, 1], [[0, 1], [2, 3], [4], [5, 6, 7]]),
    ],
)
def test_golden_micro_batches(padded, lengths, expected):
    sampler = MicroBatchSampler(lengths, rows_per_update=4, max_tokens=MAX_TOKENS, padded=padded)
    assert list(sampler) == expected


@pytest.mark.parametrize(
    ("lengths", "num_ranks"),
    [
        ([400, 390, 380, 370, 100, 90, 80, 70], 2),
        ([2000] + [200] * 31, 2),
        ([2000] + [200] * 31, 4),
    ],
)
def test_ranks_have_about_the_same_number_of_tokens(lengths, num_ranks):
    sampler = MicroBatchSampler(
        lengths, rows_per_update=len(lengths), max_tokens=8192, padded=False, num_ranks=num_ranks
    )
    (ranks,) = sampler.rounds(0)
    largest = max(num_tokens(rows, lengths, padded=False) for rows in ranks)
    assert largest <= 1.1 * sum(lengths) / num_ranks


def test_a_long_text_shares_no_padded_micro_batch_with_many_short_ones():
    lengths = [16_000] + [250] * 63
    sampler = MicroBatchSampler(lengths, rows_per_update=64, max_tokens=32_768, padded=True)
    sizes = [num_tokens(rows, lengths, padded=True) for rows in sampler]
    assert len(sizes) == 2
    assert max(sizes) <= 32_768


def test_64_solutions_share_micro_batches_by_their_number_of_tokens():
    """Sized by the maximum of 4,096 tokens, each solution had a micro-batch of its own."""
    lengths = [100 + 20 * i for i in range(64)]  # 46,720 tokens
    sampler = MicroBatchSampler(lengths, rows_per_update=64, max_tokens=4096, padded=False)
    assert sampler.num_per_update == 12
