"""The Python interface: light imports, configs, callbacks, interruptions, and the handle of a run.

The runs here need no engine. tests/slow/test_api.py has those that do.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from stage_configs import final_weights, sft_config
from tiny_models import tiny_config
from whole_runs import process_environment, write_config, write_yaml

import grpo
from grpo import api
from grpo.config import EvalConfig, SftConfig, TrainConfig
from grpo.run.callbacks import RowCallbacks

HEAVY_PACKAGES = ("torch", "transformers", "vllm", "deepspeed", "pydantic", "numpy")
STOP_AFTER = 3


def tree_of(config):
    """Returns a config as nested dicts, without the section `logging`."""
    return config.model_dump(mode="json", exclude={"logging"})


def test_import_grpo_loads_no_large_package():
    program = (
        "import sys, grpo\n"
        f"loaded = [name for name in {HEAVY_PACKAGES} if name in sys.modules]\n"
        "assert loaded == [], loaded\n"
        "assert {'train', 'load', 'Run'} <= set(dir(grpo))\n"
        "from grpo import StopRun, UserError\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=process_environment())


def test_every_public_name_exists_and_another_one_is_an_attribute_error():
    for name in grpo.__all__:
        assert getattr(grpo, name).__name__ == name
    assert grpo.__all__ == sorted(grpo.__all__)
    with pytest.raises(AttributeError, match="module 'grpo' has no attribute 'trian'"):
        _ = grpo.trian


def test_a_path_a_dict_and_a_config_object_give_the_same_config(tmp_path):
    config = sft_config(tmp_path / "run", "tiny-qwen2")
    from_path = api.load_config(write_config(tmp_path / "a.yaml", config), None, SftConfig)
    from_dict = api.load_config(tree_of(config), {"logging.progress": "off"}, SftConfig)
    from_object = api.load_config(config, None, SftConfig)
    assert from_path == from_dict == from_object


def test_progress_is_off_unless_the_config_sets_it(tmp_path):
    tree = tree_of(sft_config(tmp_path / "run", "tiny-qwen2"))
    config = api.load_config(tree, None, SftConfig)
    assert config.logging.progress == "off"
    assert api.load_config(SftConfig(**tree), None, SftConfig) == config
    assert api.load_config(tree, {"logging.progress": "line"}, SftConfig).logging.progress == "line"
    live = SftConfig(**tree, logging={"progress": "live"})
    assert api.load_config(live, None, SftConfig).logging.progress == "live"
    path = write_yaml(tmp_path / "a.yaml", tree | {"logging": {"progress": "line"}})
    assert api.load_config(Path(path), None, SftConfig).logging.progress == "line"


def test_overrides_and_dicts_may_contain_paths_and_leave_their_arguments_unchanged(tmp_path):
    tree = tree_of(tiny_config(tmp_path / "run", "tiny-qwen2"))
    tree["run_dir"] = tmp_path / "other"
    overrides = {"model.path": tmp_path / "m", "train.rollouts": 7, "rewards": {"accuracy": 2}}
    config = api.load_config(tree, overrides, TrainConfig)
    assert config.run_dir == str(tmp_path / "other")
    assert config.model.path == str(tmp_path / "m")
    assert config.train.rollouts == 7
    assert config.rewards["accuracy"].weight == 2
    assert tree["model"]["path"] == "tiny-qwen2"
    assert "logging" not in tree


def reward(completion, problem):
    return 0.0


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        ("missing.yaml", None, "missing.yaml: config file not found"),
        (3, None, "config: expected the path of a YAML file, a dict or a config object, got 3"),
        ({"train.rollouts": 5}, None, r"config: train.rollouts: .* \{'train': \{'rollouts': 5\}\}"),
        ({"trian": {}}, None, r"config: .*trian: unknown key \(did you mean train"),
        ({"rewards": {reward: 1.0}}, None, r"config.rewards: .* named by its file: 'my_rewards:"),
        ({}, ["train.rollouts=5"], "overrides: expected a dict of dotted keys"),
        ({}, {"train.rollout": 5}, r"train.rollout: unknown key \(did you mean rollouts\?\)"),
        ({"train": 3}, {"train.rollouts": 5}, "train has a value without keys"),
    ],
)
def test_a_mistake_in_the_config_is_a_user_error_before_anything_is_written(
    tmp_path, monkeypatch, config, overrides, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(grpo.UserError, match=message):
        grpo.train(config, overrides)
    assert list(tmp_path.iterdir()) == []


def test_a_callback_that_is_not_in_a_list_is_a_user_error(tmp_path):
    config = sft_config(tmp_path / "run", "tiny-qwen2")
    with pytest.raises(grpo.UserError, match=r"callbacks: expected a list .* e.g. \[print\]"):
        grpo.sft(config, callbacks=print)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def finished_run(tiny, tmp_path_factory):
    """A run of `grpo.sft`, and the rows that a callback has received."""
    rows = []
    folder = tmp_path_factory.mktemp("sft")
    run = grpo.sft(sft_config(folder / "run", tiny()), callbacks=[rows.append])
    return run, rows


def test_callbacks_receive_the_recorded_rows_in_order(finished_run):
    run, rows = finished_run
    assert rows == run.metrics
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_a_run_reads_its_directory(finished_run, tiny):
    run, rows = finished_run
    assert run == grpo.Run(str(run.path))
    assert os.fspath(run) == str(run.path)
    assert run.stage == "sft"
    assert run.status == "finished"
    assert run.config["sft"]["updates"] == 6
    assert run.config["model"]["path"] == str(tiny())
    assert run.final == run.path / "final"
    assert run.table is None
    assert run.samples() == []
    assert repr(run) == f"Run('{run.path}': sft, finished, step 6, loss {rows[-1]['loss']:.3f})"
    with pytest.raises(grpo.UserError, match=r"not a run directory \(no manifest.json\)"):
        grpo.Run(run.path / "final")
    with pytest.raises(grpo.UserError, match="expected the path of a run, got 3"):
        grpo.Run(3)


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_a_broken_manifest_is_an_error_that_names_it(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(grpo.UserError, match=r"manifest\.json: "):
        grpo.Run(tmp_path)


def test_a_model_refuses_overrides_that_have_no_effect():
    with pytest.raises(grpo.UserError, match=r"train\.rollouts has no effect on sampling"):
        grpo.load("tiny-qwen2", {"train.rollouts": 3})
    with pytest.raises(grpo.UserError, match="got None"):
        grpo.load(None)


def write_samples(folder, name, *completions):
    lines = [json.dumps({"completion": completion}) + "\n" for completion in completions]
    (folder / "samples" / f"{name}.jsonl").write_text("".join(lines))


def run_of_stage(folder, stage):
    (folder / "samples").mkdir()
    (folder / "manifest.json").write_text(json.dumps({"stage": stage, "status": "running"}))
    return grpo.Run(folder)


def test_the_samples_of_a_training_are_those_of_the_last_step_by_default(tmp_path):
    run = run_of_stage(tmp_path, "train")
    write_samples(tmp_path, "step-000002", "two")
    write_samples(tmp_path, "step-000010", "ten", "more")
    write_samples(tmp_path, "eval-000008", "held out")
    assert run.samples() == [{"completion": "ten"}, {"completion": "more"}]
    assert run.samples(2) == [{"completion": "two"}]
    assert run.samples(held_out=True) == [{"completion": "held out"}]
    with pytest.raises(grpo.UserError, match=r"step 3 has no samples\. Available: 2, 10"):
        run.samples(3)
    assert repr(run) == f"Run('{tmp_path}': train, running)"
    assert run.final is None
    assert run.config == {}


def test_the_samples_of_an_evaluation_name_their_set(tmp_path):
    run = run_of_stage(tmp_path, "eval")
    write_samples(tmp_path, "eval-aime", "a")
    write_samples(tmp_path, "eval-math", "b")
    assert run.samples() == [
        {"completion": "a", "set": "aime"},
        {"completion": "b", "set": "math"},
    ]


def test_a_run_restores_the_state_of_the_process_and_prints_nothing(tiny, tmp_path, capfd):
    environment = dict(os.environ)
    filters = list(warnings.filters)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    streams = (sys.stdout, sys.stderr)
    torch.set_num_threads(1)
    try:
        grpo.sft(sft_config(tmp_path / "run", tiny()), {"sft.updates": 1})
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    assert dict(os.environ) == environment
    assert warnings.filters == filters
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert (sys.stdout, sys.stderr) == streams
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "run" / "learner.log").exists()


def ids_of_models():
    """Returns the ids of the models in the memory of this process."""
    return {id(value) for value in gc.get_objects() if type(value).__name__ == "Qwen2ForCausalLM"}


def test_the_memory_of_a_run_is_free_after_it(tiny, tmp_path):
    earlier_models = ids_of_models()  # those of other tests
    grpo.sft(sft_config(tmp_path / "run", tiny(), learner={"zero_stage": 2}), {"sft.updates": 1})
    assert ids_of_models() <= earlier_models


def test_what_a_callback_prints_goes_to_the_caller_and_not_to_the_log(tiny, tmp_path, capfd):
    def show(row):
        print("row", row["step"])
        os.system("echo child")

    grpo.sft(sft_config(tmp_path / "run", tiny()), {"sft.updates": 2}, callbacks=[show])
    assert capfd.readouterr().out == "row 1\nchild\nrow 2\nchild\n"
    assert "row" not in (tmp_path / "run" / "learner.log").read_text()


def test_a_callback_cannot_change_the_recorded_row(tiny, tmp_path):
    run = grpo.sft(sft_config(tmp_path / "run", tiny()), {"sft.updates": 1}, callbacks=[dict.clear])
    assert run.metrics[0]["step"] == 1


def stop_after_three(row):
    if row["step"] == STOP_AFTER:
        raise grpo.StopRun


def test_a_run_that_a_callback_stops_continues_to_the_same_weights(finished_run, tiny, tmp_path):
    config = sft_config(tmp_path / "run", tiny())
    run = grpo.sft(config, callbacks=[stop_after_three])
    assert run.status == "stopped: StopRun"
    assert len(run.metrics) == STOP_AFTER
    assert run.final is None
    run = grpo.sft(config, resume=True)
    assert run.status == "finished"
    expected = final_weights(finished_run[0].path)
    weights = final_weights(run.path)
    for name in expected:
        assert torch.equal(weights[name], expected[name]), name


def test_an_exception_in_a_callback_is_raised_after_the_run_is_saved(tiny, tmp_path):
    later_rows = []

    def fail(row):
        return row["no such metric"]

    config = sft_config(tmp_path / "run", tiny())
    with pytest.raises(KeyError, match="no such metric") as raised:
        grpo.sft(config, callbacks=[fail, later_rows.append])
    assert raised.traceback[-1].name == "fail"
    assert raised.value.__notes__ == [
        f"A callback raised it. To continue {tmp_path / 'run'}: resume=True"
    ]
    assert later_rows == []
    assert grpo.Run(tmp_path / "run").status == "stopped: CallbackError"
    assert (tmp_path / "run" / "checkpoints" / "step-000001").exists()
    assert grpo.sft(config, resume=True).status == "finished"


def test_ctrl_c_saves_the_run_and_raises_an_error_that_says_how_to_continue(tiny, tmp_path):
    def interrupt(row):
        if row["step"] == STOP_AFTER:
            os.kill(os.getpid(), signal.SIGINT)

    config = sft_config(tmp_path / "run", tiny())
    message = f"interrupted by SIGINT; {tmp_path / 'run'} is saved: continue it with resume=True"
    with pytest.raises(grpo.RunInterruptedError, match=message):
        grpo.sft(config, callbacks=[interrupt])
    assert len(grpo.Run(tmp_path / "run").metrics) == STOP_AFTER
    assert grpo.sft(config, resume=True).status == "finished"


def test_a_run_works_in_another_thread_and_a_second_run_at_the_same_time_is_refused(tiny, tmp_path):
    runs, errors = [], []

    def second_run(row):
        try:
            grpo.sft(sft_config(tmp_path / "second", tiny()))
        except grpo.UserError as error:
            errors.append(str(error))

    def train():
        config = sft_config(tmp_path / "run", tiny())
        runs.append(grpo.sft(config, {"sft.updates": 1}, callbacks=[second_run]))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert runs[0].status == "finished"
    assert "another run is in progress in this process" in errors[0]
    assert not (tmp_path / "second").exists()


def test_a_second_run_in_the_same_directory_is_refused(finished_run, tiny):
    run, _ = finished_run
    with pytest.raises(grpo.UserError, match=r"already holds a run: .*Python: resume=True"):
        grpo.sft(sft_config(run.path, tiny()))
    with pytest.raises(grpo.UserError, match="there is no run to resume"):
        grpo.sft(sft_config(run.path / "x", tiny()), resume=True)


def test_callbacks_are_called_on_rank_0_only(monkeypatch):
    rows = []
    callbacks = RowCallbacks([rows.append])
    monkeypatch.setenv("RANK", "1")
    callbacks.on_row({"step": 1})
    monkeypatch.setenv("RANK", "0")
    callbacks.on_row({"step": 2})
    assert rows == [{"step": 2}]


def test_load_reports_mistakes_before_an_engine_starts(finished_run, tmp_path):
    run, _ = finished_run
    with pytest.raises(grpo.UserError, match="no such directory"):
        grpo.load("no_such_model")
    with pytest.raises(grpo.UserError, match=r"sampling.max_token: unknown key .*max_tokens"):
        grpo.load(run, {"sampling.max_token": 5})
    unfinished = run_of_stage(tmp_path, "train")
    with pytest.raises(grpo.UserError, match=r"has not finished \(status: running\): resume it"):
        grpo.load(unfinished)
    manifest = {"stage": "eval", "status": "finished"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(grpo.UserError, match="`grpo eval` writes none"):
        grpo.load(tmp_path)


def test_a_failed_pipeline_names_the_last_line_of_its_log(tiny, tmp_path, capfd):
    stage = write_config(tmp_path / "sft.yaml", sft_config("x", tiny()))
    data = {"name": "jsonl", "path": "missing"}
    stages = {"cold": {"command": "sft", "config": stage, "set": {"data": data}}}
    config = {"run_dir": tmp_path / "run", "stages": stages}
    message = r"stage cold failed with exit code 2; .*pipeline.log: grpo: .*missing"
    with pytest.raises(grpo.UserError, match=message):
        grpo.pipeline(config)
    assert capfd.readouterr() == ("", "")
    assert "== cold: grpo sft" in (tmp_path / "run" / "pipeline.log").read_text()
    assert grpo.Run(tmp_path / "run").status == "stopped in cold"


def test_the_config_of_an_evaluation_may_be_that_of_a_training(tmp_path):
    tree = tree_of(tiny_config(tmp_path / "run", "tiny-qwen2"))
    config = api.load_config(TrainConfig(**tree), {"run_dir": tmp_path / "eval"}, EvalConfig)
    assert config.run_dir == str(tmp_path / "eval")
    assert yaml.safe_load(yaml.safe_dump(tree)) == tree
