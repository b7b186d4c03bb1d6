"""The algorithm section of a config, and published recipes by name.

A preset fills in, in any section, what the config does not say itself; sizes and learning rates are
not part of it, they are in configs/. docs/algorithms.md has the same table, and a test keeps the
two equal.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from grpo.config.source import Section


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


@dataclass(frozen=True, slots=True)
class Preset:
    """A recipe: where it was published, what differs from there, and `section.key` -> value."""

    source: str
    settings: dict[str, Any]
    note: str = ""


def _algorithm(**settings: Any) -> dict[str, Any]:
    return {f"algorithm.{key}": value for key, value in settings.items()}


def _clip(low: float, high: float) -> dict[str, Any]:
    return _algorithm(clip_low=low, clip_high=high)


_R1 = _algorithm(
    advantage="group_std", loss="grpo", reduction="sequence", kl_coef=0.001, reference_reset=400
) | _clip(10.0, 10.0)
_R1 |= {"train.updates_per_rollout": 16}
_CISPO = _algorithm(loss="cispo", ratio_max=5.0, kl_coef=0.0)

PRESETS = {
    "grpo": Preset(
        "DeepSeekMath 2402.03300 Eq. 3, 4",
        _algorithm(advantage="group_std", loss="grpo", reduction="sequence", kl_coef=0.04)
        | _clip(0.2, 0.2),
        "population std",
    ),
    "r1_zero": Preset(
        "DeepSeek-R1, Nature 2025, training details",
        _R1 | {"rewards": {"accuracy": 1.0, "format": 1.0}},
    ),
    "r1": Preset(
        "DeepSeek-R1, Nature 2025, first RL stage",
        _R1 | {"rewards": {"accuracy": 1.0, "format": 1.0, "language": 1.0}},
    ),
    "dr_grpo": Preset(
        "Dr.GRPO 2503.20783",
        _algorithm(advantage="none", loss="grpo", reduction="constant", kl_coef=0.0)
        | _clip(0.2, 0.2),
    ),
    "dapo": Preset(
        "DAPO 2503.14476 Eq. 8, 11, 13",
        _algorithm(
            advantage="group_std", loss="grpo", reduction="token", kl_coef=0.0, no_signal="resample"
        )
        | _clip(0.2, 0.28)
        | {"train.updates_per_rollout": 16, "rewards": {"accuracy": 2.0, "length": 1.0}},
        "accuracy 0 or 2 for -1 or 1: the same advantages",
    ),
    "gspo": Preset(
        "GSPO 2507.18071 Eq. 5, 7",
        _algorithm(advantage="group_std", loss="gspo", reduction="sequence", kl_coef=0.0)
        | _clip(3e-4, 4e-4)
        | {"train.updates_per_rollout": 4},
    ),
    "cispo": Preset(
        "MiniMax-M1 2506.13585 Eq. 4, 5",
        _CISPO | _algorithm(advantage="group_std", reduction="token"),
        "the paper gives no cap: ScaleRL's",
    ),
    "rloo": Preset(
        "RLOO 2402.14740 section 3.3",
        _algorithm(
            advantage="leave_one_out",
            loss="reinforce",
            reduction="constant",
            kl_coef=0.03,
            kl_estimator="k1",
            kl_in="reward",
        ),
        "a constant divides the sum over tokens",
    ),
    "reinforce_pp": Preset(
        "REINFORCE++ 2501.03262 Eq. 8-10",
        _algorithm(
            advantage="batch",
            loss="grpo",
            reduction="sequence",
            kl_coef=0.001,
            kl_estimator="k1",
            kl_in="reward",
        )
        | _clip(0.2, 0.2),
    ),
    "lite_ppo": Preset(
        "Lite-PPO 2508.08221",
        _algorithm(advantage="batch_std", loss="grpo", reduction="token", kl_coef=0.0)
        | _clip(0.2, 0.2),
    ),
    "scalerl": Preset(
        "ScaleRL 2510.13786",
        _CISPO
        | _algorithm(
            advantage="centered_std",
            reduction="prompt",
            old_logprobs="sampler",
            no_signal="drop",
            drop_solved=0.9,
        )
        | {"model.float32_head": True},
        "its k = 8 steps off-policy: train.max_staleness; without forced ends of thoughts",
    ),
    "sapo": Preset(
        "SAPO 2511.20347",
        _algorithm(advantage="group_std", loss="sapo", reduction="sequence", kl_coef=0.0),
    ),
    "gmpo": Preset(
        "GMPO 2507.20673 Eq. 4",
        _algorithm(advantage="group_std", loss="gmpo", reduction="sequence", kl_coef=0.0)
        | _clip(0.4, 0.4),
        "clip_low and clip_high bound the log of the ratio",
    ),
    "on_policy_distill": Preset(
        "on-policy distillation: GKD 2306.13649, Qwen3 2505.09388 section 4.5",
        _algorithm(advantage="teacher", loss="reinforce", reduction="token", kl_coef=0.0),
        "the teacher is model.teacher; rewards are only measured",
    ),
}


def fill(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns a config's tree with its preset's values where it has none.

    Raises ValueError for a preset that there is not.
    """
    section = tree.get("algorithm") or {}
    name = section.get("preset", "grpo") if isinstance(section, dict) else "grpo"
    if name not in PRESETS:
        near = difflib.get_close_matches(str(name), PRESETS, n=1)
        raise ValueError(
            f"algorithm.preset: no preset {name!r}; have "
            f"{', '.join(PRESETS)}{f' (did you mean {near[0]}?)' if near else ''}"
        )
    filled = dict(tree)
    for path, value in PRESETS[name].settings.items():
        key, _, leaf = path.partition(".")
        if not leaf:
            filled.setdefault(key, value)
        elif isinstance(filled.get(key) or {}, dict):
            filled[key] = {leaf: value} | (filled.get(key) or {})
    if isinstance(section, dict):
        loss = filled["algorithm"].get("loss", Algorithm.model_fields["loss"].default)
        for leaf, losses in BOUNDS.items():
            usual = PRESETS[name].settings.get(
                f"algorithm.{leaf}", Algorithm.model_fields[leaf].default
            )
            if str(loss) in EQUATIONS and loss not in losses and section.get(leaf, usual) != usual:
                raise ValueError(
                    f"algorithm.{leaf}: loss {loss} has none; it is of {', '.join(losses)}: leave "
                    f"it out, or at {usual}"
                )
    return filled


