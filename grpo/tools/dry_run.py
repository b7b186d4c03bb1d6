"""`--dry-run`: the resolved config, the batch arithmetic and one rendered prompt.

Starts no engine and loads no weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo import config as configs
from grpo.experience.prompts import EXAMPLE, R1_ZERO, Prompts, visible
from grpo.learning import models
from grpo.run.display import quiet
from grpo.stages.problems import load_problems
from grpo.stages.stage import Stage, StageNeeds
from grpo.types import Problem, Unreachable


def dry_run(stage: Stage[Any], config: Any) -> None:
    """Prints what a run of `stage` would do.

    Raises UserError for what would stop it early. A tokenizer or data out of reach is reported,
    and the rest is shown without it.
    """
    needs = stage.needs(config)
    if needs is None:
        print(stage.arithmetic(config))
        return
    print(configs.dump(config))
    print(stage.arithmetic(config))
    for line in stage.preview(config):
        print(line)
    print(_prompt(needs, _load_problems(needs) or [[EXAMPLE]]))


def _load_problems(needs: StageNeeds) -> list[Sequence[Problem]]:
    """Returns all problems of the stage, set by set; only the first sets if one is unreachable."""
    seed = needs.config.seed
    problems: list[Sequence[Problem]] = []
    try:
        if needs.problems.training is not None:
            problems += load_problems(needs.problems.training, "train", seed).values()
        for data in needs.problems.held_out:
            problems += load_problems(data, "test", seed).values()
    except Unreachable as error:
        print(f"data: {error}")
    return problems


def _prompt(needs: StageNeeds, problems: Sequence[Sequence[Problem]]) -> str:
    """Returns the first prompt as text, after checking that every prompt fits."""
    config = needs.config
    problem = problems[0][0]
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with quiet(Path(scratch) / "log"):
                model_dir = models.locate(config.model, Path(scratch), config.seed, weights=False)
                tokenizer = models.load_tokenizer(model_dir)
                prompts = Prompts(config.prompt, tokenizer, models.eos_token_ids(model_dir))
            models.check_context(model_dir, needs.max_sequence_tokens)
        except Unreachable as error:
            text = problem.question
            if config.prompt.template == "r1_zero":
                text = R1_ZERO.replace("{question}", problem.question)
            return f"prompt ({config.prompt.template}; no tokenizer: {error}):\n{text}"
    for rows in problems:
        prompts.fitting(rows)
    return _rendered(needs, prompts, tokenizer, problem)


def _rendered(needs: StageNeeds, prompts: Prompts, tokenizer: Any, problem: Problem) -> str:
    """Returns a problem's prompt as the model reads it, with its length and what ends it."""
    num_tokens = len(prompts.ids(problem))
    text = prompts.text(problem)
    if needs.shows_solution:
        text += str(tokenizer.decode(list(prompts.target_ids(problem))))
    ends = ", ".join(tokenizer.convert_ids_to_tokens(list(prompts.stop_token_ids)))
    stop = f", stop strings {', '.join(prompts.stop)}" if prompts.stop else ""
    return f"prompt ({num_tokens} tokens, ends at {ends}{stop}):\n{visible(text, tokenizer)}"
