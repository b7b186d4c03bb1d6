r"""Distilling a larger model into a small one against RL on the small one, at equal compute of the
student: table and plot.

    .venv/bin/python tests/benchmarks/distill_vs_rl.py [--seeds 3] \
        [--folder runs/distill_vs_rl] [--plot docs/distill_vs_rl.svg]

A seed is one `grpo pipeline configs/distill_vs_rl/pipeline.yaml`; what is finished is not run
again. Compute of an arm is that of its student: 2 FLOPs a weight and token for sampling, 6 for an
update's forward and backward pass (attention left out: 2 % at these lengths). The teacher's own
training and sampling are told apart. Intervals: bootstrap over seeds, then over the problems, the
same for all arms.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

CONFIG = "configs/distill_vs_rl/pipeline.yaml"
ARMS = {
    "rl": "GRPO on the student",
    "by_text": "the teacher's traces, supervised",
    "soft": "the teacher's distribution on them",
    "on_policy": "on-policy distillation",
}
PROMPT, GROUP = 9, 8  # tokens of "785+933=" and a line end; completions that share it in an update


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> int:
    from safetensors import safe_open

    with safe_open(str(folder / "final" / "model.safetensors"), "pt") as file:
        return sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118 - not a dict


def spent(folder: Path, arm: str, size: int) -> list[float]:
    """Returns the FLOPs of the student after each step."""
    total, found = 0.0, []
    for row in rows(folder):
        sampled, trained = row.get("completion/tokens", 0.0), row.get("update/tokens", 0.0)
        texts = trained / 35  # about: only for the prompts' share
        prompts = PROMPT * (texts / GROUP if arm in ("rl", "on_policy") else texts)
        total += size * (2 * (sampled + (PROMPT * sampled / 35 / GROUP)) + 6 * (trained + prompts))
        found.append(total)
    return found


def judged(folder: Path) -> dict[str, bool]:
    lines = [
        json.loads(line)
        for line in next((folder / "samples").glob("eval-*.jsonl")).read_text().splitlines()
    ]
    return {line["problem"]: line["verdict"] == "correct" for line in lines}


def interval(right: np.ndarray, other: np.ndarray | None = None) -> tuple[float, float]:
    """Returns the 95 % interval of the mean of right [seeds, problems], or of its difference to
    another arm's.
    """
    values = right.astype(float) - (0 if other is None else other.astype(float))
    draw = np.random.default_rng(0)
    seeds, problems = values.shape
    means = [
        values[draw.integers(0, seeds, seeds)][:, draw.integers(0, problems, problems)].mean()
        for _ in range(10_000)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/distill_vs_rl"))
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    folders = [options.folder / f"seed-{seed}" for seed in range(options.seeds)]
    for seed, folder in enumerate(folders):
        command = [
            sys.executable,
            "-m",
            "grpo",
            "pipeline",
            CONFIG,
            f"seed={seed}",
            f"run_dir={folder}",
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    size, large = (weights(folders[0] / name) for name in ("rl", "teacher"))
    print(f"student {size:,} weights, teacher {large:,}; held-out greedy accuracy\n")
    print(
        "| arm | seeds | mean | 95 % interval | less RL | student's GFLOP "
        "|\n|---|---|---|---|---|---|"
    )
    results = {}
    for name in ("teacher", "student_start", *ARMS):
        by_problem = [judged(folder / f"{name}-sums") for folder in folders]
        results[name] = np.array(
            [[row[problem] for problem in sorted(by_problem[0])] for row in by_problem]
        )
    for name, right in results.items():
        each = ", ".join(f"{mean:.1%}" for mean in right.mean(1))
        low, high = interval(right)
        less = (
            " to ".join(f"{100 * bound:+.1f}" for bound in interval(right, results["rl"]))
            if name in ARMS and name != "rl"
            else ""
        )
        flops = (
            f"{np.mean([spent(folder / name, name, size)[-1] for folder in folders]) / 1e9:,.0f}"
            if name in ARMS
            else ""
        )
        print(
            f"| {ARMS.get(name, name)} | {each} | {right.mean():.1%} | {low:.1%} to {high:.1%} | "
            f"{less} | {flops} |"
        )
    if options.plot:
        plot(options.plot, folders, size, results)


def plot(target: Path, folders: list[Path], size: int, results: dict[str, np.ndarray]) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for seed, folder in enumerate(folders):
        curve = [
            (flops / 1e9, row["eval/accuracy"])
            for flops, row in zip(
                spent(folder / "rl", "rl", size), rows(folder / "rl"), strict=True
            )
            if "eval/accuracy" in row
        ]
        axes.plot(
            *zip(*curve, strict=True),
            color="tab:blue",
            alpha=0.6,
            label="GRPO on the student" if not seed else None,
        )
    for name, color in (("by_text", "tab:orange"), ("soft", "tab:green"), ("on_policy", "tab:red")):
        ends = [spent(folder / name, name, size)[-1] / 1e9 for folder in folders]
        axes.scatter(ends, results[name].mean(1), color=color, label=ARMS[name], zorder=3)
    axes.axhline(results["teacher"].mean(), color="gray", linestyle=":", label="teacher")
    axes.set(xlabel="the student's compute, GFLOP", ylabel="held-out accuracy", ylim=(0.3, 1.02))
    axes.legend(fontsize="small", loc="lower right")
    figure.savefig(target)


if __name__ == "__main__":
    main()
