"""The whole chain, killed once in every stage and evaluation, ends with the table of a chain that
never was.
"""

import json
import random
import time

import psutil
import pytest
import yaml
from tiny_models import tiny_config
from whole_runs import run, start, wait_for

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def write_chain(folder, model, teacher):
    """Supervised, GRPO, traces, distillation by distribution, fewer bits; every model judged.

    Random models, so that it takes minutes.
    """
    folder.mkdir()
    base = tiny_config("x", model).model_dump(mode="json")
    common = {
        name: base[name] for name in ("run_dir", "seed", "model", "data", "prompt", "logging")
    }
    sampled = {name: base[name] for name in ("sampling", "engine")} | {"rewards": {"finished": 1.0}}
    learner = {"zero_stage": 1, "micro_batch_tokens": 512}
    (folder / "traces.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "question": f"{i}+{i}=",
                    "solution": f"<think>{i}</think> <answer>{2 * i}</answer>",
                }
            )
            + "\n"
            for i in range(40)
        )
    )
    steps = {
        "sft": {
            "sft": {"updates": 30, "batch_size": 2, "max_tokens": 96},
            "learner": learner,
            "checkpoint": {"every": 5},
        },
        "train": {
            "train": {"rollouts": 4, "problems": 4, "group_size": 4},
            "learner": learner,
            "eval": {"every": 0},
            **sampled,
            "checkpoint": {"every": 1},
        },
        "collect": {
            "collect": {"problems": 24, "samples": 2, "chunk": 4, "format": False},
            **sampled,
        },
        "distill": {
            "way": "soft",
            "soft": {"updates": 20, "batch_size": 4, "max_tokens": 96},
            "learner": learner,
            "data": {"name": "traces", "path": str(folder / "traces.jsonl")},
            "checkpoint": {"every": 5},
        },
        "quantize": {"quantize": {"schemes": ["int8"]}, **sampled},
        "judge": {"train": {"rollouts": 1}, "eval": {"problems": 8}, **sampled},
    }
    for name, sections in steps.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | sections))

    def file(name):
        return str(folder / f"{name}.yaml")

    stages = {
        "cold": {"command": "sft", "config": file("sft")},
        "rl": {"command": "train", "config": file("train"), "model": "cold"},
        "traces": {"command": "collect", "config": file("collect"), "model": "rl"},
        "student": {
            "command": "distill",
            "config": file("distill"),
            "set": {"model.path": str(teacher)},
            "teacher": "rl",
        },
        "small": {"command": "quantize", "config": file("quantize"), "model": "student"},
    }
    tree = {
        "run_dir": str(folder / "run"),
        "stages": stages,
        "eval": {"sums": {"config": file("judge"), "start": False, "set": {"chunk": 2}}},
    }
    (folder / "chain.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return str(folder / "chain.yaml"), folder / "run"


def test_killed_once_in_every_stage_it_ends_with_the_same_table(tiny, tmp_path):
    model, other = tiny(), tiny(intermediate_size=128)
    config, straight = write_chain(tmp_path / "a", model, other)
    run(config, command="pipeline")
    config, folder = write_chain(tmp_path / "b", model, other)
    chance, killed = random.Random(0), []
    for stage in json.loads((straight / "manifest.json").read_text())["stages"]:
        process = start(config, command="pipeline")
        wait_for((folder / stage / "config.yaml").exists, process, seconds=200)
        time.sleep(chance.uniform(0, 8))
        family = (
            [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            if process.poll() is None
            else []
        )
        for member in family:
            member.kill()
        process.communicate()
        manifest = folder / stage / "manifest.json"
        killed.append(
            (
                stage,
                json.loads(manifest.read_text())["status"] if manifest.exists() else "not begun",
            )
        )
    print("killed in", killed)
    run(config, command="pipeline")
    assert json.loads((folder / "table.json").read_text()) == json.loads(
        (straight / "table.json").read_text()
    )
    assert (folder / "traces" / "traces.jsonl").read_text() == (
        straight / "traces" / "traces.jsonl"
    ).read_text()
    final = "final/model.safetensors"
    assert all(
        (folder / name / final).read_bytes() == (straight / name / final).read_bytes()
        for name in ("cold", "rl", "student")
    )
