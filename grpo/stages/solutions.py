"""Worked solutions as training targets: their token ids, and the doctor's check of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

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


class SolutionTexts:
    """Worked solutions as the training samples of a learner, in the order of the problems.

    Every problem is tokenized once, when the object is created, however often it occurs. Its tokens
    are stored in 4 bytes each; a list of samples would need 44 bytes per token.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        prompts: Prompts,
        *,
        max_tokens: int,
        section: str,
        weight: float,
    ) -> None:
        """Tokenizes the solutions.

        Args:
            problems: The problems, possibly with repetitions.
            prompts: The prompts of the run.
            max_tokens: As in `tokenize_solutions`.
            section: As in `tokenize_solutions`.
            weight: Weight of the cross-entropy of every solution token, stored as its advantage.

        Raises:
            UserError: As in `tokenize_solutions`.
        """
        self._ids = [problem.id for problem in problems]
        self._weight = weight
        self._tokens: dict[str, tuple[Any, Any]] = {}  # int32 arrays by id: prompt, solution
        distinct_problems = {problem.id: problem for problem in problems}
        solutions = tokenize_solutions(
            list(distinct_problems.values()), prompts, max_tokens, section
        )
        for problem_id, solution in zip(distinct_problems, solutions, strict=True):
            prompt_ids = np.array(solution.prompt_ids, np.int32)
            target_ids = np.array(solution.target_ids, np.int32)
            self._tokens[problem_id] = (prompt_ids, target_ids)

    def __getitem__(self, indices: slice) -> list[Sample]:
        """Returns the samples at a slice of the order of the problems."""
        return [self._sample(*self._tokens[problem_id]) for problem_id in self._ids[indices]]

    def _sample(self, prompt_ids: Any, target_ids: Any) -> Sample:
        return Sample(
            token_ids=(*prompt_ids.tolist(), *target_ids.tolist()),
            prompt_length=len(prompt_ids),
            advantages=(self._weight,) * len(target_ids),
        )


def check_solutions(
    max_tokens: int, problems: Sequence[Problem], prompts: Prompts
) -> Iterator[Check]:
    """Yields whether all problems have a worked solution within `max_tokens`, and with its tags."""
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
    yield from _missing_tags(problems, prompts)


def _missing_tags(problems: Sequence[Problem], prompts: Prompts) -> Iterator[Check]:
    """Warns about tags that the prompt asks for and that solutions lack."""
    if not problems:
        return
    instructions = prompts.text(problems[0]).replace(problems[0].question, "")
    if "<answer>" not in instructions:
        return
    targets = [prompts.solution(problem) for problem in problems if problem.solution is not None]
    num_lacking = sum("<answer>" not in target for target in targets)
    if num_lacking:
        yield Check(
            "warn",
            "tags",
            f"the prompt asks for <answer>, but {num_lacking} of {len(targets)} solutions have no "
            "such tag: the model would learn not to follow its prompt",
            "use a prompt that does not ask for it (prompt.template=plain, or chat without "
            "prompt.system=r1), or put the answers into the tag",
        )
