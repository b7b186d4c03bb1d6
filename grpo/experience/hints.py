"""Hints for a teacher: text that its prompt contains in addition to the question.

With a hint, a policy can be its own teacher (self-distillation): it predicts the tokens of its own
completion better if it knows a solution. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from grpo.experience.prompts import Prompts
from grpo.types import ScoredGroup


def teacher_prompts(
    groups: Sequence[ScoredGroup], kind: str, prompts: Prompts, max_tokens: int
) -> list[list[tuple[int, ...]]]:
    """Returns the token ids of the teacher's prompt for each completion, [P, G, prompt length].

    A completion without a hint has the prompt that sampled it.

    Args:
        groups: The scored groups [P].
        kind: `algorithm.teacher_hint`: `solution`, `success` or `feedback`.
        prompts: Renders the prompts.
        max_tokens: Maximum length of a hint in tokens. A longer one is cut off at its end.

    Source: OPSD 2601.18734 and SDFT 2601.19897 (`solution`), SDPO 2601.20802 (`success` and
    `feedback`, which it combines in one prompt).
    """
    prompts_PGL = []
    for scored in groups:
        prompts_GL = []
        for index in range(len(scored.group.completions)):
            text = hint(scored, index, kind)
            if text is None:
                prompts_GL.append(scored.group.prompt_ids)
            else:
                problem = scored.group.problem
                prompts_GL.append(prompts.hinted_token_ids(problem, text, max_tokens))
        prompts_PGL.append(prompts_GL)
    return prompts_PGL


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
