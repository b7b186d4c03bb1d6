"""The charts of `grpo report`: matplotlib figures from the metrics of runs.

matplotlib is imported in this file only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]  # lines of metrics.jsonl

# Title and metrics of each chart. A chart shows those of its metrics that a run has.
CHARTS: dict[str, list[str]] = {
    "Mean reward": ["reward/mean"],
    "Held-out accuracy": ["eval/accuracy"],
    "Reward functions": [],  # all reward metrics that are in no other chart
    "Groups without a signal": ["group/all_correct", "group/all_wrong", "group/no_signal"],
    "Truncated and unscored completions": [
        "completion/truncated",
        "reward/undecided",
        "reward/missing",
    ],
    "Undecided completions by cause": [
        "undecided/gold_answer",
        "undecided/worker_lost",
        "undecided/reward_failed",
        "undecided/no_grade",
        "undecided/other",
    ],
    "Tokens per completion": ["completion/length", "completion/length_max"],
    "Entropy per token": ["policy/entropy"],
    "Loss": ["loss"],
    "Token accuracy": ["policy/token_accuracy"],
    "Gradient norm": ["policy/grad_norm"],
    "KL to the reference": ["kl/ref"],
    "Divergence from the teacher": ["policy/divergence"],
    "Difference of engine and learner": ["mismatch/abs", "mismatch/k3", "probe/gap"],
    "Clipped tokens": ["clip/low", "clip/high"],
    "Staleness in versions": ["staleness/mean", "staleness/max"],
    "Sampled tokens per second": ["rollout/tokens_per_s"],
    "Idle share": ["idle/engine", "idle/learner"],
}
# Title, metric, and the label of bin i of each histogram.
HISTOGRAMS: dict[str, tuple[str, Callable[[int], str]]] = {
    "Completions by tokens": ("histogram/length", lambda i: str(2**i)),
    "Completions by advantage": ("histogram/advantage", lambda i: f"{(i - 8) / 2:g}"),
    "Tokens by age": ("histogram/staleness", str),
}
PHASES = ("rollout", "rewards", "update", "sync", "probe", "eval", "rest")
LINE_STYLES = ("-", "--", ":", "-.")
SIZE = (4.6, 2.7)  # inches
MAX_TICKS = 9  # labels on the axis of a histogram
MIN_PHASE_SHARE = 0.003  # shorter phases are not drawn
MAX_MARKED_POINTS = 20  # a line with fewer points has a marker on each
GREY = "#808080"  # legible on light and dark pages


def charts(runs: Mapping[str, Rows]) -> dict[str, Any]:
    """Returns matplotlib figures by title: charts of all runs together, then charts of each run.

    With several runs, the color shows the run and the line style the metric.

    Changes matplotlib's backend and style for the whole process.

    Args:
        runs: The metrics of each run, by name.
    """
    set_style()
    figures: dict[str, Any] = {}
    runs = {name: _with_absent_causes(rows) for name, rows in runs.items()}
    for title, metrics in CHARTS.items():
        candidates = metrics or _other_rewards(runs)
        present = [key for key in candidates if _any_run_has(key, runs)]
        if present:
            figures[title] = _line_chart(runs, present)
    for name, rows in runs.items():
        suffix = f", {name}" if len(runs) > 1 else ""
        for title, (key, bin_label) in HISTOGRAMS.items():
            # Rows without the histogram, or with empty bins only, are skipped.
            counts = {row["step"]: row[key] for row in rows if any(row.get(key, ()))}
            if counts:
                figures[title + suffix] = _heat_map(counts, bin_label)
        timed = [row for row in rows if "time/rollout_s" in row]
        if timed:
            figures[f"Seconds per phase{suffix}"] = _phase_chart(timed)
    return figures


def _with_absent_causes(rows: Rows) -> Rows:
    """Returns the rows of a run with a share of 0 for causes of undecided completions.

    A row contains only the causes that occurred in its step. Causes that never occur are not added.
    """
    metrics = set[str]().union(*rows)
    causes = {metric for metric in metrics if metric.startswith("undecided/")}
    completed = []
    for row in rows:
        absent = dict.fromkeys(causes - row.keys(), 0.0) if "reward/undecided" in row else {}
        completed.append({**row, **absent})
    return completed


def _any_run_has(key: str, runs: Mapping[str, Rows]) -> bool:
    return any(series(rows, key) for rows in runs.values())


def series(rows: Rows, key: str) -> list[tuple[int, float]]:
    """Returns (step, value) of a metric for the steps that have it."""
    return [(row["step"], row[key]) for row in rows if isinstance(row.get(key), (int, float))]


def set_style() -> None:
    """Selects the backend and the colors of all charts, which are readable on white and black."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams.update(
        {
            "svg.fonttype": "none",
            "text.parse_math": False,  # the name of a reward may contain dollar signs
            "svg.hashsalt": "grpo",  # makes the files of a run reproducible
            "axes.spines.top": False,
            "axes.spines.right": False,
            "text.color": GREY,
            "axes.labelcolor": GREY,
            "axes.edgecolor": GREY,
            "xtick.color": GREY,
            "ytick.color": GREY,
        }
    )


