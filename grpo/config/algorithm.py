"""The config section `algorithm`: advantage, loss, KL and filters of a recipe.

The published recipes are in grpo/config/presets.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from grpo.config.reading import Section, did_you_mean

# Default bounds of the ratio pi_old / pi_sampler, for each mask of MismatchSettings.
MASK_BOUNDS = {
    "token": (0.5, 5.0),  # IcePop, Ring-1T 2510.18855
    "sequence": (0.0, 3.0),  # TRL's cap
    "geometric": (0.999, 1.001),  # verl's presets with a geometric mask
}
# Bounds of the corrections in versions that had the keys mismatch_min and mismatch_max.
EARLIER_BOUNDS = {
    "tis": (0.0, 2.0),
    "mis_token": (0.0, 3.0),
    "mis_sequence": (0.0, 3.0),
    "icepop": (0.5, 5.0),
    "mask_sequence": (0.5, 2.0),
}
# Advantages that divide by a standard deviation or a mean of rewards.
NORMALIZED_ADVANTAGES = (
    "group_std",
    "batch_std",
    "centered_std",
    "centered_batch",
    "group_mean",
    "per_reward",
)
# Losses whose ratio is pi / pi_sampler.
SAMPLER_LOSSES = ("dppo", "dppo_kl")


class MismatchSettings(Section):
    """A correction of the difference between pi_old and the engine's distribution pi_sampler.

    The advantage of each token is multiplied by a factor: the weight, or 0 if the mask drops the
    token. Both are functions of rho = pi_old / pi_sampler. rho of a sequence is the product over
    its tokens; its geometric mean is that product to the power of 1 / length.

    A config can also name a combination, e.g. `mismatch: tis` (`MISMATCH_FORMS`).
    """

    mask: Literal["none", "token", "sequence", "geometric"] = Field(
        "none",
        description="Drop tokens whose rho is outside of `bounds` (`token`), or all tokens of a "
        "completion whose rho (`sequence`) or geometric mean of rho (`geometric`) is outside.",
    )
    bounds: tuple[float, float] | None = Field(
        None,
        description="Lowest and highest rho that the mask keeps. Default: 0.5 and 5 for `token` "
        "(IcePop 2510.18855), 0 and 3 for `sequence` (TRL), 0.999 and 1.001 for `geometric` "
        "(verl).",
    )
    weight: Literal["none", "token", "sequence"] = Field(
        "none",
        description="Multiply the advantage by rho of the token (`token`) or of the completion "
        "(`sequence`).",
    )
    max: float | None = Field(
        None,
        gt=0,
        description="Upper limit of the weight; 2 is common. Required unless a mask limits the "
        "weight. Default: no limit.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in_bounds(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or tree.get("bounds") is not None:
            return tree
        return {**tree, "bounds": MASK_BOUNDS.get(str(tree.get("mask")))}

    @model_validator(mode="after")
    def _check_mask_and_weight(self) -> MismatchSettings:
        if self.bounds is not None:
            if self.mask == "none":
                raise ValueError("bounds has no effect with mask=none: set mask, or remove bounds")
            low, high = self.bounds
            if not 0 <= low < high:
                raise ValueError(
                    f"bounds={list(self.bounds)}: expected two numbers >= 0, the lower one first"
                )
        if self.weight == "none":
            if self.max is not None:
                raise ValueError("max has no effect with weight=none: set weight, or remove max")
        elif self.max is None and not self._mask_limits_weight:
            raise ValueError(
                f"weight={self.weight} with mask={self.mask} has no upper limit: set max=2, or "
                f"mask={self.weight}"
            )
        return self

    @property
    def _mask_limits_weight(self) -> bool:
        if self.weight == "token":
            return self.mask != "none"
        return self.mask == self.weight

    @property
    def is_none(self) -> bool:
        """Whether nothing is corrected."""
        return self.mask == "none" and self.weight == "none"

    @property
    def uses_sequence_ratio(self) -> bool:
        """Whether the mask or the weight depends on the ratio of a complete sequence."""
        return self.mask in ("sequence", "geometric") or self.weight == "sequence"

    def __str__(self) -> str:
        """Returns the name in MISMATCH_FORMS if there is one, otherwise the keys that are set."""
        for name, form in MISMATCH_FORMS.items():
            if self == form:
                return name
        parts = []
        if self.mask != "none":
            assert self.bounds is not None
            parts += [f"mask: {self.mask}", f"bounds: {list(self.bounds)}"]
        if self.weight != "none":
            parts.append(f"weight: {self.weight}")
        if self.max is not None:
            parts.append(f"max: {self.max:g}")
        return f"{{{', '.join(parts)}}}"


# The corrections that a config can name.
MISMATCH_FORMS = {
    "none": MismatchSettings(),
    # Truncated importance sampling: "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    # Training".
    "tis": MismatchSettings(weight="token", max=2.0),
    "mis_token": MismatchSettings(mask="token", bounds=(0.0, 3.0), weight="token"),  # TRL's cap
    "mis_sequence": MismatchSettings(mask="sequence", weight="sequence"),
    "icepop": MismatchSettings(mask="token", weight="token"),
    "mask_sequence": MismatchSettings(mask="geometric"),
}


def _expand_mismatch_form(value: Any) -> Any:
    """Returns the correction that a string names, and any other value unchanged."""
    if not isinstance(value, str):
        return value
    if value not in MISMATCH_FORMS:
        raise ValueError(
            f"unknown correction {value!r}{did_you_mean(value, MISMATCH_FORMS)}. Available: "
            f"{', '.join(MISMATCH_FORMS)}, or {{mask: ..., bounds: ..., weight: ..., max: ...}}"
        )
    return MISMATCH_FORMS[value]


MismatchEntry = Annotated[
    MismatchSettings,
    BeforeValidator(
        _expand_mismatch_form,
        json_schema_input_type=Literal[tuple(MISMATCH_FORMS)] | MismatchSettings,
    ),
]


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
        "group_std",
        "batch_std",
        "centered_std",
        "centered_batch",
        "group_mean",
        "per_reward",
        "none",
        "leave_one_out",
        "batch",
        "teacher",
    ] = Field(
        "group_std",
        description="How advantages are computed (`grpo/learning/advantages.py`): from the rewards "
        "of a group or of the batch, or, with `teacher`, from the log-probabilities of "
        "`model.teacher`. Default: DeepSeekMath 2402.03300.",
    )
    loss: str = Field(
        "grpo",
        description="Loss per token: the name of a file in `grpo/losses/`, or your own function "
        "as `module:function` or `path/to/file.py:function`.",
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
        "log-ratio to [-clip_low, clip_high]. Losses `dppo` and `dppo_kl` drop tokens whose "
        "probability has moved further than these bounds. Default: DeepSeekMath 2402.03300.",
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
        description="Upper bound of the ratio for losses `cispo`, `dppo` and `dppo_kl`. Default: "
        "ScaleRL 2510.13786.",
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
        "the reward. Advantages that divide by a standard deviation or a mean of rewards "
        "subtract the penalties after the division (OpenRLHF).",
    )
    kl_unbiased: bool = Field(
        False,
        description="With `kl_in: loss`, multiply the KL term by pi / pi_old, so that its gradient "
        "is an unbiased estimate (DeepSeek-V3.2 2512.02556 Eq. 7).",
    )
    teacher_coef: float = Field(
        0.0,
        ge=0,
        description="Weight of the signal of `model.teacher` beside the rewards. "
        "`teacher_divergence` selects the signal. With `advantage: teacher` it is the only signal "
        "and has weight 1.",
    )
    teacher_divergence: Literal["sampled", "reverse_kl", "forward_kl", "jsd"] = Field(
        "sampled",
        description="Signal of the teacher at each token: `sampled` adds log pi_teacher - "
        "log pi_old of the token, clamped to +-10, to its advantage: an estimate of the reverse KL "
        "from one sample. The others add a divergence of the complete distributions to the loss: "
        "`reverse_kl` KL(pi || teacher), `forward_kl` KL(teacher || pi), or `jsd`, with beta 0.5 "
        "(GKD 2306.13649).",
    )
    teacher_top_k: int | None = Field(
        None,
        ge=1,
        description="Number of the teacher's most likely tokens that `teacher_divergence` "
        "compares; all other tokens count as one. Default: the complete vocabulary.",
    )
    teacher_hint: Literal["none", "solution", "success", "feedback"] = Field(
        "none",
        description="What the teacher's prompt contains in addition to the question: `solution` "
        "the problem's worked solution, or its answer (OPSD 2601.18734), `success` a correct "
        "completion of the group, `feedback` the reasons for the completion's low rewards (SDPO "
        "2601.20802). With a hint and without `model.teacher`, the policy with its current weights "
        "is the teacher (self-distillation).",
    )
    teacher_hint_tokens: int = Field(
        1024,
        ge=1,
        description="Maximum length in tokens of a hint. A longer one is cut off at its end.",
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
    mismatch: MismatchEntry = Field(
        MISMATCH_FORMS["none"],
        description="Correction of the difference between pi_old and the engine's distribution: "
        "`none`, `tis`, `mis_token`, `mis_sequence`, `icepop`, `mask_sequence`, or a mapping with "
        "mask and weight.",
    )
    off_policy_max: float | None = Field(
        None,
        gt=0,
        description="Drop completions with a negative advantage that have become too unlikely: "
        "those whose mean over tokens of log(pi_sampler / pi) exceeds this value (DeepSeek-V3.2 "
        "2512.02556 Eq. 8, 9; TRL suggests 0.5). Default: keep all.",
    )
    drift_coef: float = Field(
        0.0,
        ge=0,
        description="Coefficient of the term log(pi / pi_sampler)^2 in the loss, which holds the "
        "policy close to the sampler (Kimi K2.5 2602.02276; prime-rl uses 0.001).",
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
    max_reward: float | None = Field(
        None,
        description="For `drop_solved` and `pass_rate` with rewards that return no verdict, for "
        "example your own: the reward, in the weighted sum, from which a completion counts as "
        "correct. Default: without verdicts, pass rates are unknown.",
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

    @model_validator(mode="before")
    @classmethod
    def _read_config_of_earlier_version(cls, tree: Any) -> Any:
        """Translates mismatch_min and mismatch_max, the bounds of a correction in earlier versions.

        The configs that their runs have recorded contain both keys.
        """
        if not isinstance(tree, dict) or not {"mismatch_min", "mismatch_max"} & tree.keys():
            return tree
        tree = dict(tree)
        low = tree.pop("mismatch_min", None)
        high = tree.pop("mismatch_max", None)
        name = tree.get("mismatch")
        if not isinstance(name, str) or name not in EARLIER_BOUNDS:
            if low is None and high is None:
                return tree
            raise ValueError(
                "mismatch_min and mismatch_max are keys of earlier versions. Set the bounds in "
                "mismatch, e.g. mismatch={mask: token, bounds: [0.5, 5], weight: token}"
            )
        default_low, default_high = EARLIER_BOUNDS[name]
        low = default_low if low is None else low
        high = default_high if high is None else high
        if name != "tis":
            form = MISMATCH_FORMS[name]
            tree["mismatch"] = {"mask": form.mask, "bounds": [low, high], "weight": form.weight}
        elif low == 0:
            tree["mismatch"] = {"weight": "token", "max": high}
        else:
            raise ValueError(
                f"mismatch_min={low} with mismatch=tis: a weight has no lower limit any more. "
                "Remove mismatch_min"
            )
        return tree

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

    @property
    def teacher_weight(self) -> float:
        """Weight of the teacher's signal, 0 without one."""
        return 1.0 if self.advantage == "teacher" else self.teacher_coef

    @property
    def has_teacher_advantage(self) -> bool:
        """Whether the teacher's signal is part of the advantages."""
        return self.teacher_weight > 0 and self.teacher_divergence == "sampled"

    @property
    def has_teacher_loss(self) -> bool:
        """Whether the teacher's signal is a term of the loss."""
        return self.teacher_weight > 0 and self.teacher_divergence != "sampled"

    @model_validator(mode="after")
    def _check_teacher_signal(self) -> AlgorithmSettings:
        if self.advantage == "teacher" and self.teacher_coef:
            raise ValueError(
                "teacher_coef weighs the teacher beside rewards, and advantage=teacher does not "
                "use rewards: remove teacher_coef, or set another advantage"
            )
        if not self.teacher_weight and self.teacher_divergence != "sampled":
            raise ValueError(
                f"teacher_divergence={self.teacher_divergence} has no effect without a teacher's "
                "signal: set advantage=teacher, or teacher_coef to learn from rewards as well"
            )
        if not self.teacher_weight and self.teacher_hint != "none":
            raise ValueError(
                f"teacher_hint={self.teacher_hint} has no effect without a teacher's signal: set "
                "advantage=teacher, or teacher_coef to learn from rewards as well"
            )
        if self.teacher_top_k and not self.has_teacher_loss:
            raise ValueError(
                "teacher_top_k has no effect without a teacher_divergence of distributions: set "
                "teacher_divergence=reverse_kl, or remove it"
            )
        if self.has_teacher_advantage and self.kl_coef and self.kl_in == "reward":
            raise ValueError(
                "kl_in=reward already measures the KL to the teacher, and adds it up over later "
                "tokens: set kl_in=loss, or remove the teacher's signal"
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

    @property
    def has_pass_rate_filter(self) -> bool:
        """Whether problems are excluded by their pass rate."""
        return self.drop_solved is not None or self.pass_rate is not None

    @model_validator(mode="after")
    def _check_max_reward(self) -> AlgorithmSettings:
        if self.max_reward is not None and not self.has_pass_rate_filter:
            raise ValueError(
                "max_reward has no effect without drop_solved or pass_rate: set one of them, or "
                "remove it"
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
        if self.loss in SAMPLER_LOSSES and self.old_logprobs != "sampler":
            raise ValueError(
                f"loss={self.loss} needs the ratio to the sampler: set old_logprobs=sampler"
            )
        if self.old_logprobs == "sampler" and not self.mismatch.is_none:
            raise ValueError(
                f"old_logprobs=sampler with mismatch={self.mismatch} and preset={self.preset}: the "
                "ratio to the sampler already includes the mismatch. Set mismatch=none, or "
                "old_logprobs=learner"
            )
        return self
