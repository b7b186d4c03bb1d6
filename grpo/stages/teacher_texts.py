"""Soft distillation from a teacher with another vocabulary: its tokens of the texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from grpo.experience.hints import OtherVocabulary
from grpo.stages.solutions import SolutionTexts
from grpo.types import Problem, Sample, TeacherText, UserError

MIN_ALIGNED = 0.9  # share of the texts; a lower one points to a tokenizer that changes all texts


class TeacherTexts:
    """Training samples whose texts are also in the teacher's tokens."""

    def __init__(
        self, texts: SolutionTexts, problems: Sequence[Problem], teacher: OtherVocabulary
    ) -> None:
        """Tokenizes the texts.

        Args:
            texts: The samples in the student's tokens.
            problems: The problem of each sample, possibly with repetitions.
            teacher: The teacher.

        Raises:
            UserError: Less than `MIN_ALIGNED` of the texts can be compared.
        """
        self._texts = texts
        self._ids = [problem.id for problem in problems]
        self._arrays: dict[str, tuple[Any, Any, Any]] = {}  # int32: prompt, completion, spans
        self._num_tokens = self._num_aligned = self._num_spans = 0
        for index, problem in enumerate(problems):
            if problem.id not in self._arrays:
                (sample,) = texts[index : index + 1]
                self._add(problem, sample, teacher)
        if self._num_aligned < MIN_ALIGNED * self._num_tokens:
            raise UserError(
                f"soft: only {self._num_aligned / self._num_tokens:.1%} of the texts can be "
                "compared: the tokenizer of student or teacher changes the text, or the teacher's "
                "context is too short. Use way=sequence"
            )
        self._num_common = len(teacher.alignment.common_tokens())

    def _add(self, problem: Problem, sample: Sample, teacher: OtherVocabulary) -> None:
        completion_ids = sample.token_ids[sample.prompt_length :]
        prompt_ids = teacher.prompts.token_ids(problem)
        text = teacher.alignment.teacher_text(prompt_ids, completion_ids)
        assert text.completion_ids is not None and text.spans is not None
        self._num_tokens += len(completion_ids)
        if text.spans:
            self._num_aligned += text.spans[-1][0]
        self._num_spans += len(text.spans)
        self._arrays[problem.id] = (
            np.array(text.prompt_ids, np.int32),
            np.array(text.completion_ids, np.int32),
            np.array(text.spans, np.int32).reshape(-1, 2),
        )

    def summary(self) -> str:
        """Returns how well the tokens are aligned, as a line for the user."""
        return (
            f"student and teacher have different vocabularies, with {self._num_common:,} common "
            f"tokens. {self._num_aligned / self._num_tokens:.1%} of the texts are compared, in "
            f"spans of {self._num_aligned / self._num_spans:.2f} student tokens on average"
        )

    def __getitem__(self, indices: slice) -> list[Sample]:
        """Returns the samples at a slice of the order of the problems."""
        return [
            replace(sample, teacher_text=self._teacher_text(problem_id))
            for sample, problem_id in zip(self._texts[indices], self._ids[indices], strict=True)
        ]

    def _teacher_text(self, problem_id: str) -> TeacherText:
        prompt_ids, completion_ids, spans = self._arrays[problem_id]
        return TeacherText(
            prompt_ids=tuple(prompt_ids.tolist()),
            completion_ids=tuple(completion_ids.tolist()),
            spans=tuple((student, teacher) for student, teacher in spans.tolist()),
        )


Texts = SolutionTexts | TeacherTexts
