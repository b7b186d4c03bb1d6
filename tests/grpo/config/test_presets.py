"""Presets: what they fill in, what they refuse, and that docs/algorithms.md says the same as the
code.
"""

from pathlib import Path

import pytest

from grpo import config as configs
from grpo.config.presets import PRESETS, describe, parts
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
        ({"preset": "dappo"}, r"no preset 'dappo'; have grpo, .* \(did you mean dapo\?\)"),
        ({"kl_coef": 0.1, "kl_estimator": "k1"}, "k1 in the loss has a gradient of mean zero"),
        ({"kl_unbiased": True, "kl_in": "reward"}, "kl_unbiased is for kl_in=loss"),
        ({"old_logprobs": "sampler", "mismatch": "tis"}, "holds the mismatch already"),
        ({"reset_optimizer": True}, "goes with reference_reset"),
        ({"kl_unbiased": True, "kl_estimator": "k2"}, "does not have the KL's gradient"),
        (
            {"preset": "cispo", "dual_clip": 4.0},
            "dual_clip: loss cispo has none; it is of grpo: leave it out, or at None",
        ),
        ({"loss": ["grpo"]}, "algorithm.loss: input should be a valid string"),
        (
            {"preset": "sapo", "clip_high": 0.3},
            "clip_high: loss sapo has none; it is of grpo, gspo, gmpo",
        ),
        ({"ratio_max": 2.0}, "ratio_max: loss grpo has none; it is of cispo"),
        ({"mismatch_max": 2.0}, "choose one with mismatch"),
        ({"preset": "on_policy_distill"}, "model.teacher and algorithm.advantage=teacher"),
    ],
)
def test_recipes_that_mean_nothing_are_refused(algorithm, message):
    with pytest.raises(UserError, match=message):
        configs.parse(TREE | {"algorithm": algorithm})


def test_the_documented_table_is_the_codes():
    """One row a preset: name, equation, advantage, reduction, KL, what else it sets, source."""
    rows = []
    for name, preset in PRESETS.items():
        teacher = (
            {"model": {"path": "tiny-qwen2", "teacher": "tiny-qwen2"}}
            if name == "on_policy_distill"
            else {}
        )
        config = configs.parse(TREE | teacher | {"algorithm": {"preset": name}})
        what = parts(config.algorithm)
        shown = {
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
        rest = {path.removeprefix("algorithm."): value for path, value in preset.settings.items()}
        more = ", ".join(
            f"{key}: {value}" for key, value in rest.items() if key not in shown
        ).replace("'", "")
        source = preset.source + (f" ({preset.note})" if preset.note else "")
        cells = [
            f"`{name}`",
            what["equation"].replace("|", "\\|"),
            what["advantage"],
            what["reduction"],
            what["KL"],
            more,
            source,
        ]
        rows.append("| " + " | ".join(cells) + " |")
    text = (ROOT / "docs" / "algorithms.md").read_text()
    assert [
        line
        for line in text.splitlines()
        if line.partition("` |")[0].removeprefix("| `") in PRESETS
    ] == rows, "\n".join(rows)
