"""Log-probabilities and entropies of given tokens on a GPU.

The Triton kernels read a logit once for the values and once for the gradient, and write nothing of
the vocabulary's size but the gradient. The same in PyTorch's own operations
(grpo/learning/policy.py) takes eight passes over float32 copies. Computed in float32, whatever the
logits' dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits of one row that a program reads at a time
LOWEST = -1e30  # in place of logits past the end of a row: exp() of it is 0, and it times 0 is 0


def values(logits: Tensor, targets: Tensor, *, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns three float32 tensors [N] for logits [N, V] divided by the temperature.

    They are the log-probabilities of `targets` [N], the entropies, and the logarithms of the
    softmax's denominators.
    """
    logprobs, entropies, normalisers = (
        torch.empty(len(logits), device=logits.device) for _ in range(3)
    )
    if len(logits):
        _values[(len(logits),)](
            logits,
            targets,
            logprobs,
            entropies,
            normalisers,
            logits.stride(0),
            logits.shape[1],
            temperature,
            LOWEST,
            BLOCK,
            num_warps=8,
        )
    return logprobs, entropies, normalisers


def gradient(
    logits: Tensor,
    targets: Tensor,
    normalisers: Tensor,
    entropies: Tensor,
    grad: Tensor,
    entropy_grad: Tensor | None,
    *,
    temperature: float,
) -> Tensor:
    """Returns the gradient [N, V] with respect to the logits, in their dtype.

    It is the gradient of sum(grad x logprobs) + sum(entropy_grad x entropies).

    d logprob / d logit = (onehot - p) / temperature, d entropy / d logit = -p (log p + entropy) /
    temperature.
    """
    out = torch.empty_like(logits)
    if len(logits):
        grid = (len(logits), triton.cdiv(logits.shape[1], BLOCK))
        with_entropy = entropy_grad is not None
        entropy_grads = grad if entropy_grad is None else entropy_grad  # not read without
        _gradient[grid](
            logits,
            targets,
            normalisers,
            entropies,
            grad.contiguous(),
            entropy_grads.contiguous(),
            out,
            logits.stride(0),
            out.stride(0),
            logits.shape[1],
            temperature,
            with_entropy,
            BLOCK,
            num_warps=8,
        )
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _values(  # type: ignore[no-untyped-def]
    logits,
    targets,
    logprobs,
    entropies,
    normalisers,
    stride,
    vocabulary,
    temperature,
    lowest,
    block: tl.constexpr,
):
    """One program per row.

    The maximum is not known before the row's end: sums are scaled down whenever it rises (online
    softmax).
    """
    row = tl.program_id(0).to(tl.int64)
    first = logits + row * stride
    highest = lowest
    total = 0.0  # sum of exp(logit - highest)
    weighted = 0.0  # sum of exp(logit - highest) x logit
    for start in range(0, vocabulary, block):
        places = start + tl.arange(0, block)
        scaled = (
            tl.load(first + places, mask=places < vocabulary, other=lowest).to(tl.float32)
            / temperature
        )
        rising = tl.maximum(highest, tl.max(scaled, 0))
        weights = tl.exp(scaled - rising)
        shrunk = tl.exp(highest - rising)
        total = total * shrunk + tl.sum(weights, 0)
        weighted = weighted * shrunk + tl.sum(weights * scaled, 0)
        highest = rising
    normaliser = highest + tl.log(total)
    target = tl.load(first + tl.load(targets + row)).to(tl.float32) / temperature
    tl.store(normalisers + row, normaliser)
    tl.store(logprobs + row, target - normaliser)
    tl.store(entropies + row, normaliser - weighted / total)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient(  # type: ignore[no-untyped-def]
    logits,
    targets,
    normalisers,
    entropies,
    grads,
    entropy_grads,
    out,
    stride,
    out_stride,
    vocabulary,
    temperature,
    with_entropy: tl.constexpr,
    block: tl.constexpr,
):
    """One program per row and block of the vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * block + tl.arange(0, block)
    inside = places < vocabulary
    grad = tl.load(grads + row) / temperature
    scaled = (
        tl.load(logits + row * stride + places, mask=inside, other=0.0).to(tl.float32) / temperature
    )
    log_probabilities = scaled - tl.load(normalisers + row)
    factor = -grad
    if with_entropy:
        factor = -grad - tl.load(entropy_grads + row) / temperature * (
            log_probabilities + tl.load(entropies + row)
        )
    result = tl.exp(log_probabilities) * factor
    result = tl.where(places == tl.load(targets + row), result + grad, result)
    tl.store(out + row * out_stride + places, result.to(out.dtype.element_ty), mask=inside)
