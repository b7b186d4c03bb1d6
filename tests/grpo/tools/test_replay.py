"""`grpo replay`: repeats a step to the same bits, applies overrides, and rejects steps that it
cannot repeat.
"""

import itertools
import re
import shutil
from dataclasses import replace

import pytest
import yaml
from random_loop import make_loop, take_problems

from grpo import config as configs
from grpo.cli import main
from grpo.run.directory import read_update_samples
from grpo.tools.replay import replay
from grpo.types import UserError


@pytest.fixture(scope="module")
def run_dir(tiny, tmp_path_factory):
    """Returns a finished run of 4 rollouts that keeps the last 3 steps and 2 checkpoints."""
    path = tmp_path_factory.mktemp("run")
    loop = make_loop(
        path,
        tiny,
        train={"rollouts": 4, "problems": 4, "group_size": 4, "updates_per_rollout": 2},
        checkpoint={"every": 1, "keep_last": 2},
        algorithm={"kl_coef": 0.01},
        logging={"replay": 3},
    )
    (path / "config.yaml").write_text(configs.dump(loop.config))
    loop.train()
    return path


def test_a_replayed_step_is_bit_identical(run_dir, capsys):
    assert replay(str(run_dir), step=4, overrides=[])
    output = capsys.readouterr().out
    assert "step 4" in output
    assert "differs" not in output
    assert main(["replay", str(run_dir), "--step", "4"]) == 0


def test_a_replay_with_another_preset_reports_differences(run_dir, capsys):
    assert not replay(str(run_dir), step=4, overrides=["algorithm.preset=dr_grpo"])
    output = capsys.readouterr().out
    assert "dr_grpo" in output
    assert "differs" in output
    assert main(["replay", str(run_dir), "algorithm.preset=dr_grpo"]) == 0


def test_a_replay_computes_the_kl_penalties_and_teacher_logprobs_that_overrides_require(
    tiny, run_dir, capsys
):
    teacher = f"model.teacher={tiny(intermediate_size=128)}"
    for overrides in (
        ["algorithm.preset=rloo"],
        ["algorithm.preset=reinforce_pp"],
        ["algorithm.preset=on_policy_distill", teacher],
    ):
        assert not replay(str(run_dir), step=4, overrides=overrides)
        output = capsys.readouterr().out
        preset = overrides[0].removeprefix("algorithm.preset=")
        assert preset in output
        assert "loss" in output

    # The KL penalty is part of the rewards, so its coefficient changes the gradient.
    grad_norms = []
    for kl_coef in (1, 100):
        overrides = ["algorithm.kl_in=reward", f"algorithm.kl_coef={kl_coef}"]
        assert not replay(str(run_dir), step=4, overrides=overrides)
        output = capsys.readouterr().out
        grad_norms += re.findall(r"^policy/grad_norm +\S+ +(\S+)", output, re.MULTILINE)
    assert len(set(grad_norms)) == 2

    for override, message in (
        ("algorithm.truncated=mask", "truncated=mask"),
        ("algorithm.preset=gdpo", "per_reward needs the value of each reward"),
        (
            "model.teachers.arithmetic=tiny-llama",
            r"only the data sets of the run's model\.teachers",
        ),
        ("algorithm.preset=self_distill", "teacher_hint=solution needs the teacher's prompts"),
    ):
        with pytest.raises(UserError, match=message):
            replay(str(run_dir), step=4, overrides=[override])


def test_a_replay_of_self_distillation_has_the_prompts_of_the_teacher(tiny, tmp_path, capsys):
    sections = {"algorithm": {"preset": "self_distill"}, "logging": {"replay": 3}}
    loop = make_loop(tmp_path, tiny, checkpoint={"every": 1}, **sections)
    (tmp_path / "config.yaml").write_text(configs.dump(loop.config))
    loop.train()
    assert any(sample.teacher_text for sample in read_update_samples(tmp_path, 3))
    assert replay(str(tmp_path), step=3, overrides=[])
    assert "differs" not in capsys.readouterr().out
    # A teacher model without a hint reads the prompts of the policy.
    overrides = ["algorithm.preset=on_policy_distill", f"model.teacher={tiny()}"]
    assert not replay(str(tmp_path), step=3, overrides=overrides)


@pytest.mark.parametrize("preset", ["on_policy_distill", "on_policy_distill_exact"])
def test_a_replay_with_several_teachers_has_the_data_set_of_each_sample(
    tiny, tmp_path, capsys, preset
):
    def take(position, count):
        data_sets = itertools.islice(itertools.cycle(teachers), position, position + count)
        problems = take_problems(position, count)
        return [
            replace(problem, data_set=data_set)
            for problem, data_set in zip(problems, data_sets, strict=True)
        ]

    teachers = {
        "sums": str(tiny(intermediate_size=128)),
        "differences": str(tiny(intermediate_size=160)),
    }
    loop = make_loop(
        tmp_path,
        tiny,
        take=take,
        model={"teachers": teachers},
        data={
            "name": None,
            "options": {},
            "mixture": {name: {"name": "arithmetic"} for name in teachers},
        },
        algorithm={"preset": preset},
        checkpoint={"every": 1},
        logging={"replay": 3},
    )
    (tmp_path / "config.yaml").write_text(configs.dump(loop.config))
    loop.train()
    assert {sample.teacher for sample in read_update_samples(tmp_path, 3)} == set(teachers)
    assert main(["replay", str(tmp_path), "--step", "3"]) == 0
    assert "differs" not in capsys.readouterr().out
    # With the same teacher for both, the update differs.
    assert not replay(
        str(tmp_path), step=3, overrides=[f"model.teachers.differences={teachers['sums']}"]
    )
    # A single teacher for all data sets
    overrides = ["model.teachers={}", f"model.teacher={teachers['sums']}"]
    assert not replay(str(tmp_path), step=3, overrides=overrides)


def test_another_loss_uses_its_default_clip_bounds(run_dir, tmp_path):
    tree = yaml.safe_load((run_dir / "config.yaml").read_text())
    tree["algorithm"]["clip_high"] = 0.28
    copied_run = tmp_path / "run"
    shutil.copytree(run_dir, copied_run)
    (copied_run / "config.yaml").write_text(yaml.safe_dump(tree))
    assert not replay(str(copied_run), step=4, overrides=["algorithm.loss=cispo"])


def test_the_updates_of_the_last_steps_are_stored_completely(run_dir):
    stored = sorted(path.name for path in (run_dir / "samples").glob("*.npz"))
    assert stored == ["step-000002.npz", "step-000003.npz", "step-000004.npz"]
    samples = read_update_samples(run_dir, 4)
    assert len(samples) == 16
    assert {sample.group for sample in samples} == {0, 1, 2, 3}
    assert {sample.reward for sample in samples} <= {0.0, 1.0}
    for sample in samples:
        assert len(sample.advantages) == sample.completion_length
        assert len(sample.sampler_logprobs) == sample.completion_length


def test_a_step_or_directory_that_cannot_be_replayed_is_an_error(run_dir, tmp_path):
    for step, message in (
        (1, "step 1 was not kept"),
        (9, "no step 9 to replay"),
        (2, "needs the checkpoint of step 1; the run has"),
    ):
        with pytest.raises(UserError, match=message):
            replay(str(run_dir), step=step, overrides=[])
    with pytest.raises(UserError, match="not a run directory"):
        replay(str(tmp_path), step=1, overrides=[])
    (tmp_path / "config.yaml").write_text("sets: {}")
    with pytest.raises(UserError, match=r"a run of grpo eval, .* needs a run of grpo train"):
        replay(str(tmp_path), step=1, overrides=[])
