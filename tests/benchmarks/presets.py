r"""Trains the quickstart's 4M model with every preset and prints a table of held-out accuracies.

    .venv/bin/python tests/benchmarks/presets.py [--seeds 3] [--presets grpo dapo] \
        [--folder runs/presets]

The table contains the held-out accuracy at the end, its range over the seeds, and the number of
rollouts until 90 % (docs/benchmarks.md, "Every preset"). Runs that are finished are not repeated.

All runs of a seed start from the same cold start. The teacher of `on_policy_distill` is the final
model of the preset `grpo`, so that one must run before it. All presets use the same batch sizes
(SHARED_OVERRIDES), so only the recipe differs. Recipes with many mini-batches (16 in R1 and DAPO)
would need larger rollouts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from grpo.config.presets import PRESETS

SHARED_OVERRIDES = [
    "train.rollouts=12",
    "train.updates_per_rollout=2",
    "rewards={accuracy: 1.0, format: 0.1}",
    "model.warm_start=",
    "checkpoint.every=0",
]
GOOD_ACCURACY = 0.9


@dataclass(frozen=True, slots=True)
class Outcome:
    accuracy: float  # greedy, on the held-out problems, after the last rollout
    rollouts_to_90_percent: int | None  # a multiple of 4: every fourth rollout is evaluated


def run(command: str, config: str, run_dir: Path, *overrides: str) -> None:
    """Runs `grpo COMMAND CONFIG` unless it is finished. A failed run leaves a file `failed`."""
    if is_finished(run_dir):
        return
    shutil.rmtree(run_dir, ignore_errors=True)
    result = subprocess.run(
        [sys.executable, "-m", "grpo", command, config, f"run_dir={run_dir}", *overrides],
        stderr=subprocess.PIPE,
        text=True,
    )
    last_lines = result.stderr.strip().splitlines()[-1:]
    print("".join(last_lines), file=sys.stderr)
    if result.returncode:
        (run_dir / "failed").write_text(result.stderr)


def is_finished(run_dir: Path) -> bool:
    manifest = run_dir / "manifest.json"
    return manifest.exists() and json.loads(manifest.read_text())["status"] == "finished"


def read_outcome(run_dir: Path) -> Outcome | None:
    """Returns the outcome of a run, None if it failed."""
    if (run_dir / "failed").exists():
        return None
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    evaluated_rows = [row for row in rows if "eval/accuracy" in row]
    good_rows = [row for row in evaluated_rows if row["eval/accuracy"] >= GOOD_ACCURACY]
    return Outcome(
        accuracy=evaluated_rows[-1]["eval/accuracy"],
        rollouts_to_90_percent=good_rows[0]["rollout"] if good_rows else None,
    )


def train(preset: str, seed: int, folder: Path) -> Outcome | None:
    """Trains with a preset from the seed's cold start."""
    overrides = [
        f"model.path={folder / f'sft-{seed}' / 'final'}",
        f"seed={seed}",
        f"algorithm={{preset: {preset}}}",
        *SHARED_OVERRIDES,
    ]
    if preset.startswith("on_policy_distill"):
        overrides.append(f"model.teacher={folder / f'grpo-{seed}' / 'final'}")
    run_dir = folder / f"{preset}-{seed}"
    run("train", "configs/tiny.yaml", run_dir, *overrides)
    return read_outcome(run_dir)


def table_row(preset: str, outcomes: list[Outcome | None]) -> str:
    """Returns a row of the table. `outcomes` contains one entry per seed."""
    succeeded = [outcome for outcome in outcomes if outcome is not None]
    accuracies = [outcome.accuracy for outcome in succeeded]
    mean = "failed"
    accuracy_range = ""
    if accuracies:
        mean = f"{statistics.mean(accuracies):.1%}"
        accuracy_range = f"{min(accuracies):.1%} to {max(accuracies):.1%}"
    rollouts = []
    for outcome in succeeded:
        if outcome.rollouts_to_90_percent is None:
            rollouts.append("never")
        else:
            rollouts.append(str(outcome.rollouts_to_90_percent))
    num_seeds = f"{len(succeeded)} of {len(outcomes)}"
    return f"| {preset} | {mean} | {accuracy_range} | {', '.join(rollouts)} | {num_seeds} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--presets", nargs="*", default=list(PRESETS))
    parser.add_argument("--folder", type=Path, default=Path("runs/presets"))
    options = parser.parse_args()
    for seed in range(options.seeds):
        run("sft", "configs/tiny_sft.yaml", options.folder / f"sft-{seed}", f"seed={seed}")
    print("| preset | held-out accuracy | range over seeds | rollouts to 90 % | seeds |")
    print("|---|---|---|---|---|")
    for preset in options.presets:
        outcomes = [train(preset, seed, options.folder) for seed in range(options.seeds)]
        print(table_row(preset, outcomes), flush=True)


if __name__ == "__main__":
    main()
