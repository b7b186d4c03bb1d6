"""What a run prints about its recipe: the formulas, reasons for usual differences, and warnings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grpo.config.algorithm import MISMATCH_FORMS
from grpo.config.presets import PRESETS, describe_recipe
from grpo.config.train import TrainConfig

# Below this number of completions, the gradient of a mini-batch is mostly noise.
MIN_MINI_BATCH = 64
# Rewards of rewards/ that are negative.
PENALTIES = ("length", "repetition")


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a config sets a key to another value than its preset.

    Attributes:
        path: The key, e.g. `learner.betas`.
        preset_value: Its value in the preset, None if the preset does not set it.
        value: Its value in the config.
        text: The reason.
    """

    path: str
    preset_value: Any
    value: Any
    text: str


# The differences of the configs in configs/.
REASONS = (
    Reason(
        "algorithm.mismatch",
        None,
        MISMATCH_FORMS["tis"],
        "the engine rounds differently from the learner, above all in bfloat16; truncated "
        "importance sampling corrects for the difference",
    ),
    Reason(
        "algorithm.kl_coef",
        0.04,
        0.001,
        "R1's coefficient; DeepSeekMath's 0.04 holds the policy close to its start",
    ),
    Reason(
        "algorithm.kl_coef",
        0.001,
        0.0,
        "saves the memory and the scoring pass of the reference model",
    ),
    Reason(
        "learner.betas",
        None,
        (0.9, 0.95),
        "the second moment averages 20 updates instead of 1,000, as in MiniMax-M1 and OpenRLHF; "
        "a run of RL has few updates, and the scale of its gradients changes",
    ),
)


def recipe_lines(config: TrainConfig) -> list[str]:
    """Returns the recipe, the reasons for usual differences from its preset, and the warnings.

    For example `["grpo (DeepSeekMath ...): equation ...", "  kl_coef=0.001: R1's ..."]`.
    """
    lines = [describe_recipe(config.algorithm)]
    preset = PRESETS[config.algorithm.preset]
    for reason in REASONS:
        section_name, _, key = reason.path.partition(".")
        value = getattr(getattr(config, section_name), key)
        if value == reason.value and preset.settings.get(reason.path) == reason.preset_value:
            lines.append(f"  {key}={value}: {reason.text}")
    lines += [f"  warning: {warning}" for warning in recipe_warnings(config)]
    return lines


def recipe_warnings(config: TrainConfig) -> list[str]:
    """Returns a message for each setting that is valid, but weakens the recipe."""
    warnings = []
    sampling = config.sampling
    algorithm = config.algorithm
    has_sampler_ratios = (
        config.has_tokens_of_older_weights
        or not algorithm.mismatch.is_none
        or algorithm.off_policy_max is not None
        or algorithm.drift_coef > 0
    )
    if sampling.is_truncated and has_sampler_ratios:
        warnings.append(
            f"sampling.top_p={sampling.top_p:g} and top_k={sampling.top_k}: the engine's "
            "probabilities are those of the tokens that it may sample, the learner's of all "
            "tokens, so that the ratio of each token is too small. Set top_p=1 and top_k=0"
        )
    penalties = [name for name in config.rewards if name in PENALTIES]
    if algorithm.advantage == "group_mean" and penalties:
        warnings.append(
            "algorithm.advantage=group_mean (preset maxrl) divides by the mean reward of a group, "
            f"and the reward {penalties[0]} is negative: a mean close to 0 gives huge advantages, "
            "a mean below 0 gives none. Use rewards that are 0 or more"
        )
    if algorithm.advantage == "per_reward" and len(config.rewards) == 1:
        warnings.append(
            "algorithm.advantage=per_reward (preset gdpo) normalizes each reward on its own, and "
            "this config has a single one. Set several rewards, or algorithm.advantage=group_std"
        )
    num_completions = config.train.num_completions
    num_updates = config.train.updates_per_rollout
    mini_batch = num_completions // num_updates
    if mini_batch < MIN_MINI_BATCH:
        warnings.append(
            f"an update has {mini_batch} completions ({num_completions} per rollout / "
            f"train.updates_per_rollout={num_updates}): fewer than {MIN_MINI_BATCH} are mostly "
            "noise. Raise train.problems, or lower train.updates_per_rollout"
        )
    return warnings
