"""The published recipes by name (presets), and a recipe's formulas as text.

A preset sets the keys, of any section, that the config does not set itself. It sets no numbers of
problems or completions and no learning rates: those are in configs/. docs/algorithms.md has the
same table; a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grpo.config.algorithm import MISMATCH_FORMS, NORMALIZED_ADVANTAGES, AlgorithmSettings
from grpo.config.reading import did_you_mean


@dataclass(frozen=True, slots=True)
class Preset:
    """A published recipe.

    Attributes:
        source: The publication.
        settings: The keys that the preset sets, e.g. `{"algorithm.loss": "gspo"}`. A key without a
            dot is a full section, e.g. `{"rewards": {"accuracy": 1.0}}`.
        note: A difference from the publication, or a remark. "" if there is none.
    """

    source: str
    settings: dict[str, Any]
    note: str = ""


def _algorithm(**settings: Any) -> dict[str, Any]:
    """Returns the settings with the keys of section `algorithm`: `{"algorithm.loss": "gspo"}`."""
    return {f"algorithm.{key}": value for key, value in settings.items()}


_R1 = {
    **_algorithm(
        advantage="group_std",
        loss="grpo",
        reduction="sequence",
        kl_coef=0.001,
        reference_reset=400,
        clip_low=10.0,
        clip_high=10.0,
    ),
    "train.updates_per_rollout": 16,
}

# What the two variants of DPPO have in common.
_DPPO = {
    **_algorithm(
        advantage="none",
        reduction="constant",
        kl_coef=0.0,
        ratio_max=20.0,
        old_logprobs="sampler",
    ),
    "train.updates_per_rollout": 8,
}

PRESETS = {
    "grpo": Preset(
        source="DeepSeekMath 2402.03300 Eq. 3, 4",
        settings=_algorithm(
            advantage="group_std",
            loss="grpo",
            reduction="sequence",
            kl_coef=0.04,
            clip_low=0.2,
            clip_high=0.2,
        ),
        note="population std",
    ),
    "r1_zero": Preset(
        source="DeepSeek-R1, Nature 2025, training details",
        settings={**_R1, "rewards": {"accuracy": 1.0, "format": 1.0}},
    ),
    "r1": Preset(
        source="DeepSeek-R1, Nature 2025, first RL stage",
        settings={**_R1, "rewards": {"accuracy": 1.0, "format": 1.0, "language": 1.0}},
    ),
    "dr_grpo": Preset(
        source="Dr.GRPO 2503.20783",
        settings={
            **_algorithm(
                advantage="none",
                loss="grpo",
                reduction="constant",
                kl_coef=0.0,
                clip_low=0.2,
                clip_high=0.2,
            ),
            "train.updates_per_rollout": 8,
        },
        note="the authors' scripts update on 128 of 1,024 completions",
    ),
    "dapo": Preset(
        source="DAPO 2503.14476 Eq. 8, 11, 13",
        settings={
            **_algorithm(
                advantage="group_std",
                loss="grpo",
                reduction="token",
                kl_coef=0.0,
                no_signal="resample",
                clip_low=0.2,
                clip_high=0.28,
            ),
            "train.updates_per_rollout": 16,
            "rewards": {"accuracy": 2.0, "length": 1.0},
        },
        note="accuracy 0 or 2 instead of -1 or 1: the advantages are the same. Eq. 8 read "
        "literally is reduction prompt; the implementations (verl, TRL) use token",
    ),
    "gspo": Preset(
        source="GSPO 2507.18071 Eq. 5, 7",
        settings={
            **_algorithm(
                advantage="group_std",
                loss="gspo",
                reduction="sequence",
                kl_coef=0.0,
                clip_low=3e-4,
                clip_high=4e-4,
            ),
            "train.updates_per_rollout": 4,
        },
    ),
    "cispo": Preset(
        source="MiniMax-M1 2506.13585 Eq. 4, 5, section 3",
        settings={
            **_algorithm(
                loss="cispo",
                ratio_max=5.0,
                kl_coef=0.0,
                advantage="group_std",
                reduction="token",
                no_signal="resample",
            ),
            "train.updates_per_rollout": 16,
            "rewards": {"accuracy": 2.0, "length": 1.0},
            "model.float32_head": True,
            "learner.betas": (0.9, 0.95),
            "learner.eps": 1e-15,
        },
        note="the paper gives no cap, 5 is ScaleRL's; dynamic sampling and the length penalty are "
        "DAPO's; the early stop of repetitions is not implemented",
    ),
    "rloo": Preset(
        source="RLOO 2402.14740 section 3.3",
        settings=_algorithm(
            advantage="leave_one_out",
            loss="reinforce",
            reduction="constant",
            kl_coef=0.03,
            kl_estimator="k1",
            kl_in="reward",
        ),
        note="the sum over tokens is divided by a constant",
    ),
    "reinforce_pp": Preset(
        source="REINFORCE++ 2501.03262 Eq. 8-10",
        settings={
            **_algorithm(
                advantage="batch",
                loss="grpo",
                reduction="sequence",
                kl_coef=0.001,
                kl_estimator="k1",
                kl_in="reward",
                clip_low=0.2,
                clip_high=0.2,
            ),
            "train.updates_per_rollout": 8,
        },
        note="v1 of the paper gives 256 for a rollout, 4 completions and 128 for an update; in "
        "OpenRLHF these are problems and completions, which makes 8 updates",
    ),
    "lite_ppo": Preset(
        source="Lite-PPO 2508.08221",
        settings=_algorithm(
            advantage="batch_std",
            loss="grpo",
            reduction="token",
            kl_coef=0.0,
            clip_low=0.2,
            clip_high=0.2,
        ),
        note="the paper's batch of 1,024 is its rollout of 128 problems x 8 completions: with one "
        "update the ratio is 1, and the clip does not act",
    ),
    "scalerl": Preset(
        source="ScaleRL 2510.13786",
        settings={
            **_algorithm(
                loss="cispo",
                ratio_max=5.0,
                kl_coef=0.0,
                advantage="centered_std",
                reduction="prompt",
                old_logprobs="sampler",
                no_signal="drop",
                drop_solved=0.9,
            ),
            "model.float32_head": True,
        },
        note="train.max_staleness sets its k = 8 off-policy steps; forced interruptions are not "
        "implemented",
    ),
    "sapo": Preset(
        source="SAPO 2511.20347",
        settings={
            **_algorithm(advantage="group_std", loss="sapo", reduction="sequence", kl_coef=0.0),
            "train.updates_per_rollout": 4,
        },
        note="4 updates as for Qwen3-30B-A3B and in verl's script",
    ),
    "gmpo": Preset(
        source="GMPO 2507.20673 Eq. 4",
        settings={
            **_algorithm(
                advantage="group_std",
                loss="gmpo",
                reduction="sequence",
                kl_coef=0.0,
                clip_low=0.4,
                clip_high=0.4,
            ),
            "train.updates_per_rollout": 8,
        },
        note="clip_low and clip_high bound the log of the ratio; the authors' scripts update on "
        "128 of 1,024 completions",
    ),
    "dppo": Preset(
        source="DPPO 2602.04879 Eq. 12, 13 (Binary-TV)",
        settings={**_DPPO, **_algorithm(loss="dppo", clip_low=0.15, clip_high=0.15)},
        note="advantage, reduction and updates of the authors' script; prime-rl: clip_low and "
        "clip_high 0.2, drift_coef 0.001, reduction token",
    ),
    "dppo_kl": Preset(
        source="DPPO 2602.04879 Eq. 12, 14 (Binary-KL)",
        settings={**_DPPO, **_algorithm(loss="dppo_kl", clip_low=0.05, clip_high=0.05)},
        note="otherwise as dppo",
    ),
    "deepseek_v32": Preset(
        source="DeepSeek-V3.2 2512.02556 Eq. 5-9",
        settings={
            **_algorithm(
                advantage="none",
                loss="grpo",
                reduction="sequence",
                kl_coef=0.001,
                kl_unbiased=True,
                off_policy_max=0.5,
                clip_low=0.2,
                clip_high=0.2,
            ),
            "train.updates_per_rollout": 16,
        },
        note="the paper gives no numbers: KL and updates are R1's, the clip GRPO's, off_policy_max "
        "TRL's; the tokens that the sampler could choose from, and a router's experts, are not "
        "replayed",
    ),
    "maxrl": Preset(
        source="MaxRL 2602.02710",
        settings={
            **_algorithm(
                advantage="group_mean",
                loss="grpo",
                reduction="token",
                kl_coef=0.0,
                clip_low=0.2,
                clip_high=0.2,
            ),
            "rewards": {"accuracy": 1.0},
        },
        note="loss and reduction of the authors' script; rewards must not be negative",
    ),
    "gdpo": Preset(
        source="GDPO 2601.05242",
        settings={
            **_algorithm(
                advantage="per_reward",
                loss="grpo",
                reduction="token",
                kl_coef=0.0,
                clip_low=0.2,
                clip_high=0.2,
            ),
            "train.updates_per_rollout": 4,
            "rewards": {"accuracy": 1.0, "format": 1.0},
        },
        note="std over completions, as in the authors' code for TRL; their code for verl takes it "
        "over tokens. Reduction and updates of the latter",
    ),
    "reinforce_pp_baseline": Preset(
        source="REINFORCE++ with baseline, 2501.03262",
        settings=_algorithm(
            advantage="centered_batch",
            loss="grpo",
            reduction="token",
            kl_coef=1e-5,
            kl_estimator="k2",
            clip_low=0.2,
            clip_high=0.2,
        ),
        note="numbers of OpenRLHF's script, which also sets mismatch icepop and no_signal resample",
    ),
    "prorl_v2": Preset(
        source="ProRL v2, NVIDIA 2025; script of OpenRLHF",
        settings={
            **_algorithm(
                advantage="centered_batch",
                loss="grpo",
                reduction="token",
                kl_coef=1e-4,
                kl_estimator="k2",
                clip_low=0.2,
                clip_high=0.27,
                mismatch=MISMATCH_FORMS["icepop"],
                no_signal="resample",
            ),
            "train.updates_per_rollout": 8,
        },
        note="reference_reset and reset_optimizer set its periodic resets; reward 0 for truncated "
        "completions and the scheduled length penalty are not implemented",
    ),
    "on_policy_distill": Preset(
        source="on-policy distillation: GKD 2306.13649, Qwen3 2505.09388 section 4.5",
        settings=_algorithm(advantage="teacher", loss="reinforce", reduction="token", kl_coef=0.0),
        note="the teacher is model.teacher; advantages are clamped to +-10 (verl); rewards are "
        "reported but not used",
    ),
    "on_policy_distill_exact": Preset(
        source="GKD 2306.13649 Eq. 3 (all texts from the student)",
        settings=_algorithm(
            advantage="teacher",
            loss="reinforce",
            reduction="token",
            kl_coef=0.0,
            teacher_divergence="reverse_kl",
        ),
        note="the divergence of the complete distributions instead of one sample; rewards are "
        "reported but not used",
    ),
    "self_distill": Preset(
        source="OPSD 2601.18734, SDFT 2601.19897",
        settings=_algorithm(
            advantage="teacher",
            loss="reinforce",
            reduction="token",
            kl_coef=0.0,
            teacher_divergence="reverse_kl",
            teacher_hint="solution",
        ),
        note="the teacher is the current policy; model.teacher set to the start model fixes it, as "
        "in OPSD. teacher_hint success or feedback is SDPO 2601.20802. There is no moving average",
    ),
}


def apply_preset(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns a config tree with its preset's value for each key that it does not set.

    Args:
        tree: A config as nested dicts, e.g. `{"algorithm": {"preset": "dapo"}, ...}`. It is not
            modified.

    Raises:
        ValueError: The preset is unknown, or the config sets a clipping key that has no effect on
            its loss.
    """
    algorithm = tree.get("algorithm") or {}
    is_valid_section = isinstance(algorithm, dict)  # otherwise its validation raises an error
    name = algorithm.get("preset", "grpo") if is_valid_section else "grpo"
    if name not in PRESETS:
        raise ValueError(
            f"algorithm.preset: unknown preset {name!r}{did_you_mean(str(name), PRESETS)}. "
            f"Available: {', '.join(PRESETS)}"
        )
    filled = dict(tree)
    for path, value in PRESETS[name].settings.items():
        section_name, _, key = path.partition(".")
        if not key:  # the preset sets the full section
            filled.setdefault(section_name, value)
            continue
        section = filled.get(section_name) or {}
        if isinstance(section, dict):
            filled[section_name] = {key: value, **section}
    if is_valid_section:
        loss = filled["algorithm"].get("loss", AlgorithmSettings.model_fields["loss"].default)
        _check_clipping_keys(algorithm, PRESETS[name], str(loss))
    return filled


