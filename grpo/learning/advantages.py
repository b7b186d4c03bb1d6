"""Advantages: one number per completion token, computed from the rewards of a rollout.

Pure functions of Python floats; nothing here uses torch. `advantages` computes every kind that
`algorithm.advantage` can name, and cites the equation of each.

Axes in names: P problems, G completions of a problem, L tokens of a completion (ragged).
`rewards_PG[p][g]` is the reward of completion g of problem p. The completions of a problem are its
group.

Conventions, which the papers do not always state:
- std is the population standard deviation: the sum of squares is divided by n, not by n - 1.
- `None` in place of a reward means that the completion has no reward. It is excluded from every
  mean and std, and its advantage is 0.
- A group whose rewards are all equal, or that has a single reward, gets advantage 0. (For the kind
  `batch`, this holds for all tokens of the batch instead of a group.) The test is max == min,
  because rounding can make r - mean(group) differ from 0. For the kinds in NORMALIZED_ADVANTAGES,
  penalties are subtracted afterwards; for the others, before.
- The kind `teacher` does not use rewards, so neither rule applies to it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from grpo.config.algorithm import NORMALIZED_ADVANTAGES, AlgorithmSettings
from grpo.types import Completion, Group, Sample, ScoredGroup, TeacherText

T = TypeVar("T")
EPSILON = 1e-6  # added to a standard deviation before the division
# Clamp of the kind `teacher`, for tokens that the teacher finds nearly impossible. Source: verl's
# recipes of on-policy distillation.
MAX_TEACHER_ADVANTAGE = 10.0
KINDS = (
    "group_std",
    "none",
    "leave_one_out",
    "batch_std",
    "centered_std",
    "centered_batch",
    "group_mean",
    "per_reward",
    "batch",
    "teacher",
)
# [P, G, L]: the amount that is subtracted from the reward for each token
Penalties = Sequence[Sequence[Sequence[float]]]


def advantages(
    rewards_PG: Sequence[Sequence[float | None]],
    lengths_PG: Sequence[Sequence[int]],
    kind: str,
    penalties_PGL: Penalties | None = None,
) -> list[list[tuple[float, ...]]]:
    """Returns the advantage of every completion token, [P, G, L].

    `kind` selects the equation. r is the reward of a completion.

    group_std      (r - mean(group)) / (std(group) + EPSILON)
                   Source: GRPO, DeepSeekMath 2402.03300 section 4.1.2
    batch_std      (r - mean(group)) / (std(r of all groups) + EPSILON)
                   Source: Lite-PPO 2508.08221
    centered_std   (r - mean(group)) / (std(r - mean(group) of all groups) + EPSILON)
                   Source: ScaleRL 2510.13786
    centered_batch (c - mean(c)) / (std(c) + EPSILON), where c = r - mean(group), and mean and std
                   are over all tokens of the batch
                   Source: REINFORCE++ with baseline, 2501.03262; over tokens as in OpenRLHF, verl
                   and NeMo RL. A group with equal rewards gets 0 here and -mean(c) / std(c) there.
    group_mean     (r - mean(group)) / mean(group), 0 if the mean is not positive
                   Source: MaxRL 2602.02710. The paper has rewards of 0 and 1. Without an EPSILON,
                   as in prime-rl; verl's fork of the authors and SkyRL add 1e-6 to the mean.
    per_reward     as centered_std; r is the result of `normalized_rewards`
                   Source: GDPO 2601.05242
    none           r' - mean(group), where r' = r minus the sum of the completion's penalties
                   Source: Dr.GRPO 2503.20783
    leave_one_out  r' - mean(the other completions of the group)
                   Source: RLOO 2402.14740 Eq. 8
    batch          (R_t - mean) / (std + EPSILON), mean and std over all tokens of the batch.
                   R_t is the reward minus the sum of the penalties of token t and all later tokens.
                   Source: REINFORCE++ 2501.03262 Eq. 8-10
    teacher        -log(pi / pi_teacher) of the token, the negated penalty of the token, clamped to
                   +-MAX_TEACHER_ADVANTAGE
                   Source: GKD 2306.13649, with discount 0

    For the kinds in NORMALIZED_ADVANTAGES, the penalties of token t and all later tokens are
    subtracted from the normalized reward. If they were part of r, a group with equal rewards would
    have advantages of +-1 from penalties of 1e-5.
    Source: OpenRLHF's group_norm, for `group_std`. DeepSeekMath defines no KL in the reward, and
    the papers of the other kinds have none.

    Example:
        `advantages([[1, 0, 0, 1]], [[1, 1, 1, 2]], "group_std")` returns
        `[[(1.0,), (-1.0,), (-1.0,), (1.0, 1.0)]]`, up to EPSILON.

    Args:
        rewards_PG: rewards [P, G], `None` for a completion without a reward.
        lengths_PG: number of tokens of each completion [P, G].
        kind: one of KINDS.
        penalties_PGL: penalties [P, G, L]; `None` means zero. For `teacher`, the penalty of a token
            is log(pi / pi_teacher).

    Raises:
        ValueError: `kind` is unknown.
    """
    if kind not in KINDS:
        raise ValueError(
            f"algorithm.advantage={kind}: unknown kind. Available: {', '.join(KINDS)}."
        )
    if kind in ("teacher", "batch"):  # kinds with an advantage per token
        if penalties_PGL is None:
            penalties_PGL = [[(0.0,) * length for length in lengths_G] for lengths_G in lengths_PG]
        if kind == "teacher":
            return _teacher_advantages(penalties_PGL)
        return _batch_advantages(rewards_PG, penalties_PGL)
    if penalties_PGL is None:
        advantages_PG = _group_relative_advantages(rewards_PG, lengths_PG, kind)
        return _repeat_for_tokens(advantages_PG, lengths_PG)
    if kind in NORMALIZED_ADVANTAGES:
        advantages_PG = _group_relative_advantages(rewards_PG, lengths_PG, kind)
        return _subtract_penalties(advantages_PG, rewards_PG, penalties_PGL)
    penalized_PG = _penalized_rewards(rewards_PG, penalties_PGL)
    advantages_PG = _group_relative_advantages(penalized_PG, lengths_PG, kind)
    return _repeat_for_tokens(advantages_PG, lengths_PG)


def normalized_rewards(
    rewards_PG: Sequence[Sequence[float | None]],
    parts_PG: Sequence[Sequence[Mapping[str, float | None]]],
    weights: Mapping[str, float],
) -> list[list[float | None]]:
    """Returns the sum of weight_n (r_n - mean(group)) / (std(group) + EPSILON), [P, G].

    r_n is the value of reward n. It is normalized among the completions of the group that have a
    reward and to which reward n applies. None for a completion without a reward.

    Example:
        Two completions with accuracy 1 and 0 and format 0 and 0.5 have the rewards 0 and 0 if both
        weights are 1: each reward separates them by the same distance.

    Args:
        rewards_PG: rewards [P, G], `None` for a completion without a reward.
        parts_PG: the value of each reward [P, G] by name, as in `ScoredGroup.parts`.
        weights: the weight of each reward by name.

    Source: GDPO 2601.05242. TRL's `normalize_then_sum` has the std of a sample.
    """
    sums_PG = []
    for rewards_G, parts_G in zip(rewards_PG, parts_PG, strict=True):
        has_reward = [reward is not None for reward in rewards_G]
        sums_G: list[float | None] = [0.0 if rewarded else None for rewarded in has_reward]
        for name, weight in weights.items():
            values_G = [
                parts[name] if rewarded else None
                for parts, rewarded in zip(parts_G, has_reward, strict=True)
            ]
            lengths_G = [1] * len(values_G)
            [normalized_G] = _group_relative_advantages([values_G], [lengths_G], "group_std")
            sums_G = [
                None if total is None else total + weight * value
                for total, value in zip(sums_G, normalized_G, strict=True)
            ]
        sums_PG.append(sums_G)
    return sums_PG


def recipe_advantages(
    algorithm: AlgorithmSettings,
    rewards_PG: Sequence[Sequence[float | None]],
    lengths_PG: Sequence[Sequence[int]],
    penalties_PGL: Penalties | None,
) -> list[list[tuple[float, ...]]]:
    """Returns the advantages of a recipe, including a teacher's signal beside the rewards.

    Args:
        algorithm: the recipe.
        rewards_PG: as in `advantages`.
        lengths_PG: as in `advantages`.
        penalties_PGL: result of `Updater.kl_penalties`: as in `advantages`, or log(pi / pi_teacher)
            with `teacher_coef`.
    """
    kind = algorithm.advantage
    if kind == "teacher" or not algorithm.has_teacher_advantage or penalties_PGL is None:
        return advantages(rewards_PG, lengths_PG, kind, penalties_PGL)
    advantages_PGL = advantages(rewards_PG, lengths_PG, kind)
    return _with_teacher_signal(advantages_PGL, penalties_PGL, algorithm.teacher_coef)


def _penalized_rewards(
    rewards_PG: Sequence[Sequence[float | None]], penalties_PGL: Penalties
) -> list[list[float | None]]:
    """Returns r = reward - sum of the completion's penalties, [P, G]."""
    penalized_PG = []
    for rewards_G, penalties_GL in zip(rewards_PG, penalties_PGL, strict=True):
        penalized_G: list[float | None] = []
        for reward, penalties_L in zip(rewards_G, penalties_GL, strict=True):
            penalized_G.append(None if reward is None else reward - sum(penalties_L))
        penalized_PG.append(penalized_G)
    return penalized_PG


