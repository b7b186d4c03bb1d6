"""Mini-batches, token weights and padded micro-batches, made from samples.

The reduction of the loss is a weight per token. The weights are computed once per update, over all
its samples, so the gradient does not depend on the split into micro-batches.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from grpo.types import Batch, Sample, SpanIndex

# Fills `input_ids` and `labels` after the end of a sequence. Any token id would do: the masks come
# from lengths, never from token ids, so an EOS token with this id is trained like any other token.
PADDING_ID = 0


def mini_batches(samples: list[Sample], num_minibatches: int, seed: int) -> list[list[Sample]]:
    """Returns the samples in random parts of about equal size, one per optimizer update.

    A single part keeps the order of the samples. With fewer samples than `num_minibatches` there is
    one part per sample.
    """
    if num_minibatches == 1:
        return [samples]
    shuffled = random.Random(seed).sample(samples, len(samples))
    parts = [shuffled[i::num_minibatches] for i in range(num_minibatches)]
    return [part for part in parts if part]


def mini_batch_order(num_minibatches: int, seed: int, epoch: int) -> list[int]:
    """Returns the order of the mini-batches in an epoch: `0, 1, ...` in the first, then random."""
    if epoch == 0:
        return list(range(num_minibatches))
    return random.Random(seed + epoch).sample(range(num_minibatches), num_minibatches)


def token_weights(samples: Sequence[Sample], reduction: str, max_tokens: int) -> list[float]:
    """Returns the weight of each token of a completion, one number per sample.

    The loss of the update is `(weights * per_token_loss).sum()`. For N completions of lengths |o_i|
    in P groups, the weight of a token of completion i is:

    sequence  1 / (N |o_i|)                      DeepSeekMath 2402.03300 Eq. 3
    token     1 / sum_j |o_j|                    DAPO 2503.14476 Eq. 8
    constant  1 / (N max_tokens)                 Dr.GRPO 2503.20783
    prompt    1 / (P sum_{j in group} |o_j|)     ScaleRL 2510.13786

    Args:
        samples: all samples of the update, on all ranks.
        reduction: `sequence`, `token`, `constant` or `prompt`.
        max_tokens: `sampling.max_tokens`, used by `constant`.

    Raises:
        ValueError: `reduction` is unknown.
    """
    lengths = [sample.completion_length for sample in samples]
    num_samples = len(samples)
    if reduction == "sequence":
        return [1 / (num_samples * length) for length in lengths]
    if reduction == "token":
        num_tokens = sum(lengths)
        return [1 / num_tokens for _ in samples]
    if reduction == "constant":
        return [1 / (num_samples * max_tokens) for _ in samples]
    if reduction == "prompt":
        group_tokens: dict[int, int] = {}
        for sample, length in zip(samples, lengths, strict=True):
            group_tokens[sample.group] = group_tokens.get(sample.group, 0) + length
        num_groups = len(group_tokens)
        return [1 / (num_groups * group_tokens[sample.group]) for sample in samples]
    raise ValueError(
        f"algorithm.reduction={reduction}: unknown. Available: sequence, token, constant, prompt."
    )


def micro_batches(
    samples: Sequence[Sample],
    weights: Sequence[float],
    *,
    max_tokens: int,
    packed: bool = False,
    share: tuple[int, int] = (0, 1),
) -> list[Batch]:
    """Returns this rank's micro-batches of at most `max_tokens` tokens.

    A sample that is longer than `max_tokens` gets a micro-batch of its own. The samples of a
    micro-batch have the same teacher.

    Args:
        samples: all samples of the update, the same on all ranks.
        weights: result of `token_weights` for these samples.
        max_tokens: upper limit of tokens per micro-batch, padding included.
        packed: whether the model reads a packed stream (grpo/learning/packing.py). Samples of one
            prompt are then placed next to each other, and the tokens of their prompt count once.
        share: `(rank, num_ranks)`. The micro-batches are distributed over the ranks so that all
            ranks have about the same number of tokens. All ranks get the same number of
            micro-batches, because every collective needs all ranks: a rank without work in the last
            round gets a copy of another rank's micro-batch with `is_filler` set and weights 0.
    """
    rank, num_ranks = share
    # The longer text of a teacher counts, because its batch has the same rows.
    longest = [_longer_text(sample) for sample in samples]
    parts: list[MicroBatchRows] = []
    for teacher in sorted({sample.teacher for sample in samples}):
        indices = [i for i, sample in enumerate(samples) if sample.teacher == teacher]
        parts += _split([longest[i] for i in indices], indices, max_tokens, packed=packed)
    if num_ranks > 1:
        # The ranks work in rounds. Sorted, the micro-batches of a round have about the same size.
        parts.sort(key=attrgetter("num_tokens"), reverse=True)
    batches = []
    for round_index in range(math.ceil(len(parts) / num_ranks)):
        parts_of_round = parts[round_index * num_ranks : (round_index + 1) * num_ranks]
        # The order of the ranks alternates. Otherwise rank 0 would get the longest of each round.
        position = rank if round_index % 2 == 0 else num_ranks - 1 - rank
        if position < len(parts_of_round):
            batch = _collate(parts_of_round[position].indices, samples, weights)
        else:
            zero_weights = [0.0] * len(samples)
            batch = replace(_collate(parts[-1].indices, samples, zero_weights), is_filler=True)
        max_rank_tokens = max(
            sum(samples[i].completion_length for i in part.indices) for part in parts_of_round
        )
        batches.append(replace(batch, max_rank_tokens=max_rank_tokens))
    return batches


def _longer_text(sample: Sample) -> Sample:
    """Returns the sample as the policy or as the teacher reads it, whichever is longer."""
    return max(sample, _as_teacher_reads(sample), key=lambda each: len(each.token_ids))


@dataclass(slots=True)
class MicroBatchRows:
    """The sequences of one micro-batch."""

    indices: list[int]  # of the sequences
    num_tokens: int  # compared with `max_tokens`; includes padding


def _split(
    samples: Sequence[Sample], indices: Sequence[int], max_tokens: int, *, packed: bool
) -> list[MicroBatchRows]:
    """Splits samples into micro-batches. `indices` has the number of each sample in the update."""
    if packed:
        parts = _split_packed(samples, max_tokens)
    else:
        parts = split_padded([len(sample.token_ids) for sample in samples], max_tokens)
    for part in parts:
        part.indices = [indices[i] for i in part.indices]
    return parts


def split_padded(lengths: Sequence[int], max_tokens: int) -> list[MicroBatchRows]:
    """Splits sequences, longest first, into padded micro-batches with few tokens of padding.

    A sequence that is longer than `max_tokens` gets a micro-batch of its own.

    Args:
        lengths: the sequences' lengths in tokens.
        max_tokens: upper limit of tokens per micro-batch, padding included.
    """
    parts: list[MicroBatchRows] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if parts:
            part = parts[-1]
            longest = lengths[part.indices[0]]
            num_tokens = (len(part.indices) + 1) * longest
            if num_tokens <= max_tokens:
                part.indices.append(i)
                part.num_tokens = num_tokens
                continue
        parts.append(MicroBatchRows(indices=[i], num_tokens=lengths[i]))
    return parts


def _split_packed(samples: Sequence[Sample], max_tokens: int) -> list[MicroBatchRows]:
    """Splits the samples prompt by prompt; the tokens of a prompt count once per part."""
    prompts = [sample.token_ids[: sample.prompt_length] for sample in samples]
    parts: list[MicroBatchRows] = []
    for i in _by_prompt(samples, prompts):
        sample = samples[i]
        if parts:
            part = parts[-1]
            num_tokens = part.num_tokens + sample.completion_length
            if prompts[part.indices[-1]] != prompts[i]:
                num_tokens += sample.prompt_length
            if num_tokens <= max_tokens:
                part.indices.append(i)
                part.num_tokens = num_tokens
                continue
        parts.append(MicroBatchRows(indices=[i], num_tokens=len(sample.token_ids)))
    return parts


def _by_prompt(samples: Sequence[Sample], prompts: Sequence[tuple[int, ...]]) -> list[int]:
    """Returns the samples' indices, samples of one prompt next to each other.

    Prompts are sorted by their longest completion, and the samples of a prompt by their length,
    longest first.
    """
    max_lengths: dict[tuple[int, ...], int] = {}
    for prompt, sample in zip(prompts, samples, strict=True):
        max_lengths[prompt] = max(max_lengths.get(prompt, 0), sample.completion_length)

    def sort_key(i: int) -> tuple[int, tuple[int, ...], int]:
        prompt = prompts[i]
        return (-max_lengths[prompt], prompt, -len(samples[i].token_ids))

    return sorted(range(len(samples)), key=sort_key)


def _collate(indices: Sequence[int], samples: Sequence[Sample], weights: Sequence[float]) -> Batch:
    """Returns the samples at `indices` as one micro-batch, padded on the right."""
    rows = [samples[i] for i in indices]
    teacher_batch = None
    if any(sample.teacher_text is not None for sample in rows):
        teacher_rows = [_as_teacher_reads(sample) for sample in rows]
        row_weights = [weights[i] for i in indices]
        teacher_batch = _collate(range(len(rows)), teacher_rows, row_weights)
    shape = (len(rows), max(len(sample.token_ids) for sample in rows))
    input_ids = torch.full(shape, PADDING_ID)  # all tensors are [B, T]
    labels = torch.full(shape, PADDING_ID)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    token_mask = torch.zeros(shape, dtype=torch.bool)
    weights_BT = torch.zeros(shape)
    advantages_BT = torch.zeros(shape)
    sampler_logprobs = torch.zeros(shape)
    versions = torch.full(shape, -1)
    for row, (i, sample) in enumerate(zip(indices, rows, strict=True)):
        length = len(sample.token_ids)
        # Position t predicts token t + 1, so these positions predict the completion.
        completion = slice(sample.prompt_length - 1, length - 1)
        input_ids[row, :length] = torch.tensor(sample.token_ids)
        labels[row, : length - 1] = input_ids[row, 1:length]
        attention_mask[row, :length] = 1
        token_mask[row, completion] = True
        weights_BT[row, completion] = weights[i]
        advantages_BT[row, completion] = torch.tensor(sample.advantages)
        if sample.sampler_logprobs is not None:
            sampler_logprobs[row, completion] = torch.tensor(sample.sampler_logprobs)
        if sample.versions is not None:
            versions[row, completion] = torch.tensor(sample.versions)
    return Batch(
        sample_indices=tuple(indices),
        sequences=tuple(sample.token_ids for sample in rows),
        prompt_lengths=tuple(sample.prompt_length for sample in rows),
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,
        token_mask=token_mask,
        token_weights=weights_BT,
        advantages=advantages_BT,
        sampler_logprobs=sampler_logprobs,
        versions=versions,
        teacher_batch=teacher_batch,
        spans=_span_index(rows),
        teacher=rows[0].teacher,
    )


def _span_index(samples: Sequence[Sample]) -> SpanIndex | None:
    """Returns the spans of a micro-batch's rows; None if student and teacher share their tokens."""
    if any(sample.teacher_text is None or sample.teacher_text.spans is None for sample in samples):
        return None
    student, teacher = _SpanSide(), _SpanSide()
    for sample in samples:
        text = sample.teacher_text
        assert text is not None and text.spans is not None and text.completion_ids is not None
        student.add([end for end, _ in text.spans], sample.completion_length)
        teacher.add([end for _, end in text.spans], len(text.completion_ids))
    return SpanIndex(
        student_starts=torch.tensor(student.starts, dtype=torch.long),
        teacher_starts=torch.tensor(teacher.starts, dtype=torch.long),
        student_spans=torch.tensor(student.spans, dtype=torch.long),
        teacher_spans=torch.tensor(teacher.spans, dtype=torch.long),
    )


