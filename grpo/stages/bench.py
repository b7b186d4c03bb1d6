"""`grpo bench`: a few rollouts and updates of a train config, and how far each phase is from what this machine can do."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from grpo.checkpoint import read_metrics
from grpo.config import Config
from grpo.stages.train import train
from grpo.types import UserError

PHASES = ("rollout", "rewards", "update", "sync", "probe", "rest")


def bench(config: Config, *, resume: bool) -> None:
    """Runs `train.rollouts` rollouts after one that warms up, in a directory that is thrown away, and prints a table."""
    if resume:
        raise UserError("grpo bench: nothing to resume")
    with tempfile.TemporaryDirectory(prefix="grpo-bench-") as scratch:
        sections: dict[str, Any] = {
            "run_dir": scratch + "/run",
            "train": config.train.model_copy(update={"rollouts": config.train.rollouts + 1}),
            "eval": config.eval.model_copy(update={"every": 0}),
            "checkpoint": config.checkpoint.model_copy(update={"every": 0}),
        }
        train(config.model_copy(update=sections), resume=False, keep=False)
        rows = read_metrics(Path(scratch, "run", "metrics.jsonl"))
    print(table([row for row in rows if "time/total_s" in row and row["step"] > 1], rows[0]))


def table(rows: list[dict[str, Any]], first: dict[str, Any]) -> str:
    """Returns medians over the rows: seconds, share, least seconds and their ratio for each phase, tokens/s, and what was wasted."""
    median = lambda key: statistics.median(row.get(key, 0.0) for row in rows)  # noqa: E731
    total = median("time/total_s")
    lines = [
        f"machine     {first['machine/gflops']:,.0f} GFLOP/s in matrix products, {first['machine/gb_per_s']:.1f} GB/s copied",
        f"a rollout   {median('completion/tokens'):,.0f} tokens sampled, {median('rollout/tokens_per_s'):,.0f}/s; "
        f"update {median('update/tokens') / median('time/update_s'):,.0f}/s; median of {len(rows)}",
        f"{'phase':12}{'seconds':>9}{'share':>8}{'least':>9}{'ratio':>8}",
    ]
    for phase in PHASES:
        seconds, least = median(f"time/{phase}_s"), median(f"bound/{phase}_s")
        lines.append(f"{phase:12}{seconds:9.2f}{seconds / total:8.1%}" + (f"{least:9.2f}{seconds / least:8.1f}" if least else ""))
    lines.append(f"{'all':12}{total:9.2f}{1:8.1%}{median('bound/total_s'):9.2f}{total / median('bound/total_s'):8.1f}")
    lines.append(
        f"wasted      {median('group/no_signal'):.0%} of groups without signal, {median('completion/truncated'):.0%} of completions cut off"
    )
    return "\n".join(lines)