def _group_relative_advantages(
    rewards_PG: Sequence[Sequence[float | None]], lengths_PG: Sequence[Sequence[int]], kind: str
) -> list[list[float]]:
    """Returns (r - mean(group) - shift) / scale, [P, G]; r is `rewards_PG`.

    `kind` selects the scale. The shift is 0, except for `centered_batch`.
    """
    shift = 0.0
    batch_std = 0.0
    if kind == "batch_std":
        batch_std = _population_std(_all_rewards(rewards_PG))
    elif kind in ("centered_std", "per_reward"):
        batch_std = _population_std(_all_centered_rewards(rewards_PG))
    elif kind == "centered_batch":
        token_rewards = _centered_rewards_of_tokens(rewards_PG, lengths_PG)
        shift = _mean(token_rewards)
        batch_std = _population_std(token_rewards)

    advantages_PG = []
    for rewards_G in rewards_PG:
        if not rewards_differ(rewards_G):
            advantages_PG.append([0.0] * len(rewards_G))
            continue
        rewards = _without_none(rewards_G)
        mean = _mean(rewards)
        scale = _scale(rewards, kind, batch_std)
        advantages_PG.append(
            [0.0 if reward is None else (reward - mean - shift) / scale for reward in rewards_G]
        )
    return advantages_PG


