"""Trains the quickstart's model on two servers and kills processes at random.

    .venv/bin/python tests/slow/soak.py --kills 50 [--seed 0] [--async] [--folder runs/soak]

Each kill ends a server, the engine core of a server or the trainer. A killed trainer is restarted.
At the end, the script prints

- whether every step was made exactly once,
- whether every problem of the mixture was used exactly once and in order,
- the held-out accuracies, which should be the same as without kills,
- the number of remaining processes, which should be 0.

The script is not part of the test suite. 50 kills take 20 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import IO

import psutil

from grpo import config as configs
from grpo.experience.prompts import Prompts
from grpo.learning import models
from grpo.stages.problems import load_problems, make_mixture

CONFIG_FILE = "configs/tiny.yaml"
# Exit codes of a trainer that may be restarted: finished, failed with an error, killed.
RESTARTABLE_EXIT_CODES = (0, 1, -9)
# The probability that a kill is skipped because the trainer has made no step since its last start.
# If every trainer were killed before its first step, the run would never finish.
SKIP_PROBABILITY = 0.8


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rollouts", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--async", dest="staleness", action="store_const", const=1, default=0)
    parser.add_argument(
        "--pause", type=float, default=20, help="maximum number of seconds between two kills"
    )
    parser.add_argument("--model", default="runs/quickstart/sft/final")
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    return parser.parse_args()


def config_overrides(options: argparse.Namespace) -> list[str]:
    return [
        f"run_dir={options.folder}",
        f"model.path={options.model}",
        "model.warm_start=",
        "checkpoint={every: 1, keep_best: null}",
        "eval.every=10",
        f"train.rollouts={options.rollouts}",
        f"train.max_staleness={options.staleness}",
        f"engine.servers={{count: 2, restarts: {options.kills + 1}}}",
    ]


def read_rows(run_dir: Path) -> list[dict[str, float]]:
    """Returns the rows of metrics.jsonl without an incomplete last row."""
    file = run_dir / "metrics.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]


def count_rows(run_dir: Path) -> int:
    return len(read_rows(run_dir))


class Trainer:
    """The process of `grpo train`, which is restarted until the run has finished."""

    def __init__(self, run_dir: Path, overrides: list[str], log: IO[str]) -> None:
        """Starts the run."""
        self._run_dir = run_dir
        self._command = [sys.executable, "-m", "grpo", "train", CONFIG_FILE, *overrides]
        self._log = log
        self.process = subprocess.Popen(self._command, stderr=log)
        self._num_rows_at_start = 0

    def ensure_running(self) -> bool:
        """Restarts the process if it has ended. Returns False if the run has finished."""
        exit_code = self.process.poll()
        if exit_code is None:
            return True
        assert exit_code in RESTARTABLE_EXIT_CODES, (
            f"the trainer ended with exit code {exit_code}: see {self._log.name}"
        )
        if self._has_finished():
            return False
        self.process = subprocess.Popen([*self._command, "--auto-resume"], stderr=self._log)
        self._num_rows_at_start = count_rows(self._run_dir)
        return True

    def has_made_a_step(self) -> bool:
        """Returns whether the process has made a step since its start."""
        return count_rows(self._run_dir) > self._num_rows_at_start

    def _has_finished(self) -> bool:
        manifest = self._run_dir / "manifest.json"
        return manifest.exists() and json.loads(manifest.read_text())["status"] == "finished"


def find_victims(trainer_pid: int) -> dict[str, list[psutil.Process]]:
    """Returns the processes of the run by their kind. Raises psutil.Error if one ends meanwhile."""
    trainer = psutil.Process(trainer_pid)
    servers = []
    cores = []
    for process in trainer.children(recursive=True):
        if "api_server" in " ".join(process.cmdline()):
            servers.append(process)
        if "EngineCore" in process.name() or "VLLM" in process.name():
            cores.append(process)
    return {"server": servers, "core": cores, "trainer": [trainer]}


def train_with_kills(options: argparse.Namespace, log: IO[str]) -> Counter[str]:
    """Runs the training to its end and kills processes. Returns the number of kills per kind."""
    generator = random.Random(options.seed)
    num_kills: Counter[str] = Counter()
    start_time = time.monotonic()
    trainer = Trainer(options.folder, config_overrides(options), log)
    while trainer.ensure_running():
        time.sleep(generator.uniform(2, options.pause))
        try:
            victims = find_victims(trainer.process.pid)
        except psutil.Error:
            continue
        has_made_a_step = trainer.has_made_a_step()
        if num_kills.total() >= options.kills:
            continue
        if not has_made_a_step and generator.random() < SKIP_PROBABILITY:
            continue
        kind = generator.choice(["server", "core", "trainer"])
        if not victims[kind]:
            continue
        generator.choice(victims[kind]).kill()
        num_kills[kind] += 1
        seconds = time.monotonic() - start_time
        step = count_rows(options.folder) - 1
        print(f"{seconds:6.0f} s, step {step}: killed a {kind}", flush=True)
        if kind == "trainer":
            trainer.process.wait()
    return num_kills


def used_problems(config: configs.TrainConfig, run_dir: Path) -> list[str]:
    """Returns the problem id of each group of the run, in the order of training."""
    problem_ids = []
    for file in sorted((run_dir / "samples").glob("step-*.jsonl")):
        lines = file.read_text().splitlines()
        for first_line_of_group in lines[:: config.train.group_size]:
            problem_ids.append(json.loads(first_line_of_group)["problem"])
    return problem_ids


def mixture_problems(config: configs.TrainConfig, model_dir: Path, count: int) -> list[str]:
    """Returns the ids of the first `count` problems of the mixture."""
    prompts = Prompts(
        config.prompt, models.load_tokenizer(model_dir), models.eos_token_ids(model_dir)
    )
    problems = load_problems(config.data, "train", config.seed)
    mixture = make_mixture(config.data, problems, prompts, config.seed)
    return [problem.id for problem in mixture.take(0, count)]


def report(options: argparse.Namespace, num_kills: Counter[str], seconds: float) -> None:
    """Prints the results of the run."""
    rows = read_rows(options.folder)
    config = configs.load(CONFIG_FILE, config_overrides(options))
    used = used_problems(config, options.folder)
    expected = mixture_problems(config, Path(options.model), len(used))
    each_step_once = [row["rollout"] for row in rows] == list(range(options.rollouts + 1))
    accuracies = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    print(
        f"{dict(num_kills)} killed in {seconds:.0f} s; "
        f"{len(rows) - 1} of {options.rollouts} steps, each once: {each_step_once}; "
        f"{len(used)} groups used, in order and once: {used == expected}; "
        f"held-out accuracies: {accuracies}"
    )


def count_remaining_processes(run_dir: Path) -> int:
    """Returns the number of processes of a run or of any vLLM server, without this process."""
    marks = (str(run_dir), "api_server", "EngineCore")
    num_processes = 0
    for process in psutil.process_iter(["cmdline"]):
        command_line = " ".join(process.info["cmdline"] or ())
        is_marked = any(mark in command_line for mark in marks)
        if is_marked and process.pid != os.getpid():
            num_processes += 1
    return num_processes


def main() -> None:
    options = parse_options()
    subprocess.run(["rm", "-rf", str(options.folder)], check=True)
    start_time = time.monotonic()
    with options.folder.with_suffix(".log").open("w") as log:
        num_kills = train_with_kills(options, log)
    report(options, num_kills, time.monotonic() - start_time)
    time.sleep(5)
    print(f"remaining processes: {count_remaining_processes(options.folder)}")


if __name__ == "__main__":
    main()
