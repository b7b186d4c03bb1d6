"""Prints and writes what a quickstart came to.

`python launch/summary.py runs/quickstart` -> summary.json.
"""

import datetime
import json
import sys
from pathlib import Path
from typing import Any

from grpo.run.directory import read_metrics

POINTS = ("start", "after_sft", "after_grpo")


def evaluations(run: Path) -> dict[str, tuple[dict[str, Any], Path]]:
    """The metrics and completions of the three evaluations."""
    rows = [row for row in read_metrics(run / "grpo" / "metrics.jsonl") if "eval/accuracy" in row]
    start = read_metrics(run / "start" / "metrics.jsonl")[0]
    samples = [
        run / "grpo" / "samples" / f"eval-{row['step']:06d}.jsonl" for row in (rows[0], rows[-1])
    ]
    return dict(
        zip(
            POINTS,
            [
                (start, run / "start/samples/eval-000000.jsonl"),
                *zip((rows[0], rows[-1]), samples, strict=True),
            ],
            strict=True,
        )
    )


def seconds(run: Path) -> dict[str, float]:
    found = {}
    for stage in ("start", "sft", "grpo"):
        manifest = json.loads((run / stage / "manifest.json").read_text())
        begin, end = (
            datetime.datetime.fromisoformat(manifest[key]) for key in ("started", "ended")
        )
        found[stage] = (end - begin).total_seconds()
    return found


def main(run: Path) -> None:
    found = evaluations(run)
    summary: dict[str, Any] = {
        "seed": json.loads((run / "grpo" / "manifest.json").read_text())["seed"]
    }
    for name in ("accuracy", "format", "greedy/accuracy", "greedy/format"):
        values = {
            point: row[f"eval/{name}"] for point, (row, _) in found.items() if f"eval/{name}" in row
        }
        if values:
            summary[name.replace("/", "_")] = values
    summary["seconds"] = seconds(run)
    (run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\n{'held-out':18}" + "".join(f"{point.replace('_', ' '):>13}" for point in POINTS))
    for name, values in summary.items():
        if name not in ("seed", "seconds"):
            print(
                f"{name.replace('_', ' '):18}"
                + "".join(f"{values[point]:13.1%}" for point in POINTS)
            )
    print("\nOne problem, and the first completion of it at each point:")
    for point, (_, samples) in found.items():
        row = json.loads(samples.read_text().splitlines()[0])
        print(
            f"  {point.replace('_', ' '):11} {row['question']!r} -> {row['completion'][:150]!r}  "
            f"({row['verdict']})"
        )
    print(
        f"\nmodel       {run / 'grpo/final'}\ncurves      "
        f"{run / 'grpo/metrics.jsonl'}\ncompletions {run / 'grpo/samples'}/"
    )
    print(f"summary     {run / 'summary.json'}  ({sum(summary['seconds'].values()):.0f} s)")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
