"""The metrics of an evaluation, and its table with a row per set and the average over the sets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo.experience.group_metrics import mean
from grpo.metrics import statistics
from grpo.rewards.verifier.parse import final_answer

Row = Mapping[str, Any]  # a completion in samples/
Metrics = dict[str, float]

# Columns of the table, in order, with their headings. table.json has all metrics.
COLUMNS = {
    "problems": "problems",
    "accuracy": "accuracy [95 %]",
    "pass@": "pass@",
    "maj@": "maj@",
    "format": "format",
    "undecided": "undecided",
    "completion/truncated": "truncated",
    "completion/length": "length",
    "length/right": "length right",
    "length/wrong": "length wrong",
    "completion/tokens": "tokens",
    "time/sampling_s": "seconds",
    "tokens_per_s": "tokens/s",
    "cost": "cost",
}
# Metrics whose names and headings end in the number of completions.
SAMPLED_METRICS = ("pass@", "maj@")
# Metrics of the average row: the mean over the sets, and the sum.
AVERAGED_METRICS = ("undecided", "completion/truncated", "completion/length")
SUMMED_METRICS = (
    "problems",
    "completion/tokens",
    "time/sampling_s",
    "time/scoring_s",
    "cost",
)
COUNTS = ("problems", "completion/tokens")
# Rewards without a majority vote: two right programs have different texts.
WITHOUT_MAJORITY = ("code",)


@dataclass(frozen=True, slots=True, kw_only=True)
class SetResult:
    """The result of one set.

    Attributes:
        metrics: All metrics by name.
        pass_rates: The share of correct completions of each problem; None without verdicts.
    """

    metrics: Metrics
    pass_rates: list[float] | None


def evaluation_metrics(rows: Sequence[Row]) -> Metrics:
    """Returns the metrics of completions.

    The accuracy is the mean over problems of the share of correct completions (pass@1), with its
    95 % interval over problems. An undecided completion counts as wrong; `undecided` is the share
    of these. With n > 1 completions per problem, pass@k for k = 1, 2, 4, ... <= n and maj@n are
    added. `length/right` and `length/wrong` are the mean lengths of correct and of all other
    completions, in tokens. If a completion has no verdict, the metrics are the means of the rewards
    and lengths, and the share of truncated completions.

    Args:
        rows: The completions as rows of samples/, at least one.
    """
    rewards = [row["reward"] for row in rows if row["reward"] is not None]
    truncated = [float(row["finish_reason"] == "length") for row in rows]
    metrics = {
        "mean": mean(rewards),
        "completion/length": mean([row["tokens"] for row in rows]),
        "completion/truncated": mean(truncated),
    }
    for name in rows[0]["parts"]:
        metrics[name] = mean([row["parts"][name] for row in rows if row["parts"][name] is not None])
    if _lacks_verdict(rows):
        return metrics
    metrics.update(_accuracy(rows))
    metrics["undecided"] = mean([float(row["verdict"] == "undecided") for row in rows])
    correct_lengths = [float(row["tokens"]) for row in rows if row["verdict"] == "correct"]
    if correct_lengths:
        metrics["length/right"] = mean(correct_lengths)
    wrong_lengths = [float(row["tokens"]) for row in rows if row["verdict"] != "correct"]
    if wrong_lengths:
        metrics["length/wrong"] = mean(wrong_lengths)
    return metrics


def _lacks_verdict(rows: Sequence[Row]) -> bool:
    return any(row["verdict"] is None for row in rows)


def pass_rates(rows: Sequence[Row]) -> list[float] | None:
    """Returns the share of correct completions of each problem, None if a verdict is missing."""
    if _lacks_verdict(rows):
        return None
    return [mean([float(value) for value in group]) for group in _is_correct_by_problem(rows)]


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Returns the completions of each problem."""
    groups: dict[str, list[Row]] = defaultdict(list)  # by problem id
    for row in rows:
        groups[row["problem"]].append(row)
    return list(groups.values())


def _is_correct_by_problem(rows: Sequence[Row]) -> list[list[bool]]:
    return [[row["verdict"] == "correct" for row in group] for group in _groups(rows)]


