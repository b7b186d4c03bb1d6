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

    def teacher_text(self, problem: Problem, completion_ids: Sequence[int]) -> TeacherText:
        """Returns a completion after the teacher's own prompt, see `Alignment.teacher_text`."""
        return self.alignment.teacher_text(self.prompts.token_ids(problem), completion_ids)


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
        texts_G = []
        for index, completion in enumerate(scored.group.completions):
            problem = scored.group.problem
            vocabulary = settings.vocabularies.get(settings.teacher_of(problem))
            teacher_prompts = prompts if vocabulary is None else vocabulary.prompts
            prompt_ids = None
            text = None if settings.hint == "none" else hint(scored, index, settings.hint)
            if text is not None:
                prompt_ids = teacher_prompts.hinted_token_ids(
                    problem, text, settings.max_hint_tokens
                )
            teacher_text = None
            if vocabulary is not None:
                prompt_ids = prompt_ids or teacher_prompts.token_ids(problem)
                teacher_text = vocabulary.alignment.teacher_text(prompt_ids, completion.token_ids)
            elif prompt_ids is not None:
                teacher_text = TeacherText(prompt_ids=prompt_ids)
            texts_G.append(teacher_text)
        texts_PG.append(texts_G)
    _require_spans(list(itertools.chain.from_iterable(texts_PG)))
    return texts_PG


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