def _scale(rewards: Sequence[float], kind: str, batch_std: float) -> float:
    """Returns the divisor of a group's centered rewards."""
    if kind == "group_std":
        return _population_std(rewards) + EPSILON
    if kind in ("batch_std", "centered_std", "centered_batch", "per_reward"):
        return batch_std + EPSILON
    if kind == "group_mean":
        mean = _mean(rewards)
        return mean if mean > 0 else math.inf  # makes every advantage 0
    if kind == "leave_one_out":
        # With n rewards, r - mean(the others) = (r - mean) * n / (n - 1) = (r - mean) / (1 - 1/n).
        return 1 - 1 / len(rewards)
    return 1.0


def _batch_advantages(
    rewards_PG: Sequence[Sequence[float | None]], penalties_PGL: Penalties
) -> list[list[tuple[float, ...]]]:
    """Returns (R_t - mean) / scale, with mean and scale over all tokens of the batch, [P, G, L]."""
    all_returns: list[float] = []
    for rewards_G, penalties_GL in zip(rewards_PG, penalties_PGL, strict=True):
        for reward, penalties_L in zip(rewards_G, penalties_GL, strict=True):
            if reward is not None:
                all_returns += _returns_to_go(reward, penalties_L)
    mean = _mean(all_returns)
    scale = math.inf  # makes every advantage 0
    if rewards_differ(all_returns):
        scale = _population_std(all_returns) + EPSILON
    advantages_PGL = []
    for rewards_G, penalties_GL in zip(rewards_PG, penalties_PGL, strict=True):
        advantages_GL: list[tuple[float, ...]] = []
        for reward, penalties_L in zip(rewards_G, penalties_GL, strict=True):
            if reward is None:
                advantages_GL.append((0.0,) * len(penalties_L))
            else:
                returns_L = _returns_to_go(reward, penalties_L)
                advantages_GL.append(tuple((value - mean) / scale for value in returns_L))
        advantages_PGL.append(advantages_GL)
    return advantages_PGL