def _check_clipping_keys(algorithm: dict[str, Any], preset: Preset, loss: str) -> None:
    """Raises ValueError if `algorithm` changes a key of CLIPPING_KEYS that its loss ignores."""
    if loss not in EQUATIONS:  # a user's own loss may read any key
        return
    for key, losses in CLIPPING_KEYS.items():
        default = _preset_value(preset, key)
        if loss not in losses and algorithm.get(key, default) != default:
            raise ValueError(
                f"algorithm.{key}: has no effect on loss {loss}, only on {', '.join(losses)}. "
                f"Remove it, or set it to {default}"
            )


def _preset_value(preset: Preset, key: str) -> Any:
    """Returns the value of a key of section `algorithm` with a preset and nothing else."""
    default = AlgorithmSettings.model_fields[key].default
    return preset.settings.get(f"algorithm.{key}", default)


# The clipping keys of section `algorithm`, and the losses that read them.
CLIPPING_KEYS = {
    "clip_low": ("grpo", "gspo", "gmpo", "dppo", "dppo_kl"),
    "clip_high": ("grpo", "gspo", "gmpo", "dppo", "dppo_kl"),
    "dual_clip": ("grpo",),
    "ratio_max": ("cispo", "dppo", "dppo_kl"),
}

# By loss: the term that is maximized for each token, as a format string. r = pi / pi_old, A is the
# advantage, and sg() stops the gradient.
EQUATIONS = {
    "grpo": "min(r A, clip(r, {lower_bound:.6g}, {upper_bound:.6g}) A)",
    "gspo": "min(s A, clip(s, {lower_bound:.6g}, {upper_bound:.6g}) A), "
    "s = (pi(o) / pi_old(o))^(1/|o|)",
    "cispo": "sg(min(r, {ratio_max:g})) A log pi",
    "dppo": "sg(min(r, {ratio_max:g})) A log pi, r = pi / pi_sampler; 0 where A > 0 and "
    "pi - pi_sampler > {clip_high:g}, or A < 0 and pi - pi_sampler < -{clip_low:g}",
    "dppo_kl": "sg(min(r, {ratio_max:g})) A log pi, r = pi / pi_sampler; 0 where the binary KL is "
    "above {clip_high:g} with A > 0 and r > 1, or above {clip_low:g} with A < 0 and r < 1",
    "reinforce": "r A",
    "sapo": "(4 / tau) sigmoid(tau (r - 1)) A, tau 1 where A > 0, else 1.05",
    "gmpo": "s A, s = exp(mean of clipped log r): at most {clip_high:g} where A > 0, at least "
    "-{clip_low:g} where A < 0",
}

