"""Metrics on held-out problems: they are sampled, scored and described on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from grpo.engines import Engine, SamplingOptions
from grpo.experience.describing import describe, sample_rows
from grpo.experience.plugins import RewardFunction
from grpo.experience.prompts import Prompts
from grpo.experience.sampling import sample
from grpo.experience.scoring import score
from grpo.run import ranks
from grpo.types import Problem, ScoredGroup


def evaluate(
    engine: Engine,
    prompts: Prompts,
    problems: Sequence[Problem],
    rewards: Mapping[str, tuple[RewardFunction, float]],
    options: SamplingOptions,
    *,
    samples: int,
    run_seed: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Returns `eval/` metrics of held-out problems, and the rows of `sample_rows`.

    The metrics are means over `samples` completions per problem. Above temperature 0 one greedy
    completion per problem is judged too, as `eval/greedy/`. The seeds are the same at every call.
    """
    metrics: dict[str, float] = {}
    kept: list[dict[str, Any]] = []
    passes = {"eval/": (options, samples)} | (
        {"eval/greedy/": (replace(options, temperature=0.0), 1)} if options.temperature > 0 else {}
    )
    for prefix, (chosen, size) in passes.items():

        def judged(
            share: slice, chosen: SamplingOptions = chosen, size: int = size
        ) -> list[ScoredGroup]:
            groups = sample(
                engine,
                prompts,
                problems,
                chosen,
                group_size=size,
                run_seed=run_seed,
                rollout=0,
                on_progress=on_progress,
                share=share,
            )
            return score(groups, rewards, prompts.for_rewards)

        scored = ranks.split_across_ranks("the evaluation of the other ranks", judged)
        kept += [row | {"greedy": prefix == "eval/greedy/"} for row in sample_rows(scored)]
        found = describe(scored)
        wanted = {
            key: value for key, value in found.items() if key.startswith(("reward/", "completion/"))
        }
        metrics |= {prefix + key.removeprefix("reward/"): value for key, value in wanted.items()}
    return metrics, kept