def _returns_to_go(reward: float, penalties_L: Sequence[float]) -> list[float]:
    """Returns R_t = reward - sum of the penalties from token t to the last token, [L].

    `_returns_to_go(1.0, [0.5, 0.25])` is `[0.25, 0.75]`.
    """
    return_to_go = reward
    reversed_returns = []
    for penalty in reversed(penalties_L):
        return_to_go -= penalty
        reversed_returns.append(return_to_go)
    return reversed_returns[::-1]


def _subtract_penalties(
    advantages_PG: Sequence[Sequence[float]],
    rewards_PG: Sequence[Sequence[float | None]],
    penalties_PGL: Penalties,
) -> list[list[tuple[float, ...]]]:
    """Returns the advantages minus the penalties from each token to the last token, [P, G, L].

    A completion without a reward keeps the advantage 0.
    """
    advantages_PGL = []
    for advantages_G, rewards_G, penalties_GL in zip(
        advantages_PG, rewards_PG, penalties_PGL, strict=True
    ):
        advantages_GL: list[tuple[float, ...]] = []
        for advantage, reward, penalties_L in zip(
            advantages_G, rewards_G, penalties_GL, strict=True
        ):
            if reward is None:
                advantages_GL.append((0.0,) * len(penalties_L))
            else:
                advantages_GL.append(tuple(_returns_to_go(advantage, penalties_L)))
        advantages_PGL.append(advantages_GL)
    return advantages_PGL


def _teacher_advantages(penalties_PGL: Penalties) -> list[list[tuple[float, ...]]]:
    """Returns the negated and clamped penalties, [P, G, L]. The rewards are not used."""
    limit = MAX_TEACHER_ADVANTAGE
    advantages_PGL = []
    for penalties_GL in penalties_PGL:
        advantages_GL: list[tuple[float, ...]] = []
        for penalties_L in penalties_GL:
            advantages_GL.append(tuple(_clamp(-value, limit) for value in penalties_L))
        advantages_PGL.append(advantages_GL)
    return advantages_PGL


def _with_teacher_signal(
    advantages_PGL: Sequence[Sequence[tuple[float, ...]]], penalties_PGL: Penalties, weight: float
) -> list[list[tuple[float, ...]]]:
    """Returns the advantages plus `weight` log(pi_teacher / pi) of each token, [P, G, L].

    The signal is that of the kind `teacher`: it is clamped to +-MAX_TEACHER_ADVANTAGE before the
    weight, and a token's signal is not added to earlier tokens.

    Args:
        advantages_PGL: advantages from the rewards [P, G, L].
        penalties_PGL: log(pi / pi_teacher) of each token [P, G, L].
        weight: weight of the teacher's signal.
    """
    sums_PGL = []
    for advantages_GL, signals_GL in zip(
        advantages_PGL, _teacher_advantages(penalties_PGL), strict=True
    ):
        sums_GL: list[tuple[float, ...]] = []
        for advantages_L, signals_L in zip(advantages_GL, signals_GL, strict=True):
            sums_GL.append(
                tuple(
                    advantage + weight * signal
                    for advantage, signal in zip(advantages_L, signals_L, strict=True)
                )
            )
        sums_PGL.append(sums_GL)
    return sums_PGL


def _clamp(value: float, limit: float) -> float:
    """Returns the value, at most `limit` away from 0. NaN stays NaN, so that the update fails."""
    if value > limit:
        return limit
    if value < -limit:
        return -limit
    return value


def _repeat_for_tokens(
    advantages_PG: Sequence[Sequence[float]], lengths_PG: Sequence[Sequence[int]]
) -> list[list[tuple[float, ...]]]:
    """Returns the advantage of each completion, repeated for its tokens, [P, G, L]."""
    advantages_PGL = []
    for advantages_G, lengths_G in zip(advantages_PG, lengths_PG, strict=True):
        advantages_PGL.append(
            [(value,) * length for value, length in zip(advantages_G, lengths_G, strict=True)]
        )
    return advantages_PGL


def _all_rewards(rewards_PG: Sequence[Sequence[float | None]]) -> list[float]:
    rewards: list[float] = []
    for rewards_G in rewards_PG:
        rewards += _without_none(rewards_G)
    return rewards


def _all_centered_rewards(rewards_PG: Sequence[Sequence[float | None]]) -> list[float]:
    """Returns r - mean(group) of all completions that have a reward."""
    centered: list[float] = []
    for rewards_G in rewards_PG:
        rewards = _without_none(rewards_G)
        mean = _mean(rewards)
        centered += [reward - mean for reward in rewards]
    return centered