@dataclass(slots=True)
class _SpanSide:
    """The tokens of one tokenizer in a `SpanIndex`, row by row."""

    starts: list[int] = field(default_factory=list)
    spans: list[int] = field(default_factory=list)

    def add(self, ends: Sequence[int], num_tokens: int) -> None:
        """Adds a row with `num_tokens` completion tokens. `ends` has the ends of its spans."""
        offset = len(self.spans)
        start = 0
        for end in ends:
            index = len(self.starts)
            self.starts.append(offset + start)
            self.spans += [-1] + [index] * (end - start - 1)
            start = end
        self.spans += [-1] * (num_tokens - start)


def _as_teacher_reads(sample: Sample) -> Sample:
    """Returns the sample with the teacher's tokens in place of the policy's."""
    text = sample.teacher_text
    if text is None:
        return sample
    with_prompt = replace(
        sample,
        token_ids=text.prompt_ids + sample.token_ids[sample.prompt_length :],
        prompt_length=len(text.prompt_ids),
        teacher_text=None,
    )
    if text.completion_ids is None:
        return with_prompt
    return replace(
        with_prompt,
        token_ids=text.prompt_ids + text.completion_ids,
        # The values of the student's tokens are not those of the teacher's.
        advantages=(0.0,) * len(text.completion_ids),
        sampler_logprobs=None,
        versions=None,
    )


def align_with_policy(values: Tensor, batch: Batch) -> Tensor:
    """Returns values [B, T] of completion tokens, from their positions in `teacher_batch`.

    Args:
        values: values at the positions of `batch.teacher_batch`, [B, T'].
        batch: the micro-batch. Without a `teacher_batch`, the values are returned unchanged.
    """
    if batch.teacher_batch is None:
        return values
    grid = torch.zeros(batch.token_mask.shape, dtype=values.dtype)
    return grid.masked_scatter(batch.token_mask, values[batch.teacher_batch.token_mask])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Returns the micro-batch with its tensors on `device`."""
    values_on_device: dict[str, Any] = {}
    for each in fields(batch):
        value = getattr(batch, each.name)
        if isinstance(value, Tensor):
            values_on_device[each.name] = value.to(device)
    if batch.teacher_top is not None:
        token_ids, logprobs = batch.teacher_top
        values_on_device["teacher_top"] = (token_ids.to(device), logprobs.to(device))
    if batch.teacher_batch is not None:
        values_on_device["teacher_batch"] = to_device(batch.teacher_batch, device)
    if batch.spans is not None:
        values_on_device["spans"] = SpanIndex(*(values.to(device) for values in batch.spans))
    return replace(batch, **values_on_device)
