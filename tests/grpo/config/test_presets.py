"""Tests presets: the keys that they fill in, the errors of invalid recipes, and that the table in
docs/algorithms.md matches the code.
"""

from pathlib import Path

import pytest

from grpo import config as configs
from grpo.config.presets import PRESETS, describe_recipe, formulas
from grpo.experience import plugins
from grpo.types import UserError

ROOT = Path(__file__).parents[3]
TREE = {
    "run_dir": "x",
    "model": {"path": "tiny-qwen2"},
    "data": {"name": "arithmetic"},
    "train": {"rollouts": 1},
}


def config_tree(preset, **algorithm):
    """Returns a minimal config tree with a preset and other keys of section `algorithm`."""
    tree = {**TREE, "algorithm": {"preset": preset, **algorithm}}
    if preset.startswith("on_policy_distill"):
        tree["model"] = {**TREE["model"], "teacher": "tiny-qwen2"}
    return tree


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fills_in_its_settings_and_keys_of_the_config_override_it(preset):
    config = configs.parse(config_tree(preset))
    # Raises UserError if the loss does not exist.
    plugins.find_function("grpo.losses", config.algorithm.loss, "loss", "algorithm.loss")
    for path, expected in PRESETS[preset].settings.items():
        section_name, _, key = path.partition(".")
        section = getattr(config, section_name)
        if key:
            assert getattr(section, key) == expected
        else:  # `rewards`, the only complete section
            assert {name: reward.weight for name, reward in section.items()} == expected
    changed = configs.parse(config_tree(preset, reduction="prompt", kl_coef=0.5)).algorithm
    assert changed.reduction == "prompt"
    assert changed.kl_coef == 0.5
    assert "kl_coef=0.5" in describe_recipe(changed)


def test_the_description_of_a_recipe_lists_every_changed_key():
    config = configs.parse(
        config_tree("dr_grpo", dual_clip=4.0, mismatch="icepop", top_entropy=0.2)
    )
    assert "with dual_clip=4.0, mismatch=icepop, top_entropy=0.2)" in describe_recipe(
        config.algorithm
    )


def test_a_correction_is_a_name_or_a_mask_with_a_weight():
    combined = {"mask": "geometric", "bounds": [0.999, 1.001], "weight": "token", "max": 2}
    config = configs.parse(config_tree("grpo", mismatch=combined))
    assert config.algorithm.mismatch.bounds == (0.999, 1.001)
    text = "mismatch={mask: geometric, bounds: [0.999, 1.001], weight: token, max: 2}"
    assert text in describe_recipe(config.algorithm)
    assert configs.parse(config.model_dump(mode="json")) == config
    named = configs.parse(config_tree("grpo", mismatch="icepop"))
    written_out = {"mask": "token", "bounds": [0.5, 5.0], "weight": "token"}
    assert configs.parse(config_tree("grpo", mismatch=written_out)) == named


@pytest.mark.parametrize(
    ("name", "low", "high", "expected"),
    [
        ("none", None, None, "none"),
        ("tis", None, None, "tis"),
        ("tis", None, 3.0, {"weight": "token", "max": 3.0}),
        ("icepop", None, None, "icepop"),
        ("mis_sequence", 0.5, None, {"mask": "sequence", "bounds": [0.5, 3], "weight": "sequence"}),
        # Its bounds were others than those of the name today.
        ("mask_sequence", None, None, {"mask": "geometric", "bounds": [0.5, 2]}),
    ],
)
def test_a_config_that_an_earlier_version_recorded_keeps_its_meaning(name, low, high, expected):
    recorded = config_tree("grpo", mismatch=name, mismatch_min=low, mismatch_max=high)
    assert configs.parse(recorded) == configs.parse(config_tree("grpo", mismatch=expected))


