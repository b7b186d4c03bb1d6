"""Worked solutions that a stage learns from: their tokens, and the doctor's check of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from grpo.experience.prompts import Prompts
from grpo.stages.stage import Check
from grpo.types import Problem, UserError


def tokenize_solutions(
    problems: Sequence[Problem], prompts: Prompts, max_tokens: int, section: str
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yields the token ids of each problem's prompt and of its worked solution.

    Args:
        problems: Problems with a worked solution.
        prompts: The prompts of the run.
        max_tokens: The longest prompt with its solution.
        section: The config section with `max_tokens`, for error messages.

    Raises:
        UserError: A problem has no solution, or is too long with it; the message names it.
    """
    for problem in problems:
        if problem.solution is None:
            raise UserError(f"{section}: problem {problem.id} has no worked solution to learn from")
        prompt_ids = prompts.ids(problem)
        target_ids = prompts.target_ids(problem)
        length = len(prompt_ids) + len(target_ids)
        if length > max_tokens:
            raise UserError(
                f"{section}: {problem.id} has {length} tokens with its solution; "
                f"{section}.max_tokens is {max_tokens}"
            )
        yield prompt_ids, target_ids


def check_solutions(
    max_tokens: int, problems: Sequence[Problem], prompts: Prompts
) -> Iterator[Check]:
    """Yields whether every problem has a worked solution, and fits into `max_tokens` with it."""
    missing = [problem.id for problem in problems if problem.solution is None]
    lengths = [
        len(prompts.ids(problem)) + len(prompts.target_ids(problem))
        for problem in problems
        if problem.solution is not None
    ]
    num_long = sum(length > max_tokens for length in lengths)
    message = (
        f"{len(lengths)} of {max(lengths, default=0)} tokens at most; {num_long} of more than "
        f"max_tokens={max_tokens}"
    )
    if missing:
        message += f"; {len(missing)} problems have none, such as {missing[0]}"
        remedy = "data={name: traces, path: RUN}: what `grpo collect` kept"
    elif num_long:
        remedy = "raise max_tokens"
    else:
        remedy = ""
    yield Check("fail" if remedy else "ok", "solutions", message, remedy)
