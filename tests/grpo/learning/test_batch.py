"""Tests of token weights and micro-batches: labels, masks, padding and the token budget."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo.learning.batch import micro_batches, token_weights
from grpo.types import Sample


def make_sample(prompt, completion, advantage=1.0, group=0):
    length = len(completion)
    return Sample(
        token_ids=(*prompt, *completion),
        prompt_length=len(prompt),
        advantages=(advantage,) * length,
        sampler_logprobs=tuple(-0.5 - i for i in range(length)),
        group=group,
    )


def test_golden_batch():
    # The second row is the example of types.Batch: prompt (5, 6) and completion (7, 8), padded to
    # the 5 tokens of the first row.
    samples = [make_sample((5, 6), (7, 8), advantage=2.0), make_sample((1, 2), (3, 4, 9))]
    [batch] = micro_batches(samples, [0.25, 0.1], max_tokens=100)
    assert batch.sample_indices == (1, 0)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 9], [5, 6, 7, 8, 0]]
    assert batch.labels.tolist() == [[2, 3, 4, 9, 0], [6, 7, 8, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch.token_mask.tolist() == [
        [False, True, True, True, False],
        [False, True, True, False, False],
    ]
    expected_weights = torch.tensor([[0, 0.1, 0.1, 0.1, 0], [0, 0.25, 0.25, 0, 0]])
    assert torch.equal(batch.token_weights, expected_weights)
    assert batch.advantages[1].tolist() == [0, 2, 2, 0, 0]
    assert batch.sampler_logprobs[1].tolist() == [0, -0.5, -1.5, 0, 0]


def test_an_eos_token_with_the_padding_id_is_trained():
    samples = [make_sample((5,), (7, 0)), make_sample((5,), (7, 7, 0))]
    [batch] = micro_batches(samples, [1.0, 1.0], max_tokens=100)
    assert batch.token_mask.sum(1).tolist() == [3, 2]
    assert batch.labels[1][batch.token_mask[1]].tolist() == [7, 0]


def test_token_weights_are_the_published_reductions():
    # Three completions: lengths 2 and 3 in group 0, length 4 in group 1.
    samples = [
        make_sample((1,), (2,) * 2, group=0),
        make_sample((1,), (2,) * 3, group=0),
        make_sample((1,), (2,) * 4, group=1),
    ]
    # 1 / (3 * 2), 1 / (3 * 3), 1 / (3 * 4)
    assert token_weights(samples, "sequence", 10) == [1 / 6, 1 / 9, 1 / 12]
    # 1 / (2 + 3 + 4)
    assert token_weights(samples, "token", 10) == [1 / 9] * 3
    # 1 / (3 * 10)
    assert token_weights(samples, "constant", 10) == [1 / 30] * 3
    # 1 / (2 * 5) for the group of 2 + 3 tokens, 1 / (2 * 4) for the group of 4 tokens
    assert token_weights(samples, "prompt", 10) == [1 / 10, 1 / 10, 1 / 8]


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=20),
    st.integers(40, 200),
    st.sampled_from(["sequence", "token", "prompt"]),
)
def test_micro_batches_contain_every_token_once_and_respect_the_token_budget(
    lengths, max_tokens, reduction
):
    samples = [
        make_sample((1,) * 5, (2,) * length, group=i // 3) for i, length in enumerate(lengths)
    ]
    weights = token_weights(samples, reduction, 30)
    batches = micro_batches(samples, weights, max_tokens=max_tokens)

    indices = []
    for batch in batches:
        indices += batch.sample_indices
    assert sorted(indices) == list(range(len(samples)))
    assert sum(int(batch.token_mask.sum()) for batch in batches) == sum(lengths)
    assert sum(float(batch.token_weights.sum()) for batch in batches) == pytest.approx(1, abs=1e-5)
    for batch in batches:
        longest = batch.input_ids.shape[1]
        assert batch.input_ids.numel() <= max(max_tokens, longest)
