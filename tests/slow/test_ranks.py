"""Complete runs on two ranks: equality with the run on one rank, lost ranks and resuming."""

import json
import signal
import subprocess
import time

import psutil
import pytest
from tiny_models import tiny_config
from whole_runs import (
    RESUMABLE_RUN_SECTIONS,
    read_metrics,
    run_grpo,
    start_grpo,
    wait_for,
    write_config,
)

pytestmark = [pytest.mark.engine, pytest.mark.slow]

COMPARED_METRICS = (
    "reward/mean",
    "loss",
    "policy/grad_norm",
    "kl/ref",
    "policy/entropy",
    "completion/tokens",
    "eval/digits:share",
    "update",
)


@pytest.fixture(scope="module")
def reference_runs(tiny, tmp_path_factory):
    """A folder with a run on one rank (1.yaml, run-1/) and on two ranks (2.yaml, run-2/).

    Both configs are equal except for the run directory.
    """
    folder = tmp_path_factory.mktemp("reference")
    sections = {
        **RESUMABLE_RUN_SECTIONS,
        "model": {"dtype": "float32"},
        "learner": {"zero_stage": 2},
        "checkpoint": {"keep_last": 9},
    }
    for num_ranks in (1, 2):
        run_dir = folder / f"run-{num_ranks}"
        config = write_config(
            folder / f"{num_ranks}.yaml", tiny_config(run_dir, tiny(), **sections)
        )
        run_grpo(config, ranks=num_ranks)
    return folder


def copy_config(reference_runs, num_ranks, folder):
    """Writes the config of a reference run with the run directory `folder/run`.

    Returns the path of the config.
    """
    reference_config = (reference_runs / f"{num_ranks}.yaml").read_text()
    reference_run_dir = str(reference_runs / f"run-{num_ranks}")
    config = folder / "config.yaml"
    config.write_text(reference_config.replace(reference_run_dir, str(folder / "run")))
    return str(config)


def compared_rows(run_dir):
    """Returns COMPARED_METRICS of each row of metrics."""
    result = []
    for row in read_metrics(run_dir):
        result.append({key: row[key] for key in COMPARED_METRICS if key in row})
    return result


def assert_equal_metrics(run_dir, reference_run_dir):
    actual_rows = compared_rows(run_dir)
    expected_rows = compared_rows(reference_run_dir)
    for actual, expected in zip(actual_rows, expected_rows, strict=True):
        assert actual == pytest.approx(expected, rel=1e-3, abs=1e-4)


