"""`--dry-run`: prints the resolved config, the batch arithmetic and one rendered prompt.

It starts no engine and loads no weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo import config as configs
from grpo.experience.prompts import EXAMPLE, R1_ZERO, Prompts, mark_special_tokens
from grpo.learning import models
from grpo.run.display import redirect_output
from grpo.stages.problems import load_problems
from grpo.stages.stage import Part, Stage, StageNeeds
from grpo.types import DownloadError, Problem, UserError


def dry_run(stage: Stage[Any], config: Any) -> None:
    """Prints the config, the batch arithmetic, the stage's additional lines and the first prompt.

    For a pipeline, it prints only the commands. If the tokenizer or the data cannot be reached,
    this is reported, and the output contains the parts that do not need them.

    Args:
        stage: The stage of the config.
        config: Its config.

    Raises:
        UserError: The run would fail early, for example because a prompt is too long.
    """
    needs = stage.needs(config)
    if needs is not None:
        print(configs.dump(config))
    print(stage.batch_arithmetic(config))
    for line in stage.dry_run_lines(config):
        print(line)
    if needs is None:
        return
    for part in _parts_with_prompts(stage, config):
        if part.name:
            print(f"{part.name}:")
        part_needs = part.stage.needs(part.config)
        assert part_needs is not None  # only a pipeline has no needs, and a pipeline is no part
        try:
            print(_prompt(part_needs, _load_problems(part_needs) or [[EXAMPLE]]))
        except UserError as error:
            raise UserError(f"{part.name}: {error}" if part.name else str(error)) from None


def _parts_with_prompts(stage: Stage[Any], config: Any) -> list[Part]:
    """Returns the parts of an evaluation, whose prompts differ; for other kinds the whole stage."""
    parts = stage.parts(config)
    if all(part.stage is stage for part in parts):
        return parts
    return [Part(stage=stage, config=config)]


def _load_problems(needs: StageNeeds) -> list[Sequence[Problem]]:
    """Returns the problems of each data set, without the sets that cannot be reached."""
    sections = [(data, "test") for data in needs.problems.held_out]
    if needs.problems.training is not None:
        sections.insert(0, (needs.problems.training, "train"))
    problems: list[Sequence[Problem]] = []
    for data, split in sections:
        try:
            problems += load_problems(data, split, needs.config.seed, needs.rewards).values()
        except DownloadError as error:
            print(f"data: {error}")
    return problems


def _prompt(needs: StageNeeds, problems: Sequence[Sequence[Problem]]) -> str:
    """Returns the first prompt as text, after checking the length of every prompt."""
    config = needs.config
    problem = _shown_problem(needs, problems)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with redirect_output(Path(scratch) / "log"):
                model_dir = models.locate(config.model, Path(scratch), config.seed, weights=False)
                tokenizer = models.load_tokenizer(model_dir)
                prompts = Prompts(config.prompt, tokenizer, models.eos_token_ids(model_dir))
            models.check_context(model_dir, needs.max_sequence_tokens, config.length_keys)
        except DownloadError as error:
            text = problem.question
            if config.prompt.template == "r1_zero":
                text = R1_ZERO.replace("{question}", problem.question)
            return f"prompt ({config.prompt.template}; no tokenizer: {error}):\n{text}"
    for problems_of_set in problems:
        prompts.without_overlong(problems_of_set)
    return _rendered(needs, prompts, tokenizer, problem)


def _shown_problem(needs: StageNeeds, problems: Sequence[Sequence[Problem]]) -> Problem:
    """Returns the first problem, for supervised training the first one with a worked solution."""
    if not needs.shows_solution:
        return problems[0][0]
    for problems_of_set in problems:
        for problem in problems_of_set:
            if problem.solution or problem is EXAMPLE:
                return problem
    raise UserError(
        "data: no problem has a worked solution, the target of supervised training. For the set "
        "hub, name its column: data.columns.solution=COLUMN"
    )


def _rendered(needs: StageNeeds, prompts: Prompts, tokenizer: Any, problem: Problem) -> str:
    """Returns the prompt that the model reads, its length in tokens, and its stop tokens."""
    num_tokens = len(prompts.token_ids(problem))
    text = prompts.text(problem)
    if needs.shows_solution:
        text += str(tokenizer.decode(list(prompts.solution_ids(problem))))
    stop_tokens = ", ".join(tokenizer.convert_ids_to_tokens(list(prompts.stop_token_ids)))
    stop_strings = f", stop strings {', '.join(prompts.stop)}" if prompts.stop else ""
    return (
        f"prompt ({num_tokens} tokens, stop tokens {stop_tokens}{stop_strings}):\n"
        f"{mark_special_tokens(text, tokenizer)}"
    )
