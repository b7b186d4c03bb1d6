"""Tests of the text that a run prints about its recipe, and of truncated sampling."""

from pathlib import Path

import pytest

from grpo import config as configs
from grpo.config.recipe import recipe_lines, recipe_warnings
from grpo.types import UserError

CONFIGS = Path(__file__).parents[3] / "configs"


def train_config(**sections):
    """Returns a config of 256 completions per rollout, with more sections."""
    tree = {
        "run_dir": "x",
        "model": {"path": "tiny-qwen2"},
        "data": {"name": "arithmetic"},
        "train": {"rollouts": 1},
    }
    return configs.parse(tree | sections)


def test_a_run_prints_the_reasons_for_usual_differences_from_its_preset():
    config = configs.load(str(CONFIGS / "gsm8k_qwen2.5_0.5b.yaml"))
    recipe, *reasons = recipe_lines(config)
    assert recipe.startswith("grpo (DeepSeekMath")
    assert [reason.partition(":")[0].strip() for reason in reasons] == [
        "mismatch=tis",
        "kl_coef=0.001",
        "betas=(0.9, 0.95)",
    ]
    # Another preset and another value have another reason, or none.
    seven_b = recipe_lines(configs.load(str(CONFIGS / "r1_zero_math_7b.yaml")))
    assert any(line.startswith("  kl_coef=0.0: saves the memory") for line in seven_b)
    assert len(recipe_lines(train_config(algorithm={"preset": "rloo", "kl_coef": 0.001}))) == 1
    # Values of the preset need no reason.
    cispo = train_config(algorithm={"preset": "cispo"}, train={"rollouts": 1, "problems": 128})
    assert cispo.learner.betas == (0.9, 0.95)
    assert len(recipe_lines(cispo)) == 1


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS.glob("*.yaml") if "\nalgorithm:" in path.read_text()], ids=str
)
def test_the_shipped_configs_correct_for_an_engine_in_bfloat16(path):
    config = configs.load(str(path))
    assert config.model.dtype == "bfloat16"
    assert str(config.algorithm.mismatch) == "tis"
    assert config.learner.betas == (0.9, 0.95)
    # The reference model of the 7B config does not fit beside its learner and engine.
    assert config.algorithm.kl_coef == (0.0 if path.name == "r1_zero_math_7b.yaml" else 0.001)
    assert recipe_warnings(config) == []


TRUNCATIONS = [{"top_p": 0.95}, {"top_k": 50}]
GEOMETRIC = {"mask": "geometric", "weight": "token", "max": 2}


@pytest.mark.parametrize("sampling", TRUNCATIONS)
@pytest.mark.parametrize(
    ("algorithm", "remedy"),
    [
        ({"old_logprobs": "sampler"}, "algorithm.old_logprobs=learner"),
        ({"preset": "scalerl"}, "algorithm.old_logprobs=learner"),
        ({"preset": "dppo"}, "algorithm.preset=cispo"),
        ({"mismatch": "mis_sequence"}, "algorithm.mismatch=tis"),
        ({"mismatch": "mask_sequence"}, "algorithm.mismatch=tis"),
        ({"mismatch": GEOMETRIC}, "algorithm.mismatch=tis"),
        # Groups that are carried over have the old logprobs of the sampler.
        ({"preset": "gspo", "no_signal": "resample"}, "algorithm.mismatch=tis"),
    ],
)
def test_truncated_sampling_with_ratios_of_complete_sequences_is_an_error(
    sampling, algorithm, remedy
):
    with pytest.raises(
        UserError, match=f"error of their ratio grows with every token.*or {remedy}"
    ):
        train_config(sampling=sampling, algorithm=algorithm)
    train_config(algorithm=algorithm)


@pytest.mark.parametrize("sampling", TRUNCATIONS)
@pytest.mark.parametrize(
    ("algorithm", "is_warned"),
    [
        ({"mismatch": "tis"}, True),
        ({"mismatch": "icepop"}, True),
        # Groups that are carried over have the old logprobs of the sampler.
        ({"no_signal": "resample"}, True),
        ({"off_policy_max": 0.5}, True),
        ({"drift_coef": 0.001}, True),
        ({"mismatch": "none"}, False),
    ],
)
def test_truncated_sampling_with_ratios_of_tokens_is_a_warning(sampling, algorithm, is_warned):
    config = train_config(sampling=sampling, algorithm=algorithm)
    assert any("the ratio of each token is too small" in line for line in recipe_lines(config)) == (
        is_warned
    )


def test_small_mini_batches_are_a_warning():
    # 32 problems x 8 completions in 4 and in 8 updates.
    train = {"rollouts": 1, "problems": 32, "group_size": 8}
    assert recipe_warnings(train_config(train=train | {"updates_per_rollout": 4})) == []
    (warning,) = recipe_warnings(train_config(train=train | {"updates_per_rollout": 8}))
    assert "an update has 32 completions (256 per rollout" in warning


def test_a_mean_of_negative_rewards_is_a_warning():
    algorithm = {"preset": "maxrl"}
    assert recipe_warnings(train_config(algorithm=algorithm)) == []
    rewards = {"accuracy": 1.0, "length": 1.0}
    (warning,) = recipe_warnings(train_config(algorithm=algorithm, rewards=rewards))
    assert "the reward length is negative" in warning


def test_one_reward_is_a_warning_if_each_is_normalized():
    algorithm = {"preset": "gdpo"}
    train = {"rollouts": 1, "problems": 32, "group_size": 8}
    assert recipe_warnings(train_config(algorithm=algorithm, train=train)) == []
    (warning,) = recipe_warnings(
        train_config(algorithm=algorithm, train=train, rewards={"accuracy": 1.0})
    )
    assert "this config has a single one" in warning
