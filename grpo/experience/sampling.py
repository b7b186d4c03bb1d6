"""Samples groups: derives seeds, sends requests to an engine, and returns completions as groups.

It uses any engine through the `Engine` protocol, and does not import torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from grpo.engines import Engine, Request, SamplingOptions
from grpo.experience.prompts import ChatPrompts, Prompts
from grpo.types import Completion, Group, Problem

if TYPE_CHECKING:
    from grpo.config import SamplingStageConfig


def derive_seed(run_seed: int, rollout: int | str, problem_id: str) -> int:
    """Returns the sampling seed of a group. Completion i of the group has this seed plus i.

    The seed depends on the arguments only, so a resumed run needs no sampler state.

    Args:
        run_seed: The config key `seed`.
        rollout: Number of completed rollouts, or another key, such as "stream/7".
        problem_id: Id of the problem, or another key.
    """
    digest = hashlib.blake2b(f"{run_seed}/{rollout}/{problem_id}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big")


def sampling_options(
    config: SamplingStageConfig, prompts: Prompts | ChatPrompts, temperature: float
) -> SamplingOptions:
    """Returns the engine's sampling options for a config.

    `temperature` is an argument because an evaluation has its own (`eval.temperature`).
    """
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


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRequest:
    """A problem and the engine request that samples its group."""

    problem: Problem
    request: Request


def make_group_requests(
    prompts: Prompts,
    problems: Sequence[Problem],
    *,
    group_size: int,
    run_seed: int,
    rollout: int | str,
) -> list[GroupRequest]:
    """Returns one request of `group_size` completions per problem, in order.

    If a problem occurs several times, each occurrence has its own seed. To sample only a part of
    the problems, slice the result: the seeds stay those of the complete list.

    `run_seed` and `rollout` are arguments of `derive_seed`.
    """
    occurrences: dict[str, int] = {}
    requests = []
    for problem in problems:
        occurrence = occurrences.get(problem.id, 0)
        occurrences[problem.id] = occurrence + 1
        seed_key = f"{problem.id}#{occurrence}" if occurrence else problem.id
        request = Request(
            prompt_ids=prompts.token_ids(problem),
            seed=derive_seed(run_seed, rollout, seed_key),
            n=group_size,
        )
        requests.append(GroupRequest(problem=problem, request=request))
    return requests


def sample(
    engine: Engine,
    prompts: Prompts,
    requests: Sequence[GroupRequest],
    options: SamplingOptions,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Group]:
    """Samples one group per request and returns the groups in order.

    The prefix cache is emptied first, so that a resumed run starts with the same cache as a run
    that was never interrupted.

    Args:
        engine: The engine.
        prompts: The prompts that `requests` were built with.
        requests: From `make_group_requests`.
        options: How the engine samples.
        on_progress: Called as `on_progress(done, total)` with the number of finished completions.
    """
    engine.reset_cache()
    completions_per_request = engine.generate(
        [group_request.request for group_request in requests], options, on_progress
    )
    groups = []
    for group_request, completions in zip(requests, completions_per_request, strict=True):
        problem = group_request.problem
        request = group_request.request
        assert len(completions) == request.n, (
            f"the engine returned {len(completions)} completions for problem {problem.id}, "
            f"expected {request.n}"
        )
        groups.append(make_group(problem, request.prompt_ids, prompts, completions))
    return groups


def make_group(
    problem: Problem,
    prompt_ids: tuple[int, ...],
    prompts: Prompts,
    completions: Sequence[Completion],
) -> Group:
    """Returns a problem's completions as a group.

    If the prompt ends with a `<think>` prefill, it is prepended to the text of each completion,
    because rewards expect complete tags.
    """
    prefill = prompts.prefill(problem)
    with_prefill = [
        replace(completion, text=prefill + completion.text) for completion in completions
    ]
    return Group(problem=problem, prompt_ids=prompt_ids, completions=tuple(with_prefill))
