"""Divergences between the student's and the teacher's distribution over the vocabulary.

Each function returns one value per position. Axes: N positions, V vocabulary, K teacher tokens, C
tokens that two vocabularies have in common.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOG_OF_ZERO = -1e4
MIN_PROBABILITY = 1e-20  # of an outcome; its logarithm must be finite


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


class CommonTokens(NamedTuple):
    """One of two vocabularies: the tokens that the other one has, too, and all others."""

    ids: Tensor  # of the common tokens, [C], in the same order for both vocabularies
    other_ids: Tensor  # of all other tokens, [V - C]


class Vocabularies(NamedTuple):
    """The tokens that the vocabularies of student and teacher have in common."""

    student: CommonTokens
    teacher: CommonTokens


class SpanStart(NamedTuple):
    """One model's prediction at the start of N spans, and how the spans continue.

    Attributes:
        logits: At the first token of each span, after the division by the temperature, [N, V].
        first_ids: The first token of each span, [N].
        rest: The log-probability of the span's other tokens together, [N]; 0 without any.
        common: The tokens that both vocabularies have.
    """

    logits: Tensor
    first_ids: Tensor
    rest: Tensor
    common: CommonTokens


def span_divergence(student: SpanStart, teacher: SpanStart, kind: str, beta: float = 0.5) -> Tensor:
    """Returns the divergence [N] of two models with different vocabularies.

    The outcomes that are compared at the start of a span:

    - the text of the span: its probability is the product over its tokens;
    - each token that both vocabularies have, except the first ones of the span;
    - everything else, as one outcome.

    They exclude each other, so both distributions sum to 1. With equal vocabularies, all spans have
    one token, and the result is `divergence`.

    Args:
        student: The student's prediction.
        teacher: The teacher's prediction.
        kind: As in `divergence`.
        beta: As in `divergence`.

    Source: GOLD (Hugging Face, 2025) multiplies the probabilities of a span's tokens in the same
    way. It scales the complete distribution by them, so that it does not sum to 1, and compares
    tokens without a counterpart by rank (ULD 2402.12030).
    """
    is_student_first = student.common.ids == student.first_ids[:, None]  # [N, C]
    is_teacher_first = teacher.common.ids == teacher.first_ids[:, None]
    return _divergence(
        _outcomes(student, is_student_first, is_teacher_first),
        _outcomes(teacher, is_teacher_first, is_student_first),
        kind,
        beta,
    )


def _outcomes(model: SpanStart, is_first: Tensor, is_first_of_other: Tensor) -> Tensor:
    """Returns the log-probabilities [N, C + 2] of the outcomes of `span_divergence`.

    Args:
        model: The model's prediction.
        is_first: Whether a common token is the model's first token of the span, [N, C].
        is_first_of_other: The same for the other model.
    """
    logprobs = torch.log_softmax(model.logits.float(), -1)
    first = logprobs.gather(-1, model.first_ids[:, None])[:, 0]
    common = logprobs[:, model.common.ids]
    others = logprobs[:, model.common.other_ids].exp()
    is_first_id = model.common.other_ids == model.first_ids[:, None]
    # Everything else: tokens that only this vocabulary has, the first token of the other model, and
    # other continuations of the own first token.
    remaining = others.masked_fill(is_first_id, 0).sum(-1)
    remaining = remaining + (common.exp() * (is_first_of_other & ~is_first)).sum(-1)
    remaining = remaining - first.exp() * torch.expm1(model.rest)
    span = first + model.rest
    return torch.cat(
        [
            # exp(LOG_OF_ZERO) is 0 in both distributions, and so is its part of the divergence.
            common.masked_fill(is_first | is_first_of_other, LOG_OF_ZERO),
            span[:, None],
            remaining.clamp(min=MIN_PROBABILITY).log()[:, None],
        ],
        -1,
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
