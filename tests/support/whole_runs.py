"""Helpers of the tests that start whole runs.

`grpo train` in a process of its own, as a user does.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import yaml
from tiny_models import tiny_config

from grpo import config as configs

# of a learner in the tests' own process
OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def write_tree(path: Path, tree: dict) -> str:
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def write_config(path: Path, config: configs.TrainConfig) -> str:
    return write_tree(path, config.model_dump(mode="json"))


def environment() -> dict[str, str]:
    """Returns the environment of a process that may join a group of its own and finds digits.py."""
    kept = {name: value for name, value in os.environ.items() if name not in OF_RANKS}
    return kept | {"PYTHONPATH": str(Path(__file__).parent)}


def start(*arguments, command="train", ranks=1, **options) -> subprocess.Popen:
    """Starts `grpo COMMAND ...`, with `ranks` above 1 under torchrun."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        if ranks > 1
        else []
    )
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "grpo", command, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        **options,
    )


def run(*arguments, code=0, **options) -> str:
    process = start(*arguments, **options)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    return errors


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def outcome(run_dir):
    """Everything of a run that must not depend on when it was interrupted: all but times."""
    timed = ("time/", "seconds", "tokens_per_s", "machine/", "bound/", "idle/")
    metrics = [
        {k: v for k, v in row.items() if not any(t in k for t in timed)} for row in rows(run_dir)
    ]
    samples = {path.name: _content(path) for path in sorted((run_dir / "samples").iterdir())}
    weights = (run_dir / "final" / "model.safetensors").read_bytes()
    return metrics, samples, weights


def _content(path):
    if path.suffix != ".npz":  # which holds the time of day
        return path.read_text()
    with np.load(path) as arrays:
        return {name: arrays[name].tobytes() for name in arrays.files}


def wait_for(condition, process=None, seconds=120):
    """Waits until a condition holds, and fails at once when the process has ended before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


SECTIONS = {  # several updates a rollout, KL to the start, bfloat16 with float32 masters
    "train": {"rollouts": 4, "problems": 4, "group_size": 4, "updates_per_rollout": 2},
    "eval": {"every": 2, "problems": 4},
    "rewards": {"digits:share": 1.0, "accuracy": 1.0},
    "algorithm": {"kl_coef": 0.01},
    "model": {"dtype": "bfloat16"},
    "learner": {"zero_stage": 1, "warmup_updates": 2},
}


def uninterrupted(folder: Path, model_dir: Path, **train) -> tuple[Path, str]:
    """Runs SECTIONS to the end without an interruption; returns the folder and its config."""
    sections = SECTIONS | {"train": SECTIONS["train"] | train}
    config = write_config(
        folder / "config.yaml", tiny_config(folder / "run", model_dir, **sections)
    )
    run(config)
    return folder, config


def again(straight: tuple[Path, str], folder: Path) -> str:
    """Returns the config of the same run in another folder."""
    return write_config(
        folder / "config.yaml",
        configs.load(straight[1]).model_copy(update={"run_dir": str(folder / "run")}),
    )
