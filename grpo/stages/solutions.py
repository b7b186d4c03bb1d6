"""Worked solutions as training targets: their token ids, and the doctor's check of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from grpo.config import DataSettings
from grpo.experience.prompts import Prompts
from grpo.stages.problems import MIN_SEEN, check_dropped
from grpo.stages.stage import Check
from grpo.types import Problem, Sample, UserError

if TYPE_CHECKING:
    from grpo.data.common.mixture import Mixture

MAX_DRAWS_PER_PROBLEM = 20  # so that a search for problems that can be trained on ends


class TokenizedSolution(NamedTuple):
    """The token ids of a prompt and its worked solution."""

    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]


class TrainingLimits(NamedTuple):
    """Which problems a supervised stage can train on, and what happens to the others."""

    section: str  # of the config, for messages
    max_tokens: int  # of a prompt with its solution
    data: DataSettings


def take_trainable(
    mixture: Mixture,
    count: int,
    prompts: Prompts,
    limits: TrainingLimits,
    say: Callable[[str], None],
) -> list[Problem]:
    """Returns the first problems of a mixture that the stage can train on.

    With `data.malformed: drop` these are problems with a solution, with `data.overlong: drop`
    problems that fit `max_tokens`. Without them it returns the first problems, and
    `tokenize_solutions` raises for the others. The result depends only on the arguments, so that a
    resumed run trains on the same problems.

    Args:
        mixture: The problems in the order of the run.
        count: Number of problems.
        prompts: The prompts of the run.
        limits: What can be trained on.
        say: Receives a line if problems were dropped.

    Raises:
        UserError: More problems than `data.max_dropped` were dropped.
    """
    data = limits.data
    if data.malformed == "error" and data.overlong == "error":
        return mixture.take(0, count)
    reasons: dict[str, str] = {}  # "" for a problem that can be trained on, by its id
    problems: list[Problem] = []
    for position in range(MAX_DRAWS_PER_PROBLEM * count):
        problem = mixture[position]
        if problem.id not in reasons:
            reasons[problem.id] = _drop_reason(problem, prompts, limits)
        if not reasons[problem.id]:
            problems.append(problem)
        if len(problems) == count:
            break
    dropped = [f"{problem_id} ({reason})" for problem_id, reason in reasons.items() if reason]
    if dropped:
        check_dropped(limits.section, dropped, len(reasons), data.max_dropped, say)
    if len(problems) < count:
        raise UserError(f"{limits.section}: almost no problem can be trained on: {dropped[0]}")
    return problems


def _drop_reason(problem: Problem, prompts: Prompts, limits: TrainingLimits) -> str:
    """Returns why a problem is dropped, "" if it is not."""
    if problem.solution is None:
        return "no solution" if limits.data.malformed == "drop" else ""
    if limits.data.overlong == "error":
        return ""
    num_tokens = len(prompts.token_ids(problem)) + len(prompts.solution_ids(problem))
    if num_tokens <= limits.max_tokens:
        return ""
    return f"{num_tokens:,} tokens, more than {limits.max_tokens:,}"


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
    limits: TrainingLimits, problems: Sequence[Problem], prompts: Prompts
) -> Iterator[Check]:
    """Yields whether the problems have worked solutions within `max_tokens`, and with their tags.

    Problems without one are a failure, unless the config drops them and they are not too many.
    """
    max_tokens, data = limits.max_tokens, limits.data
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
    remedy = ""
    if without_solution and data.malformed == "error":
        remedy = (
            "train on the traces of grpo collect, data={name: traces, path: RUN}, or set "
            "data.malformed=drop"
        )
    elif num_too_long and data.overlong == "error":
        remedy = "raise max_tokens, or set data.overlong=drop"
    elif len(without_solution) + num_too_long > data.max_dropped * max(len(problems), MIN_SEEN):
        remedy = f"more than data.max_dropped={data.max_dropped} would be dropped: raise a limit"
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
