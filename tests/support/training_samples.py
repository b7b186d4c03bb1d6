"""Trainable samples with random tokens, and what a learner computes of them."""

import torch

from grpo.learning import packing
from grpo.learning.batch import micro_batches, to_device, token_weights
from grpo.learning.policy import HeadOptions, Policy
from grpo.types import Sample

COMBINATIONS = [
    (0, "float32"),
    (1, "float32"),
    (2, "float32"),
    (3, "float32"),
    (1, "bfloat16"),
    (2, "bfloat16"),
    (3, "bfloat16"),
]


def samples(seed=0, count=10):
    generator = torch.Generator().manual_seed(seed)

    def integer(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    rows = []
    for _ in range(count):
        prompt, completion = integer(2, 9), integer(1, 20)
        ids = torch.randint(7, 200, (prompt + completion,), generator=generator).tolist()
        advantage = float(torch.randn((), generator=generator))
        rows.append(
            Sample(
                token_ids=tuple(ids),
                prompt_length=prompt,
                advantages=(advantage,) * completion,
                sampler_logprobs=(-5.0,) * completion,
            )
        )
    return rows


def batches(rows, budget):
    return micro_batches(rows, token_weights(rows, "sequence", 20), max_tokens=budget)


def groups(seed=0):
    """Four prompts of 1 to 20 tokens, each with 1 to 4 completions of 1 to 12."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    def tokens(count):
        return tuple(torch.randint(7, 200, (count,), generator=generator).tolist())

    samples = []
    for _ in range(4):
        prompt = tokens(integer(1, 21))
        for i in range(integer(1, 5)):
            completion = tokens(integer(1, 13))
            samples.append(
                Sample(
                    token_ids=prompt + completion,
                    prompt_length=len(prompt),
                    advantages=(i - 1.0,) * len(completion),
                )
            )
    return samples


def scored(model, samples, max_tokens, device="cpu"):
    """Logprobs and entropies of every completion token in the samples' order, and the gradient of
    advantage x logprob.
    """
    packed = model.config._attn_implementation == packing.PACKED_ATTENTION
    policy = Policy(model, HeadOptions(temperature=0.7, chunk_tokens=5))
    found = {}
    for batch in micro_batches(samples, [1.0] * len(samples), max_tokens=max_tokens, packed=packed):
        batch = to_device(batch, torch.device(device))
        logprobs, entropies, *_ = policy(batch)
        (logprobs * batch.advantages).sum().backward()
        for row, i in enumerate(batch.index):
            mask = batch.token_mask[row]
            found[i] = torch.stack([logprobs[row][mask], entropies[row][mask]])
    values = torch.cat([found[i] for i in range(len(samples))], dim=1)
    return values, {name: parameter.grad for name, parameter in model.named_parameters()}
