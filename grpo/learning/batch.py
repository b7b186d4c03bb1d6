"""Samples become padded micro-batches.

The reduction of the loss is decided here, once an update, as a weight for each token.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from grpo.types import Batch, Sample


def minibatches(samples: list[Sample], count: int, seed: int) -> list[list[Sample]]:
    """Returns the samples in `count` random parts of about equal size; one part keeps the order."""
    if count == 1:
        return [samples]
    order = random.Random(seed).sample(samples, len(samples))
    return [part for i in range(count) if (part := order[i::count])]


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """Returns the mini-batches of an epoch: the first in their order, later ones shuffled."""
    return random.Random(seed + epoch).sample(range(count), count) if epoch else list(range(count))


def token_weights(samples: Sequence[Sample], reduction: str, max_tokens: int) -> list[float]:
    """Returns, for each completion of a whole update, the weight of each of its tokens.

    The loss is `(weights * per_token).sum()`.

    Over N completions of lengths |o_i| in P groups: sequence `1 / (N |o_i|)` (DeepSeekMath
    2402.03300 Eq. 3), token `1 / sum |o_i|` (DAPO 2503.14476 Eq. 8), constant `1 / (N max_tokens)`
    (Dr.GRPO 2503.20783), prompt `1 / (P sum of the group's |o_i|)` (ScaleRL 2510.13786).
    Micro-batches cannot change them.
    """
    lengths = [sample.completion_length for sample in samples]
    n, total = len(lengths), sum(lengths)
    if reduction == "prompt":
        tokens: dict[int, int] = {}
        for sample, length in zip(samples, lengths, strict=True):
            tokens[sample.group] = tokens.get(sample.group, 0) + length
        return [1 / (len(tokens) * tokens[sample.group]) for sample in samples]
    return [
        {"sequence": 1 / (n * length), "token": 1 / total, "constant": 1 / (n * max_tokens)}[
            reduction
        ]
        for length in lengths
    ]


def micro_batches(
    samples: Sequence[Sample],
    weights: Sequence[float],
    *,
    max_tokens: int,
    packed: bool = False,
    pad_id: int = 0,
    share: tuple[int, int] = (0, 1),
) -> list[Batch]:
    """Returns micro-batches of at most `max_tokens` tokens.

    They are padded, with samples sorted by length so that few tokens are padding. For a packed
    stream (grpo/learning/packing.py) a prompt's samples are side by side, and its tokens are
    counted once.

    `share` (rank, ranks): only this rank's part of them, the long ones dealt out evenly; every rank
    gets as many, so that all meet in each exchange: the last may be `idle`, of weight 0.
    """
    rank, ranks = share
    parts = _partition(samples, max_tokens, packed)
    if ranks > 1:
        parts.sort(key=lambda part: -part[1])
    rounds = -(-len(parts) // ranks)
    own = [n * ranks + (rank if n % 2 == 0 else ranks - 1 - rank) for n in range(rounds)]
    made = [_collate(parts[i][0], samples, weights, pad_id) for i in own if i < len(parts)]
    if len(made) < rounds:
        made.append(
            replace(_collate(parts[-1][0], samples, [0.0] * len(samples), pad_id), idle=True)
        )
    tokens = [sum(samples[i].completion_length for i in part) for part, _ in parts]
    return [
        replace(batch, most=max(tokens[n * ranks : (n + 1) * ranks]))
        for n, batch in enumerate(made)
    ]


def _partition(
    samples: Sequence[Sample], max_tokens: int, packed: bool
) -> list[tuple[list[int], int]]:
    """Returns the micro-batches as places of samples, with their tokens."""
    longest: dict[tuple[int, ...], int] = {}
    prompts = [sample.token_ids[: sample.prompt_length] if packed else () for sample in samples]
    for prompt, sample in zip(prompts, samples, strict=True):
        longest[prompt] = max(longest.get(prompt, 0), sample.completion_length)
    order = sorted(
        range(len(samples)),
        key=lambda i: (-longest[prompts[i]], prompts[i], -len(samples[i].token_ids)),
    )
    parts, rows, cost = list[tuple[list[int], int]](), list[int](), 0
    for i in order:
        if packed:
            shared = bool(rows) and prompts[rows[-1]] == prompts[i]
            after = (
                cost + samples[i].completion_length + (0 if shared else samples[i].prompt_length)
            )
        else:
            after = (len(rows) + 1) * len(samples[rows[0] if rows else i].token_ids)
        if rows and after > max_tokens:
            parts.append((rows, cost))
            rows, after = [], len(samples[i].token_ids)
        rows.append(i)
        cost = after
    return [*parts, (rows, cost)] if rows else parts


def _collate(
    rows: Sequence[int], samples: Sequence[Sample], weights: Sequence[float], pad_id: int
) -> Batch:
    """Pads on the right.

    Masks come from lengths, never from token values (an EOS that is also the padding is still
    trained).
    """
    length = max(len(samples[i].token_ids) for i in rows)
    ids, labels = torch.full((len(rows), length), pad_id), torch.full((len(rows), length), pad_id)
    attention, mask = (
        torch.zeros(len(rows), length, dtype=torch.long),
        torch.zeros(len(rows), length, dtype=torch.bool),
    )
    weight, advantage, sampler = (torch.zeros(len(rows), length) for _ in range(3))
    versions = torch.full((len(rows), length), -1)
    for row, i in enumerate(rows):
        sample = samples[i]
        end = len(sample.token_ids)
        # the positions that predict the completion
        completion = slice(sample.prompt_length - 1, end - 1)
        ids[row, :end] = torch.tensor(sample.token_ids)
        labels[row, : end - 1] = ids[row, 1:end]
        attention[row, :end] = 1
        mask[row, completion] = True
        weight[row, completion] = weights[i]
        advantage[row, completion] = torch.tensor(sample.advantages)
        if sample.sampler_logprobs is not None:
            sampler[row, completion] = torch.tensor(sample.sampler_logprobs)
        if sample.versions is not None:
            versions[row, completion] = torch.tensor(sample.versions)
    return Batch(
        index=tuple(rows),
        sequences=tuple(samples[i].token_ids for i in rows),
        prompt_lengths=tuple(samples[i].prompt_length for i in rows),
        input_ids=ids,
        attention_mask=attention,
        labels=labels,
        token_mask=mask,
        token_weights=weight,
        advantages=advantage,
        sampler_logprobs=sampler,
        versions=versions,
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Returns the batch with its tensors on a device."""
    held = {f.name: getattr(batch, f.name) for f in fields(batch)}
    moved: dict[str, Any] = {
        name: value.to(device) for name, value in held.items() if isinstance(value, Tensor)
    }
    if batch.teacher_top is not None:
        moved["teacher_top"] = tuple(part.to(device) for part in batch.teacher_top)
    return replace(batch, **moved)
