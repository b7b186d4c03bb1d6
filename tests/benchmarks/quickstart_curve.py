"""Draws the README's picture: held-out accuracy over the rollouts of the quickstart, three seeds.

for seed in 0 1 2; do ./launch/quickstart.sh --seed $seed; done
python tests/benchmarks/quickstart_curve.py [--runs runs] [--output docs/quickstart.svg]
"""

import argparse
from pathlib import Path

from grpo.run.directory import read_metrics
from grpo.tools.charts import set_style

FOLDERS = {0: "quickstart", 1: "quickstart-seed1", 2: "quickstart-seed2"}


def draw(runs: Path, output: Path) -> None:
    set_style()
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.2), layout="constrained")
    for seed, folder in FOLDERS.items():
        rows = read_metrics(runs / folder / "grpo" / "metrics.jsonl")
        points = [
            (row["step"], 100 * row["eval/accuracy"]) for row in rows if "eval/accuracy" in row
        ]
        steps, accuracies = zip(*points, strict=True)
        axes.plot(steps, accuracies, marker=".", label=f"seed {seed}")
        print(f"seed {seed}: " + ", ".join(f"{value:.1f}" for value in accuracies))
    axes.set_xlabel("rollouts of 48 problems x 8 completions, after SFT")
    axes.set_ylabel("correct of 200 held-out sums, %")
    axes.set_ylim(0, 103)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(output, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--output", type=Path, default=Path("docs/quickstart.svg"))
    options = parser.parse_args()
    draw(options.runs, options.output)
