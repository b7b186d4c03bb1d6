"""Training samples as columns: arrays of values per sample, and concatenated values per token."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from grpo.types import Sample, TeacherText


def columns_of(samples: Sequence[Sample]) -> dict[str, Any]:
    """Returns samples as columns.

    "ids" has all tokens; "advantages", "logprobs" and "token_versions" have completion tokens. The
    columns of `_teacher_columns` exist only if a sample needs them.
    """
    return {
        **_teacher_columns(samples),
        "lengths": [len(sample.token_ids) for sample in samples],
        "prompts": [sample.prompt_length for sample in samples],
        "groups": [sample.group for sample in samples],
        "rewards": [sample.reward for sample in samples],
        "token_versions": _concatenated([sample.versions or () for sample in samples], np.int32),
        "ids": _concatenated([sample.token_ids for sample in samples], np.uint32),
        # float32, as in a batch
        "advantages": _concatenated([sample.advantages for sample in samples], np.float32),
        "logprobs": _concatenated(
            [sample.sampler_logprobs or () for sample in samples], np.float32
        ),
    }


def _concatenated(values: Sequence[Sequence[Any]], dtype: Any) -> Any:
    return np.array(list(itertools.chain.from_iterable(values)), dtype=dtype)


def _teacher_columns(samples: Sequence[Sample]) -> dict[str, Any]:
    """Returns what teachers read, as columns.

    "teachers" has the names of the teachers. Each of the others has the values of all samples, and
    a column with their number for each sample: "teacher_prompts" for "teacher_ids",
    "teacher_completions" for "teacher_completion_ids", "teacher_spans" for "teacher_span_ends",
    which has two ends per span.
    """
    columns: dict[str, Any] = {}
    if any(sample.teacher for sample in samples):
        columns["teachers"] = [sample.teacher for sample in samples]
    texts = [sample.teacher_text or TeacherText(prompt_ids=()) for sample in samples]
    if any(text.prompt_ids for text in texts):
        prompts = [text.prompt_ids for text in texts]
        columns["teacher_prompts"] = [len(prompt) for prompt in prompts]
        columns["teacher_ids"] = _concatenated(prompts, np.uint32)
    if any(text.spans is not None for text in texts):
        completions = [text.completion_ids or () for text in texts]
        columns["teacher_completions"] = [len(completion) for completion in completions]
        columns["teacher_completion_ids"] = _concatenated(completions, np.uint32)
        ends = [list(itertools.chain.from_iterable(text.spans or ())) for text in texts]
        columns["teacher_spans"] = [len(each) for each in ends]
        columns["teacher_span_ends"] = _concatenated(ends, np.uint32)
    return columns


def samples_of(columns: Mapping[str, list[Any]]) -> list[Sample]:
    """Returns samples from the columns that `columns_of` makes, or an earlier version made."""
    num_samples = len(columns["lengths"])
    num_completion_tokens = [
        length - prompt_length
        for length, prompt_length in zip(columns["lengths"], columns["prompts"], strict=True)
    ]
    token_ids = _split(columns["ids"], columns["lengths"])
    advantages = _split(columns["advantages"], num_completion_tokens)
    logprobs = _split(columns["logprobs"], num_completion_tokens)
    versions = _split(_versions_per_token(columns), num_completion_tokens)
    teacher_texts = _teacher_texts(columns)
    teachers = columns.get("teachers", [""] * num_samples)
    return [
        Sample(
            token_ids=token_ids[i],
            prompt_length=columns["prompts"][i],
            advantages=advantages[i],
            sampler_logprobs=logprobs[i] or None,
            versions=versions[i] or None,
            group=columns["groups"][i],
            reward=columns["rewards"][i],
            teacher_text=teacher_texts[i],
            teacher=teachers[i],
        )
        for i in range(num_samples)
    ]


def _split(values: Sequence[Any], lengths: Sequence[int]) -> list[tuple[Any, ...]]:
    """Returns consecutive parts of the values; all are empty if there are no values."""
    ends = list(itertools.accumulate(lengths))
    starts = [0, *ends[:-1]]
    return [tuple(values[start:end]) for start, end in zip(starts, ends, strict=True)]


def _versions_per_token(columns: Mapping[str, list[Any]]) -> list[int]:
    """Returns the weight version of each completion token.

    The files of older runs have one version per sample, in "versions".
    """
    if "token_versions" in columns:
        return columns["token_versions"]
    token_versions: list[int] = []
    for length, prompt_length, version in zip(
        columns["lengths"], columns["prompts"], columns["versions"], strict=True
    ):
        token_versions += [version] * (length - prompt_length)
    return token_versions


def _teacher_texts(columns: Mapping[str, list[Any]]) -> list[TeacherText | None]:
    """Returns what the teacher reads for each sample, None where it reads the sample's tokens."""
    num_samples = len(columns["lengths"])
    if "teacher_prompts" not in columns:
        return [None] * num_samples
    prompts = _split(columns["teacher_ids"], columns["teacher_prompts"])
    if "teacher_completions" not in columns:
        return [TeacherText(prompt_ids=prompt) if prompt else None for prompt in prompts]
    completions = _split(columns["teacher_completion_ids"], columns["teacher_completions"])
    ends = _split(columns["teacher_span_ends"], columns["teacher_spans"])
    texts: list[TeacherText | None] = []
    for prompt, completion, ends_of_sample in zip(prompts, completions, ends, strict=True):
        text = None
        if completion:
            spans = tuple(zip(ends_of_sample[::2], ends_of_sample[1::2], strict=True))
            text = TeacherText(prompt_ids=prompt, completion_ids=completion, spans=spans)
        elif prompt:
            text = TeacherText(prompt_ids=prompt)
        texts.append(text)
    return texts