def problems_and_completions(run_dir):
    lines = (run_dir / "samples" / "step-000003.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    return [(sample["problem"], sample["completion"]) for sample in samples]


def test_run_on_two_ranks_with_an_engine_each_equals_the_run_on_one_rank(reference_runs):
    one_rank = reference_runs / "run-1"
    two_ranks = reference_runs / "run-2"
    assert len(read_metrics(one_rank)) == 5
    assert_equal_metrics(two_ranks, one_rank)
    assert problems_and_completions(one_rank) == problems_and_completions(two_ranks)


def test_killed_rank_ends_the_job_and_one_rank_resumes_the_run_of_two(reference_runs, tmp_path):
    run_dir = tmp_path / "run"
    config = copy_config(reference_runs, 2, tmp_path)
    launcher = start_grpo(config, ranks=2)
    wait_for(lambda: (run_dir / "checkpoints" / "step-000002").exists(), launcher)
    job_processes = psutil.Process(launcher.pid).children(recursive=True)
    (rank1,) = [
        child
        for child in psutil.Process(launcher.pid).children()
        if child.environ().get("RANK") == "1"
    ]
    rank1.kill()
    kill_time = time.monotonic()
    launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    assert time.monotonic() - kill_time < 40
    _, alive = psutil.wait_procs(job_processes, timeout=10)
    assert not alive
    run_grpo(config, "--resume")
    assert_equal_metrics(run_dir, reference_runs / "run-2")


def test_run_whose_reward_fails_on_one_rank_resumes_after_the_last_complete_rollout(
    tiny, tmp_path, monkeypatch
):
    run_dir = tmp_path / "run"
    # Rank 1 scores 8 of the 16 completions of a rollout, so its reward fails in the third rollout.
    monkeypatch.setenv("CALLS", "16")
    sections = {
        **RESUMABLE_RUN_SECTIONS,
        "model": {"dtype": "float32"},
        "checkpoint": {"every": 0},
        "eval": {"every": 0},
        "rewards": {"digits:share_or_fail_on_rank_1": 1.0},
        "train": {"rollouts": 4, "problems": 4, "group_size": 4},
    }
    config = write_config(tmp_path / "config.yaml", tiny_config(run_dir, tiny(), **sections))
    errors = run_grpo(config, ranks=2, code=1)
    assert "reward digits:share_or_fail_on_rank_1 failed on completion" in errors
    assert "ValueError: too many calls" in errors
    checkpoints = [path.name for path in (run_dir / "checkpoints").glob("step-*")]
    assert checkpoints == ["step-000002"]
    monkeypatch.setenv("CALLS", "1000")
    run_grpo(config, "--resume", ranks=2)
    assert [row["rollout"] for row in read_metrics(run_dir) if "loss" in row] == [1, 2, 3, 4]


def test_run_on_two_ranks_saves_when_the_launcher_gets_sigterm_and_resumes(
    reference_runs, tmp_path
):
    run_dir = tmp_path / "run"
    config = copy_config(reference_runs, 2, tmp_path)
    launcher = start_grpo(config, "checkpoint.every=0", ranks=2)
    wait_for(
        lambda: (run_dir / "metrics.jsonl").exists() and len(read_metrics(run_dir)) >= 2,
        launcher,
    )
    launcher.send_signal(signal.SIGTERM)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode != 0, errors
    assert list((run_dir / "checkpoints").glob("step-*")), errors
    run_grpo(config, "--resume", ranks=2)
    last_row = compared_rows(run_dir)[-1]
    last_reference_row = compared_rows(reference_runs / "run-2")[-1]
    assert last_reference_row == pytest.approx(last_row, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    "override",
    ["engine.servers={count: 2}", "learner.sequence_parallel=2"],
    ids=["servers", "sequence_parallel"],
)
def test_run_on_two_ranks_with_servers_or_sequence_parallelism_equals_the_run_on_one_rank(
    reference_runs, tmp_path, override
):
    config = copy_config(reference_runs, 1, tmp_path)
    run_grpo(config, override, ranks=2)
    assert_equal_metrics(tmp_path / "run", reference_runs / "run-1")


def test_supervised_training_on_two_ranks_makes_the_updates_of_one_rank(tiny, tmp_path):
    sections = {
        "prompt": {"template": "plain"},
        "data": {"name": "arithmetic", "options": {"digits": 2}},
        "logging": {"progress": "off"},
        "sft": {"updates": 6, "batch_size": 8, "max_tokens": 56},
        "learner": {"lr": 1e-3, "micro_batch_tokens": 80},  # two solutions
        "model": {"path": str(tiny()), "dtype": "float32"},
    }
    for num_ranks in (1, 2):
        config = tmp_path / f"{num_ranks}.yaml"
        run_dir = tmp_path / f"run-{num_ranks}"
        config.write_text(json.dumps({**sections, "run_dir": str(run_dir)}))
        run_grpo(str(config), command="sft", ranks=num_ranks)
    one_rank_rows = read_metrics(tmp_path / "run-1")
    two_ranks_rows = read_metrics(tmp_path / "run-2")
    for one_rank, two_ranks in zip(one_rank_rows, two_ranks_rows, strict=True):
        assert one_rank["update/micro_batches"] == 2 * two_ranks["update/micro_batches"] == 4
        for metric in ("loss", "policy/grad_norm", "policy/entropy", "policy/token_accuracy"):
            assert one_rank[metric] == pytest.approx(two_ranks[metric], rel=1e-3)
    errors = run_grpo(str(tmp_path / "2.yaml"), "--resume", command="sft", code=2)
    assert "was written by 2 ranks, and this run has 1: resume `grpo sft` with 2 ranks" in errors


def test_two_groups_of_ranks_that_share_sequences_make_the_updates_of_trl(tiny, tmp_path):
    """Five micro-batches for two groups, so that one group computes one with weight 0."""
    sections = {
        "prompt": {"template": "plain"},
        "data": {"name": "arithmetic", "options": {"digits": 2}},
        "logging": {"progress": "off"},
        "sft": {"updates": 4, "batch_size": 5, "max_tokens": 40},
        "model": {"path": str(tiny()), "dtype": "float32"},
    }
    learners = {
        "trl": {"lr": 1e-3, "micro_batch_tokens": 200},
        "shared": {"lr": 1e-3, "micro_batch_tokens": 40, "sequence_parallel": 2},
    }
    for name, num_ranks in (("trl", 1), ("shared", 4)):
        run = {**sections, "learner": learners[name], "run_dir": str(tmp_path / name)}
        config = tmp_path / f"{name}.yaml"
        config.write_text(json.dumps(run))
        run_grpo(str(config), command="sft", ranks=num_ranks)
    rows, shared_rows = read_metrics(tmp_path / "trl"), read_metrics(tmp_path / "shared")
    assert [row["update/micro_batches"] for row in shared_rows] == [3] * 4  # of a group
    for row, shared_row in zip(rows, shared_rows, strict=True):
        for metric in ("loss", "policy/grad_norm"):
            assert shared_row[metric] == pytest.approx(row[metric], rel=1e-3)


def test_two_ranks_need_neither_a_network_nor_a_host_name(tiny, tmp_path):
    """The machine of this run has its loopback interface only, and no address for its name."""
    isolate = ("unshare", "--map-root-user", "--net", "--uts", "sh", "-c")
    prepare = "ip link set lo up && hostname no-such-host"
    try:
        subprocess.run([*isolate, prepare], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine does not let a user make a network namespace: {error}")
    config = tiny_config(tmp_path / "run", tiny(), train={"rollouts": 1})
    config_path = write_config(tmp_path / "config.yaml", config)
    run_grpo(config_path, ranks=2, wrapper=(*isolate, f'{prepare} && exec "$@"', "sh"))
    assert len(read_metrics(tmp_path / "run")) == 2  # before and after the rollout


def test_unreadable_gold_answers_stop_both_ranks_and_a_resume_continues_with_corrected_ones(
    tiny, tmp_path
):
    """The gold answers of the second rollout are no choices."""
    data_file = tmp_path / "data.jsonl"

    def write_data(answer_of_rollout_2):
        rows = []
        for i in range(12):
            answer = answer_of_rollout_2 if i in (5, 6) else "B"
            rows.append(
                {"question": f"{i}?", "answer": answer, "choices": ["red", "blue"], "number": i}
            )
        data_file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    config = tiny_config(
        tmp_path / "run",
        tiny(),
        train={"rollouts": 3, "problems": 4, "group_size": 4},
        data={
            "name": "jsonl",
            "path": str(data_file),
            "options": {"test_fraction": 0.0},
            "curriculum": "number",
        },
        rewards={"choice": 1.0, "finished": 0.5},
        learner={"zero_stage": 1},
    )
    path = write_config(tmp_path / "config.yaml", config)
    write_data("E")
    errors = run_grpo(path, ranks=2, code=1)
    assert errors.count("8 of the rollout's 16 completions (50.0%) are undecided") == 1
    assert "problem jsonl/train/5, gold answer 'E'" in errors
    write_data("A")
    run_grpo(path, "--resume", ranks=2)
    assert [row["rollout"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2, 3]
