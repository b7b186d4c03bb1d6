"""`grpo bench`: times the phases of a training step and compares them with the machine's limits."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from grpo.config import TrainConfig
from grpo.learning import models
from grpo.metrics import roofline
from grpo.run.directory import read_metrics
from grpo.run.display import redirect_output
from grpo.stages.train import train
from grpo.tools import simulate as simulation
from grpo.types import UserError

PHASES = ("rollout", "rewards", "update", "sync", "probe", "rest")  # without evaluation


def bench(config: TrainConfig, *, resume: bool) -> None:
    """Runs one warm-up rollout and `train.rollouts` measured ones, and prints a table.

    The run directory is temporary.

    Args:
        config: A training config.
        resume: Must be False.

    Raises:
        UserError: `resume` is set.
    """
    if resume:
        raise UserError("grpo bench: nothing to resume; remove --resume")
    with tempfile.TemporaryDirectory(prefix="grpo-bench-") as scratch:
        sections: dict[str, Any] = {
            "run_dir": scratch + "/run",
            "train": config.train.model_copy(update={"rollouts": config.train.rollouts + 1}),
            "eval": config.eval.model_copy(update={"every": 0}),
            "checkpoint": config.checkpoint.model_copy(update={"every": 0}),
        }
        train(config.model_copy(update=sections), resume=False, keep=False)
        rows = read_metrics(Path(scratch, "run", "metrics.jsonl"))
    measured_rows = [row for row in rows if "time/total_s" in row and row["step"] > 1]
    print(table(measured_rows, rows[0]))


def simulate(config: TrainConfig, device: str, mean: float | None) -> str:
    """Returns a table of the estimated step time on 1 to 1,024 devices (grpo/tools/simulate.py).

    Args:
        config: A training config.
        device: A key of `simulation.DEVICES`, or a run directory, whose measured rates are used.
        mean: Mean completion length in tokens. Default: that of the run, or a quarter of
            `sampling.max_tokens` for a named device.

    Raises:
        UserError: `device` is neither a run directory nor a known device.
    """
    metrics_file = Path(device) / "metrics.jsonl"
    max_tokens = config.sampling.max_tokens
    if metrics_file.exists():
        rows = read_metrics(metrics_file)
        updated_rows = [row for row in rows if "time/rollout_s" in row and row["bound/update_s"]]
        rates = simulation.rates_of_run(updated_rows, rows[0])
        default_mean = statistics.mean(row["completion/length"] for row in updated_rows)
    elif device in simulation.DEVICES:
        rates = simulation.DEVICES[device]
        default_mean = max_tokens / 4
    else:
        raise UserError(
            f"--simulate {device}: neither a run directory nor one of "
            f"{', '.join(simulation.DEVICES)}"
        )
    mean = mean or default_mean
    work = _workload(config, mean)
    heading = (
        f"{config.train.num_completions} completions of {mean:,.0f} tokens on average, at most "
        f"{max_tokens:,}"
    )
    return "\n".join([heading, *simulation.table(rates, _model_shape(config), work)])


def _workload(config: TrainConfig, mean: float) -> simulation.Workload:
    """Returns the work of one step. It ignores `train.epochs` and the forward passes of a teacher.

    `mean` is the mean completion length in tokens.
    """
    num_forwards = 0
    if config.algorithm.kl_coef > 0:
        num_forwards += 1  # reference logprobs
    if config.train.updates_per_rollout > 1:
        num_forwards += 1  # old logprobs
    servers = config.engine.servers
    return simulation.Workload(
        lengths=simulation.lognormal_lengths(
            config.train.num_completions, mean, config.sampling.max_tokens
        ),
        prompt=round(config.prompt.max_tokens / 2),  # an assumption: prompts are not read
        updates=config.train.updates_per_rollout,
        forwards=num_forwards,
        concurrency=config.engine.max_sequences,
        checkpointing=config.model.gradient_checkpointing,
        tensor_parallel=servers.tensor_parallel if servers else 1,
    )


def _model_shape(config: TrainConfig) -> roofline.ModelShape:
    """Returns the sizes of the model, without downloading its weights."""
    with (
        tempfile.TemporaryDirectory(prefix="grpo-simulate-") as scratch,
        redirect_output(Path(scratch) / "log"),
    ):
        model_dir = models.locate(config.model, Path(scratch), config.seed, weights=False)
        return roofline.model_shape(model_dir, models.num_weights(model_dir), config.model.dtype)


def table(rows: list[dict[str, Any]], first_row: dict[str, Any]) -> str:
    """Returns a table with the seconds, the share and the lower bound of each phase.

    Args:
        rows: Metrics of the measured rollouts. The table shows medians over them.
        first_row: The first row of the metrics, with the rates of the machine.
    """

    def median(key: str) -> float:
        return float(statistics.median(row.get(key, 0.0) for row in rows))

    total_s = median("time/total_s")
    lines = [
        f"machine     {first_row['machine/gflops']:,.0f} GFLOP/s in matrix products, "
        f"{first_row['machine/gb_per_s']:.1f} GB/s copied",
        f"rollout     {median('completion/tokens'):,.0f} tokens sampled, "
        f"{median('rollout/tokens_per_s'):,.0f}/s; update "
        f"{median('update/tokens') / median('time/update_s'):,.0f}/s; median of {len(rows)}",
        f"{'phase':12}{'seconds':>9}{'share':>8}{'bound':>9}{'ratio':>8}",
    ]
    for phase in PHASES:
        seconds = median(f"time/{phase}_s")
        bound_s = median(f"bound/{phase}_s")
        line = f"{phase:12}{seconds:9.2f}{seconds / total_s:8.1%}"
        if bound_s:
            line += f"{bound_s:9.2f}{seconds / bound_s:8.1f}"
        lines.append(line)
    total_bound_s = median("bound/total_s")
    lines += [
        f"{'total':12}{total_s:9.2f}{'100.0%':>8}{total_bound_s:9.2f}"
        f"{total_s / total_bound_s:8.1f}",
        f"weights     {median('sync/bytes') / 1e9:.2f} GB sent to the engine in "
        f"{median('sync/seconds'):.3f} s of the sync",
        f"waste       {median('group/no_signal'):.0%} of groups without a signal, "
        f"{median('completion/truncated'):.0%} of completions truncated",
    ]
    return "\n".join(lines)
