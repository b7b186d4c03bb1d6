"""Prints the results of a quickstart run and writes them to summary.json.

python launch/summary.py runs/quickstart
"""

import datetime
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo import json_lines
from grpo.run.directory import read_metrics

STAGES = ("start", "sft", "grpo")  # the directories of the run
POINTS = ("start", "after_sft", "after_grpo")  # when the model is evaluated
METRICS = ("accuracy", "format", "greedy/accuracy", "greedy/format")
MAX_COMPLETION_CHARACTERS = 150


@dataclass(frozen=True)
class Evaluation:
    """An evaluation on held-out problems.

    Attributes:
        metrics: Its row of metrics.jsonl: `{"step": 0, "eval/accuracy": 0.25}`.
        samples_file: The JSON lines of its completions.
    """

    metrics: dict[str, Any]
    samples_file: Path


def find_evaluations(run: Path) -> dict[str, Evaluation]:
    """Returns the evaluation at each of POINTS."""
    start_row = read_metrics(run / "start" / "metrics.jsonl")[0]
    grpo_rows = read_metrics(run / "grpo" / "metrics.jsonl")
    grpo_rows = [row for row in grpo_rows if "eval/accuracy" in row]
    return {
        "start": Evaluation(start_row, run / "start" / "samples" / "eval-000000.jsonl"),
        "after_sft": grpo_evaluation(run, grpo_rows[0]),
        "after_grpo": grpo_evaluation(run, grpo_rows[-1]),
    }


def grpo_evaluation(run: Path, row: dict[str, Any]) -> Evaluation:
    return Evaluation(row, run / "grpo" / "samples" / f"eval-{row['step']:06d}.jsonl")


def read_manifest(run: Path, stage: str) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((run / stage / "manifest.json").read_text())
    return manifest


def stage_seconds(run: Path) -> dict[str, float]:
    """Returns the duration of each stage: `{"start": 20.0, "sft": 60.0, "grpo": 200.0}`."""
    durations = {}
    for stage in STAGES:
        manifest = read_manifest(run, stage)
        started = datetime.datetime.fromisoformat(manifest["started"])
        ended = datetime.datetime.fromisoformat(manifest["ended"])
        durations[stage] = (ended - started).total_seconds()
    return durations


def metric_values(evaluations: dict[str, Evaluation]) -> dict[str, dict[str, float]]:
    """Returns the values of each metric at each point.

    Example: `{"greedy_accuracy": {"start": 0.0, "after_sft": 0.4, "after_grpo": 0.8}}`.
    """
    values_of_metrics = {}
    for metric in METRICS:
        values = {}
        for point, evaluation in evaluations.items():
            if f"eval/{metric}" in evaluation.metrics:
                values[point] = evaluation.metrics[f"eval/{metric}"]
        if values:
            values_of_metrics[metric.replace("/", "_")] = values
    return values_of_metrics


def print_metrics(values_of_metrics: dict[str, dict[str, float]]) -> None:
    header = "".join(f"{point.replace('_', ' '):>13}" for point in POINTS)
    print(f"\n{'held-out':18}{header}")
    for metric, values in values_of_metrics.items():
        cells = "".join(f"{values[point]:13.1%}" for point in POINTS)
        print(f"{metric.replace('_', ' '):18}{cells}")


def print_first_completions(evaluations: dict[str, Evaluation]) -> None:
    print("\nThe first completion of one problem at each point:")
    for point, evaluation in evaluations.items():
        row = json_lines.read_objects(evaluation.samples_file)[0]
        completion = row["completion"][:MAX_COMPLETION_CHARACTERS]
        label = point.replace("_", " ")
        print(f"  {label:11} {row['question']!r} -> {completion!r}  ({row['verdict']})")


def main(run: Path) -> None:
    evaluations = find_evaluations(run)
    values_of_metrics = metric_values(evaluations)
    durations = stage_seconds(run)
    summary = {
        "seed": read_manifest(run, "grpo")["seed"],
        **values_of_metrics,
        "seconds": durations,
    }
    summary_file = run / "summary.json"
    summary_file.write_text(json.dumps(summary, indent=2) + "\n")
    print_metrics(values_of_metrics)
    print_first_completions(evaluations)
    print(f"\nmodel       {run / 'grpo' / 'final'}")
    print(f"curves      {run / 'grpo' / 'metrics.jsonl'}")
    print(f"completions {run / 'grpo' / 'samples'}/")
    print(f"summary     {summary_file}  ({sum(durations.values()):.0f} s)")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
