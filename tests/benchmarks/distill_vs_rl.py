r"""Compares distillation from a larger model with RL on the small model, at equal compute.

    .venv/bin/python tests/benchmarks/distill_vs_rl.py [--seeds 3] \
        [--folder runs/distill_vs_rl] [--plot docs/distill_vs_rl.svg]

Runs `grpo pipeline configs/distill_vs_rl/pipeline.yaml` once per seed and prints a table of the
held-out accuracy of each method (docs/benchmarks.md, "Distillation compared with RL on the small
model"). Stages that are finished are not repeated.

Compute is the student's: 2 FLOPs per weight and sampled token, 6 FLOPs per weight and token of an
update. Attention is not counted (2 % at these lengths), nor are the training and the traces of the
teacher. The intervals are 95 % bootstrap intervals: seeds and problems are resampled, in the same
way for all methods.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open

CONFIG = "configs/distill_vs_rl/pipeline.yaml"
METHODS = {  # stage of the pipeline -> description
    "rl": "GRPO on the student",
    "by_text": "SFT on the teacher's traces",
    "soft": "soft targets: the teacher's distribution on the traces",
    "on_policy": "on-policy distillation",
}
SAMPLING_METHODS = ("rl", "on_policy")  # their updates have a prompt per group
COLORS = {"by_text": "tab:orange", "soft": "tab:green", "on_policy": "tab:red"}
PROMPT_TOKENS = 9  # "785+933=" and a line end
COMPLETION_TOKENS = 35  # approximate mean; used only to estimate the number of prompts
GROUP_SIZE = 8  # completions that share their prompt in a packed update


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/distill_vs_rl"))
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    folders = [options.folder / f"seed-{seed}" for seed in range(options.seeds)]
    for seed, folder in enumerate(folders):
        run_pipeline(seed, folder)
    student_weights = count_weights(folders[0] / "rl")
    teacher_weights = count_weights(folders[0] / "teacher")
    print(
        f"student {student_weights:,} weights, teacher {teacher_weights:,}; held-out greedy "
        "accuracy\n"
    )
    results = {
        name: correct_answers([folder / f"{name}-sums" for folder in folders])
        for name in ("teacher", "student_start", *METHODS)
    }
    print_table(results, folders, student_weights)
    if options.plot:
        plot(options.plot, folders, student_weights, results)


def run_pipeline(seed: int, folder: Path) -> None:
    overrides = [f"seed={seed}", f"run_dir={folder}"]
    command = [sys.executable, "-m", "grpo", "pipeline", CONFIG, *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def count_weights(run_dir: Path) -> int:
    """Returns the number of weights of a run's final model."""
    with safe_open(str(run_dir / "final" / "model.safetensors"), "pt") as file:
        names = file.keys()
        return sum(int(np.prod(file.get_slice(name).get_shape())) for name in names)


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def correct_answers(eval_dirs: list[Path]) -> np.ndarray:
    """Returns whether each answer is correct [seeds, problems], from one evaluation per seed."""
    by_seed = []
    for eval_dir in eval_dirs:
        samples_file = next((eval_dir / "samples").glob("eval-*.jsonl"))
        samples = [json.loads(line) for line in samples_file.read_text().splitlines()]
        by_seed.append({sample["problem"]: sample["verdict"] == "correct" for sample in samples})
    problems = sorted(by_seed[0])
    return np.array([[correct[problem] for problem in problems] for correct in by_seed])


def student_flops(run_dir: Path, method: str, num_weights: int) -> list[float]:
    """Returns the FLOPs of the student until the end of each step."""
    total = 0.0
    flops = []
    for row in read_metrics(run_dir):
        sampled_tokens = row.get("completion/tokens", 0.0)
        sampled_prompt_tokens = PROMPT_TOKENS * sampled_tokens / COMPLETION_TOKENS / GROUP_SIZE
        trained_tokens = row.get("update/tokens", 0.0)
        num_prompts = trained_tokens / COMPLETION_TOKENS
        if method in SAMPLING_METHODS:
            num_prompts = num_prompts / GROUP_SIZE
        trained_prompt_tokens = PROMPT_TOKENS * num_prompts
        total += num_weights * (
            2 * (sampled_tokens + sampled_prompt_tokens)
            + 6 * (trained_tokens + trained_prompt_tokens)
        )
        flops.append(total)
    return flops


