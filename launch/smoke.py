"""The table of launch/smoke_8gpu.sh, and the reward of its runs.

python launch/smoke.py runs/smoke
"""

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from grpo.run.directory import read_metrics

CANARY = re.compile(r"canary: .*\(gap (\S+)\)")
RESUMED = re.compile(r"resumed (after rollout \d+)")


def varied(completion, problem):  # type: ignore[no-untyped-def]
    """A reward that differs within a group, so that every group has a training signal."""
    return float(completion.token_ids[0] % 2)


def rows_of_run(run: Path) -> list[tuple[str, str]]:
    """Returns the rows of the table about one run: (quantity, value with its unit)."""
    metrics = read_metrics(run / "metrics.jsonl")
    steps = [row for row in metrics if "sync/seconds" in row]
    sync_s = statistics.median(row["sync/seconds"] for row in steps)
    sync_gb = steps[-1]["sync/bytes"] / 1e9
    checkpoint = last_checkpoint(run)
    log = run.with_suffix(".log").read_text()
    return [
        ("gap of the canary", ", ".join(CANARY.findall(log))),
        ("weight sync, median", f"{sync_s:.3f} s for {sync_gb:.3g} GB"),
        ("largest gap of a probe", f"{largest_gap(metrics):.2g}"),
        ("step, median", f"{statistics.median(row['time/total_s'] for row in steps):.2f} s"),
        ("throughput, median", f"{throughput(steps):,.0f} completion tokens/s"),
        ("checkpoint", f"{checkpoint['seconds']:.2f} s for {checkpoint['bytes'] / 1e9:.3g} GB"),
        ("resumed", ", ".join(RESUMED.findall(log)) or "no"),
        ("rollouts", str(steps[-1]["rollout"])),
    ]


def largest_gap(metrics: list[dict[str, Any]]) -> float:
    """Returns the largest gap. The row of a step whose sync or probe failed has none."""
    return float(max(row["probe/gap"] for row in metrics if "probe/gap" in row))


def require_complete(rows: dict[str, str], expected: dict[str, str]) -> None:
    """Raises ValueError if a row differs from the expected one."""
    for quantity, value in expected.items():
        if rows[quantity] != value:
            raise ValueError(f"{quantity}: {rows[quantity]}, expected {value}")


def last_checkpoint(run: Path) -> dict[str, Any]:
    folder = max((run / "checkpoints").glob("step-*"))
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return state


def throughput(steps: list[dict[str, Any]]) -> float:
    """Returns the median of a step's completion tokens over its complete duration."""
    rates = [float(row["completion/tokens"] / row["time/total_s"]) for row in steps]
    return statistics.median(rates)


# Rows that a complete run has.
EXPECTED = {
    "ranks": {"resumed": "after rollout 2", "rollouts": "4"},
    "pool": {"rollouts": "3"},
}


def main(folder: Path) -> int:
    """Prints the table and returns 1 if a run failed."""
    num_failed = 0
    print(f"{'run':7}{'quantity':26}value")
    for name, expected in EXPECTED.items():
        run = folder / name
        rows: list[tuple[str, str]] = []
        try:
            rows = rows_of_run(run)
            require_complete(dict(rows), expected)
        except (OSError, ValueError, LookupError) as error:
            rows.append(("FAILED", f"{error}; see {run}.log"))
            num_failed += 1
        for quantity, value in rows:
            print(f"{name:7}{quantity:26}{value}")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