# R is a completion's reward, R_t a token's return, R_n the value of reward n and w_n its weight.
ADVANTAGES = {
    "group_std": "(R - group mean) / group std",
    "batch_std": "(R - group mean) / batch std of R",
    "centered_std": "(R - group mean) / batch std of (R - group mean)",
    "centered_batch": "c - mean of c, / std of c over all tokens of the batch, c = R - group mean",
    "group_mean": "(R - group mean) / group mean",
    "per_reward": "S / batch std of S, S = sum over n of w_n (R_n - group mean) / group std",
    "none": "R - group mean",
    "leave_one_out": "R - mean of the group's other completions",
    "batch": "(R_t - mean) / std over all tokens of the batch",
    "teacher": "log pi_teacher - log pi_old at each token",
}

REDUCTIONS = {
    "sequence": "mean over completions of the mean over tokens",
    "token": "mean over all tokens",
    "constant": "sum over tokens / (completions x max_tokens)",
    "prompt": "mean over problems of the mean over their tokens",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Formulas:
    """A recipe in formulas.

    Example: `Formulas(equation="r A", advantage="R - group mean", reduction="mean over all tokens",
    kl="0.04 k3 in the loss")`.
    """

    equation: str
    advantage: str
    reduction: str
    kl: str


def formulas(algorithm: AlgorithmSettings) -> Formulas:
    """Returns a recipe in formulas. The equation of a user's loss is its name."""
    equation = EQUATIONS.get(algorithm.loss, algorithm.loss)
    return Formulas(
        equation=equation.format(
            lower_bound=1 - algorithm.clip_low,
            upper_bound=1 + algorithm.clip_high,
            ratio_max=algorithm.ratio_max,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
        ),
        advantage=_advantage_formula(algorithm),
        reduction=REDUCTIONS[algorithm.reduction],
        kl=_kl_formula(algorithm),
    )


# KL terms of the teacher, by `teacher_divergence`.
TEACHER_DIVERGENCES = {
    "reverse_kl": "KL(pi || pi_teacher)",
    "forward_kl": "KL(pi_teacher || pi)",
    "jsd": "JSD of pi and pi_teacher",
}


def _advantage_formula(algorithm: AlgorithmSettings) -> str:
    if algorithm.advantage == "teacher":
        return "0" if algorithm.has_teacher_loss else ADVANTAGES["teacher"]
    formula = ADVANTAGES[algorithm.advantage]
    if algorithm.has_teacher_advantage:
        formula += f" + {algorithm.teacher_coef:g} (log pi_teacher - log pi_old) at each token"
    return formula


def _kl_formula(algorithm: AlgorithmSettings) -> str:
    terms = []
    if algorithm.kl_coef:
        terms.append(_reference_kl_formula(algorithm))
    if algorithm.has_teacher_loss:
        divergence = TEACHER_DIVERGENCES[algorithm.teacher_divergence]
        tokens = "the vocabulary"
        if algorithm.teacher_top_k is not None:
            tokens = f"the teacher's {algorithm.teacher_top_k} most likely tokens"
        terms.append(f"{algorithm.teacher_weight:g} {divergence} over {tokens} in the loss")
    return ", ".join(terms) or "none"


def _reference_kl_formula(algorithm: AlgorithmSettings) -> str:
    term = f"r {algorithm.kl_estimator}" if algorithm.kl_unbiased else algorithm.kl_estimator
    kl = f"{algorithm.kl_coef:g} {term} in the {algorithm.kl_in}"
    if algorithm.kl_in == "reward" and algorithm.advantage in NORMALIZED_ADVANTAGES:
        kl += " after the normalization"
    if algorithm.reference_reset:
        kl += f", reference reset every {algorithm.reference_reset} updates"
    return kl


def describe_recipe(algorithm: AlgorithmSettings) -> str:
    """Returns a recipe in one line: its preset and source, the changed keys, and its formulas.

    `grpo (DeepSeekMath 2402.03300 Eq. 3, 4, with dual_clip=4.0): equation ...; advantage ...;
    reduction ...; KL ...`
    """
    preset = PRESETS[algorithm.preset]
    changes = []
    for key in AlgorithmSettings.model_fields:
        value = getattr(algorithm, key)
        if key != "preset" and value != _preset_value(preset, key):
            changes.append(f"{key}={value}")
    origin = preset.source
    if changes:
        origin += f", with {', '.join(changes)}"
    recipe = formulas(algorithm)
    return (
        f"{algorithm.preset} ({origin}): equation {recipe.equation}; "
        f"advantage {recipe.advantage}; reduction {recipe.reduction}; KL {recipe.kl}"
    )
