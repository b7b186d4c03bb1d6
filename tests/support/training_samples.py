"""Training samples with random tokens, and a policy's outputs and gradients on them."""

import torch

from grpo.learning import packing
from grpo.learning.batch import micro_batches, to_device, token_weights
from grpo.learning.policy import HeadOptions, Policy
from grpo.types import Sample

# (ZeRO stage, dtype of the model)
STAGES_AND_DTYPES = [
    (0, "float32"),
    (1, "float32"),
    (2, "float32"),
    (3, "float32"),
    (1, "bfloat16"),
    (2, "bfloat16"),
    (3, "bfloat16"),
]


class TokenGenerator:
    """Draws random integers and token ids with a seeded `torch.Generator`."""

    def __init__(self, seed):
        """Seeds `generator`."""
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, low, high):
        """Returns an integer in [low, high)."""
        return int(torch.randint(low, high, (), generator=self.generator))

    def tokens(self, count):
        """Returns `count` token ids in [7, 200) as a tuple."""
        return tuple(torch.randint(7, 200, (count,), generator=self.generator).tolist())


def random_samples(seed=0, count=10):
    """Returns samples with prompts of 2 to 8 tokens and completions of 1 to 19 tokens.

    The prompts differ. The advantages are normally distributed.
    """
    draw = TokenGenerator(seed)
    result = []
    for _ in range(count):
        prompt_length = draw.integer(2, 9)
        completion_length = draw.integer(1, 20)
        token_ids = draw.tokens(prompt_length + completion_length)
        advantage = float(torch.randn((), generator=draw.generator))
        result.append(
            Sample(
                token_ids=token_ids,
                prompt_length=prompt_length,
                advantages=(advantage,) * completion_length,
                sampler_logprobs=(-5.0,) * completion_length,
            )
        )
    return result


def padded_batches(samples, max_tokens):
    """Returns the samples as padded micro-batches of at most `max_tokens` tokens each."""
    return micro_batches(samples, token_weights(samples, "sequence", 20), max_tokens=max_tokens)


def grouped_samples(seed=0):
    """Returns the samples of four groups. The samples of a group have the same prompt.

    Prompts have 1 to 20 tokens. A group has 1 to 4 completions of 1 to 12 tokens with the
    advantages -1, 0, 1 and 2.
    """
    draw = TokenGenerator(seed)
    result = []
    for _ in range(4):
        prompt = draw.tokens(draw.integer(1, 21))
        for i in range(draw.integer(1, 5)):
            completion = draw.tokens(draw.integer(1, 13))
            result.append(
                Sample(
                    token_ids=prompt + completion,
                    prompt_length=len(prompt),
                    advantages=(i - 1.0,) * len(completion),
                )
            )
    return result


def values_and_gradients(model, samples, max_tokens, device="cpu"):
    """Returns a policy's outputs on samples, and the gradient of advantage x logprob.

    Args:
        model: The policy's model, padded or packed.
        samples: Samples with advantages.
        max_tokens: Maximum number of tokens per micro-batch.
        device: The device of the model.

    Returns:
        A tuple `(values, gradients)`. `values` [2, L] contains the logprobs and the entropies of
        the completion tokens, in the order of the samples. `gradients` contains a tensor per
        parameter name.
    """
    packed = model.config._attn_implementation == packing.PACKED_ATTENTION
    policy = Policy(model, HeadOptions(temperature=0.7, chunk_tokens=5))
    values_of_samples = {}  # index of a sample -> [2, completion length]
    for batch in micro_batches(samples, [1.0] * len(samples), max_tokens=max_tokens, packed=packed):
        batch = to_device(batch, torch.device(device))
        output = policy(batch)
        (output.logprobs * batch.advantages).sum().backward()
        for row, index in enumerate(batch.sample_indices):
            mask = batch.token_mask[row]
            values_of_samples[index] = torch.stack(
                [output.logprobs[row][mask], output.entropies[row][mask]]
            )
    values = torch.cat([values_of_samples[i] for i in range(len(samples))], dim=1)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return values, gradients