def _centered_rewards_of_tokens(
    rewards_PG: Sequence[Sequence[float | None]], lengths_PG: Sequence[Sequence[int]]
) -> list[float]:
    """Returns r - mean(group) of the completion of each token of the batch."""
    centered: list[float] = []
    for rewards_G, lengths_G in zip(rewards_PG, lengths_PG, strict=True):
        mean = _mean(_without_none(rewards_G))
        for reward, length in zip(rewards_G, lengths_G, strict=True):
            if reward is not None:
                centered += [reward - mean] * length
    return centered


def _without_none(rewards_G: Sequence[float | None]) -> list[float]:
    return [reward for reward in rewards_G if reward is not None]


def _mean(values: Sequence[float]) -> float:
    """Returns the mean, 0 for an empty sequence."""
    if not values:
        return 0.0
    return sum(values) / len(values)


def _population_std(values: Sequence[float]) -> float:
    """Returns the square root of the mean squared deviation, 0 for an empty sequence."""
    if not values:
        return 0.0
    mean = _mean(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    return float(variance**0.5)


def rewards_differ(rewards_G: Sequence[float | None]) -> bool:
    """Returns whether the rewards of a group differ. If not, all its advantages are 0."""
    rewards = _without_none(rewards_G)
    return bool(rewards) and max(rewards) != min(rewards)


def to_samples(
    groups: Sequence[ScoredGroup],
    advantages_PGL: Sequence[Sequence[tuple[float, ...]]],
    *,
    mask_truncated: bool = False,
    teacher_texts_PG: Sequence[Sequence[TeacherText | None]] | None = None,
    teachers: Collection[str] = (),
) -> list[Sample]:
    """Returns one sample per completion that has a reward, in the order of the groups.

    Args:
        groups: scored groups [P].
        advantages_PGL: result of `advantages` for these groups.
        mask_truncated: skip completions that were cut off by `sampling.max_tokens`. Their rewards
            still count in the means of `advantages` (overlong filtering, DAPO 2503.14476).
        teacher_texts_PG: what a teacher reads in place of the completions and their prompts. `None`
            if it reads the same.
        teachers: names of the data sets that have a teacher of their own (`model.teachers`).
    """
    samples = []
    for group_index, (scored, advantages_GL) in enumerate(zip(groups, advantages_PGL, strict=True)):
        teacher_texts_G: Sequence[TeacherText | None] = [None] * len(advantages_GL)
        if teacher_texts_PG is not None:
            teacher_texts_G = teacher_texts_PG[group_index]
        data_set = scored.group.problem.data_set
        teacher = data_set if data_set in teachers else ""
        for completion, reward, advantages_L, teacher_text in zip(
            scored.group.completions, scored.rewards, advantages_GL, teacher_texts_G, strict=True
        ):
            if reward is None:
                continue
            if mask_truncated and completion.finish_reason == "length":
                continue
            sample = _to_sample(scored.group, completion, advantages_L, reward, group_index)
            samples.append(replace(sample, teacher_text=teacher_text, teacher=teacher))
    return samples


def _to_sample(
    group: Group,
    completion: Completion,
    advantages_L: tuple[float, ...],
    reward: float,
    group_index: int,
) -> Sample:
    return Sample(
        token_ids=group.prompt_ids + completion.token_ids,
        prompt_length=len(group.prompt_ids),
        advantages=advantages_L,
        sampler_logprobs=completion.logprobs,
        group=group_index,
        reward=reward,
        versions=_version_per_token(completion),
    )


def _version_per_token(completion: Completion) -> tuple[int, ...]:
    """Returns the version of the weights that sampled each token, [L].

    `completion.versions == ((3, 0, 2), (4, 2, 3))` gives `(3, 3, 4)`.
    """
    versions: list[int] = []
    for version, start, end in completion.versions:
        versions += [version] * (end - start)
    return tuple(versions)


def completion_lengths(groups: Sequence[ScoredGroup]) -> list[list[int]]:
    """Returns the number of tokens of each completion, [P, G]."""
    lengths_PG = []
    for scored in groups:
        lengths_PG.append([len(completion.token_ids) for completion in scored.group.completions])
    return lengths_PG


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