def _new_figure() -> tuple[Any, Any]:
    """Returns an empty figure and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("step")
    return figure, axes


def _other_rewards(runs: Mapping[str, Rows]) -> list[str]:
    """Returns the reward metrics that are in no other chart."""
    charted = set().union(*CHARTS.values())
    keys: set[str] = set()
    for rows in runs.values():
        for row in rows:
            keys.update(key for key in row if key.startswith("reward/"))
    return sorted(keys - charted)


def _line_chart(runs: Mapping[str, Rows], metrics: Sequence[str]) -> Any:
    """Returns a line chart of metrics over the steps of all runs."""
    figure, axes = _new_figure()
    several_runs = len(runs) > 1
    for run_number, (name, rows) in enumerate(runs.items()):
        for metric_number, key in enumerate(metrics):
            points = series(rows, key)
            if not points:
                continue
            labels = []
            if several_runs:
                labels.append(name)
            if len(metrics) > 1:
                labels.append(key.partition("/")[2])
            if several_runs:
                color_number = run_number
                line_style = LINE_STYLES[metric_number % len(LINE_STYLES)]
            else:
                color_number = metric_number
                line_style = "-"
            axes.plot(
                [step for step, _ in points],
                [value for _, value in points],
                line_style,
                color=f"C{color_number}",
                label=" ".join(labels),
                marker="." if len(points) < MAX_MARKED_POINTS else None,
            )
    if several_runs or len(metrics) > 1:
        axes.legend(fontsize="x-small", frameon=False)
    axes.grid(alpha=0.2)
    return figure


def _heat_map(counts: Mapping[int, Sequence[int]], bin_label: Callable[[int], str]) -> Any:
    """Returns a histogram per step as a heat map: one column per step, darker for larger shares.

    Args:
        counts: Counts of the bins, by step.
        bin_label: Returns the label of bin i.
    """
    figure, axes = _new_figure()
    steps = range(min(counts), max(counts) + 1)
    num_bins = max(len(column) for column in counts.values())
    columns = [counts.get(step, ()) for step in steps]
    # shares[i][k]: the share of bin i at step k
    shares = [
        [column[i] / sum(column) if i < len(column) else 0.0 for column in columns]
        for i in range(num_bins)
    ]
    occupied = [i for i in range(num_bins) if any(shares[i])]
    visible_bins = range(occupied[0], occupied[-1] + 1)
    extent = (steps[0] - 0.5, steps[-1] + 0.5, visible_bins[0] - 0.5, visible_bins[-1] + 0.5)
    # Blue, with the share as opacity. The square root makes small shares visible.
    colors = [[(0.12, 0.47, 0.71, share**0.5) for share in shares[i]] for i in visible_bins]
    axes.imshow(colors, aspect="auto", origin="lower", extent=extent, interpolation="nearest")
    ticks = visible_bins[:: math.ceil(len(visible_bins) / MAX_TICKS)]
    axes.set_yticks(list(ticks), [bin_label(i) for i in ticks])
    return figure


def _phase_chart(rows: Rows) -> Any:
    """Returns a stacked chart of the seconds per phase, with the lower bound as a line."""
    figure, axes = _new_figure()
    steps = [row["step"] for row in rows]
    total = sum(row["time/total_s"] for row in rows)
    seconds = {phase: [row.get(f"time/{phase}_s") or 0.0 for row in rows] for phase in PHASES}
    visible = [phase for phase in PHASES if sum(seconds[phase]) > MIN_PHASE_SHARE * total]
    axes.stackplot(steps, [seconds[phase] for phase in visible], labels=visible, alpha=0.8)
    axes.plot(
        steps,
        [row.get("bound/total_s") or 0.0 for row in rows],
        "--",
        color=GREY,
        label="lower bound",
    )
    figure.legend(fontsize="x-small", frameon=False, ncols=4, loc="outside lower center")
    return figure
