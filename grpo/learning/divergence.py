"""Divergences between the student's and the teacher's distribution over the vocabulary.

Each function returns one value per position. Axes: N positions, V vocabulary, K teacher tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def divergence(
    student: Tensor, teacher: Tensor, kind: str, temperature: float, beta: float = 0.5
) -> Tensor:
    """Returns the divergence [N] of the two distributions at a temperature, in float32.

    If the vocabularies are padded to different sizes (as in Qwen2.5), only the common part counts.

    Args:
        student: The student's logits [N, V].
        teacher: The teacher's logits [N, V].
        kind: With s for the student's and t for the teacher's distribution:

            - `forward_kl`: KL(t || s)
            - `reverse_kl`: KL(s || t)
            - `jsd`: beta KL(t || m) + (1 - beta) KL(s || m), with m = beta t + (1 - beta) s
        temperature: Divides both sets of logits.
        beta: The weight of the teacher in `jsd`, between 0 and 1.

    Source:
        forward_kl: Hinton 1503.02531 (the caller multiplies by the squared temperature).
        jsd: GKD 2306.13649 Eq. 1.
    """
    vocabulary = min(student.shape[-1], teacher.shape[-1])
    student_logprobs = torch.log_softmax(student[:, :vocabulary].float() / temperature, -1)
    teacher_logprobs = torch.log_softmax(teacher[:, :vocabulary].float() / temperature, -1)
    return _divergence(student_logprobs, teacher_logprobs, kind, beta)


def top_divergence(
    student: Tensor, ids: Tensor, logprobs: Tensor, kind: str, beta: float = 0.5
) -> Tensor:
    """Returns the divergence [N] at temperature 1, from the teacher's K most likely tokens only.

    All other tokens count as one additional token. The result is at most the divergence over the
    full vocabulary, and it does not have the bias of a truncated distribution (2503.16870).

    Args:
        student: The student's logits [N, V].
        ids: The teacher's K most likely tokens [N, K].
        logprobs: The teacher's log-probabilities of these tokens [N, K].
        kind: As in `divergence`.
        beta: As in `divergence`.
    """
    student_logprobs = torch.log_softmax(student.float(), -1).gather(-1, ids)
    return _divergence(
        _with_remaining_tokens(student_logprobs),
        _with_remaining_tokens(logprobs.float()),
        kind,
        beta,
    )


def _with_remaining_tokens(logprobs: Tensor) -> Tensor:
    """Returns log-probabilities [N, K + 1]: the K given ones, and that of all remaining tokens."""
    top_mass = torch.logsumexp(logprobs, -1, keepdim=True)
    # A mass of exactly 1 would leave log 0 for the remaining tokens.
    remaining = (-torch.expm1(top_mass.clamp(max=-1e-7))).log()
    return torch.cat([logprobs, remaining], -1)


def _divergence(s: Tensor, t: Tensor, kind: str, beta: float) -> Tensor:
    """Returns the divergence [N] of log-probabilities [N, V]: s student, t teacher."""
    if kind == "forward_kl":
        return _kl(t, s)
    if kind == "reverse_kl":
        return _kl(s, t)
    assert kind == "jsd" and 0 < beta < 1, f"got {kind}, beta {beta}"
    m = torch.logaddexp(t + math.log(beta), s + math.log(1 - beta))
    return beta * _kl(t, m) + (1 - beta) * _kl(s, m)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Returns KL(p || q) [N] of two sets of log-probabilities [N, V]."""
    return (p.exp() * (p - q)).sum(-1)
