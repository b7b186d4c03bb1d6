"""Problems become groups of completions: seeds, options and requests to an engine.

Knows engines by their interface only; no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from grpo.engines import Engine, Request, SamplingOptions
from grpo.experience.prompts import Chat, Prompts
from grpo.types import Completion, Group, Problem

if TYPE_CHECKING:
    from grpo.config import SampledConfig


def seed_of(run_seed: int, rollout: int | str, problem_id: str) -> int:
    """Returns a group's sampling seed; completion i has this plus i.

    A function of its arguments alone: a resume needs no sampler state.
    """
    digest = hashlib.blake2b(f"{run_seed}/{rollout}/{problem_id}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big")


def sampling_options(
    config: SampledConfig, prompts: Prompts | Chat, temperature: float
) -> SamplingOptions:
    """Returns how a config samples."""
    sampling = config.sampling
    return SamplingOptions(
        max_tokens=sampling.max_tokens,
        temperature=temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop=prompts.stop,
        stop_token_ids=prompts.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
    )


def sample(
    engine: Engine,
    prompts: Prompts,
    problems: Sequence[Problem],
    options: SamplingOptions,
    *,
    group_size: int,
    run_seed: int,
    rollout: int | str,
    on_progress: Callable[[int, int], None] | None = None,
    share: slice = slice(None),
) -> list[Group]:
    """Returns one group of `group_size` completions per problem, in order.

    Only the problems at `share` are sampled, with the seeds that they have among all.
    """
    ids = [prompts.ids(problem) for problem in problems]
    seen: dict[str, int] = {}
    requests = []
    for problem, prompt_ids in zip(problems, ids, strict=True):
        # a small set comes round within a rollout: other samples then
        again = seen[problem.id] = seen.get(problem.id, -1) + 1
        key = f"{problem.id}#{again}" if again else problem.id
        requests.append(
            Request(prompt_ids=prompt_ids, seed=seed_of(run_seed, rollout, key), n=group_size)
        )
    # a resumed run and one that was never interrupted find the same, empty one
    engine.reset_cache()
    completions = engine.generate(requests[share], options, on_progress)
    groups = []
    for problem, prompt_ids, group in zip(problems[share], ids[share], completions, strict=True):
        assert len(group) == group_size, (
            f"got {len(group)} completions for {problem.id}, asked for {group_size}"
        )
        groups.append(group_of(problem, prompt_ids, prompts, group))
    return groups


def group_of(
    problem: Problem,
    prompt_ids: tuple[int, ...],
    prompts: Prompts,
    completions: Sequence[Completion],
) -> Group:
    """Returns completions as a group, what the prompt prefilled put back in front of their text."""
    prefill = prompts.prefill(problem)
    whole = tuple(replace(completion, text=prefill + completion.text) for completion in completions)
    return Group(problem=problem, prompt_ids=prompt_ids, completions=whole)
