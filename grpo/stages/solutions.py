"""Worked solutions as training targets: their token ids, and the doctor's check of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from grpo.experience.prompts import Prompts
from grpo.stages.stage import Check
from grpo.types import Problem, Sample, UserError


class TokenizedSolution(NamedTuple):
    """The token ids of a prompt and its worked solution."""

    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]


def tokenize_solutions(
    problems: Sequence[Problem], prompts: Prompts, max_tokens: int, section: str
) -> Iterator[TokenizedSolution]:
    """Yields each problem's prompt and worked solution as token ids.

    Args:
        problems: Problems with a worked solution.
        prompts: The prompts of the run.
        max_tokens: Maximum length of a prompt with its solution.
        section: The config section that sets `max_tokens`, for error messages.

    Raises:
        UserError: A problem has no solution, or is longer than `max_tokens` with it. The message
            names the problem.
    """
    for problem in problems:
        if problem.solution is None:
            raise UserError(
                f"{section}: problem {problem.id} has no worked solution, which is the training "
                "target; use data with solutions, for example the traces of grpo collect"
            )
        prompt_ids = prompts.token_ids(problem)
        target_ids = prompts.solution_ids(problem)
        num_tokens = len(prompt_ids) + len(target_ids)
        if num_tokens > max_tokens:
            raise UserError(
                f"{section}: problem {problem.id} has {num_tokens} tokens with its solution, more "
                f"than {section}.max_tokens={max_tokens}: raise the limit or remove the problem"
            )
        yield TokenizedSolution(prompt_ids, target_ids)


def training_texts(solutions: Iterable[TokenizedSolution], *, weight: float) -> list[Sample]:
    """Returns solutions as the training samples of a learner.

    Args:
        solutions: The solutions.
        weight: Weight of the cross-entropy of every solution token, stored as its advantage.
    """
    return [
        Sample(
            token_ids=solution.prompt_ids + solution.target_ids,
            prompt_length=len(solution.prompt_ids),
            advantages=(weight,) * len(solution.target_ids),
        )
        for solution in solutions
    ]


def check_solutions(
    max_tokens: int, problems: Sequence[Problem], prompts: Prompts
) -> Iterator[Check]:
    """Yields one finding: whether all problems have a worked solution within `max_tokens`."""
    without_solution = [problem.id for problem in problems if problem.solution is None]
    lengths = [  # in tokens, with the prompt
        len(prompts.token_ids(problem)) + len(prompts.solution_ids(problem))
        for problem in problems
        if problem.solution is not None
    ]
    num_too_long = sum(length > max_tokens for length in lengths)
    message = (
        f"{len(lengths)} solutions, at most {max(lengths, default=0)} tokens with their "
        f"prompts; {num_too_long} exceed max_tokens={max_tokens}"
    )
    if without_solution:
        num_missing = len(without_solution)
        message += f"; {num_missing} problems have no solution, for example {without_solution[0]}"
        remedy = "train on the traces of grpo collect: data={name: traces, path: RUN}"
    elif num_too_long:
        remedy = "raise max_tokens"
    else:
        remedy = ""
    yield Check("fail" if remedy else "ok", "solutions", message, remedy)
