"""Log-probabilities and entropies of given tokens, and their gradient with respect to the logits.

`token_logprobs` runs the PyTorch operations of this file on a CPU, and the Triton kernels of
grpo/learning/logprob_kernels.py on a GPU.

Axes: N rows (positions that predict a completion token), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class TokenValues(NamedTuple):
    """Values of N target tokens, float32."""

    logprobs: Tensor  # [N]
    entropies: Tensor  # [N], of the distribution over the vocabulary
    normalizers: Tensor  # [N], log of the softmax denominator: logsumexp(logits / temperature)


class TokenGrads(NamedTuple):
    """Gradients of the loss with respect to `TokenValues`."""

    logprobs: Tensor  # [N]
    entropies: Tensor | None  # [N]; None if the loss does not depend on the entropies


def token_logprobs(
    logits: Tensor, targets: Tensor, *, temperature: float, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Returns the log-probabilities of the targets and the entropies, both [N] float32.

    Args:
        logits: [N, V].
        targets: [N], token ids.
        temperature: divides the logits.
        entropy_gradient: whether the entropies carry a gradient.
    """
    logprobs_and_entropies: tuple[Tensor, Tensor]
    logprobs_and_entropies = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        logits, targets, temperature, entropy_gradient
    )
    return logprobs_and_entropies


class _TokenLogprobs(torch.autograd.Function):
    """The autograd function of `token_logprobs`. Its gradient has the logits' dtype.

    Plain autograd makes ten passes over the vocabulary. This function makes fewer. On a CPU, it
    makes them on blocks of rows that fit into the cache. That is four times as fast as passes over
    all rows, which take longer than the matrix product of the output head.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        if logits.is_cuda:
            values = _kernels().compute_values(logits, targets, temperature=temperature)
        else:
            values = compute_values(logits, targets, temperature=temperature)
        ctx.save_for_backward(logits, targets, *values)
        ctx.temperature = temperature
        ctx.entropy_gradient = entropy_gradient
        if not entropy_gradient:
            ctx.mark_non_differentiable(values.entropies)
        return values.logprobs, values.entropies

    @staticmethod
    def backward(
        ctx: Any, logprob_grads: Tensor, entropy_grads: Tensor
    ) -> tuple[Tensor, None, None, None]:
        logits, targets, *saved_values = ctx.saved_tensors
        values = TokenValues(*saved_values)
        grads = TokenGrads(logprob_grads, entropy_grads if ctx.entropy_gradient else None)
        arguments = (logits, targets, values, grads)
        if logits.is_cuda:
            logits_grad = _kernels().compute_gradient(*arguments, temperature=ctx.temperature)
        else:
            logits_grad = compute_gradient(*arguments, temperature=ctx.temperature)
        return logits_grad, None, None, None


def _kernels() -> Any:
    # Triton comes with PyTorch for CUDA only.
    from grpo.learning import logprob_kernels

    return logprob_kernels


def compute_values(logits: Tensor, targets: Tensor, *, temperature: float) -> TokenValues:
    """Returns the values of the targets under softmax(logits / temperature).

    Args:
        logits: [N, V].
        targets: [N], token ids.
        temperature: divides the logits.
    """
    num_rows = len(logits)
    logprobs = torch.empty(num_rows, device=logits.device)
    entropies = torch.empty(num_rows, device=logits.device)
    normalizers = torch.empty(num_rows, device=logits.device)
    for rows, scaled in _row_blocks(logits, temperature):
        max_logits = scaled.amax(-1, keepdim=True)
        target_logits = scaled.gather(-1, targets[rows, None])[:, 0]
        weights = torch.exp(scaled - max_logits)
        total_weights = weights.sum(-1)
        normalizers[rows] = max_logits[:, 0] + total_weights.log()
        logprobs[rows] = target_logits - normalizers[rows]
        mean_logits = torch.linalg.vecdot(weights, scaled) / total_weights
        entropies[rows] = normalizers[rows] - mean_logits
    return TokenValues(logprobs, entropies, normalizers)


def compute_gradient(
    logits: Tensor, targets: Tensor, values: TokenValues, grads: TokenGrads, *, temperature: float
) -> Tensor:
    """Returns the gradient of the loss with respect to the logits, [N, V], in their dtype.

    The chain rule is applied with

        d logprob / d logit = (onehot(target) - p) / temperature
        d entropy / d logit = -p (log p + entropy) / temperature

    Args:
        logits: [N, V].
        targets: [N], token ids.
        values: from `compute_values`.
        grads: gradients of the loss with respect to `values`.
        temperature: divides the logits.
    """
    logits_grad = torch.empty_like(logits)
    logprob_grads = grads.logprobs[:, None] / temperature
    for rows, scaled in _row_blocks(logits, temperature):
        factor = -logprob_grads[rows]
        log_probabilities = scaled.sub_(values.normalizers[rows, None])
        if grads.entropies is not None:
            factor = factor - grads.entropies[rows, None] / temperature * (
                log_probabilities + values.entropies[rows, None]
            )
        # In place: the block's log-probabilities become its gradient.
        block_grad = log_probabilities.exp_().mul_(factor)
        block_grad.scatter_add_(-1, targets[rows, None], logprob_grads[rows])
        logits_grad[rows] = block_grad.to(logits_grad.dtype)
    return logits_grad


def _row_blocks(logits: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """Yields `(rows, logits[rows] / temperature)` in float32.

    All blocks share one buffer: a block is valid until the next one, and can be changed in place.
    """
    num_rows, vocabulary = logits.shape
    block_rows = num_rows
    if logits.device.type == "cpu":
        block_rows = 2**20 // vocabulary  # 4 MiB, which fit into the cache
    block_rows = max(1, min(num_rows, block_rows))
    buffer = torch.empty(block_rows, vocabulary, device=logits.device)
    for start in range(0, num_rows, block_rows):
        rows = slice(start, min(start + block_rows, num_rows))
        block = buffer[: rows.stop - start].copy_(logits[rows])
        if temperature != 1:
            block.div_(temperature)
        yield rows, block
