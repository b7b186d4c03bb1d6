"""Checkpoints.

What has its final name is whole, whatever happens while it is written; nothing is kept that should
not be.
"""

import json
import resource
import signal
from pathlib import Path

import pytest
import yaml
from tiny_models import tiny_config

from grpo import config as configs
from grpo.run.directory import RunDirectory, replace_directory, write_file
from grpo.stages.resume import check_same
from grpo.stages.run_context import open_stage
from grpo.types import RunError, UserError


def run_directory(tmp_path, **options):
    run = RunDirectory(str(tmp_path / "run"), resume=options.pop("resume", False))
    run.update_manifest(stage="train")
    return run


def save(run, rollouts, content="weights", **metrics):
    return run.save(
        rollouts,
        {"metrics": metrics},
        lambda directory: write_file(directory / "weights.bin", content),
    )


def test_an_error_while_writing_leaves_the_old_directory_whole_and_nothing_beside_it(tmp_path):
    target = tmp_path / "final"
    with replace_directory(target) as scratch:
        (scratch / "a").write_text("1")
    with pytest.raises(KeyboardInterrupt), replace_directory(target) as scratch:
        (scratch / "a").write_text("2")
        raise KeyboardInterrupt
    assert (target / "a").read_text() == "1" and [p.name for p in tmp_path.iterdir()] == ["final"]


def test_a_checkpoint_that_cannot_be_written_is_an_error_and_the_last_good_one_stays(tmp_path):
    """A file size limit makes every write past 1 MB fail, as a full disk would."""
    run = run_directory(tmp_path)
    good = save(run, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(
            RunError,
            match=r"step-000002 could not be written .* Last good checkpoint: .*step-000001",
        ):
            save(run, 2, "x" * 2_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert run.latest() == good and run.read_state(good)["step"] == 1
    assert [p.name for p in run.checkpoints.iterdir()] == ["step-000001"]


def test_a_failed_torch_write_is_told_the_same_way(tmp_path):
    def fail(directory):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    with pytest.raises(RunError, match="could not be written"):
        run_directory(tmp_path).save(1, {"metrics": {}}, fail)


def test_a_damaged_file_is_named(tmp_path):
    run = run_directory(tmp_path)
    checkpoint = save(run, 1)
    (checkpoint / "weights.bin").write_text("weighty")
    with pytest.raises(RunError, match=r"weights.bin is missing or damaged: remove .*step-000001"):
        run.read_state(checkpoint)


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    run = run_directory(tmp_path)
    for rollouts, accuracy in [(1, 0.2), (2, 0.9), (3, 0.5), (4, 0.6)]:
        save(run, rollouts, **{"eval/accuracy": accuracy})
    run.prune(keep_last=1, keep_best="eval/accuracy")
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step-000002", "step-000004"]
    run.prune(keep_last=1, keep_best=None)
    assert [p.name for p in run.checkpoints.iterdir()] == ["step-000004"]


def test_leftovers_of_a_killed_save_are_neither_found_nor_in_the_way(tmp_path):
    run = run_directory(tmp_path)
    (run.checkpoints / ".step-000002.partial").mkdir()
    (run.checkpoints / ".step-000002.partial" / "weights.bin").write_text("half")
    assert run.latest() is None
    assert save(run, 2).name == "step-000002"


def test_metrics_and_samples_past_a_checkpoint_are_cut_off(tmp_path):
    run = run_directory(tmp_path)
    for rollout in range(5):
        run.append_metrics({"step": rollout})
        run.write_samples(f"step-{rollout:06d}", [])
    run.write_samples("eval-000004", [])
    with run.metrics.open("a") as file:
        file.write('{"step": 5, "rew')  # killed in the middle of a line
    run.cut(2)
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [0, 1, 2]
    assert sorted(p.name for p in run.samples.iterdir()) == [
        f"step-00000{i}.jsonl" for i in range(3)
    ]


def test_a_run_directory_is_taken_once(tmp_path):
    run_directory(tmp_path)
    with pytest.raises(UserError, match="already holds a run: continue it with --resume"):
        run_directory(tmp_path)
    with pytest.raises(UserError, match="there is no run to resume"):
        RunDirectory(str(tmp_path / "other"), resume=True)


def test_two_processes_cannot_work_on_one_run(tmp_path):
    run = run_directory(tmp_path)
    with pytest.raises(UserError, match="another process is working on this run"):
        RunDirectory(str(run.path), resume=True)


def test_a_run_of_an_older_version_goes_on_and_a_changed_key_is_named(tmp_path):
    config = tiny_config(tmp_path, "tiny-qwen2")
    written = yaml.safe_load(configs.dump(config))
    del written["learner"]["sequence_parallel"]  # a key that came later
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    check_same(tmp_path, config)
    written["learner"]["lr"] = 0.5  # what a run that stopped may need
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    check_same(tmp_path, config)
    written["learner"]["weight_decay"] = 0.5
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    with pytest.raises(
        UserError, match=r"the config differs from .*: learner.weight_decay was 0.5, is 0.0"
    ):
        check_same(tmp_path, config)


def test_a_mistake_that_shows_late_keeps_what_is_done_and_is_in_the_manifest(tiny, tmp_path):
    """Before anything was done a run is forgotten; a part of a stage within, or a step, is not."""
    for name in (None, "warm_start/manifest.json", "int8/config.json", "metrics.jsonl"):
        config = tiny_config(tmp_path / str(name).replace("/", "-"), tiny())
        file = name and Path(config.run_dir) / name
        with (
            pytest.raises(UserError, match="too late"),
            open_stage(config, "train", total=1, unit="step", resume=False) as stage,
        ):
            if file:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text("")
            raise UserError("too late")
        assert stage.run.manifest.exists() == bool(file) and (file is None or file.exists())
        assert file is None or stage.run.read_manifest()["status"] == "stopped: UserError"
        del stage  # and with it the lock
