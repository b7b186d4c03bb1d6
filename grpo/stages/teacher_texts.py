"""Soft distillation from a teacher with another vocabulary: its tokens of the texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grpo.config import DistillConfig
from grpo.experience.prompts import Prompts
from grpo.learning import models
from grpo.learning.alignment import Alignment, read_tokens
from grpo.stages.solutions import SolutionTexts
from grpo.stages.start_model import StartModel
from grpo.types import Problem, Sample, TeacherText, UserError

MIN_ALIGNED = 0.9  # share of the texts; a lower one points to a tokenizer that changes all texts


class Teacher(NamedTuple):
    """A teacher whose vocabulary is not the student's."""

    prompts: Prompts
    alignment: Alignment


def find_other_vocabulary(
    config: DistillConfig, start: StartModel, teacher_dir: Path
) -> Teacher | None:
    """Returns the teacher's prompts and tokens; None if its vocabulary is the student's.

    Raises:
        UserError: A setting needs equal vocabularies, or the tokens cannot be aligned.
    """
    tokenizer = models.load_tokenizer(teacher_dir)
    if models.has_same_vocabulary(start.tokenizer, tokenizer):
        return None
    check_settings(config)
    # `prompt.chat_template` is for the student. The teacher has its own.
    settings = config.prompt.model_copy(update={"chat_template": None})
    prompts = Prompts(settings, tokenizer, models.eos_token_ids(teacher_dir))
    alignment = Alignment(
        student=read_tokens(start.tokenizer, start.prompts.end_id),
        teacher=read_tokens(tokenizer, prompts.end_id),
    )
    return Teacher(prompts, alignment)


def check_settings(config: DistillConfig) -> None:
    """Raises UserError if a setting needs student and teacher to have the same vocabulary."""
    soft = config.soft
    assert soft is not None
    changes = {
        "soft.temperature=1": soft.temperature != 1,
        "soft.teacher_topk=": soft.teacher_topk is not None,
        "soft.hidden_weight=0": soft.hidden_weight > 0,
        "learner.sequence_parallel=1": config.learner.sequence_parallel > 1,
    }
    if any(changes.values()):
        needed = ", ".join(change for change, is_needed in changes.items() if is_needed)
        raise UserError(f"student and teacher have different vocabularies, which needs {needed}")


class TeacherTexts:
    """Training samples whose texts are also in the teacher's tokens.

    Attributes:
        max_tokens: Length in tokens of the teacher's longest prompt with its text.
    """

    def __init__(self, texts: SolutionTexts, problems: Sequence[Problem], teacher: Teacher) -> None:
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
        self.max_tokens = 0
        self._num_tokens = self._num_aligned = self._num_spans = 0
        for index, problem in enumerate(problems):
            if problem.id not in self._arrays:
                (sample,) = texts[index : index + 1]
                self._add(problem, sample, teacher)
        if self._num_aligned < MIN_ALIGNED * self._num_tokens:
            raise UserError(
                f"soft: only {self._num_aligned / self._num_tokens:.1%} of the texts can be "
                "compared: the tokenizer of student or teacher changes the text. Use way=sequence"
            )
        self._num_common = len(teacher.alignment.common_tokens())

    def _add(self, problem: Problem, sample: Sample, teacher: Teacher) -> None:
        completion_ids = sample.token_ids[sample.prompt_length :]
        text = teacher.alignment.teacher_text(teacher.prompts.token_ids(problem), completion_ids)
        assert text.completion_ids is not None and text.spans is not None
        self.max_tokens = max(self.max_tokens, len(text.prompt_ids) + len(text.completion_ids))
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
