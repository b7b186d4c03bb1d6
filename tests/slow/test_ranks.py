"""Whole runs on two ranks: the run of one, and no rank left waiting when one is lost."""

import json
import signal
import time

import psutil
import pytest
from tiny_models import tiny_config
from whole_runs import SECTIONS, rows, run, start, wait_for, write_config

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(scope="module")
def straight(tiny, tmp_path_factory):
    """One rank's run and two ranks', of the same config."""
    folder = tmp_path_factory.mktemp("straight")
    made = SECTIONS | {
        "model": {"dtype": "float32"},
        "learner": {"zero_stage": 2},
        "checkpoint": {"keep_last": 9},
    }
    for count in (1, 2):
        config = write_config(
            folder / f"{count}.yaml", tiny_config(folder / f"run-{count}", tiny(), **made)
        )
        run(config, ranks=count)
    return folder


def curve(run_dir):
    keys = (
        "reward/mean",
        "loss",
        "policy/grad_norm",
        "kl/ref",
        "policy/entropy",
        "completion/tokens",
        "eval/digits:share",
        "update",
    )
    return [{key: row[key] for key in keys if key in row} for row in rows(run_dir)]


def test_two_ranks_with_an_engine_each_have_the_run_of_one(straight):
    one, two = (curve(straight / f"run-{count}") for count in (1, 2))
    assert len(one) == 5 and all(
        b == pytest.approx(a, rel=1e-3, abs=1e-4) for a, b in zip(one, two, strict=True)
    )
    samples = [
        (straight / f"run-{count}" / "samples" / "step-000003.jsonl").read_text().splitlines()
        for count in (1, 2)
    ]
    texts = [
        [(json.loads(line)["problem"], json.loads(line)["completion"]) for line in side]
        for side in samples
    ]
    assert texts[0] == texts[1]


def test_a_killed_rank_ends_the_job_and_one_rank_goes_on_where_two_stopped(
    straight, tiny, tmp_path
):
    config = (
        (straight / "2.yaml").read_text().replace(str(straight / "run-2"), str(tmp_path / "run"))
    )
    (tmp_path / "config.yaml").write_text(config)
    process = start(str(tmp_path / "config.yaml"), ranks=2)
    wait_for(lambda: (tmp_path / "run" / "checkpoints" / "step-000002").exists(), process)
    family = psutil.Process(process.pid).children(recursive=True)
    (victim,) = [
        member
        for member in psutil.Process(process.pid).children()
        if member.environ().get("RANK") == "1"
    ]
    victim.kill()
    started = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - started < 40
    assert not psutil.wait_procs(family, timeout=10)[1]
    run(str(tmp_path / "config.yaml"), "--resume")
    assert all(
        b == pytest.approx(a, rel=1e-3, abs=1e-4)
        for a, b in zip(curve(straight / "run-2"), curve(tmp_path / "run"), strict=True)
    )


def test_a_reward_that_fails_on_one_rank_costs_the_rollout_and_no_more(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("CALLS", "16")  # of rank 1: half of four groups of four a rollout
    made = SECTIONS | {
        "model": {"dtype": "float32"},
        "checkpoint": {"every": 0},
        "eval": {"every": 0},
    }
    made |= {
        "rewards": {"digits:share_until_the_third": 1.0},
        "train": {"rollouts": 4, "problems": 4, "group_size": 4},
    }
    errors = run(
        write_config(tmp_path / "c.yaml", tiny_config(tmp_path / "run", tiny(), **made)),
        ranks=2,
        code=1,
    )
    assert (
        "reward digits:share_until_the_third failed on completion" in errors
        and "ValueError: no more" in errors
    )
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == [
        "step-000002"
    ]
    monkeypatch.setenv("CALLS", "1000")
    run(str(tmp_path / "c.yaml"), "--resume", ranks=2)
    assert [row["rollout"] for row in rows(tmp_path / "run") if "loss" in row] == [1, 2, 3, 4]


def test_a_signal_to_the_launcher_saves_and_two_ranks_go_on(straight, tmp_path):
    config = (
        (straight / "2.yaml").read_text().replace(str(straight / "run-2"), str(tmp_path / "run"))
    )
    (tmp_path / "config.yaml").write_text(config)
    process = start(str(tmp_path / "config.yaml"), "checkpoint.every=0", ranks=2)
    wait_for(
        lambda: (tmp_path / "run" / "metrics.jsonl").exists() and len(rows(tmp_path / "run")) >= 2,
        process,
    )
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and list((tmp_path / "run" / "checkpoints").glob("step-*")), (
        errors
    )
    run(str(tmp_path / "config.yaml"), "--resume", ranks=2)
    assert curve(straight / "run-2")[-1] == pytest.approx(
        curve(tmp_path / "run")[-1], rel=1e-3, abs=1e-4
    )


@pytest.mark.parametrize(
    "more",
    [["engine.servers={count: 2}"], ["learner.sequence_parallel=2"]],
    ids=["servers", "shared"],
)
def test_two_ranks_with_servers_or_with_shared_sequences_have_the_run_of_one(
    straight, tmp_path, more
):
    config = (
        (straight / "1.yaml").read_text().replace(str(straight / "run-1"), str(tmp_path / "run"))
    )
    (tmp_path / "config.yaml").write_text(config)
    run(str(tmp_path / "config.yaml"), *more, ranks=2)
    assert all(
        b == pytest.approx(a, rel=1e-3, abs=1e-4)
        for a, b in zip(curve(straight / "run-1"), curve(tmp_path / "run"), strict=True)
    )


def test_supervised_ranks_see_different_rows_and_make_the_updates_of_one(tiny, tmp_path):
    sections = {
        "prompt": {"template": "plain"},
        "data": {"name": "arithmetic", "options": {"digits": 2}},
        "logging": {"progress": "off"},
        "sft": {"updates": 6, "batch_size": 8, "max_tokens": 96},
        "learner": {"lr": 1e-3, "micro_batch_tokens": 200},
        "model": {"path": str(tiny()), "dtype": "float32"},
    }
    for count in (1, 2):
        (tmp_path / f"{count}.yaml").write_text(
            json.dumps(sections | {"run_dir": str(tmp_path / f"run-{count}")})
        )
        run(str(tmp_path / f"{count}.yaml"), command="sft", ranks=count)
    one, two = (rows(tmp_path / f"run-{count}") for count in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert (a["loss"], a["policy/grad_norm"]) == pytest.approx(
            (b["loss"], b["policy/grad_norm"]), rel=1e-3
        )
