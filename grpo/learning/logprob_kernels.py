"""Triton kernels for the log-probabilities and entropies of given tokens, and for their gradient.

The forward pass and the backward pass each read every logit once. The gradient is the only result
of the size of the vocabulary. The equivalent PyTorch operations (grpo/learning/token_logprobs.py)
read float32 copies of the logits eight times. The kernels compute in float32, whatever the dtype of
the logits.

Axes: N rows (positions that predict a completion token), V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.learning.token_logprobs import TokenGrads, TokenValues

BLOCK = 4096  # logits of one row that a program loads at a time
# Replaces the logits past the end of a row. It is finite: exp(LOWEST - max) is 0, and 0 * LOWEST is
# 0, where 0 * -inf would be NaN.
LOWEST = -1e30


def compute_values(logits: Tensor, targets: Tensor, *, temperature: float) -> TokenValues:
    """Returns log-probabilities and entropies under softmax(logits / temperature).

    Args:
        logits: [N, V].
        targets: [N], token ids.
        temperature: divides the logits.
    """
    num_rows, vocab_size = logits.shape
    logprobs = torch.empty(num_rows, device=logits.device)
    entropies = torch.empty(num_rows, device=logits.device)
    normalizers = torch.empty(num_rows, device=logits.device)
    if num_rows > 0:
        _values[(num_rows,)](
            logits,
            targets,
            logprobs,
            entropies,
            normalizers,
            logits.stride(0),
            vocab_size,
            temperature,
            LOWEST,
            BLOCK,
            num_warps=8,
        )
    return TokenValues(logprobs, entropies, normalizers)


def compute_gradient(
    logits: Tensor, targets: Tensor, values: TokenValues, grads: TokenGrads, *, temperature: float
) -> Tensor:
    """Returns the gradient of the loss with respect to the logits, [N, V], in their dtype.

    Its formulas are given in grpo/learning/token_logprobs.py.

    Args:
        logits: [N, V].
        targets: [N], token ids.
        values: from `compute_values`.
        grads: gradients of the loss with respect to `values`.
        temperature: divides the logits.
    """
    logits_grad = torch.empty_like(logits)
    num_rows, vocab_size = logits.shape
    if num_rows == 0:
        return logits_grad
    entropy_grads = grads.entropies
    with_entropy = entropy_grads is not None
    if entropy_grads is None:
        entropy_grads = grads.logprobs  # any pointer: the kernel does not read it
    _gradient[(num_rows, triton.cdiv(vocab_size, BLOCK))](
        logits,
        targets,
        values.normalizers,
        values.entropies,
        grads.logprobs.contiguous(),
        entropy_grads.contiguous(),
        logits_grad,
        logits.stride(0),
        logits_grad.stride(0),
        vocab_size,
        temperature,
        with_entropy,
        BLOCK,
        num_warps=8,
    )
    return logits_grad


# A Triton kernel takes every pointer and every size as a separate parameter.
@triton.jit  # type: ignore[untyped-decorator]
def _values(  # type: ignore[no-untyped-def] # noqa: PLR0913
    logits,
    targets,
    logprobs,
    entropies,
    normalizers,
    row_stride,
    vocab_size,
    temperature,
    lowest,
    block: tl.constexpr,
):
    """Computes one row per program.

    The logits are read once, block by block. When a block raises the maximum, the sums so far are
    scaled down (online softmax).
    """
    row = tl.program_id(0).to(tl.int64)
    row_start = logits + row * row_stride
    max_logit = lowest
    weight_sum = 0.0  # sum of exp(logit - max_logit)
    weighted_sum = 0.0  # sum of exp(logit - max_logit) * logit
    for start in range(0, vocab_size, block):
        token_ids = start + tl.arange(0, block)
        inside = token_ids < vocab_size
        block_logits = tl.load(row_start + token_ids, mask=inside, other=lowest)
        scaled = block_logits.to(tl.float32) / temperature
        new_max = tl.maximum(max_logit, tl.max(scaled, 0))
        weights = tl.exp(scaled - new_max)
        correction = tl.exp(max_logit - new_max)
        weight_sum = weight_sum * correction + tl.sum(weights, 0)
        weighted_sum = weighted_sum * correction + tl.sum(weights * scaled, 0)
        max_logit = new_max
    normalizer = max_logit + tl.log(weight_sum)
    target_logit = tl.load(row_start + tl.load(targets + row)).to(tl.float32) / temperature
    tl.store(normalizers + row, normalizer)
    tl.store(logprobs + row, target_logit - normalizer)
    tl.store(entropies + row, normalizer - weighted_sum / weight_sum)


# A Triton kernel takes every pointer and every size as a separate parameter.
@triton.jit  # type: ignore[untyped-decorator]
def _gradient(  # type: ignore[no-untyped-def] # noqa: PLR0913
    logits,
    targets,
    normalizers,
    entropies,
    logprob_grads,
    entropy_grads,
    logits_grad,
    row_stride,
    grad_row_stride,
    vocab_size,
    temperature,
    with_entropy: tl.constexpr,
    block: tl.constexpr,
):
    """Computes one row and one block of the vocabulary per program."""
    row = tl.program_id(0).to(tl.int64)
    token_ids = tl.program_id(1) * block + tl.arange(0, block)
    inside = token_ids < vocab_size
    logprob_grad = tl.load(logprob_grads + row) / temperature
    block_logits = tl.load(logits + row * row_stride + token_ids, mask=inside, other=0.0)
    scaled = block_logits.to(tl.float32) / temperature
    log_probabilities = scaled - tl.load(normalizers + row)
    factor = -logprob_grad
    if with_entropy:
        factor = -logprob_grad - tl.load(entropy_grads + row) / temperature * (
            log_probabilities + tl.load(entropies + row)
        )
    result = tl.exp(log_probabilities) * factor
    is_target = token_ids == tl.load(targets + row)
    result = tl.where(is_target, result + logprob_grad, result)
    pointers = logits_grad + row * grad_row_stride + token_ids
    tl.store(pointers, result.to(logits_grad.dtype.element_ty), mask=inside)
