r"""Compares recipes on a task that separates them, at equal compute.

    .venv/bin/python tests/benchmarks/recipes.py [--seeds 3] [--recipes grpo dapo] \
        [--jobs 2] [--folder runs/recipes]

Prints a table of held-out accuracies. Runs that are finished are not repeated. With `--jobs`, as
many runs at a time have one core each.

The task (hard_sums/train.yaml) has a low start, rewards that are wrong for 15 % of the completions,
sums of two to eight digits, so that lengths have a long tail, and eight updates per rollout. All
runs start from one model (hard_sums/sft.yaml).

Compute is that of learner and sampler: 2 FLOPs per weight and token of a forward pass (sampling,
and scoring by policy, reference or teacher), 6 per weight and token of an update. Prompts are not
counted: they are short, and packed once per group. The accuracies are those at the compute of the
cheapest run, linear between two evaluations, and the mean from the start to that compute.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from grpo import config as configs
from grpo.config import TrainConfig

CONFIGS = Path(__file__).parent / "hard_sums"
TEACHER_RECIPES = {
    "on_policy_distill": "{preset: on_policy_distill}",
    "on_policy_distill_exact": "{preset: on_policy_distill_exact}",
    "grpo + teacher": "{preset: grpo, teacher_coef: 0.1, teacher_divergence: reverse_kl}",
}
RECIPES = {  # name -> section `algorithm`
    "grpo": "{preset: grpo}",
    "dapo": "{preset: dapo}",
    "cispo": "{preset: cispo}",
    "dppo": "{preset: dppo}",
    "dppo_kl": "{preset: dppo_kl}",
    "deepseek_v32": "{preset: deepseek_v32}",
    "maxrl": "{preset: maxrl}",
    "gdpo": "{preset: gdpo}",
    "reinforce_pp_baseline": "{preset: reinforce_pp_baseline}",
    "prorl_v2": "{preset: prorl_v2}",
    "grpo + drift": "{preset: grpo, drift_coef: 0.001}",
    **TEACHER_RECIPES,
}
BASELINE = "grpo"
# Quantiles of Student's t for a two-sided 95 % interval, by number of seeds.
T_QUANTILES = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 8: 2.36, 10: 2.26}


@dataclass(frozen=True, slots=True)
class Curve:
    """A run: the compute until each evaluation, in FLOPs per weight, and the accuracies there."""

    flops: list[float]
    accuracies: list[float]

    def at(self, flops: float) -> float:
        """Returns the accuracy at a compute, linear between evaluations."""
        points = list(zip(self.flops, self.accuracies, strict=True))
        for (low, first), (high, second) in itertools.pairwise(points):
            if flops <= high:
                return first + (second - first) * (flops - low) / (high - low)
        return points[-1][1]

    def mean(self, flops: float) -> float:
        """Returns the mean accuracy from the start to a compute."""
        num_points = 200
        return statistics.mean(
            self.at(flops * (index + 0.5) / num_points) for index in range(num_points)
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/recipes"))
    options = parser.parse_args()
    start_dir = options.folder / "sft"
    teacher_dir = options.folder / "teacher"
    run("sft", start_dir, [])
    if TEACHER_RECIPES.keys() & set(options.recipes):
        train_teacher(teacher_dir)
    cores: SimpleQueue[int] = SimpleQueue()
    for core in range(options.jobs):
        cores.put(core)

    def train(recipe: str, seed: int) -> None:
        overrides = [
            f"seed={seed}",
            f"model.path={start_dir / 'final'}",
            f"algorithm={RECIPES[recipe]}",
        ]
        if recipe in TEACHER_RECIPES:
            overrides.append(f"model.teacher={teacher_dir / 'final'}")
        core = cores.get()
        pin = ["taskset", "-c", str(core)] if options.jobs > 1 else []
        try:
            run("train", run_dir(options.folder, recipe, seed), overrides, pin)
        finally:
            cores.put(core)

    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [
            pool.submit(train, recipe, seed)
            for seed in range(options.seeds)
            for recipe in options.recipes
        ]
    for job in jobs:
        job.result()
    print_table(options.folder, options.recipes, options.seeds)


def run_dir(folder: Path, recipe: str, seed: int) -> Path:
    return folder / f"{recipe.replace(' ', '')}-{seed}"


def train_teacher(path: Path) -> None:
    """Trains a model on worked solutions only, twice as long as the start model."""
    overrides = ["sft.updates=1600"]
    for entry in ("two", "three", "four", "six", "eight"):
        overrides.append(f"data.mixture.{entry}.options.terse=0")
    run("sft", path, overrides)


def run(command: str, path: Path, overrides: list[str], pin: Sequence[str] = ()) -> None:
    """Runs `grpo COMMAND` with the task's config unless it is finished.

    A failed run leaves a file `failed`.
    """
    manifest = path / "manifest.json"
    if manifest.exists() and json.loads(manifest.read_text())["status"] == "finished":
        return
    shutil.rmtree(path, ignore_errors=True)
    config = CONFIGS / f"{command}.yaml"
    arguments = [command, str(config), f"run_dir={path}", *overrides]
    result = subprocess.run(
        [*pin, sys.executable, "-m", "grpo", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    print(path, *result.stderr.strip().splitlines()[-1:], file=sys.stderr, flush=True)
    if result.returncode:
        path.mkdir(parents=True, exist_ok=True)
        (path / "failed").write_text(result.stderr)


def read_curve(path: Path) -> Curve:
    """Returns the curve of a finished run."""
    config = configs.load(path / "config.yaml", kind=TrainConfig)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    total = 0.0
    curve = Curve([], [])
    for row in rows:
        if "completion/tokens" in row:
            num_updates = row["update/made"]
            trained_tokens = row["update/tokens"] * num_updates
            total += 2 * row["completion/tokens"]
            total += (6 + 2 * num_scoring_passes(config)) * trained_tokens
        if "eval/accuracy" in row:
            curve.flops.append(total)
            curve.accuracies.append(row["eval/accuracy"])
    return curve


def num_scoring_passes(config: TrainConfig) -> int:
    """Returns the number of forward passes besides those of the updates, per trained token."""
    algorithm = config.algorithm
    passes = int(algorithm.old_logprobs != "sampler")
    passes += int(algorithm.kl_coef > 0)
    if algorithm.has_teacher_advantage:
        passes += 2  # by policy and teacher, for the advantages
    if algorithm.has_teacher_loss:
        passes += 1
    return passes


def print_table(folder: Path, recipes: Sequence[str], num_seeds: int) -> None:
    """Prints a row per recipe. The compute of all is that of the cheapest run."""
    curves: dict[str, list[Curve]] = {}
    for recipe in recipes:
        paths = [run_dir(folder, recipe, seed) for seed in range(num_seeds)]
        if all((path / "final").exists() for path in paths):
            curves[recipe] = [read_curve(path) for path in paths]
        else:
            print(f"{recipe}: a run is missing or has failed", file=sys.stderr)
    budget = min(curve.flops[-1] for each in curves.values() for curve in each)
    print(f"compute: {budget:.4g} FLOPs per weight\n")
    columns = ["recipe", "accuracy, by seed", "mean", "minus grpo, points"]
    columns += ["mean until then", "minus grpo, points"]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    baseline_ends = [curve.at(budget) for curve in curves[BASELINE]]
    baseline_means = [curve.mean(budget) for curve in curves[BASELINE]]
    for recipe, curves_of_seeds in curves.items():
        ends = [curve.at(budget) for curve in curves_of_seeds]
        means = [curve.mean(budget) for curve in curves_of_seeds]
        cells = [
            recipe,
            ", ".join(f"{end:.1%}" for end in ends),
            f"{statistics.mean(ends):.1%}",
            "" if recipe == BASELINE else difference(ends, baseline_ends),
            f"{statistics.mean(means):.1%}",
            "" if recipe == BASELINE else difference(means, baseline_means),
        ]
        print(f"| {' | '.join(cells)} |")


def difference(values: Sequence[float], baselines: Sequence[float]) -> str:
    """Returns the mean difference in points with its 95 % interval, paired by seed."""
    differences = [
        100 * (value - baseline) for value, baseline in zip(values, baselines, strict=True)
    ]
    mean = statistics.mean(differences)
    if len(differences) not in T_QUANTILES:
        return f"{mean:+.1f}"
    error = statistics.stdev(differences) / len(differences) ** 0.5
    margin = T_QUANTILES[len(differences)] * error
    return f"{mean:+.1f} ({mean - margin:+.1f} to {mean + margin:+.1f})"


if __name__ == "__main__":
    main()
