"""Divergences between a teacher's and a student's distribution over the vocabulary.

There is one value per position: [N].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def divergence(
    student: Tensor, teacher: Tensor, kind: str, temperature: float, beta: float = 0.5
) -> Tensor:
    """Returns the divergence at each position, in float32 and at a temperature T.

    forward_kl  KL(t || s)
    reverse_kl  KL(s || t)
    jsd         beta KL(t || m) + (1 - beta) KL(s || m), m = beta t + (1 - beta) s

    Of two vocabularies that are padded to different sizes (Qwen2.5) the common part counts.
    Source: Hinton 1503.02531 (forward; the caller multiplies by T^2); GKD 2306.13649 Eq. 1 (jsd).
    """
    size = min(student.shape[-1], teacher.shape[-1])
    s, t = (
        torch.log_softmax(logits[:, :size].float() / temperature, -1)
        for logits in (student, teacher)
    )
    return between(s, t, kind, beta)


def top_divergence(
    student: Tensor, ids: Tensor, logprobs: Tensor, kind: str, beta: float = 0.5
) -> Tensor:
    """Returns the divergence [N] at temperature 1 from the k likeliest tokens of the teacher alone.

    `ids` and `logprobs` are these tokens [N, k]. All other tokens count as one more token. The
    result is never more than the whole divergence, and it is without the bias of a distribution
    that is cut off (2503.16870). `student` [N, V]: logits.
    """
    s = torch.log_softmax(student.float(), -1)
    return between(_with_rest(s.gather(-1, ids)), _with_rest(logprobs.float()), kind, beta)


def _with_rest(top: Tensor) -> Tensor:
    """Returns log-probabilities [N, k + 1], the last one of all that is left."""
    rest = (-torch.expm1(torch.logsumexp(top, -1, keepdim=True).clamp(max=-1e-7))).log()
    return torch.cat([top, rest], -1)


def between(s: Tensor, t: Tensor, kind: str, beta: float) -> Tensor:
    """Returns the divergence of log-probabilities [N, V] of student and teacher."""
    if kind == "forward_kl":
        return _kl(t, s)
    if kind == "reverse_kl":
        return _kl(s, t)
    assert kind == "jsd" and 0 < beta < 1, f"got {kind}, beta {beta}"
    m = torch.logaddexp(t + math.log(beta), s + math.log(1 - beta))
    return beta * _kl(t, m) + (1 - beta) * _kl(s, m)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)
