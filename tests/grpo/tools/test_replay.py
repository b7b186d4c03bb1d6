"""A step made again from what was kept of it.

The same bits, another recipe, and what is said when it cannot be done.
"""

import re
import shutil

import pytest
import yaml
from random_loop import make_loop

from grpo import config as configs
from grpo.cli import main
from grpo.run.directory import read_update
from grpo.tools.replay import replay
from grpo.types import UserError


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    sections = {
        "checkpoint": {"every": 1, "keep_last": 2},
        "algorithm": {"kl_coef": 0.01},
        "logging": {"replay": 3},
    }
    train = {"rollouts": 4, "problems": 4, "group_size": 4, "updates_per_rollout": 2}
    loop = make_loop(path, tiny, train=train, **sections)
    (path / "config.yaml").write_text(configs.dump(loop.config))
    loop.train()
    return path


def test_a_step_is_made_again_to_the_same_bits(folder, capsys):
    assert replay(str(folder), step=4, overrides=[])
    out = capsys.readouterr().out
    assert "step 4" in out and "differs" not in out
    assert main(["replay", str(folder), "--step", "4"]) == 0


def test_by_another_recipe_it_differs_where_the_recipe_does(folder, capsys):
    assert not replay(str(folder), step=4, overrides=["algorithm.preset=dr_grpo"])
    out = capsys.readouterr().out
    assert "dr_grpo" in out and "differs" in out
    assert main(["replay", str(folder), "algorithm.preset=dr_grpo"]) == 0


def test_a_recipe_with_costs_in_the_reward_or_a_teacher_gets_them(tiny, folder, capsys):
    for preset, more in (
        ("rloo", []),
        ("reinforce_pp", []),
        ("on_policy_distill", [f"model.teacher={tiny(intermediate_size=128)}"]),
    ):
        assert not replay(str(folder), step=4, overrides=[f"algorithm.preset={preset}", *more])
        out = capsys.readouterr().out
        assert preset in out and "loss" in out
    norms = []
    for coefficient in (1, 100):  # the KL is in the advantages
        assert not replay(
            str(folder),
            step=4,
            overrides=["algorithm.kl_in=reward", f"algorithm.kl_coef={coefficient}"],
        )
        norms += re.findall(r"^policy/grad_norm +\S+ +(\S+)", capsys.readouterr().out, re.MULTILINE)
    assert len(set(norms)) == 2
    with pytest.raises(UserError, match="truncated=mask"):
        replay(str(folder), step=4, overrides=["algorithm.truncated=mask"])


def test_another_loss_comes_with_its_own_bounds(folder, tmp_path, capsys):
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(
        yaml.safe_dump(tree | {"algorithm": tree["algorithm"] | {"clip_high": 0.28}})
    )
    assert not replay(str(tmp_path / "run"), step=4, overrides=["algorithm.loss=cispo"])


def test_the_last_steps_are_kept_whole(folder):
    assert sorted(path.name for path in (folder / "samples").glob("*.npz")) == [
        f"step-00000{n}.npz" for n in (2, 3, 4)
    ]
    samples = read_update(folder, 4)
    assert (
        len(samples) == 16
        and {sample.group for sample in samples} == {0, 1, 2, 3}
        and {sample.reward for sample in samples} <= {0.0, 1.0}
    )
    assert all(
        len(sample.advantages) == len(sample.sampler_logprobs) == sample.completion_length
        for sample in samples
    )


def test_what_cannot_be_replayed_is_told(folder, tmp_path):
    for step, message in (
        (1, "step 1 was not kept"),
        (9, "no step 9 to replay"),
        (2, "needs the checkpoint of step 1; the run has"),
    ):
        with pytest.raises(UserError, match=message):
            replay(str(folder), step=step, overrides=[])
    with pytest.raises(UserError, match="not a run directory"):
        replay(str(tmp_path), step=1, overrides=[])
    (tmp_path / "config.yaml").write_text("sets: {}")
    with pytest.raises(UserError, match=r"a run of grpo eval, .* needs a run of grpo train"):
        replay(str(tmp_path), step=1, overrides=[])
