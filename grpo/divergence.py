"""Divergences between a teacher's and a student's distribution over the vocabulary, position by position. Logits [N, V] in, [N] out."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def divergence(student: Tensor, teacher: Tensor, kind: str, temperature: float, beta: float = 0.5) -> Tensor:
    """Returns, in float32 and at a temperature T:

    forward_kl KL(t || s)   reverse_kl KL(s || t)   jsd beta KL(t || m) + (1 - beta) KL(s || m), m = beta t + (1 - beta) s
    Source: Hinton 1503.02531 (forward; the caller multiplies by T^2); GKD 2306.13649 Eq. 1 (jsd). Of two vocabularies that are padded to
    different sizes (Qwen2.5) the common part counts.
    """
    size = min(student.shape[-1], teacher.shape[-1])
    s, t = (torch.log_softmax(logits[:, :size].float() / temperature, -1) for logits in (student, teacher))
    if kind == "forward_kl":
        return _kl(t, s)
    if kind == "reverse_kl":
        return _kl(s, t)
    assert kind == "jsd" and 0 < beta < 1, f"got {kind}, beta {beta}"
    m = torch.logaddexp(t + math.log(beta), s + math.log(1 - beta))
    return beta * _kl(t, m) + (1 - beta) * _kl(s, m)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)
