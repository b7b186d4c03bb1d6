"""Advantages of a group's completions from their rewards. Pure functions of plain numbers; `None` rewards are left out."""

from __future__ import annotations

from collections.abc import Sequence

from grpo.types import Sample, ScoredGroup

EPSILON = 1e-6


def group_advantages(rewards_G: Sequence[float | None], kind: str) -> list[float]:
    """Returns the advantages [G] of one group: `group_std` (r - mean) / (std + 1e-6), `none` r - mean.

    `group_advantages([1, 0, 0, 1], "group_std") == [1, -1, -1, 1]` (up to 1e-6). A completion without a reward gets 0 and does not
    enter mean or std. A group whose rewards are all equal (decided by max == min, not by an epsilon), or that has one reward, gets 0.
    Source: DeepSeekMath 2402.03300 section 4.1.2; `none`: Dr.GRPO 2503.20783. Ours: population std, eps 1e-6.
    """
    known = [reward for reward in rewards_G if reward is not None]
    if not has_signal(rewards_G):
        return [0.0] * len(rewards_G)
    mean = sum(known) / len(known)
    std = (sum((reward - mean) ** 2 for reward in known) / len(known)) ** 0.5
    scale = {"group_std": std + EPSILON, "none": 1.0}[kind]
    return [0.0 if reward is None else (reward - mean) / scale for reward in rewards_G]


def has_signal(rewards_G: Sequence[float | None]) -> bool:
    """Returns whether a group's rewards differ, so that it teaches something."""
    known = [reward for reward in rewards_G if reward is not None]
    return bool(known) and max(known) != min(known)


def to_samples(groups: Sequence[ScoredGroup], kind: str) -> list[Sample]:
    """Returns one sample for each completion that has a reward, groups in order, the advantage repeated over its tokens."""
    samples = []
    for scored in groups:
        advantages = group_advantages(scored.rewards, kind)
        for completion, reward, advantage in zip(scored.group.completions, scored.rewards, advantages, strict=True):
            if reward is not None:
                samples.append(
                    Sample(
                        token_ids=scored.group.prompt_ids + completion.token_ids,
                        prompt_length=len(scored.group.prompt_ids),
                        advantages=(advantage,) * len(completion.token_ids),
                        sampler_logprobs=completion.logprobs,
                    )
                )
    return samples
