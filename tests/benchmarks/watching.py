"""Measures the share of the step time that metrics, kept samples and the diagnosis take.

    .venv/bin/python tests/benchmarks/watching.py [CONFIG] [key=value ...]

Trains with CONFIG (default: configs/tiny.yaml) in runs/watching. Prints the seconds and share of

- `record`: writing a row of metrics, to the trackers too, and its diagnosis,
- `vecdot`: the entropies,
- `objective`: the loss per token, including the metrics that it reports. The loss itself is
  therefore included, and the total is an upper bound,
- `outside the phases`: samples, rows of metrics, and the updates that are kept for `grpo replay`.

Figures in docs/benchmarks.md, "Servers and asynchronous rollouts".
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from grpo import config as configs
from grpo.learning import learner
from grpo.run.directory import read_metrics
from grpo.stages.train import train
from grpo.training.journal import Journal

SECONDS: dict[str, float] = defaultdict(float)  # of all calls, by name of the function


def time_calls(owner: Any, name: str) -> None:
    """Replaces a function of a module or class by one that adds its duration to SECONDS."""
    function: Callable[..., Any] = getattr(owner, name)

    def timed_function(*arguments: Any, **keyword_arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*arguments, **keyword_arguments)
        finally:
            SECONDS[name] += time.perf_counter() - start

    setattr(owner, name, timed_function)


def main() -> None:
    config_file, *overrides = sys.argv[1:] or ["configs/tiny.yaml"]
    config: configs.TrainConfig = configs.load(config_file, ["run_dir=runs/watching", *overrides])
    time_calls(Journal, "record")
    time_calls(torch.linalg, "vecdot")
    time_calls(learner, "objective")
    train(config, resume=False)
    rows = read_metrics(Path(config.run_dir) / "metrics.jsonl")[1:]  # the first is not a step
    step_s = sum(row["time/total_s"] for row in rows) + SECONDS["record"]
    SECONDS["outside the phases"] = sum(row["time/rest_s"] for row in rows)
    SECONDS["total"] = sum(SECONDS.values())
    for name, seconds in SECONDS.items():
        print(f"{name:20} {seconds:8.3f} s  {seconds / step_s:6.2%} of {len(rows)} steps")


if __name__ == "__main__":
    main()
