"""Tests the run directory: a checkpoint that has its final name is complete, failed writes leave
nothing behind, and old or invalid runs are kept, removed or rejected correctly.
"""

import json

import pytest
import yaml
from limits import limited_file_size
from tiny_models import tiny_config

from grpo import config as configs
from grpo.run.directory import RunDirectory, replace_directory, write_file
from grpo.stages.resume import require_same_config
from grpo.stages.run_context import open_stage
from grpo.types import RunError, UserError


def make_run_directory(tmp_path):
    """Returns the directory of a new run."""
    run = RunDirectory(str(tmp_path / "run"), resume=False)
    run.update_manifest(stage="train")
    return run


def save_checkpoint(run, step, content="weights", **metrics):
    """Saves a checkpoint with the single file weights.bin and returns its directory."""

    def write(directory):
        write_file(directory / "weights.bin", content)

    return run.save_checkpoint(step, {"metrics": metrics}, write)


def sorted_names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_an_error_in_replace_directory_keeps_the_old_directory_and_removes_the_new(tmp_path):
    target = tmp_path / "final"
    with replace_directory(target) as scratch:
        (scratch / "a").write_text("1")
    with pytest.raises(KeyboardInterrupt), replace_directory(target) as scratch:
        (scratch / "a").write_text("2")
        raise KeyboardInterrupt
    assert (target / "a").read_text() == "1"
    assert sorted_names(tmp_path) == ["final"]


def test_a_failed_write_of_a_checkpoint_is_an_error_and_keeps_the_previous_checkpoint(tmp_path):
    run = make_run_directory(tmp_path)
    checkpoint = save_checkpoint(run, 1)
    message = r"step-000002 could not be written .* Last good checkpoint: .*step-000001"
    with limited_file_size(1_000_000), pytest.raises(RunError, match=message):
        save_checkpoint(run, 2, "x" * 2_000_000)
    assert run.last_checkpoint() == checkpoint
    assert run.read_checkpoint_state(checkpoint)["step"] == 1
    assert sorted_names(run.checkpoints) == ["step-000001"]


def test_a_failed_write_of_torch_is_also_a_run_error(tmp_path):
    def fail(directory):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    with pytest.raises(RunError, match="could not be written"):
        make_run_directory(tmp_path).save_checkpoint(1, {"metrics": {}}, fail)


def test_a_file_that_the_checkpoint_does_not_list_is_an_error(tmp_path):
    """DeepSpeed unpickles every file whose name has the right form."""
    run = make_run_directory(tmp_path)
    checkpoint = save_checkpoint(run, 1)
    (checkpoint / "learner").mkdir()
    run.read_checkpoint_state(checkpoint)
    (checkpoint / "learner" / "zero_pp_rank_1_optim_states.pt").write_bytes(b"x")
    with pytest.raises(RunError, match=r"rank_1_optim_states\.pt is not a file of this checkpoint"):
        run.read_checkpoint_state(checkpoint)


def test_the_error_of_a_damaged_checkpoint_names_the_file(tmp_path):
    run = make_run_directory(tmp_path)
    checkpoint = save_checkpoint(run, 1)
    (checkpoint / "weights.bin").write_text("damaged")
    with pytest.raises(RunError, match=r"weights.bin is missing or damaged: remove .*step-000001"):
        run.read_checkpoint_state(checkpoint)


def test_prune_keeps_the_last_and_the_best_checkpoints(tmp_path):
    run = make_run_directory(tmp_path)
    for step, accuracy in [(1, 0.2), (2, 0.9), (3, 0.5), (4, 0.6)]:
        save_checkpoint(run, step, **{"eval/accuracy": accuracy})
    run.prune_checkpoints(keep_last=1, keep_best="eval/accuracy")
    assert sorted_names(run.checkpoints) == ["step-000002", "step-000004"]
    run.prune_checkpoints(keep_last=1, keep_best=None)
    assert sorted_names(run.checkpoints) == ["step-000004"]


def test_the_partial_directory_of_a_killed_save_is_no_checkpoint_and_is_replaced(tmp_path):
    run = make_run_directory(tmp_path)
    partial = run.checkpoints / ".step-000002.partial"
    partial.mkdir()
    (partial / "weights.bin").write_text("incomplete")
    assert run.last_checkpoint() is None
    assert save_checkpoint(run, 2).name == "step-000002"


def test_remove_after_removes_the_metrics_and_samples_after_a_step(tmp_path):
    run = make_run_directory(tmp_path)
    for step in range(5):
        run.append_metrics({"step": step})
        run.write_samples(f"step-{step:06d}", [])
    run.write_samples("eval-000004", [])
    with run.metrics.open("a") as file:
        file.write('{"step": 5, "rew')  # the process was killed while it wrote this line
    run.remove_after(2)
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert sorted_names(run.samples) == [
        "step-000000.jsonl",
        "step-000001.jsonl",
        "step-000002.jsonl",
    ]


def test_a_new_run_needs_an_unused_directory_and_a_resume_needs_a_run(tmp_path):
    make_run_directory(tmp_path)
    with pytest.raises(UserError, match="already holds a run: continue it with --resume"):
        make_run_directory(tmp_path)
    with pytest.raises(UserError, match="there is no run to resume"):
        RunDirectory(str(tmp_path / "other"), resume=True)


def test_two_processes_cannot_work_on_one_run(tmp_path):
    run = make_run_directory(tmp_path)
    with pytest.raises(UserError, match="another process is working on this run"):
        RunDirectory(str(run.path), resume=True)


def test_a_resume_accepts_new_keys_and_free_keys_but_no_other_change_of_the_config(tmp_path):
    config = tiny_config(tmp_path, "tiny-qwen2")
    written = yaml.safe_load(configs.dump(config))

    def write_and_check():
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
        require_same_config(tmp_path, config)

    # An older version of grpo did not have this key.
    del written["learner"]["sequence_parallel"]
    write_and_check()
    # The learning rate may change on resume.
    written["learner"]["lr"] = 0.5
    write_and_check()
    written["learner"]["weight_decay"] = 0.5
    message = r"the config differs from .*: learner.weight_decay was 0.5, is 0.0"
    with pytest.raises(UserError, match=message):
        write_and_check()


def fail_with_user_error(run_dir, model_dir, written_file=None):
    """Runs a stage that writes an empty file, if one is named, and then raises UserError.

    Returns:
        The directory of the run.
    """
    with (
        pytest.raises(UserError, match="invalid data"),
        open_stage(
            tiny_config(run_dir, model_dir), "train", total=1, unit="step", resume=False
        ) as stage,
    ):
        if written_file is not None:
            file = run_dir / written_file
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("")
        raise UserError("invalid data")
    return stage.run


def test_a_user_error_removes_a_run_without_results_and_is_recorded_in_one_with_results(
    tiny, tmp_path
):
    """Results are the finished part of a stage, a quantized model, or a recorded step."""
    run = fail_with_user_error(tmp_path / "no_results", tiny())
    assert not run.manifest.exists()
    for i, name in enumerate(("warm_start/manifest.json", "int8/config.json", "metrics.jsonl")):
        run = fail_with_user_error(tmp_path / f"results-{i}", tiny(), name)
        assert (run.path / name).exists()
        assert run.read_manifest()["status"] == "stopped: UserError"
