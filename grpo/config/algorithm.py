"""The config section `algorithm`: advantage, loss, KL and filters of a recipe.

The published recipes are in grpo/config/presets.py.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from grpo.config.reading import Section


class AlgorithmSettings(Section):
    """A recipe: an advantage, a loss, a reduction, and the terms and filters around them.

    Keys that the config does not set have the preset's value.
    """

    preset: str = Field(
        "grpo",
        description="Name of a published recipe (`PRESETS` in `grpo/config/presets.py`). It sets "
        "every key that the config does not set itself.",
    )
    advantage: Literal[
        "group_std", "batch_std", "centered_std", "none", "leave_one_out", "batch", "teacher"
    ] = Field(
        "group_std",
        description="How advantages are computed (`grpo/learning/advantages.py`): from the rewards "
        "of a group or of the batch, or, with `teacher`, from the log-probabilities of "
        "`model.teacher`. Default: DeepSeekMath 2402.03300.",
    )
    loss: str = Field(
        "grpo",
        description="Loss per token: the name of a file in `grpo/losses/`, or your own function "
        "as `module:function`.",
    )
    reduction: Literal["sequence", "token", "constant", "prompt"] = Field(
        "sequence",
        description="How the losses of an update's tokens are averaged. `sequence`: mean over "
        "completions of the mean over their tokens (DeepSeekMath 2402.03300 Eq. 3); `token`: mean "
        "over all tokens; `constant`: sum over tokens / (completions x sampling.max_tokens); "
        "`prompt`: mean over problems of the mean over their tokens.",
    )
    clip_low: float = Field(
        0.2,
        gt=0,
        description="The ratio is clipped to [1 - clip_low, 1 + clip_high]. Loss `gmpo` clips the "
        "log-ratio to [-clip_low, clip_high]. Default: DeepSeekMath 2402.03300.",
    )
    clip_high: float = Field(
        0.2,
        gt=0,
        description="Upper clipping distance of the ratio, see `clip_low`. "
        "Default: DeepSeekMath 2402.03300.",
    )
    dual_clip: float | None = Field(
        None,
        gt=1,
        description="Upper bound of the ratio where the advantage is negative, for loss `grpo` "
        "(INTELLECT-2 uses 4). Default: no bound.",
    )
    ratio_max: float = Field(
        5.0,
        ge=1,
        description="Upper bound of the ratio for loss `cispo`. Default: ScaleRL 2510.13786.",
    )
    kl_coef: float = Field(
        0.0,
        ge=0,
        description="Coefficient of the KL to the reference model, which is `model.teacher` or the "
        "start model. Above 0 the learner holds a second copy of the weights, except with LoRA.",
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        "k3",
        description="Estimator of the KL per token, with d = log pi - log pi_ref: k1 = d, "
        "k2 = d^2 / 2, k3 = exp(-d) + d - 1. Default: DeepSeekMath 2402.03300 Eq. 4.",
    )
    kl_in: Literal["loss", "reward"] = Field(
        "loss",
        description="Where the KL is applied: as a term of the loss, or as a penalty per token in "
        "the reward.",
    )
    kl_unbiased: bool = Field(
        False,
        description="With `kl_in: loss`, multiply the KL term by pi / pi_old, so that its gradient "
        "is an unbiased estimate (DeepSeek-V3.2 2512.02556 Eq. 7).",
    )
    reference_reset: int = Field(
        0,
        ge=0,
        description="Interval, in updates, at which the current policy becomes the reference model "
        "(R1 uses 400). 0: never.",
    )
    reset_optimizer: bool = Field(
        False,
        description="Reset Adam's moments at every `reference_reset` (ProRL).",
    )
    old_logprobs: Literal["learner", "sampler"] = Field(
        "learner",
        description="Source of log pi_old: `learner` recomputes it where the ratio needs it, "
        "`sampler` takes the engine's log-probabilities.",
    )
    mismatch: Literal["none", "tis", "mis_token", "mis_sequence", "icepop", "mask_sequence"] = (
        Field(
            "none",
            description="Importance weights that correct the difference between pi_old and the "
            "engine's distribution pi_sampler (`mismatch_weights` in "
            "`grpo/learning/objective.py`).",
        )
    )
    mismatch_min: float | None = Field(
        None,
        ge=0,
        description="Lower bound of pi_old / pi_sampler in the correction. "
        "Default: depends on `mismatch` (`MISMATCH_BOUNDS` in `grpo/learning/objective.py`).",
    )
    mismatch_max: float | None = Field(
        None,
        gt=0,
        description="Upper bound of pi_old / pi_sampler in the correction. "
        "Default: depends on `mismatch` (`MISMATCH_BOUNDS` in `grpo/learning/objective.py`).",
    )
    no_signal: Literal["keep", "drop", "resample"] = Field(
        "keep",
        description="Groups without a training signal: `keep` includes them in the average, `drop` "
        "excludes groups with equal rewards, `resample` replaces groups that are all right or all "
        "wrong with new ones (dynamic sampling, DAPO 2503.14476 Eq. 11).",
    )
    max_rounds: int = Field(
        10,
        ge=1,
        description="With `no_signal: resample`, the maximum number of sampling rounds per "
        "rollout. The run stops if they do not give enough groups.",
    )
    max_idle: int = Field(
        50,
        ge=0,
        description="Number of consecutive rollouts without an update after which the run stops. "
        "0: no limit.",
    )
    drop_solved: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Problems whose last pass rate is at least this share are not drawn (ScaleRL "
        "uses 0.9). Until a problem is sampled, its `meta.pass_rate` counts, if it has one. "
        "Default: no limit.",
    )
    pass_rate: tuple[float, float] | None = Field(
        None,
        description="Lowest and highest allowed pass rate: problems whose last pass rate is "
        "outside are not drawn. `meta.pass_rate` counts as for `drop_solved`. Default: no limits.",
    )
    truncated: Literal["keep", "mask"] = Field(
        "keep",
        description="Completions that are cut off at `sampling.max_tokens`: `keep` trains on "
        "them, `mask` counts them in the baseline only (overlong filtering, DAPO 2503.14476).",
    )
    entropy_coef: float = Field(
        0.0,
        description="Coefficient of a bonus on the policy's entropy in the loss.",
    )
    top_entropy: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of a rollout's tokens that keep their advantage: those with the highest "
        "entropy. All other tokens have advantage 0 (2506.01939 uses 0.2).",
    )

    @model_validator(mode="after")
    def _check_kl(self) -> AlgorithmSettings:
        if (
            self.kl_coef
            and self.kl_in == "loss"
            and self.kl_estimator == "k1"
            and not self.kl_unbiased
        ):
            raise ValueError(
                "kl_estimator=k1 with kl_in=loss: the gradient of k1 has mean zero. Set "
                "kl_estimator=k2 or k3, kl_unbiased=true, or kl_in=reward"
            )
        if self.kl_unbiased and self.kl_in == "reward":
            raise ValueError(
                "kl_unbiased=true requires kl_in=loss: no gradient passes through a KL in the "
                "reward"
            )
        if self.kl_unbiased and self.kl_estimator == "k2":
            raise ValueError(
                "kl_unbiased=true with kl_estimator=k2: the ratio times k2 does not have the "
                "gradient of the KL. Set kl_estimator=k1 or k3"
            )
        return self

    @model_validator(mode="after")
    def _check_teacher_advantage(self) -> AlgorithmSettings:
        if self.advantage != "teacher":
            return self
        has_kl_in_reward = self.kl_coef > 0 and self.kl_in == "reward"
        if self.no_signal != "keep" or has_kl_in_reward:
            raise ValueError(
                "advantage=teacher does not use rewards: set no_signal=keep, and kl_in=loss if "
                "kl_coef is above 0"
            )
        return self

    @model_validator(mode="after")
    def _check_mismatch_bounds(self) -> AlgorithmSettings:
        has_bounds = self.mismatch_min is not None or self.mismatch_max is not None
        if self.mismatch == "none" and has_bounds:
            raise ValueError(
                "mismatch_min and mismatch_max have no effect with mismatch=none: choose a "
                "correction, or remove the bounds"
            )
        return self

    @model_validator(mode="after")
    def _check_reset_optimizer(self) -> AlgorithmSettings:
        if self.reset_optimizer and not self.reference_reset:
            raise ValueError(
                "reset_optimizer=true requires reference_reset: set it to a number of updates"
            )
        return self

    @model_validator(mode="after")
    def _check_sampler_logprobs(self) -> AlgorithmSettings:
        if self.old_logprobs == "sampler" and self.mismatch != "none":
            raise ValueError(
                f"old_logprobs=sampler with mismatch={self.mismatch}: the ratio to the sampler "
                "already includes the mismatch. Set mismatch=none, or old_logprobs=learner"
            )
        return self
