"""The algorithm section of a config: a recipe's choices.

Published recipes by name are in grpo/config/presets.py.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from grpo.config.reading import Section


class Algorithm(Section):
    """A recipe: advantage x loss x reduction, and what is around them.

    What the config does not say is the preset's (PRESETS).
    """

    preset: str = "grpo"  # a name in PRESETS
    # grpo/learning/advantages.py
    advantage: Literal[
        "group_std", "batch_std", "centered_std", "none", "leave_one_out", "batch", "teacher"
    ] = "group_std"
    loss: str = "grpo"  # a file in grpo/losses/ or module:function
    # grpo/learning/batch.py: token_weights
    reduction: Literal["sequence", "token", "constant", "prompt"] = "sequence"
    clip_low: float = Field(0.2, gt=0)  # ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = Field(0.2, gt=0)
    # grpo: the ratio counts as at most this where the advantage is negative
    dual_clip: float | None = Field(None, gt=1)
    ratio_max: float = Field(5.0, ge=1)  # cispo: cap of the ratio itself
    # KL to the start model; above 0 keeps a second copy of the weights (none with LoRA)
    kl_coef: float = Field(0.0, ge=0)
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    # in the loss: times pi / pi_old, so that its gradient has the right mean (DeepSeek-V3.2)
    kl_unbiased: bool = False
    # updates after which the reference becomes the policy; 0: never
    reference_reset: int = Field(0, ge=0)
    reset_optimizer: bool = False  # with it (ProRL)
    # of pi_old: computed again where needed, or the engine's own
    old_logprobs: Literal["learner", "sampler"] = "learner"
    # grpo/learning/objective.py: mismatch_weights
    mismatch: Literal["none", "tis", "mis_token", "mis_sequence", "icepop", "mask_sequence"] = (
        "none"
    )
    # bounds of pi_old / pi_sampler; defaults: MISMATCH_BOUNDS in learning/objective.py
    mismatch_min: float | None = Field(None, ge=0)
    mismatch_max: float | None = Field(None, gt=0)
    # groups of equal rewards: counted, left out, or others sampled instead
    no_signal: Literal["keep", "drop", "resample"] = "keep"
    max_rounds: int = Field(10, ge=1)  # resample: samplings a rollout before it gives up
    # rollouts in a row without an update after which the run stops; 0: never
    max_idle: int = Field(50, ge=0)
    # a problem with this pass rate is not drawn again (ScaleRL: 0.9)
    drop_solved: float | None = Field(None, gt=0, le=1)
    # a problem whose last pass rate is outside is not drawn again
    pass_rate: tuple[float, float] | None = None
    # mask: completions cut off by max_tokens count in the baseline only (DAPO)
    truncated: Literal["keep", "mask"] = "keep"
    entropy_coef: float = 0.0  # bonus on the policy's entropy, in the loss
    # share of tokens, of the highest entropy, that the advantage goes to (2506.01939: 0.2)
    top_entropy: float = Field(1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _meaning(self) -> Algorithm:
        if (
            self.kl_coef
            and self.kl_in == "loss"
            and self.kl_estimator == "k1"
            and not self.kl_unbiased
        ):
            raise ValueError(
                "k1 in the loss has a gradient of mean zero: use kl_estimator k2 or k3, "
                "kl_unbiased, or kl_in=reward"
            )
        if self.kl_unbiased and self.kl_in == "reward":
            raise ValueError(
                "kl_unbiased is for kl_in=loss: in the reward no gradient passes through the KL"
            )
        if self.kl_unbiased and self.kl_estimator == "k2":
            raise ValueError(
                "kl_unbiased with k2: the ratio times k2 does not have the KL's gradient; use k1 "
                "or k3"
            )
        if self.advantage == "teacher" and (
            self.no_signal != "keep" or (self.kl_coef and self.kl_in == "reward")
        ):
            raise ValueError(
                "advantage=teacher asks no rewards: no_signal is keep, and a KL goes into the loss"
            )
        if self.mismatch == "none" and (
            self.mismatch_min is not None or self.mismatch_max is not None
        ):
            raise ValueError(
                "mismatch_min and mismatch_max bound a correction: choose one with mismatch"
            )
        if self.reset_optimizer and not self.reference_reset:
            raise ValueError(
                "reset_optimizer goes with reference_reset: give it a number of updates"
            )
        if self.old_logprobs == "sampler" and self.mismatch != "none":
            raise ValueError(
                "with old_logprobs=sampler the ratio holds the mismatch already: set "
                "mismatch=none, or old_logprobs=learner"
            )
        return self