def test_parsing_a_resolved_config_gives_the_same_config():
    config = configs.parse(config_tree("dapo"))
    assert configs.parse(config.model_dump(mode="json")) == config
    assert config.rewards["length"].options == {"max_tokens": 1024, "buffer": 204}
    # The resolved config contains dapo's clip_high, which loss cispo ignores. That is an error only
    # if the value differs from that of the preset.
    config = configs.parse(config_tree("dapo", loss="cispo"))
    assert configs.parse(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (
            {"preset": "dapoo"},
            r"unknown preset 'dapoo' \(did you mean dapo\?\)\. Available: grpo, ",
        ),
        ({"kl_coef": 0.1, "kl_estimator": "k1"}, "the gradient of k1 has mean zero"),
        ({"kl_unbiased": True, "kl_in": "reward"}, "kl_unbiased=true requires kl_in=loss"),
        ({"old_logprobs": "sampler", "mismatch": "tis"}, "already includes the mismatch"),
        ({"loss": "dppo"}, "loss=dppo needs the ratio to the sampler: set old_logprobs=sampler"),
        (
            {"preset": "dppo_kl", "mismatch": "tis"},
            "old_logprobs=sampler with mismatch=tis and preset=dppo_kl",
        ),
        ({"off_policy_max": 0}, "algorithm.off_policy_max: input should be greater than 0"),
        ({"drift_coef": -1}, "algorithm.drift_coef: input should be greater than or equal to 0"),
        ({"max_reward": 1.0}, "max_reward has no effect without drop_solved or pass_rate"),
        ({"reset_optimizer": True}, "reset_optimizer=true requires reference_reset"),
        ({"kl_unbiased": True, "kl_estimator": "k2"}, "does not have the gradient of the KL"),
        (
            {"preset": "cispo", "dual_clip": 4.0},
            "dual_clip: has no effect on loss cispo, only on grpo. Remove it, or set it to None",
        ),
        ({"loss": ["grpo"]}, "algorithm.loss: input should be a valid string"),
        (
            {"preset": "sapo", "clip_high": 0.3},
            "clip_high: has no effect on loss sapo, only on grpo, gspo, gmpo, dppo, dppo_kl",
        ),
        ({"ratio_max": 2.0}, "ratio_max: has no effect on loss grpo, only on cispo, dppo, dppo_kl"),
        (
            {"mismatch": "tiss"},
            r"unknown correction 'tiss' \(did you mean tis\?\). Available: none,",
        ),
        ({"mismatch": {"weight": "token"}}, "weight=token with mask=none has no upper limit"),
        ({"mismatch": {"bounds": [0, 2]}}, "bounds has no effect with mask=none"),
        ({"mismatch": {"mask": "token", "bounds": [2, 1]}}, "expected two numbers >= 0, the lower"),
        ({"mismatch": {"mask": "token", "max": 2}}, "max has no effect with weight=none"),
        ({"mismatch": {"masks": "token"}}, r"mismatch\.masks: unknown key \(did you mean mask\?\)"),
        ({"mismatch": {"mask": "token", "weight": "sequence"}}, "mask=token has no upper limit"),
        # Keys of earlier versions.
        ({"mismatch_max": 3.0}, "mismatch_min and mismatch_max are keys of earlier versions"),
        ({"mismatch": {"mask": "token"}, "mismatch_max": 3.0}, "are keys of earlier versions"),
        ({"mismatch": "tis", "mismatch_min": 0.5}, "a weight has no lower limit any more"),
        (
            {"preset": "on_policy_distill"},
            r"advantage=teacher \(preset on_policy_distill\) needs model.teacher",
        ),
        ({"teacher_coef": 0.5}, r"algorithm.teacher_coef=0.5 needs model.teacher"),
        (
            {"preset": "on_policy_distill", "teacher_coef": 0.5},
            "advantage=teacher does not use rewards: remove teacher_coef",
        ),
        ({"teacher_divergence": "jsd"}, "teacher_divergence=jsd has no effect without a teacher"),
        ({"teacher_hint": "solution"}, "teacher_hint=solution has no effect without a teacher"),
        ({"teacher_coef": 0.5, "teacher_top_k": 8}, "set teacher_divergence=reverse_kl"),
        (
            {"teacher_coef": 0.5, "kl_coef": 0.1, "kl_in": "reward"},
            "kl_in=reward already measures the KL to the teacher",
        ),
    ],
)
def test_an_invalid_recipe_is_an_error(algorithm, message):
    with pytest.raises(UserError, match=message):
        configs.parse(TREE | {"algorithm": algorithm})


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        (
            {"sums": "tiny-qwen2", "difference": "tiny-qwen2"},
            r"model\.teachers\.difference: no such data set \(did you mean differences\?\)\. "
            "Available: sums, differences",
        ),
        ({"sums": "tiny-qwen2"}, "no teacher for the data set differences: add one, or set model"),
    ],
)
def test_every_data_set_needs_a_teacher(teachers, message):
    mixture = {
        "sums": {"name": "arithmetic"},
        "differences": {"name": "arithmetic", "options": {"operations": ["-"]}},
    }
    tree = TREE | {
        "data": {"mixture": mixture},
        "model": {**TREE["model"], "teachers": teachers},
        "algorithm": {"preset": "on_policy_distill"},
    }
    with pytest.raises(UserError, match=message):
        configs.parse(tree)
    # model.teacher teaches the others.
    model = {**TREE["model"], "teachers": {"sums": "tiny-qwen2"}, "teacher": "tiny-llama"}
    config = configs.parse(tree | {"model": model})
    assert config.model.all_teachers == {"": "tiny-llama", "sums": "tiny-qwen2"}


# Keys whose values are in the columns "equation" to "KL" of the table. The column "also sets" lists
# all others.
SHOWN_IN_FORMULAS = {
    "loss",
    "advantage",
    "reduction",
    "clip_low",
    "clip_high",
    "ratio_max",
    "kl_coef",
    "kl_estimator",
    "kl_in",
    "kl_unbiased",
    "reference_reset",
    "teacher_divergence",
}


def table_row(name, preset):
    """Returns the row of a preset: name, equation, advantage, reduction, KL, other keys, source."""
    recipe = formulas(configs.parse(config_tree(name)).algorithm)
    other_keys = []
    for path, value in preset.settings.items():
        key = path.removeprefix("algorithm.")
        if key not in SHOWN_IN_FORMULAS:
            other_keys.append(f"{key}: {value}".replace("'", ""))
    source = preset.source
    if preset.note:
        source += f" ({preset.note})"
    cells = [
        f"`{name}`",
        recipe.equation.replace("|", "\\|"),
        recipe.advantage,
        recipe.reduction,
        recipe.kl.replace("|", "\\|"),
        ", ".join(other_keys),
        source,
    ]
    return "| " + " | ".join(cells) + " |"


def test_the_documented_table_matches_the_code():
    expected_rows = [table_row(name, preset) for name, preset in PRESETS.items()]
    documented_rows = []
    for line in (ROOT / "docs" / "algorithms.md").read_text().splitlines():
        first_cell = line.partition("` |")[0].removeprefix("| `")
        if first_cell in PRESETS:
            documented_rows.append(line)
    assert documented_rows == expected_rows, "\n".join(expected_rows)
