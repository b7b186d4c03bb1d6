"""`grpo bench`: runs a few rollouts and updates of a train config.

It tells how far each phase is from what this machine can do.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from grpo.config import Config
from grpo.learning import models
from grpo.metrics import roofline
from grpo.run.directory import read_metrics
from grpo.run.display import quiet
from grpo.stages.train import train
from grpo.types import UserError

PHASES = ("rollout", "rewards", "update", "sync", "probe", "rest")


def bench(config: Config, *, resume: bool) -> None:
    """Runs `train.rollouts` rollouts after one that warms up, and prints a table.

    The run's directory is thrown away.
    """
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


def simulate(config: Config, device: str, mean: float | None) -> str:
    """Returns what a step would take on 1 to 1,024 of a device (grpo/tools/simulate.py).

    `device` is a device's name or a run directory. A run directory stands for machines like its
    own, at its measured rates and lengths. `mean` is the completion length; the default is a
    quarter of sampling.max_tokens, or the run's own. Raises UserError.
    """
    from grpo.tools import simulate as s

    count, longest, metrics = (
        config.train.completions,
        config.sampling.max_tokens,
        Path(device) / "metrics.jsonl",
    )
    with (
        tempfile.TemporaryDirectory(prefix="grpo-simulate-") as scratch,
        quiet(Path(scratch) / "log"),
    ):
        model_dir = models.locate(config.model, Path(scratch), config.seed, weights=False)
        shape = roofline.shape(model_dir, models.num_weights(model_dir), config.model.dtype)
    prompt, passes = (
        config.prompt.max_tokens / 2,
        int(config.algorithm.kl_coef > 0) + int(config.train.updates_per_rollout > 1),
    )
    if metrics.exists():
        rows = [
            row
            for row in read_metrics(metrics)
            if "time/rollout_s" in row and row["bound/update_s"]
        ]
        rates, mean = (
            s.measured(rows, read_metrics(metrics)[0]),
            mean or statistics.mean(row["completion/length"] for row in rows),
        )
    elif device in s.DEVICES:
        rates, mean = s.DEVICES[device], mean or longest / 4
    else:
        raise UserError(
            f"--simulate {device}: neither a run directory nor one of {', '.join(s.DEVICES)}"
        )
    work = s.Work(
        lengths=s.lengths(count, mean, longest),
        prompt=round(prompt),
        updates=config.train.updates_per_rollout,
        forwards=passes,
        concurrency=config.engine.max_sequences,
        checkpointing=config.model.gradient_checkpointing,
        tensor_parallel=config.engine.servers.tensor_parallel if config.engine.servers else 1,
    )
    return "\n".join(
        [
            f"{count} completions of {mean:,.0f} tokens in the mean, at most {longest:,}",
            *s.table(rates, shape, work),
        ]
    )


def table(rows: list[dict[str, Any]], first: dict[str, Any]) -> str:
    """Returns a table of medians over the rows.

    It has the seconds, share, least seconds and their ratio for each phase, tokens/s, and what was
    wasted.
    """

    def median(key: str) -> float:
        return float(statistics.median(row.get(key, 0.0) for row in rows))

    total = median("time/total_s")
    lines = [
        f"machine     {first['machine/gflops']:,.0f} GFLOP/s in matrix products, "
        f"{first['machine/gb_per_s']:.1f} GB/s copied",
        f"a rollout   {median('completion/tokens'):,.0f} tokens sampled, "
        f"{median('rollout/tokens_per_s'):,.0f}/s; "
        f"update {median('update/tokens') / median('time/update_s'):,.0f}/s; median of {len(rows)}",
        f"{'phase':12}{'seconds':>9}{'share':>8}{'least':>9}{'ratio':>8}",
    ]
    for phase in PHASES:
        seconds, least = median(f"time/{phase}_s"), median(f"bound/{phase}_s")
        lines.append(
            f"{phase:12}{seconds:9.2f}{seconds / total:8.1%}"
            + (f"{least:9.2f}{seconds / least:8.1f}" if least else "")
        )
    least = median("bound/total_s")
    lines.append(f"{'all':12}{total:9.2f}{1:8.1%}{least:9.2f}{total / least:8.1f}")
    lines.append(
        f"weights     {median('sync/bytes') / 1e9:.2f} GB to the engine in "
        f"{median('sync/seconds'):.3f} s of the sync"
    )
    lines.append(
        f"wasted      {median('group/no_signal'):.0%} of groups without signal, "
        f"{median('completion/truncated'):.0%} of completions cut off"
    )
    return "\n".join(lines)
