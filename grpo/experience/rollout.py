"""Problems become groups of completions, groups become scored groups.

Knows engines and rewards by their interfaces only; no torch.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from grpo.engines import Engine, Request, SamplingOptions
from grpo.experience.plugins import Prompt, RewardFunction, failed
from grpo.experience.prompts import Chat, Prompts
from grpo.learning.advantages import has_signal
from grpo.run import ranks
from grpo.types import Completion, Group, Problem, Sample, Score, ScoredGroup, Verdict

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


def score(
    groups: Sequence[Group],
    rewards: Mapping[str, tuple[RewardFunction, float]],
    asked_as: Callable[[Problem], Prompt],
) -> list[ScoredGroup]:
    """Returns the groups with rewards: the weighted sum of the functions that apply.

    `rewards`: name -> (function, weight).

    `asked_as`: the prompt that a problem's rewards are shown.
    """
    asked = [asked_as(group.problem) for group in groups]
    columns = {name: function(groups, asked) for name, (function, _) in rewards.items()}
    weights = {name: weight for name, (_, weight) in rewards.items()}
    return [
        _score(group, {name: column[n] for name, column in columns.items()}, weights)
        for n, group in enumerate(groups)
    ]


def _score(
    group: Group, columns: Mapping[str, Sequence[Any]], weights: Mapping[str, float]
) -> ScoredGroup:
    totals, parts, verdicts, faults = [], [], [], []
    for i in range(len(group.completions)):
        values = {name: column[i] for name, column in columns.items()}
        verdict = next((value for value in values.values() if isinstance(value, Verdict)), None)
        part = {name: _number(value) for name, value in values.items()}
        undecided = any(
            isinstance(value, Verdict) and value.value == "undecided" for value in values.values()
        )
        for name, value in part.items():
            if value is not None and not math.isfinite(value):
                raise failed(name, group, i, f"it gave {value}")
        known = [weights[name] * value for name, value in part.items() if value is not None]
        totals.append(None if undecided or not known else sum(known))
        parts.append(part)
        verdicts.append(verdict)
        faults.append(
            {
                name: value.reason
                for name, value in values.items()
                if isinstance(value, Score) and value.reason
            }
        )
    return ScoredGroup(
        group=group,
        rewards=tuple(totals),
        parts=tuple(parts),
        verdicts=tuple(verdicts),
        faults=tuple(faults),
    )


def _number(value: float | Score | Verdict | None) -> float | None:
    if isinstance(value, Verdict):
        return {"correct": 1.0, "wrong": 0.0, "undecided": None}[value.value]
    return value.value if isinstance(value, Score) else None if value is None else float(value)


def describe(groups: Sequence[ScoredGroup]) -> dict[str, Any]:
    """Returns the metrics of scored groups.

    Every `mean` is over completions, every `group/` share over groups.
    """
    completions = [completion for scored in groups for completion in scored.group.completions]
    rewards = [reward for scored in groups for reward in scored.rewards]
    known = [reward for reward in rewards if reward is not None]
    lengths = [len(completion.token_ids) for completion in completions]
    metrics: dict[str, Any] = {
        "reward/mean": mean(known),
        "reward/missing": 1 - len(known) / len(rewards),
        "group/no_signal": mean([float(not has_signal(scored.rewards)) for scored in groups]),
        "completion/length": mean(lengths),
        "completion/length_max": float(max(lengths)),
        "completion/truncated": mean(
            [float(completion.finish_reason == "length") for completion in completions]
        ),
        "completion/tokens": float(sum(lengths)),
        # completions of 2^i to 2^(i+1) - 1 tokens
        "histogram/length": _histogram([length.bit_length() - 1 for length in lengths]),
    }
    for name in groups[0].parts[0]:
        values = [
            value for scored in groups for part in scored.parts if (value := part[name]) is not None
        ]
        metrics[f"reward/{name}"] = mean(values)
    faults = Counter(
        f"{name}/{reason.replace(' ', '_')}"
        for scored in groups
        for fault in scored.faults
        for name, reason in fault.items()
    )
    metrics |= {fault: count / len(completions) for fault, count in sorted(faults.items())}
    verdicts = [verdict for scored in groups for verdict in scored.verdicts if verdict is not None]
    if verdicts:
        metrics["reward/undecided"] = mean(
            [float(verdict.value == "undecided") for verdict in verdicts]
        )
        metrics["group/all_correct"] = mean(
            [float(all(v and v.value == "correct" for v in scored.verdicts)) for scored in groups]
        )
        metrics["group/all_wrong"] = mean(
            [float(all(v and v.value == "wrong" for v in scored.verdicts)) for scored in groups]
        )
    return metrics


def staleness(groups: Sequence[ScoredGroup], version: int) -> dict[str, Any]:
    """Returns how many versions older than the learner's the weights were that sampled each token.

    The metrics are the mean, the maximum, and the tokens by age.
    """
    spans = [
        span
        for scored in groups
        for completion in scored.group.completions
        for span in completion.versions
    ]
    ages = Counter[int]()
    for sampled, start, end in spans:
        ages[version - sampled] += end - start
    total = sum(ages.values())
    return {
        "staleness/mean": sum(age * count for age, count in ages.items()) / total,
        "staleness/max": float(max(ages)),
        "histogram/staleness": [ages[age] for age in range(max(ages) + 1)],
    }


def sample_rows(
    groups: Sequence[ScoredGroup],
    used: Sequence[ScoredGroup] = (),
    values: Sequence[Sequence[tuple[float, ...]]] = (),
) -> list[dict[str, Any]]:
    """Returns one JSON object per completion.

    It has what was asked, what came, how it was judged, and the advantage if the completion is used
    now.
    """
    of_group = {id(scored): rows for scored, rows in zip(used, values, strict=True)}
    return [
        {
            "problem": scored.group.problem.id,
            "question": scored.group.problem.question,
            "answer": scored.group.problem.answer,
            "meta": scored.group.problem.meta,
            "completion": completion.text,
            "tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "reward": scored.rewards[i],
            "parts": scored.parts[i],
            "faults": scored.faults[i],
            "verdict": (verdict := scored.verdicts[i]) and verdict.value,
            "reason": verdict and verdict.reason,
            "advantage": of_group[id(scored)][i][0] if id(scored) in of_group else None,
            "version": completion.versions[0][0],
        }
        for scored in groups
        for i, completion in enumerate(scored.group.completions)
    ]


def advantage_histogram(samples: Sequence[Sample]) -> list[int]:
    """Returns how many samples have which mean advantage of their tokens.

    The bins are 0.5 wide, around -4 to 4. The outer ones hold what lies beyond.
    """
    means = [mean(sample.advantages) for sample in samples]
    return _histogram(
        [round(2 * max(-4.0, min(4.0, each))) + 8 for each in means if each == each], 17
    )


def _histogram(places: Sequence[int], size: int = 0) -> list[int]:
    counts = Counter(places)
    return [counts[i] for i in range(size or max(places) + 1)]


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


def mean(values: Sequence[float]) -> float:
    """Returns the mean, NaN of nothing."""
    return sum(values) / len(values) if values else float("nan")