def _accuracy(rows: Sequence[Row]) -> Metrics:
    """Returns the accuracy with its interval, and with several completions pass@k and maj@n."""
    is_correct = _is_correct_by_problem(rows)
    rates = [sum(group) / len(group) for group in is_correct]
    low, high = statistics.bootstrap_interval(rates)
    metrics = {"accuracy": mean(rates), "accuracy/low": low, "accuracy/high": high}
    min_group_size = min(len(group) for group in is_correct)
    if min_group_size == 1:
        return metrics
    k = 1
    while k <= min_group_size:
        values = [statistics.pass_at_k(len(group), sum(group), k) for group in is_correct]
        metrics[f"pass@{k}"] = mean(values)
        k *= 2
    if any(name in rows[0]["parts"] for name in WITHOUT_MAJORITY):
        return metrics
    majorities = []
    for group, is_correct_in_group in zip(_groups(rows), is_correct, strict=True):
        answers = [final_answer(row["completion"]) for row in group]
        majorities.append(statistics.majority_accuracy(answers, is_correct_in_group))
    metrics[f"maj@{min_group_size}"] = mean(majorities)
    return metrics


def average(results: Mapping[str, SetResult]) -> Metrics:
    """Returns the average row of several sets.

    The accuracy is the unweighted mean over the sets, with its 95 % interval over the problems
    within the sets. It is left out if a set has none. The length and the shares of truncated and of
    undecided completions are means over the sets; problems, tokens, seconds and cost are sums.

    Args:
        results: The result of each set by name.
    """
    tables = [result.metrics for result in results.values()]
    metrics: Metrics = {}
    rates = [result.pass_rates for result in results.values() if result.pass_rates is not None]
    if len(rates) == len(results):
        low, high = statistics.average_interval(rates)
        accuracy = mean([mean(rates_of_set) for rates_of_set in rates])
        metrics.update({"accuracy": accuracy, "accuracy/low": low, "accuracy/high": high})
    for key in (*AVERAGED_METRICS, *SUMMED_METRICS):
        values = [table[key] for table in tables if key in table]
        if len(values) < len(tables):
            continue
        metrics[key] = mean(values) if key in AVERAGED_METRICS else sum(values)
    if "time/sampling_s" in metrics:
        seconds = max(metrics["time/sampling_s"], 1e-9)
        metrics["tokens_per_s"] = metrics["completion/tokens"] / seconds
    return metrics


def markdown_table(table: Mapping[str, Metrics]) -> str:
    """Returns a table with a row per set and a column per metric of `COLUMNS`.

    Args:
        table: The metrics by set: `{"aime": {"accuracy": 0.5}, "amc": {"accuracy": 0.75}}`.
    """
    headings = _headings(table)
    lines = [["set", *headings.values()]]
    for name, metrics in table.items():
        lines.append([name, *(_cell(key, metrics) for key in headings)])
    widths = [max(len(line[index]) for line in lines) for index in range(len(headings) + 1)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(_table_line(line, widths) for line in lines)


def _headings(table: Mapping[str, Metrics]) -> dict[str, str]:
    """Returns the headings of the metrics that at least one set has, in the order of `COLUMNS`."""
    keys: dict[str, None] = {}
    for metrics in table.values():
        keys.update(dict.fromkeys(metrics))
    headings = {}
    for name, heading in COLUMNS.items():
        if name in SAMPLED_METRICS:
            sampled = [key for key in keys if key.startswith(name)]
            sampled.sort(key=lambda key: int(key.partition("@")[2]))
            headings.update({key: key for key in sampled})
        elif name in keys:
            headings[name] = heading
    return headings


def _table_line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Returns a line in which the first cell is on the left, and the others are on the right."""
    first, *others = cells
    padded = [first.ljust(widths[0])]
    padded += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
    return "| " + " | ".join(padded) + " |"


def _cell(key: str, metrics: Metrics) -> str:
    if key not in metrics:
        return ""
    value = metrics[key]
    if key == "accuracy" and "accuracy/low" in metrics:
        low, high = metrics["accuracy/low"], metrics["accuracy/high"]
        return f"{value:.1%} [{100 * low:.1f}, {100 * high:.1f}]"
    if key in COUNTS:
        return f"{value:,.0f}"
    if key == "cost":
        return f"{value:,.2f}"
    if "length" in key or key in ("time/sampling_s", "tokens_per_s"):
        return f"{value:,.1f}"
    return f"{value:.1%}"
