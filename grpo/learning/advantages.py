"""Advantages of completions from their rewards.

Pure functions of plain numbers; `None` rewards are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from grpo.types import Sample, ScoredGroup

T = TypeVar("T")
EPSILON = 1e-6
KINDS = ("group_std", "none", "leave_one_out", "batch_std", "centered_std", "batch", "teacher")
# a group's completions' tokens: what each token costs
Penalties = Sequence[Sequence[Sequence[float]]]


def advantages(
    rewards_PG: Sequence[Sequence[float | None]],
    lengths_PG: Sequence[Sequence[int]],
    kind: str,
    penalties: Penalties | None = None,
) -> list[list[tuple[float, ...]]]:
    """Returns the advantage of each completion's tokens, groups and completions in order.

    With r the reward less all its penalties:

    group_std      (r - mean) / (std + 1e-6), mean and std of the group
                   DeepSeekMath 2402.03300 section 4.1.2
    none           r - mean
                   Dr.GRPO 2503.20783
    leave_one_out  r - mean of the others
                   RLOO 2402.14740 Eq. 8
    batch_std      (r - mean of the group) / (std of all r + 1e-6)
                   Lite-PPO 2508.08221
    centered_std   (r - mean of the group) / (std of all of these + 1e-6)
                   ScaleRL 2510.13786, REINFORCE++-baseline 2501.03262
    batch          (R_t - mean) / (std + 1e-6) over all tokens of the batch, R_t the reward less
                   the penalties from t on
                   REINFORCE++ 2501.03262 Eq. 8-10
    teacher        -log(pi / pi_teacher) of the token, which is its penalty
                   GKD 2306.13649, with discount 0

    `advantages([[1, 0, 0, 1]], [[1] * 4], "group_std")` is +-1 (up to 1e-6). A completion without a
    reward gets 0 and enters no mean. A group whose rewards are all equal (decided by max == min,
    not by an epsilon), or that has one reward, gets 0. Ours: population std.

    Raises ValueError for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown advantage {kind!r}; have {', '.join(KINDS)}")
    if penalties is None:
        penalties = [[()] * len(lengths) for lengths in lengths_PG]
    if kind == "teacher":
        return [[tuple(-cost for cost in costs) for costs in rows] for rows in penalties]
    if kind == "batch":
        return _batch(rewards_PG, lengths_PG, penalties)
    totals = [
        [
            None if reward is None else reward - sum(cost)
            for reward, cost in zip(rewards, costs, strict=True)
        ]
        for rewards, costs in zip(rewards_PG, penalties, strict=True)
    ]
    batch_std = _mean_std(_centered(totals) if kind == "centered_std" else _decided(totals))[1]
    return [
        [
            (value,) * length
            for value, length in zip(_of_group(group, kind, batch_std), lengths, strict=True)
        ]
        for group, lengths in zip(totals, lengths_PG, strict=True)
    ]


def _decided(totals_PG: Sequence[Sequence[float | None]]) -> list[float]:
    """Returns all rewards of a batch."""
    return [total for group in totals_PG for total in group if total is not None]


def _centered(totals_PG: Sequence[Sequence[float | None]]) -> list[float]:
    """Returns all rewards of a batch, less the mean of their group."""
    centered = []
    for group in totals_PG:
        rewards = [total for total in group if total is not None]
        mean, _ = _mean_std(rewards)
        centered += [reward - mean for reward in rewards]
    return centered


def _of_group(rewards_G: Sequence[float | None], kind: str, batch_std: float) -> list[float]:
    if not has_signal(rewards_G):
        return [0.0] * len(rewards_G)
    rewards = [reward for reward in rewards_G if reward is not None]
    mean, std = _mean_std(rewards)
    if kind == "group_std":
        scale = std + EPSILON
    elif kind == "none":
        scale = 1.0
    elif kind == "leave_one_out":
        scale = 1 - 1 / len(rewards)
    else:  # batch_std, centered_std
        scale = batch_std + EPSILON
    return [0.0 if reward is None else (reward - mean) / scale for reward in rewards_G]


def _batch(
    rewards_PG: Sequence[Sequence[float | None]],
    lengths_PG: Sequence[Sequence[int]],
    penalties: Penalties,
) -> list[list[tuple[float, ...]]]:
    returns = [
        [
            None if reward is None else _returns(reward, cost or (0.0,) * length)
            for reward, length, cost in zip(*rows, strict=True)
        ]
        for rows in zip(rewards_PG, lengths_PG, penalties, strict=True)
    ]
    known = [
        value for group in returns for tokens in group if tokens is not None for value in tokens
    ]
    mean, std = _mean_std(known)
    scale = std + EPSILON if known and max(known) != min(known) else float("inf")
    return [
        [
            (0.0,) * length if tokens is None else tuple((value - mean) / scale for value in tokens)
            for tokens, length in zip(group, lengths, strict=True)
        ]
        for group, lengths in zip(returns, lengths_PG, strict=True)
    ]


def _returns(reward: float, costs: Sequence[float]) -> list[float]:
    left, found = reward, []
    for cost in reversed(costs):
        left -= cost
        found.append(left)
    return found[::-1]


def _mean_std(values: Sequence[float]) -> tuple[float, float]:
    mean = sum(values) / len(values) if values else 0.0
    return mean, (sum((value - mean) ** 2 for value in values) / max(1, len(values))) ** 0.5


def has_signal(rewards_G: Sequence[float | None]) -> bool:
    """Returns whether a group's rewards differ, so that it teaches something."""
    known = [reward for reward in rewards_G if reward is not None]
    return bool(known) and max(known) != min(known)


def to_samples(
    groups: Sequence[ScoredGroup],
    values: Sequence[Sequence[tuple[float, ...]]],
    *,
    mask_truncated: bool = False,
) -> list[Sample]:
    """Returns one sample for each completion that has a reward, groups in order.

    `values` are their advantages.

    `mask_truncated` leaves out those that were cut off, whose rewards have counted in the means
    (overlong filtering, DAPO 2503.14476).
    """
    return [
        Sample(
            token_ids=scored.group.prompt_ids + completion.token_ids,
            prompt_length=len(scored.group.prompt_ids),
            advantages=value,
            sampler_logprobs=completion.logprobs,
            group=number,
            reward=reward,
            versions=tuple(
                version for version, start, end in completion.versions for _ in range(start, end)
            ),
        )
        for number, (scored, rows) in enumerate(zip(groups, values, strict=True))
        for completion, reward, value in zip(
            scored.group.completions, scored.rewards, rows, strict=True
        )
        if reward is not None and not (mask_truncated and completion.finish_reason == "length")
    ]


def lengths(groups: Sequence[ScoredGroup]) -> list[list[int]]:
    """Returns each completion's tokens."""
    return [
        [len(completion.token_ids) for completion in scored.group.completions] for scored in groups
    ]


def unflatten(values: Sequence[T], lengths: Sequence[int]) -> list[list[T]]:
    """Returns the values in consecutive parts of the given lengths.

    `unflatten([1, 2, 3], [1, 2])` is `[[1], [2, 3]]`.
    """
    parts = []
    start = 0
    for length in lengths:
        parts.append(list(values[start : start + length]))
        start += length
    return parts
