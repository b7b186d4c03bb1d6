"""Batches: the shift happens once, masks come from lengths, the reduction cannot depend on the
split.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo.learning.batch import micro_batches, token_weights
from grpo.types import Sample


def sample(prompt, completion, advantage=1.0, group=0):
    n = len(completion)
    return Sample(
        token_ids=(*prompt, *completion),
        prompt_length=len(prompt),
        advantages=(advantage,) * n,
        sampler_logprobs=tuple(-0.5 - i for i in range(n)),
        group=group,
    )


def test_golden_batch():
    # The example of types.Batch: prompt (5, 6), completion (7, 8), padded to 5 by a longer
    # neighbour.
    (batch,) = micro_batches(
        [sample((5, 6), (7, 8), 2.0), sample((1, 2), (3, 4, 9))], [0.25, 0.1], max_tokens=100
    )
    assert batch.index == (1, 0)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 9], [5, 6, 7, 8, 0]]
    assert batch.labels.tolist() == [[2, 3, 4, 9, 0], [6, 7, 8, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch.token_mask.tolist() == [
        [False, True, True, True, False],
        [False, True, True, False, False],
    ]
    assert torch.equal(
        batch.token_weights, torch.tensor([[0, 0.1, 0.1, 0.1, 0], [0, 0.25, 0.25, 0, 0]])
    )
    assert batch.advantages[1].tolist() == [0, 2, 2, 0, 0]
    assert batch.sampler_logprobs[1].tolist() == [0, -0.5, -1.5, 0, 0]


def test_eos_that_is_also_the_padding_is_trained():
    (batch,) = micro_batches(
        [sample((5,), (7, 0)), sample((5,), (7, 7, 0))], [1.0, 1.0], max_tokens=100
    )
    assert batch.token_mask.sum(1).tolist() == [3, 2]
    assert batch.labels[1][batch.token_mask[1]].tolist() == [7, 0]


def test_token_weights_are_the_published_reductions():
    # lengths 2, 3 in group 0, 4 in group 1: sequence 1/(3*2), 1/(3*3), 1/(3*4); token 1/9; constant
    # 1/(3*10); prompt 1/(2*5), 1/(2*4)
    samples = [sample((1,), (2,) * n, group=group) for n, group in ((2, 0), (3, 0), (4, 1))]
    assert token_weights(samples, "sequence", 10) == [1 / 6, 1 / 9, 1 / 12]
    assert token_weights(samples, "token", 10) == [1 / 9] * 3
    assert token_weights(samples, "constant", 10) == [1 / 30] * 3
    assert token_weights(samples, "prompt", 10) == [1 / 10, 1 / 10, 1 / 8]


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=20),
    st.integers(40, 200),
    st.sampled_from(["sequence", "token", "prompt"]),
)
def test_micro_batches_keep_every_token_once_within_the_budget(lengths, budget, reduction):
    samples = [sample((1,) * 5, (2,) * n, group=i // 3) for i, n in enumerate(lengths)]
    batches = micro_batches(samples, token_weights(samples, reduction, 30), max_tokens=budget)
    assert sorted(i for batch in batches for i in batch.index) == list(range(len(samples)))
    assert sum(int(batch.token_mask.sum()) for batch in batches) == sum(lengths)
    assert sum(float(batch.token_weights.sum()) for batch in batches) == pytest.approx(1, abs=1e-5)
    assert all(
        batch.input_ids.numel() <= max(budget, batch.input_ids.shape[1]) for batch in batches
    )
