"""Helpers for tests that start complete runs of `grpo` in separate processes, as a user does."""

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

# Starts ranks on this machine, as launch/torchrun.sh does.
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1")

# Variables that a learner in the tests' own process sets. A new process must not inherit them.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# Parts of the names of metrics that contain times or rates.
TIMED = ("time/", "seconds", "tokens_per_s", "machine/", "bound/", "idle/")

# Several updates per rollout, KL to the initial model, bfloat16 with float32 master weights.
RESUMABLE_RUN_SECTIONS = {
    "train": {"rollouts": 4, "problems": 4, "group_size": 4, "updates_per_rollout": 2},
    "eval": {"every": 2, "problems": 4},
    "rewards": {"digits:share": 1.0, "accuracy": 1.0},
    "algorithm": {"kl_coef": 0.01},
    "model": {"dtype": "bfloat16"},
    "learner": {"zero_stage": 1, "warmup_updates": 2},
}


def write_yaml(path: Path, tree: dict) -> str:
    """Writes a tree as YAML and returns the path as a string."""
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def write_config(path: Path, config: configs.TrainConfig) -> str:
    """Writes a config as YAML and returns the path as a string."""
    return write_yaml(path, config.model_dump(mode="json"))


def process_environment() -> dict[str, str]:
    """Returns the environment for a process that forms its own ranks and can import digits.py."""
    variables = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    folders = [str(Path(__file__).parent)]
    if "PYTHONPATH" in variables:
        folders.append(variables["PYTHONPATH"])
    variables["PYTHONPATH"] = os.pathsep.join(folders)
    return variables


def start_grpo(*arguments, command="train", ranks=1, wrapper=(), **options) -> subprocess.Popen:
    """Starts `grpo COMMAND ARGUMENTS...`. Its standard error is a pipe.

    Args:
        arguments: Arguments of the command.
        command: Command of `grpo`.
        ranks: Number of ranks. With more than one, torchrun starts them.
        wrapper: Command to which the command of Python is appended, such as `("nice",)`.
        options: Further options of Popen.
    """
    launcher = []
    if ranks > 1:
        launcher = [*TORCHRUN, f"--nproc-per-node={ranks}"]
    return subprocess.Popen(
        [*wrapper, sys.executable, *launcher, "-m", "grpo", command, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=process_environment(),
        **options,
    )


def run_grpo(*arguments, code=0, **options) -> str:
    """Runs `grpo` to its end, see `start_grpo`, and returns its standard error.

    Args:
        arguments: Arguments of the command.
        code: Expected exit code.
        options: Further options of `start_grpo`.

    Raises:
        AssertionError: The exit code differs from `code`.
        subprocess.TimeoutExpired: The run takes more than 300 s.
    """
    process = start_grpo(*arguments, **options)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    return errors


def read_metrics(run_dir):
    """Returns the rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def read_reproducible_results(run_dir):
    """Returns the results of a run that must not depend on interruptions.

    Returns:
        A tuple `(metrics, samples, weights)`: the rows of metrics without times and rates, the
        contents of the files in samples/ by name, and the bytes of the final weights.
    """
    metrics = untimed(read_metrics(run_dir))
    samples = {path.name: _content(path) for path in sorted((run_dir / "samples").iterdir())}
    weights = (run_dir / "final" / "model.safetensors").read_bytes()
    return metrics, samples, weights


def untimed(value):
    """Returns a value without the durations and rates in its dicts, such as a table of results."""
    if isinstance(value, list):
        return [untimed(item) for item in value]
    if isinstance(value, dict):
        return {key: untimed(item) for key, item in value.items() if not is_timed(key)}
    return value


def is_timed(key):
    """Returns whether the name of a metric is that of a duration or a rate."""
    return any(part in key for part in TIMED)


def _content(path):
    if path.suffix == ".npz":  # the archive's bytes contain the time of day
        with np.load(path) as arrays:
            return {name: arrays[name].tobytes() for name in arrays.files}
    return path.read_text()


def wait_for(condition, process=None, seconds=300):
    """Waits until `condition()` is true.

    Args:
        condition: Function without parameters. It is called every 20 ms.
        process: Process that must run until then.
        seconds: Time limit.

    Raises:
        AssertionError: The process has ended, or the limit is exceeded.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, f"the condition is not true after {seconds} s"
        time.sleep(0.02)


def train_uninterrupted(folder: Path, model_dir: Path, **train) -> tuple[Path, str]:
    """Trains with RESUMABLE_RUN_SECTIONS to the end, in `folder/run`.

    Args:
        folder: Existing directory for the config and the run.
        model_dir: Directory of the model.
        train: Keys to merge into the section `train`.

    Returns:
        `folder`, and the path of the config.
    """
    sections = RESUMABLE_RUN_SECTIONS | {"train": RESUMABLE_RUN_SECTIONS["train"] | train}
    config = write_config(
        folder / "config.yaml", tiny_config(folder / "run", model_dir, **sections)
    )
    run_grpo(config)
    return folder, config


def write_config_for_other_folder(uninterrupted_run: tuple[Path, str], folder: Path) -> str:
    """Writes the config of an uninterrupted run for another folder.

    Args:
        uninterrupted_run: Result of `train_uninterrupted`.
        folder: Existing directory for the config. Its run directory is `folder/run`.

    Returns:
        The path of the new config.
    """
    _, config_path = uninterrupted_run
    config = configs.load(config_path).model_copy(update={"run_dir": str(folder / "run")})
    return write_config(folder / "config.yaml", config)
