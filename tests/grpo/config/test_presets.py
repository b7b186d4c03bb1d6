"""Presets: what they fill in, what they refuse, and that docs/algorithms.md says the same as the
code.
"""

from pathlib import Path

import pytest

from grpo import config as configs
from grpo.config.presets import PRESETS, describe, formulas
from grpo.experience import plugins
from grpo.types import UserError

ROOT = Path(__file__).parents[3]
TREE = {
    "run_dir": "x",
    "model": {"path": "tiny-qwen2"},
    "data": {"name": "arithmetic"},
    "train": {"rollouts": 1},
}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_one_word_and_the_config_wins(preset):
    tree = TREE | (
        {"model": TREE["model"] | {"teacher": "tiny-qwen2"}}
        if preset == "on_policy_distill"
        else {}
    )
    config = configs.parse(tree | {"algorithm": {"preset": preset}})
    plugins.find("grpo.losses", config.algorithm.loss, "loss", "algorithm.loss")
    for path, value in PRESETS[preset].settings.items():
        section, _, key = path.partition(".")
        found = getattr(config, section)
        if key:
            assert getattr(found, key) == value
        else:
            assert {name: reward.weight for name, reward in found.items()} == value
    changed = configs.parse(
        tree
        | {
            "algorithm": {
                "preset": preset,
                "advantage": "none",
                "kl_coef": 0.5,
                "kl_estimator": "k2",
            }
        }
    )
    assert (changed.algorithm.advantage, changed.algorithm.kl_coef) == ("none", 0.5)
    assert "kl_coef=0.5" in describe(changed.algorithm)


def test_the_printed_recipe_tells_every_change():
    config = configs.parse(
        TREE
        | {
            "algorithm": {
                "preset": "dr_grpo",
                "dual_clip": 4.0,
                "mismatch": "icepop",
                "top_entropy": 0.2,
            }
        }
    )
    assert "with dual_clip=4.0, mismatch=icepop, top_entropy=0.2)" in describe(config.algorithm)


def test_the_resolved_config_is_the_same_config():
    config = configs.parse(TREE | {"algorithm": {"preset": "dapo"}})
    assert configs.parse(config.model_dump(mode="json")) == config
    assert config.rewards["length"].options == {"max_tokens": 1024, "buffer": 204}
    # the preset's clip_high is not the user's
    config = configs.parse(TREE | {"algorithm": {"preset": "dapo", "loss": "cispo"}})
    assert configs.parse(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (
            {"preset": "dappo"},
            r"unknown preset 'dappo' \(did you mean dapo\?\)\. Available: grpo, ",
        ),
        ({"kl_coef": 0.1, "kl_estimator": "k1"}, "the gradient of k1 has mean zero"),
        ({"kl_unbiased": True, "kl_in": "reward"}, "kl_unbiased=true requires kl_in=loss"),
        ({"old_logprobs": "sampler", "mismatch": "tis"}, "already includes the mismatch"),
        ({"reset_optimizer": True}, "reset_optimizer=true requires reference_reset"),
        ({"kl_unbiased": True, "kl_estimator": "k2"}, "does not have the gradient of the KL"),
        (
            {"preset": "cispo", "dual_clip": 4.0},
            "dual_clip: has no effect on loss cispo, only on grpo. Remove it, or set it to None",
        ),
        ({"loss": ["grpo"]}, "algorithm.loss: input should be a valid string"),
        (
            {"preset": "sapo", "clip_high": 0.3},
            "clip_high: has no effect on loss sapo, only on grpo, gspo, gmpo",
        ),
        ({"ratio_max": 2.0}, "ratio_max: has no effect on loss grpo, only on cispo"),
        ({"mismatch_max": 2.0}, "have no effect with mismatch=none"),
        (
            {"preset": "on_policy_distill"},
            r"advantage=teacher \(preset on_policy_distill\) needs model.teacher",
        ),
    ],
)
def test_recipes_that_mean_nothing_are_refused(algorithm, message):
    with pytest.raises(UserError, match=message):
        configs.parse(TREE | {"algorithm": algorithm})


# The keys that the columns "equation" to "KL" of the table show.
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
    "reference_reset",
}


def documented_row(name, preset):
    """Returns the row of a preset: name, equation, advantage, reduction, KL, other keys, source."""
    tree = TREE | {"algorithm": {"preset": name}}
    if name == "on_policy_distill":
        tree["model"] = {"path": "tiny-qwen2", "teacher": "tiny-qwen2"}
    recipe = formulas(configs.parse(tree).algorithm)
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
        recipe.kl,
        ", ".join(other_keys),
        source,
    ]
    return "| " + " | ".join(cells) + " |"


def test_the_documented_table_is_the_codes():
    rows = [documented_row(name, preset) for name, preset in PRESETS.items()]
    text = (ROOT / "docs" / "algorithms.md").read_text()
    documented = [
        line
        for line in text.splitlines()
        if line.partition("` |")[0].removeprefix("| `") in PRESETS
    ]
    assert documented == rows, "\n".join(rows)
