"""What a run's knowing of itself costs.

Metrics, kept samples, diagnosis and trackers, as a share of its steps.

    .venv/bin/python tests/benchmarks/watching.py [CONFIG] [key=value ...]

Counted: what a step does outside its phases (the row, samples, the update kept for a replay),
writing the row and the diagnosis of it, the entropies, and the per-token reports of the objective
with the objective itself, so that the share is rather too large.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from grpo import config as configs
from grpo.learning import learner
from grpo.stages.train import train
from grpo.training.journal import Journal

SPENT: dict[str, float] = defaultdict(float)


def timed(owner: Any, name: str) -> None:
    inner: Callable[..., Any] = getattr(owner, name)

    def outer(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            return inner(*arguments, **named)
        finally:
            SPENT[name] += time.perf_counter() - start

    setattr(owner, name, outer)


def main() -> None:
    file, *overrides = sys.argv[1:] or ["configs/tiny.yaml"]
    config: configs.TrainConfig = configs.load(file, ["run_dir=runs/watching", *overrides])
    for owner, name in ((Journal, "record"), (torch.linalg, "vecdot"), (learner, "objective")):
        timed(owner, name)
    train(config, resume=False)
    rows = [
        json.loads(line)
        for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    ][1:]
    SPENT["rest of the steps"] = sum(row["time/rest_s"] for row in rows)
    total = sum(row["time/total_s"] for row in rows) + SPENT["record"]
    for name, seconds in {**SPENT, "together": sum(SPENT.values())}.items():
        print(f"{name:20} {seconds:8.3f} s  {seconds / total:6.2%} of {len(rows)} steps")


if __name__ == "__main__":
    main()