def interval(correct: np.ndarray, baseline: np.ndarray | None = None) -> tuple[float, float]:
    """Returns the 95 % bootstrap interval of an accuracy.

    Args:
        correct: Whether each answer is correct [seeds, problems].
        baseline: The same for another method. The interval is then that of the difference.
    """
    values = correct.astype(float)
    if baseline is not None:
        values = values - baseline.astype(float)
    generator = np.random.default_rng(0)
    num_seeds, num_problems = values.shape
    means = []
    for _ in range(10_000):
        seeds = generator.integers(0, num_seeds, num_seeds)
        problems = generator.integers(0, num_problems, num_problems)
        means.append(values[seeds][:, problems].mean())
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def print_table(results: dict[str, np.ndarray], folders: list[Path], num_weights: int) -> None:
    """Prints one row per model. `num_weights` is the size of the student."""
    print("| | seeds | mean | 95 % interval | minus RL, points | student's GFLOP |")
    print("|---|---|---|---|---|---|")
    for name, correct in results.items():
        accuracies = ", ".join(f"{accuracy:.1%}" for accuracy in correct.mean(1))
        low, high = interval(correct)
        difference = ""
        if name in METHODS and name != "rl":
            low_difference, high_difference = interval(correct, results["rl"])
            difference = f"{100 * low_difference:+.1f} to {100 * high_difference:+.1f}"
        gflop = ""
        if name in METHODS:
            flops = [student_flops(folder / name, name, num_weights)[-1] for folder in folders]
            gflop = f"{np.mean(flops) / 1e9:,.0f}"
        print(
            f"| {METHODS.get(name, name)} | {accuracies} | {correct.mean():.1%} | {low:.1%} to "
            f"{high:.1%} | {difference} | {gflop} |"
        )


def plot(
    target: Path, folders: list[Path], num_weights: int, results: dict[str, np.ndarray]
) -> None:
    """Writes a figure: accuracy over the student's compute, a curve per seed of RL."""
    import matplotlib

    matplotlib.use("svg")  # before pyplot is imported
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for seed, folder in enumerate(folders):
        gflops, accuracies = learning_curve(folder / "rl", num_weights)
        label = METHODS["rl"] if seed == 0 else None
        axes.plot(gflops, accuracies, color="tab:blue", alpha=0.6, label=label)
    for name, color in COLORS.items():
        flops = [student_flops(folder / name, name, num_weights)[-1] for folder in folders]
        gflops = [value / 1e9 for value in flops]
        axes.scatter(gflops, results[name].mean(1), color=color, label=METHODS[name], zorder=3)
    axes.axhline(results["teacher"].mean(), color="gray", linestyle=":", label="teacher")
    axes.set(xlabel="the student's compute, GFLOP", ylabel="held-out accuracy", ylim=(0.3, 1.02))
    axes.legend(fontsize="small", loc="lower right")
    figure.savefig(target)


def learning_curve(run_dir: Path, num_weights: int) -> tuple[list[float], list[float]]:
    """Returns the student's GFLOP and the held-out accuracy at each evaluation of an RL run."""
    gflops = []
    accuracies = []
    flops_of_steps = student_flops(run_dir, "rl", num_weights)
    for flops, row in zip(flops_of_steps, read_metrics(run_dir), strict=True):
        if "eval/accuracy" in row:
            gflops.append(flops / 1e9)
            accuracies.append(row["eval/accuracy"])
    return gflops, accuracies


if __name__ == "__main__":
    main()
