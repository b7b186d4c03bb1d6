"""Rules that explain the metrics of a run in plain words.

A rule looks at the rollouts so far and reports at most once per run, in the log and in the report.

The rules are pure functions: log, report and tests get the same findings from the same rows.
This module depends on the standard library only.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]  # one line of metrics.jsonl
WINDOW = 5  # rollouts over which most rules average; with fewer, these rules do not apply


@dataclass(frozen=True, slots=True)
class Finding:
    """One report of a rule: `Finding(step=7, rule="too_hard", text="82% of groups are ...")`."""

    step: int
    rule: str
    text: str


class Diagnosis:
    """Follows a run row by row, and reports each rule once."""

    def __init__(self, rows: Sequence[Row] = ()) -> None:
        """Replays earlier rows, so that rules that have reported on them do not report again.

        Args:
            rows: The rows of metrics.jsonl so far, in order.
        """
        self._rows: list[Row] = []  # of rollouts only, not those of a start or resume
        self._reported_rules: set[str] = set()
        for row in rows:
            self.add_row(row)

    def add_row(self, row: Row) -> list[Finding]:
        """Adds a row and returns its new findings, at most one per rule and run."""
        if "reward/mean" not in row:
            return []
        self._rows.append(row)
        past = History(self._rows)
        new_findings = []
        for rule, apply_rule in RULES.items():
            if rule in self._reported_rules:
                continue
            text = apply_rule(past)
            if text:
                new_findings.append(Finding(int(row["step"]), rule, text))
                self._reported_rules.add(rule)
        return new_findings


def diagnose(rows: Sequence[Row]) -> list[Finding]:
    """Returns all findings of a run, each at the first step at which its rule applies.

    Args:
        rows: The lines of metrics.jsonl, in order.
    """
    diagnosis = Diagnosis()
    all_findings: list[Finding] = []
    for row in rows:
        all_findings += diagnosis.add_row(row)
    return all_findings


class History:
    """The metrics of a run so far."""

    def __init__(self, rows: Sequence[Row]) -> None:
        """Args: `rows`: metrics of the rollouts so far, oldest first."""
        self.rows = rows

    def values(self, key: str) -> list[float]:
        """Returns the finite values of a metric, oldest first. Other rows are skipped."""
        return [
            row[key]
            for row in self.rows
            if isinstance(row.get(key), (int, float)) and math.isfinite(row[key])
        ]

    def now(self, key: str, window: int = WINDOW) -> float:
        """Returns the mean of the last `window` values of a metric, NaN if there are fewer."""
        values = self.values(key)
        return statistics.fmean(values[-window:]) if len(values) >= window else math.nan

    def first(self, key: str, window: int = WINDOW) -> float:
        """Returns the mean of the first `window` values of a metric, NaN if there are fewer."""
        values = self.values(key)
        return statistics.fmean(values[:window]) if len(values) >= window else math.nan


# A comparison with NaN is false: a rule whose metrics are missing must not apply. The conditions
# below are therefore written as "if not (value >= limit): return None".


def _too_hard(past: History) -> str | None:
    all_wrong = past.now("group/all_wrong")
    if not all_wrong >= 0.8:
        return None
    details = []
    undecided = past.now("reward/undecided")
    if undecided >= 0.05:
        details.append(f"{undecided:.0%} undecided")
    truncated = past.now("completion/truncated")
    if truncated >= 0.05:
        details.append(f"{truncated:.0%} truncated")
    malformed = 1 - past.now("reward/format")
    if malformed >= 0.2:
        details.append(f"{malformed:.0%} malformed")
    parenthesis = f" ({', '.join(details)})" if details else ""
    return (
        f"{all_wrong:.0%} of groups are all wrong{parenthesis}: the problems are too hard for this "
        "model, or the verifier cannot parse its answers; read some of samples/, try easier "
        "problems, a cold start (grpo sft) or a larger train.group_size"
    )


def _undecided(past: History) -> str | None:
    undecided = past.now("reward/undecided")
    if not undecided >= 0.1:
        return None
    causes: dict[str, float] = {}  # mean share of completions; a row has only causes that occurred
    for row in past.rows[-WINDOW:]:
        for key, value in row.items():
            if key.startswith("undecided/"):
                cause = key.partition("/")[2].replace("_", " ")
                causes[cause] = causes.get(cause, 0.0) + value / WINDOW
    details = ", ".join(f"{cause} {share:.0%}" for cause, share in sorted(causes.items()))
    parenthesis = f" ({details})" if details else ""
    return (
        f"{undecided:.0%} of completions are undecided and have no reward{parenthesis}: the "
        "verifier may not be able to parse the gold answers; `grpo grade RUN` lists them"
    )


def _no_signal(past: History) -> str | None:
    no_signal = past.now("group/no_signal")
    explained = 0.0  # by groups that are all wrong or all correct
    for key in ("group/all_wrong", "group/all_correct"):
        share = past.now(key)
        if not math.isnan(share):  # NaN if no reward is a verdict
            explained += share
    if not (no_signal >= 0.9 and no_signal - explained >= 0.3):
        return None
    return (
        f"{no_signal:.0%} of groups have equal rewards, and not all of these are all correct or "
        "all wrong: a reward may always return the same value"
    )


def _mismatch(past: History) -> str | None:
    gap = past.now("mismatch/abs")
    effective_share = past.now("mismatch/effective")
    if not (gap >= 0.15 or effective_share <= 0.7):
        return None
    return (
        f"engine and learner disagree: mean absolute difference of logprobs {gap:.2f}, effective "
        f"sample size {effective_share:.0%}; use a mismatch correction (algorithm.mismatch=tis, or "
        "a mask), model.float32_head, or float32"
    )


def _zero_loss(past: History) -> str | None:
    if len(past.rows) > 1:
        return None
    (row,) = past.rows
    if not (abs(row.get("loss", 1.0)) < 1e-3 and row.get("update/made") == 1):
        return None
    return (
        "a loss near 0 is expected when every rollout has one update: the advantages of a group "
        "sum to 0; watch the reward"
    )


def _entropy(past: History) -> str | None:
    if len(past.rows) < 2 * WINDOW:
        return None
    first_entropy = past.first("policy/entropy")
    entropy = past.now("policy/entropy")
    has_collapsed = entropy < 0.25 * first_entropy
    best_reward = max([1.0, *past.values("reward/mean")])  # 1: the maximum of accuracy alone
    if not (has_collapsed and past.now("reward/mean") < 0.9 * best_reward):
        return None
    return (
        f"entropy is collapsing ({first_entropy:.2f} to {entropy:.2f}) while rewards are below "
        "their best: lower learner.lr, raise algorithm.clip_high or algorithm.entropy_coef"
    )


def _clipped(past: History) -> str | None:
    share = past.now("clip/low") + past.now("clip/high")
    if not share >= 0.2:
        return None
    return (
        f"{share:.0%} of tokens are clipped: the policy moves far within a rollout (with gspo, a "
        "third is usual); lower learner.lr, or use fewer updates per rollout"
    )


def _gradient(past: History) -> str | None:
    norms = past.values("policy/grad_norm")
    if len(norms) <= 10:
        return None
    median = statistics.median(norms[-21:-1])
    if median == 0 or norms[-1] < 10 * median:
        return None
    return (
        f"the gradient norm jumped to {norms[-1]:.2g}, {norms[-1] / median:.0f} times its median: "
        "read the samples of this step"
    )


def _format_only(past: History) -> str | None:
    if len(past.rows) < 20:
        return None
    if not (past.now("reward/format") >= 0.9 and past.now("reward/accuracy", 10) <= 0.02):
        return None
    return (
        "the model has learned the format, but its answers stay wrong: only the format reward "
        "moves; use easier problems, or lower the weight of the format reward"
    )


def _hacking(past: History) -> str | None:
    accuracies = past.values("eval/accuracy")
    if len(accuracies) < 3:
        return None
    best, last = max(accuracies), accuracies[-1]
    first_reward = past.first("reward/mean")
    reward = past.now("reward/mean")
    if not (last <= best - 0.1 and reward >= first_reward + 0.05):
        return None
    return (
        f"rewards rise ({first_reward:.2f} to {reward:.2f}) while held-out accuracy falls "
        f"({best:.0%} to {last:.0%}): the rewards may pay for something else, or the model "
        "memorizes the problems"
    )


def _flat(past: History) -> str | None:
    values = past.values("reward/mean")
    if len(values) < 30:
        return None
    early, late = values[:10], values[-10:]
    early_mean, late_mean = statistics.fmean(early), statistics.fmean(late)
    noise = math.sqrt((statistics.variance(early) + statistics.variance(late)) / 10)
    if abs(late_mean - early_mean) > 2 * noise or late_mean >= 0.9:
        return None
    signal = 1 - past.now("group/no_signal", 10)
    return (
        f"the reward has not moved in {len(values)} rollouts ({early_mean:.3f} to "
        f"{late_mean:.3f}, noise {noise:.3f}); {signal:.0%} of groups have a training signal: "
        "increase it (easier problems, larger groups), or raise learner.lr"
    )


def _slow_rewards(past: History) -> str | None:
    share = past.now("time/rewards_s") / past.now("time/total_s")
    if not share >= 0.25:
        return None
    return (
        f"rewards take {share:.0%} of the time: raise reward_pool.workers, or use a cheaper reward"
    )


def _language(past: History) -> str | None:
    share = past.now("completion/language")
    if not share <= 0.8:
        return None
    return (
        f"only {share:.0%} of the text is in the language of the question: add the reward "
        "`language`"
    )


def _waiting(past: History) -> str | None:
    if math.isnan(past.now("staleness/mean")):
        return None  # in a synchronous step one side always waits
    remedies = {
        "learner": "use more servers, or fewer learner ranks",
        "engine": "use fewer servers, or a larger train.max_staleness",
    }
    for side, remedy in remedies.items():
        share = past.now(f"idle/{side}")
        if share >= 0.4:
            return (
                f"the {side} is idle for {share:.0%} of the time: {remedy} "
                "(`grpo bench CONFIG --simulate RUN` finds the best split)"
            )
    return None


def _merge(past: History) -> str | None:
    share = past.now("lora/merged")
    if not share <= 0.5:
        return None
    return (
        f"the weights of the engine have only {share:.0%} of the adapter's change, because merging "
        "in bfloat16 rounds it away: set model.dtype=float32, or raise "
        "learner.lr or model.lora.alpha (final/ is merged in the same way; adapter/ is exact)"
    )


def _above(
    key: str, limit: float, text: str, window: int = WINDOW
) -> Callable[[History], str | None]:
    """Returns a rule that applies when the mean of a metric is at least `limit`.

    `text` is a format string for the mean.
    """

    def rule(past: History) -> str | None:
        value = past.now(key, window)
        return text.format(value) if value >= limit else None

    return rule


# By name. DIAGNOSIS_RULES in grpo/config/sections.py lists the same names, for logging.alarms.
RULES: dict[str, Callable[[History], str | None]] = {
    "too_hard": _too_hard,
    "too_easy": _above(
        "group/all_correct",
        0.8,
        "{:.0%} of groups are all correct: the model can learn little from these problems; use "
        "harder ones, or algorithm.no_signal=resample",
    ),
    "no_signal": _no_signal,
    "undecided": _undecided,
    "truncated": _above(
        "completion/truncated",
        0.3,
        "{:.0%} of completions are truncated at sampling.max_tokens: raise it, add a stop string, "
        "or use the reward `length` to shorten completions",
    ),
    "stale_weights": _above(
        "probe/gap_share",
        0.5,
        "engine weights may be stale: the probe gap is {:.0%} of the limit that stops the run; "
        "read engine.log; if the cause is low precision, set engine.dtype=float32",
        window=1,
    ),
    "mismatch": _mismatch,
    "zero_loss": _zero_loss,
    "entropy": _entropy,
    "clipped": _clipped,
    "gradient": _gradient,
    "format_only": _format_only,
    "hacking": _hacking,
    "flat": _flat,
    "slow_rewards": _slow_rewards,
    "waiting": _waiting,
    "far": _above(
        "kl/ref",
        1,
        "the policy is far from its reference (KL of {:.1f} per token): lower learner.lr, or raise "
        "algorithm.kl_coef",
    ),
    "language": _language,
    "merge": _merge,
    "pass_rate": _above(
        "group/rate_unknown",
        0.5,
        "{:.0%} of groups have no pass rate, because no completion has a verdict of correct or "
        "wrong: algorithm.drop_solved and algorithm.pass_rate do not apply to their problems; if "
        "your rewards return no verdicts, set algorithm.max_reward",
    ),
}
