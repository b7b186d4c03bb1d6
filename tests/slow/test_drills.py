"""Drills of minutes.

Runs killed again and again, and a disk that fills up, end as if nothing had happened.
`launch/test.sh --all`.
"""

import json
import random
import resource
import time

import pytest
from conftest import tiny_config
from whole_runs import SECTIONS, again, outcome, run, start, uninterrupted, wait_for, write_config

from grpo.algorithm import PRESETS

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(scope="module")
def straight(tiny, tmp_path_factory):
    # 1M weights
    model = tiny(
        hidden_size=256, intermediate_size=512, num_attention_heads=8, num_key_value_heads=4
    )
    return uninterrupted(tmp_path_factory.mktemp("straight"), model, rollouts=24)


def test_a_run_killed_at_random_moments_ends_like_one_that_never_was(straight, tmp_path):
    """Five kills, each within a second or so of a rollout's end.

    While it samples, updates, syncs, evaluates or saves.
    """
    config, chance, run_dir, killed = (
        again(straight, tmp_path),
        random.Random(0),
        tmp_path / "run",
        [-1],
    )
    for _ in range(5):
        process = start(config, *(["--resume"] if len(killed) > 1 else []))
        wait_for(lambda: last_step(run_dir) > killed[-1], process)
        time.sleep(chance.uniform(0, 1.2))
        process.kill()
        process.communicate()
        assert process.returncode == -9
        killed.append(last_step(run_dir))
    print("killed after rollouts", killed[1:])
    assert killed[-1] < 24
    run(config, "--resume")
    assert outcome(run_dir) == outcome(straight[0] / "run")


def last_step(run_dir):
    lines = (
        (run_dir / "metrics.jsonl").read_text().split("\n")[:-1]
        if (run_dir / "metrics.jsonl").exists()
        else []
    )
    return json.loads(lines[-1])["step"] if lines else -1


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_and_the_run_goes_on_when_there_is_room(
    straight, tmp_path
):
    """Files larger than 6 MB cannot be written for a while.

    The weights still can, the optimizer's state of 11 MB cannot.
    """
    config = again(straight, tmp_path)
    run(config, "train.rollouts=2")
    before = {
        file: file.read_bytes()
        for file in (tmp_path / "run" / "checkpoints" / "step-000002").rglob("*")
        if file.is_file()
    }

    def limit():
        return resource.setrlimit(resource.RLIMIT_FSIZE, (6_000_000, 6_000_000))

    errors = run(config, "--resume", code=1, preexec_fn=limit)
    assert (
        "step-000003 could not be written" in errors
        and "step-000002" in errors
        and errors.startswith("grpo: ")
    )
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-000001",
        "step-000002",
    ]
    assert all(file.read_bytes() == content for file, content in before.items())
    run(config, "--resume")
    assert outcome(tmp_path / "run") == outcome(straight[0] / "run")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_proves_its_sync_and_resumes_bit_for_bit(tiny, tmp_path, preset):
    sections = SECTIONS | {
        "algorithm": {"preset": preset},
        "train": {"rollouts": 3, "problems": 8, "group_size": 4},
    }
    sections["learner"] = {"lr": 1e-4, "zero_stage": 1}
    # without verdicts: dynamic sampling would wait for right answers
    sections["rewards"] = {"digits:share": 1.0}
    if preset == "on_policy_distill":
        sections["model"] = SECTIONS["model"] | {"teacher": str(tiny(intermediate_size=128))}
    configs = [
        write_config(tmp_path / f"{name}.yaml", tiny_config(tmp_path / name, tiny(), **sections))
        for name in "ab"
    ]
    run(configs[0])
    run(configs[1], "train.rollouts=2", "eval.every=0")
    run(configs[1], "--resume", "eval.every=0")
    ours, theirs = outcome(tmp_path / "a"), outcome(tmp_path / "b")

    def drop(metrics):
        return [
            {k: v for k, v in row.items() if not k.startswith("eval/")}
            for row in metrics
            if "reward/mean" in row
        ]

    assert drop(ours[0]) == drop(theirs[0]) and ours[2] == theirs[2]
