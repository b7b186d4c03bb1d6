"""The charts of `grpo report`: matplotlib figures from the metrics of runs.

matplotlib is imported in this file only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]  # of a metrics.jsonl

# title -> metrics; a chart shows those that a run has
CHARTS: dict[str, list[str]] = {
    "Reward": ["reward/mean"],
    "Held-out accuracy": ["eval/accuracy"],
    "Rewards": [],  # all metrics of rewards that are in no other chart
    "Share of groups": ["group/all_correct", "group/all_wrong", "group/no_signal"],
    "Share of completions": ["completion/truncated", "reward/undecided", "reward/missing"],
    "Tokens a completion": ["completion/length", "completion/length_max"],
    "Entropy a token": ["policy/entropy"],
    "Loss": ["loss"],
    "Token accuracy": ["policy/token_accuracy"],
    "Gradient norm": ["policy/grad_norm"],
    "KL to the reference": ["kl/ref", "policy/divergence"],
    "Engine against learner": ["mismatch/abs", "mismatch/k3", "probe/gap"],
    "Clipped tokens": ["clip/low", "clip/high"],
    "Versions behind": ["staleness/mean", "staleness/max"],
    "Sampled tokens a second": ["rollout/tokens_per_s"],
    "Idle share": ["idle/engine", "idle/learner"],
}
# title -> metric, and the label of bin i
HISTOGRAMS: dict[str, tuple[str, Callable[[int], str]]] = {
    "Completions by tokens": ("histogram/length", lambda i: str(2**i)),
    "Completions by advantage": ("histogram/advantage", lambda i: f"{(i - 8) / 2:g}"),
    "Tokens by age": ("histogram/staleness", str),
}
PHASES = ("rollout", "rewards", "update", "sync", "probe", "eval", "rest")
LINE_STYLES = ("-", "--", ":", "-.")
SIZE = (4.6, 2.7)  # inches
GREY = "#808080"  # legible on a light and on a dark page


def charts(runs: Mapping[str, Rows]) -> dict[str, Any]:
    """Returns matplotlib figures by title: metrics of all runs, then each run's own charts.

    With several runs, each has one colour and each metric one line style.
    """
    _set_style()
    figures: dict[str, Any] = {}
    for title, metrics in CHARTS.items():
        present = [
            key
            for key in metrics or _other_rewards(runs)
            if any(series(rows, key) for rows in runs.values())
        ]
        if present:
            figures[title] = _lines(runs, present)
    for name, rows in runs.items():
        suffix = f", {name}" if len(runs) > 1 else ""
        for title, (key, bin_label) in HISTOGRAMS.items():
            counts = {row["step"]: row[key] for row in rows if sum(row.get(key, ()))}
            if counts:
                figures[title + suffix] = _heat(counts, bin_label)
        timed = [row for row in rows if "time/rollout_s" in row]
        if timed:
            figures[f"Seconds a phase{suffix}"] = _phases(timed)
    return figures


def series(rows: Rows, key: str) -> list[tuple[int, float]]:
    """Returns step and value of a metric, where it has one."""
    return [(row["step"], row[key]) for row in rows if isinstance(row.get(key), (int, float))]


def _set_style() -> None:
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "grpo",  # the same file for the same run
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
    """Returns the metrics of rewards that no other chart shows."""
    charted = set().union(*CHARTS.values())
    keys: set[str] = set()
    for rows in runs.values():
        for row in rows:
            keys.update(key for key in row if key.startswith("reward/"))
    return sorted(keys - charted)


def _lines(runs: Mapping[str, Rows], metrics: Sequence[str]) -> Any:
    """Returns a chart of some metrics over the steps of all runs."""
    figure, axes = _new_figure()
    several_runs = len(runs) > 1
    for number, (name, rows) in enumerate(runs.items()):
        for place, key in enumerate(metrics):
            points = series(rows, key)
            if not points:
                continue
            labels = []
            if several_runs:
                labels.append(name)
            if len(metrics) > 1:
                labels.append(key.partition("/")[2])
            steps, values = zip(*points, strict=True)
            axes.plot(
                steps,
                values,
                LINE_STYLES[place % 4] if several_runs else "-",
                color=f"C{number if several_runs else place}",
                label=" ".join(labels),
                marker="." if len(points) < 20 else None,
            )
    if several_runs or len(metrics) > 1:
        axes.legend(fontsize="x-small", frameon=False)
    axes.grid(alpha=0.2)
    return figure


def _heat(counts: Mapping[int, Sequence[int]], bin_label: Callable[[int], str]) -> Any:
    """Returns a histogram over the run: one column per step, the darker the larger the share.

    Args:
        counts: The bins' counts by step.
        bin_label: What bin i holds.
    """
    figure, axes = _new_figure()
    steps = range(min(counts), max(counts) + 1)
    num_bins = max(len(column) for column in counts.values())
    columns = [counts.get(step, ()) for step in steps]
    shares = [
        [column[i] / sum(column) if i < len(column) else 0.0 for column in columns]
        for i in range(num_bins)
    ]
    used = [i for i in range(num_bins) if any(shares[i])]
    shown = range(used[0], used[-1] + 1)
    extent = (steps[0] - 0.5, steps[-1] + 0.5, shown[0] - 0.5, shown[-1] + 0.5)
    # A share of 0 is transparent: the page shows through.
    colours = [[(0.12, 0.47, 0.71, share**0.5) for share in shares[i]] for i in shown]
    axes.imshow(colours, aspect="auto", origin="lower", extent=extent, interpolation="nearest")
    ticks = shown[:: -(-len(shown) // 9)]
    axes.set_yticks(list(ticks), [bin_label(i) for i in ticks])
    return figure


def _phases(rows: Rows) -> Any:
    """Returns the seconds of a run's steps by phase, below the machine's bound."""
    figure, axes = _new_figure()
    steps = [row["step"] for row in rows]
    total = sum(row["time/total_s"] for row in rows)
    seconds = {phase: [row.get(f"time/{phase}_s") or 0.0 for row in rows] for phase in PHASES}
    shown = [phase for phase in PHASES if sum(seconds[phase]) > 0.003 * total]
    axes.stackplot(steps, [seconds[phase] for phase in shown], labels=shown, alpha=0.8)
    axes.plot(
        steps,
        [row.get("bound/total_s") or 0.0 for row in rows],
        "--",
        color="#222222",
        label="this machine's bound",
    )
    figure.legend(fontsize="x-small", frameon=False, ncols=4, loc="outside lower center")
    return figure
