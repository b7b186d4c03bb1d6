"""What a teacher reads: prompts with hints, and the tokens of another vocabulary. No torch.

A hint is text that the teacher's prompt contains in addition to the question. With it, a policy can
be its own teacher (self-distillation): it predicts the tokens of its own completion better if it
knows a solution.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from grpo.experience.prompts import Prompts
from grpo.learning.alignment import Alignment
from grpo.types import Problem, ScoredGroup, TeacherText, UserError


class OtherVocabulary(NamedTuple):
    """The prompts and the tokens of a teacher whose vocabulary is not the policy's."""

    prompts: Prompts
    alignment: Alignment


class TeacherSettings(NamedTuple):
    """What teachers read.

    Attributes:
        hint: `algorithm.teacher_hint`: `none`, `solution`, `success` or `feedback`.
        max_hint_tokens: Maximum length of a hint in tokens. A longer one is cut off at its end.
        names: The data sets that have a teacher of their own (`model.teachers`).
        vocabularies: The teachers whose vocabulary is not the policy's, by name.
    """

    hint: str
    max_hint_tokens: int
    names: Collection[str] = ()
    vocabularies: Mapping[str, OtherVocabulary] = {}

    def teacher_of(self, problem: Problem) -> str:
        """Returns the name of the teacher of a problem; "" is `model.teacher`."""
        return problem.data_set if problem.data_set in self.names else ""


def teacher_texts(
    groups: Sequence[ScoredGroup], prompts: Prompts, settings: TeacherSettings
) -> list[list[TeacherText | None]]:
    """Returns what a teacher reads in place of each completion, [P, G].

    It is None where the teacher reads the prompt and the tokens of the policy: without a hint and
    with the same vocabulary.

    Args:
        groups: The scored groups [P].
        prompts: Renders the policy's prompts.
        settings: What teachers read.

    Raises:
        UserError: A teacher has another vocabulary, and no completion can be aligned with it.

    Source: OPSD 2601.18734 and SDFT 2601.19897 (`solution`), SDPO 2601.20802 (`success` and
    `feedback`, which it combines in one prompt).
    """
    texts_PG = []
    for scored in groups:
        num_completions = len(scored.group.completions)
        texts_PG.append(
            [_teacher_text(scored, index, prompts, settings) for index in range(num_completions)]
        )
    _require_spans(list(itertools.chain.from_iterable(texts_PG)))
    return texts_PG


def _teacher_text(
    scored: ScoredGroup, index: int, prompts: Prompts, settings: TeacherSettings
) -> TeacherText | None:
    """Returns what a teacher reads in place of the completion at `index`."""
    problem = scored.group.problem
    other = settings.vocabularies.get(settings.teacher_of(problem))
    teacher_prompts = prompts if other is None else other.prompts
    hint_text = None if settings.hint == "none" else hint(scored, index, settings.hint)
    if hint_text is not None:
        limit = settings.max_hint_tokens
        prompt_ids = teacher_prompts.hinted_token_ids(problem, hint_text, limit)
    elif other is not None:
        prompt_ids = teacher_prompts.token_ids(problem)
    else:
        return None
    if other is None:
        return TeacherText(prompt_ids=prompt_ids)
    completion = scored.group.completions[index]
    return other.alignment.teacher_text(prompt_ids, completion.token_ids)


def _require_spans(texts: Sequence[TeacherText | None]) -> None:
    """Raises UserError if texts are in the tokens of another vocabulary, and none has a span."""
    spans = [text.spans for text in texts if text is not None and text.spans is not None]
    if spans and not any(spans):
        raise UserError(
            "model.teacher: no completion can be aligned with the teacher's tokens: its tokenizer "
            "changes the start of the text"
        )


def hint(scored: ScoredGroup, index: int, kind: str) -> str | None:
    """Returns the hint about a group's problem for the completion at `index`, None without one.

    For example `"Feedback on an earlier attempt: format: no answer"`.
    """
    if kind == "solution":
        problem = scored.group.problem
        solution = problem.solution or problem.answer
        return f"A correct solution:\n{solution}" if solution else None
    if kind == "success":
        for other, verdict in enumerate(scored.verdicts):
            if other != index and verdict is not None and verdict.value == "correct":
                return f"A correct solution:\n{scored.group.completions[other].text}"
        return None
    if kind == "feedback":
        reasons = _feedback(scored, index)
        if not reasons:
            return None
        return f"Feedback on an earlier attempt: {'; '.join(reasons)}"
    raise ValueError(f"unknown hint {kind!r}. Available: solution, success, feedback.")


def _feedback(scored: ScoredGroup, index: int) -> list[str]:
    """Returns why a completion's rewards are low: `["wrong answer", "format: no answer"]`."""
    reasons = []
    verdict = scored.verdicts[index]
    if verdict is not None and verdict.value == "wrong":
        reasons.append(verdict.reason or "wrong answer")
    for name, reason in scored.faults[index].items():
        reasons.append(f"{name}: {reason}")
    return reasons