_CLIPPED = ("grpo", "gspo", "gmpo")
# whose they are
BOUNDS = {
    "clip_low": _CLIPPED,
    "clip_high": _CLIPPED,
    "dual_clip": ("grpo",),
    "ratio_max": ("cispo",),
}
EQUATIONS = {  # of what is maximised at each token; r = pi / pi_old, sg: without a gradient
    "grpo": "min(r A, clip(r, {low:.6g}, {high:.6g}) A)",
    "gspo": "min(s A, clip(s, {low:.6g}, {high:.6g}) A), s = (pi(o) / pi_old(o))^(1/|o|)",
    "cispo": "sg(min(r, {cap:g})) A log pi",
    "reinforce": "r A",
    "sapo": "(4 / tau) sigmoid(tau (r - 1)) A, tau 1 where A > 0, else 1.05",
    "gmpo": "s A, s = exp(mean of log r within [-{a.clip_low:g}, {a.clip_high:g}])",
}
ADVANTAGES = {
    "group_std": "(R - mean) / std of the group",
    "batch_std": "(R - mean of the group) / std of the batch",
    "centered_std": "(R - mean of the group) / std of these in the batch",
    "none": "R - mean of the group",
    "leave_one_out": "R - mean of the group's others",
    "batch": "(R_t - mean) / std over the batch's tokens",
    "teacher": "log pi_teacher - log pi_old at each token",
}
REDUCTIONS = {
    "sequence": "mean over completions of the mean over tokens",
    "token": "mean over all tokens",
    "constant": "sum over tokens / (completions x max_tokens)",
    "prompt": "mean over problems of the mean over their tokens",
}


def parts(algorithm: Algorithm) -> dict[str, str]:
    """Returns what a recipe is, in formulas: equation, advantage, reduction, KL."""
    a = algorithm
    equation = EQUATIONS.get(a.loss, a.loss).format(
        low=1 - a.clip_low, high=1 + a.clip_high, cap=a.ratio_max, a=a
    )
    kl = f"{a.kl_coef:g} {a.kl_estimator} in the {a.kl_in}" if a.kl_coef else "none"
    if a.kl_coef and a.reference_reset:
        kl += f", reference reset every {a.reference_reset} updates"
    return {
        "equation": equation,
        "advantage": ADVANTAGES[a.advantage],
        "reduction": REDUCTIONS[a.reduction],
        "KL": kl,
    }


def describe(algorithm: Algorithm) -> str:
    """Returns a recipe in one line.

    It has the recipe's name and source, what the config changed, and what the recipe is in
    formulas.
    """
    preset = PRESETS[algorithm.preset]
    own = {path.removeprefix("algorithm."): value for path, value in preset.settings.items()}
    usual = {
        key: own.get(key, spec.default)
        for key, spec in Algorithm.model_fields.items()
        if key != "preset"
    }
    changed = [
        f"{key}={getattr(algorithm, key)}"
        for key, value in usual.items()
        if getattr(algorithm, key) != value
    ]
    told = [f"{key} {value}" for key, value in parts(algorithm).items()]
    return (
        f"{algorithm.preset} ({preset.source}{', with ' + ', '.join(changed) if changed else ''}): "
        + "; ".join(told)
    )
