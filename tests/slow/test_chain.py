"""A pipeline that is killed once in every stage and evaluation.

Its results must equal those of an uninterrupted pipeline.
"""

import json
import random
import time

import psutil
import pytest
import yaml
from tiny_models import tiny_config
from whole_runs import run_grpo, start_grpo, untimed, wait_for, write_yaml

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def write_traces(path):
    lines = []
    for i in range(40):
        trace = {
            "question": f"{i}+{i}=",
            "solution": f"<think>{i}</think> <answer>{2 * i}</answer>",
        }
        lines.append(json.dumps(trace) + "\n")
    path.write_text("".join(lines))


def stage_sections(base, traces_file):
    """Returns the sections of each stage's config, and of the evaluation's, by file name."""
    engine_sections = {
        "sampling": base["sampling"],
        "engine": base["engine"],
        "rewards": {"finished": 1.0},
    }
    learner = {"zero_stage": 1, "micro_batch_tokens": 512}
    return {
        "sft": {
            "sft": {"updates": 30, "batch_size": 2, "max_tokens": 96},
            "learner": learner,
            "checkpoint": {"every": 5},
        },
        "train": {
            "train": {"rollouts": 4, "problems": 4, "group_size": 4},
            "learner": learner,
            "eval": {"every": 0},
            "checkpoint": {"every": 1},
            **engine_sections,
        },
        "collect": {
            "collect": {"problems": 24, "samples": 2, "chunk": 4, "format": False},
            **engine_sections,
        },
        "distill": {
            "way": "soft",
            "soft": {"updates": 20, "batch_size": 4, "max_tokens": 96},
            "learner": learner,
            "data": {"name": "traces", "path": str(traces_file)},
            "checkpoint": {"every": 5},
        },
        "quantize": {"quantize": {"schemes": ["int8"]}, **engine_sections},
        "evaluate": {"train": {"rollouts": 1}, "eval": {"problems": 8}, **engine_sections},
    }


def write_pipeline(folder, model, student):
    """Writes a pipeline of all kinds of stages for models with random weights.

    The model is fine-tuned and trained with GRPO. Then traces are collected from it, it is
    distilled into the student, and the student is quantized. Every model is evaluated.

    Args:
        folder: Directory to create.
        model: Directory of the initial model.
        student: Directory of the student.

    Returns:
        The path of the config, and the run directory.
    """
    folder.mkdir()
    write_traces(folder / "traces.jsonl")
    # The pipeline replaces the run directory "x".
    base = tiny_config("x", model).model_dump(mode="json")
    common = {
        name: base[name] for name in ("run_dir", "seed", "model", "data", "prompt", "logging")
    }
    files = {}
    for name, sections in stage_sections(base, folder / "traces.jsonl").items():
        files[name] = write_yaml(folder / f"{name}.yaml", common | sections)

    stages = {
        "cold": {"command": "sft", "config": files["sft"]},
        "rl": {"command": "train", "config": files["train"], "model": "cold"},
        "traces": {"command": "collect", "config": files["collect"], "model": "rl"},
        "student": {
            "command": "distill",
            "config": files["distill"],
            "set": {"model.path": str(student)},
            "teacher": "rl",
        },
        "small": {"command": "quantize", "config": files["quantize"], "model": "student"},
    }
    evaluation = {"config": files["evaluate"], "start": False, "set": {"chunk": 2}}
    tree = {
        "run_dir": str(folder / "run"),
        "stages": stages,
        "eval": {"sums": evaluation},
    }
    # The order of the stages matters, so the keys must not be sorted.
    config = folder / "chain.yaml"
    config.write_text(yaml.safe_dump(tree, sort_keys=False))
    return str(config), folder / "run"


def kill_with_children(process):
    """Kills a process and all processes that it has started, if it is still running."""
    if process.poll() is None:
        parent = psutil.Process(process.pid)
        for member in [parent, *parent.children(recursive=True)]:
            member.kill()
    process.communicate()


def run_status(run_dir):
    """Returns the status in a run's manifest."""
    manifest = run_dir / "manifest.json"
    if not manifest.exists():
        return "not started"
    return json.loads(manifest.read_text())["status"]


def test_pipeline_killed_in_every_stage_ends_with_the_same_results(tiny, tmp_path):
    model = tiny()
    student = tiny(intermediate_size=128)
    config, expected_dir = write_pipeline(tmp_path / "a", model, student)
    run_grpo(config, command="pipeline")

    config, run_dir = write_pipeline(tmp_path / "b", model, student)
    generator = random.Random(0)
    statuses = {}  # by stage, after its kill
    for stage in json.loads((expected_dir / "manifest.json").read_text())["stages"]:
        process = start_grpo(config, command="pipeline")
        wait_for((run_dir / stage / "config.yaml").exists, process)
        time.sleep(generator.uniform(0, 8))
        kill_with_children(process)
        statuses[stage] = run_status(run_dir / stage)
    print("status of each stage when it was killed:", statuses)

    run_grpo(config, command="pipeline")
    table = json.loads((run_dir / "table.json").read_text())
    expected_table = json.loads((expected_dir / "table.json").read_text())
    assert untimed(table) == untimed(expected_table)
    traces = (run_dir / "traces" / "traces.jsonl").read_text()
    assert traces == (expected_dir / "traces" / "traces.jsonl").read_text()
    for stage in ("cold", "rl", "student"):
        weights = (run_dir / stage / "final" / "model.safetensors").read_bytes()
        expected_weights = (expected_dir / stage / "final" / "model.safetensors").read_bytes()
        assert weights == expected_weights, stage
