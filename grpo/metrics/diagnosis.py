"""What a run's numbers mean in plain words.

Rules over the last rows of metrics; each speaks once, in the log and in the report.

Pure: a log, a report and a test get the same findings from the same rows. Standard library only.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
WINDOW = 5  # rollouts that a rule looks at; fewer at the start of a run say nothing yet


@dataclass(frozen=True, slots=True)
class Finding:
    """`Finding(step=7, rule="too_hard", text="82% of groups are all wrong: ...")`."""

    step: int
    rule: str
    text: str


class Watch:
    """Follows a run: `see(row)` returns what the row adds to what was said."""

    def __init__(self, rows: Sequence[Row] = ()) -> None:
        """`rows`: metrics that the run already has, in order; what they say is not said again."""
        self._rows: list[Row] = []  # rollouts; the evaluation before the first is none
        self._told: set[str] = set()
        for row in rows:
            self.see(row)

    def see(self, row: Row) -> list[Finding]:
        """Returns the findings that a row of metrics adds, at most one per rule and run."""
        if "reward/mean" not in row:
            return []
        self._rows.append(row)
        past = Past(self._rows)
        spoken = {rule: speak(past) for rule, speak in RULES.items() if rule not in self._told}
        new = [Finding(int(row["step"]), rule, text) for rule, text in spoken.items() if text]
        self._told |= {finding.rule for finding in new}
        return new


def findings(rows: Sequence[Row]) -> list[Finding]:
    """Returns what is to be said of a run, each rule once, at the step where it first holds.

    `rows`: of metrics.jsonl, in order.
    """
    found: list[Finding] = []
    watch = Watch()
    for row in rows:
        found += watch.see(row)
    return found


class Past:
    """The rows so far.

    `now(key)` is the mean of the last rows, `first(key)` of the first, NaN where there are too few.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        """`rows`: metrics of the rollouts so far, oldest first."""
        self.rows = rows

    def values(self, key: str) -> list[float]:
        """Returns a metric's finite numbers, oldest first; rows without one are left out."""
        return [
            row[key]
            for row in self.rows
            if isinstance(row.get(key), (int, float)) and math.isfinite(row[key])
        ]

    def now(self, key: str, window: int = WINDOW) -> float:
        """Returns the mean of a metric's last `window` numbers, NaN if there are fewer."""
        values = self.values(key)
        return statistics.fmean(values[-window:]) if len(values) >= window else math.nan

    def first(self, key: str, window: int = WINDOW) -> float:
        """Returns the mean of a metric's first `window` numbers, NaN if there are fewer."""
        values = self.values(key)
        return statistics.fmean(values[:window]) if len(values) >= window else math.nan


def _too_hard(past: Past) -> str | None:
    if not past.now("group/all_wrong") >= 0.8:
        return None
    why = [
        f"{past.now(key):.0%} {what}"
        for key, what in (("reward/undecided", "undecided"), ("completion/truncated", "cut off"))
        if past.now(key) >= 0.05
    ]
    malformed = 1 - past.now("reward/format")
    why += [f"{malformed:.0%} not well-formed"] if malformed >= 0.2 else []
    told = f" ({', '.join(why)})" if why else ""
    return (
        f"{past.now('group/all_wrong'):.0%} of groups are all wrong{told}: the problems are too "
        "hard for this model, or the verifier "
        "cannot read its answers; read some of samples/, try easier problems, a cold start (grpo "
        "sft) or a larger group_size"
    )


def _no_signal(past: Past) -> str | None:
    # none where no reward is a verdict
    judged = [past.now(key) for key in ("group/all_wrong", "group/all_correct")]
    alike = past.now("group/no_signal") - sum(share for share in judged if not math.isnan(share))
    if not (past.now("group/no_signal") >= 0.9 and alike >= 0.3):
        return None
    return (
        f"{past.now('group/no_signal'):.0%} of groups have equal rewards though not all right or "
        "wrong: a reward may always give the same"
    )


def _mismatch(past: Past) -> str | None:
    gap, weight = past.now("mismatch/abs"), past.now("mismatch/effective")
    if gap >= 0.15 or weight <= 0.7:
        return (
            f"engine and learner disagree: mean |difference of logprobs| {gap:.2f}, effective "
            f"samples {weight:.0%}; use a "
            "mismatch correction (algorithm.mismatch=tis), model.float32_head, or float32"
        )
    return None


def _zero_loss(past: Past) -> str | None:
    if (
        len(past.rows) == 1
        and abs(past.rows[0].get("loss", 1.0)) < 1e-3
        and past.rows[0].get("update/made") == 1
    ):
        return (
            "a loss near 0 is expected when every rollout has one update: advantages of a group "
            "sum to 0; watch the reward"
        )
    return None


def _entropy(past: Past) -> str | None:
    before, now = past.first("policy/entropy"), past.now("policy/entropy")
    if (
        len(past.rows) < 2 * WINDOW
        or not now < 0.25 * before
        or not past.now("reward/mean") < 0.9 * _best(past)
    ):
        return None
    return (
        f"entropy is collapsing ({before:.2f} to {now:.2f}) while rewards are not at their best: "
        "lower learner.lr, raise "
        "algorithm.clip_high or algorithm.entropy_coef"
    )


def _best(past: Past) -> float:
    """Returns the highest mean reward of a rollout, at least 1.

    Accuracy alone would give 1.
    """
    return max([1.0, *past.values("reward/mean")])


def _clipped(past: Past) -> str | None:
    share = past.now("clip/low") + past.now("clip/high")
    if not share >= 0.2:
        return None
    return (
        f"{share:.0%} of tokens are clipped: the policy moves far within a rollout (of gspo a "
        "third is usual); lower learner.lr, or make "
        "fewer updates a rollout"
    )


def _gradient(past: Past) -> str | None:
    norms = past.values("policy/grad_norm")
    if len(norms) <= 10 or not norms[-1] >= 10 * statistics.median(norms[-21:-1]):
        return None
    times = norms[-1] / statistics.median(norms[-21:-1])
    return (
        f"the gradient norm jumped to {norms[-1]:.2g}, {times:.0f} times its median: see this "
        "step's samples"
    )


def _format_only(past: Past) -> str | None:
    if len(past.rows) < 20 or not (
        past.now("reward/format") >= 0.9 and past.now("reward/accuracy", 10) <= 0.02
    ):
        return None
    return (
        "the format is learned and the answers stay wrong: the format reward alone moves; easier "
        "problems, or lower its weight"
    )


def _hacking(past: Past) -> str | None:
    judged = past.values("eval/accuracy")
    if len(judged) < 3 or not (
        judged[-1] <= max(judged) - 0.1
        and past.now("reward/mean") >= past.first("reward/mean") + 0.05
    ):
        return None
    return (
        f"rewards rise ({past.first('reward/mean'):.2f} to {past.now('reward/mean'):.2f}) while "
        "held-out accuracy falls "
        f"({max(judged):.0%} to {judged[-1]:.0%}): a reward may pay for something else, or the "
        "problems are learned by heart"
    )


def _flat(past: Past) -> str | None:
    values = past.values("reward/mean")
    if len(values) < 30:
        return None
    early, late = values[:10], values[-10:]
    noise = math.sqrt((statistics.variance(early) + statistics.variance(late)) / 10)
    if (
        abs(statistics.fmean(late) - statistics.fmean(early)) > 2 * noise
        or statistics.fmean(late) >= 0.9
    ):
        return None
    signal = 1 - past.now("group/no_signal", 10)
    return (
        f"the reward has not moved in {len(values)} rollouts ({statistics.fmean(early):.3f} to "
        f"{statistics.fmean(late):.3f}, noise "
        f"{noise:.3f}); {signal:.0%} of groups teach something: more signal (easier problems, "
        "larger groups) or a higher learner.lr"
    )


def _slow_rewards(past: Past) -> str | None:
    share = past.now("time/rewards_s") / past.now("time/total_s")
    return (
        f"{share:.0%} of the time goes into rewards: more reward_pool.workers, or a cheaper reward"
        if share >= 0.25
        else None
    )


def _language(past: Past) -> str | None:
    share = past.now("completion/language")
    return (
        f"only {share:.0%} of the text is in the question's language: add the reward `language`"
        if share <= 0.8
        else None
    )


def _waiting(past: Past) -> str | None:
    # without asynchronous rollouts one side always waits
    if math.isnan(past.now("staleness/mean")):
        return None
    for side, cure in (
        ("learner", "more servers, or fewer learner ranks"),
        ("engine", "fewer servers, or a larger train.max_staleness"),
    ):
        if (share := past.now(f"idle/{side}")) >= 0.4:
            return (
                f"the {side} waits {share:.0%} of the time: {cure} (grpo bench CONFIG --simulate "
                "RUN finds the split)"
            )
    return None


def _above(key: str, least: float, text: str, window: int = WINDOW) -> Callable[[Past], str | None]:
    """Returns a rule that speaks when a metric's mean is at least so much.

    `text` has a place for it.
    """
    return lambda past: (
        text.format(past.now(key, window)) if past.now(key, window) >= least else None
    )


# By name; grpo/config/sections.py has the names too (DIAGNOSIS_RULES), for logging.alarms.
RULES: dict[str, Callable[[Past], str | None]] = {
    "too_hard": _too_hard,
    "too_easy": _above(
        "group/all_correct",
        0.8,
        "{:.0%} of groups are all right: little is left to learn from these problems; take harder "
        "ones, or algorithm.no_signal=resample",
    ),
    "no_signal": _no_signal,
    "undecided": _above(
        "reward/undecided",
        0.1,
        "{:.0%} of completions could not be judged and teach nothing: the gold answers may be in "
        "a form the verifier does not read; "
        "`grpo grade RUN` lists them",
    ),
    "truncated": _above(
        "completion/truncated",
        0.3,
        "{:.0%} of completions are cut off at sampling.max_tokens: raise it, add a stop string, "
        "or shorten them (rewards.length)",
    ),
    "stale_weights": _above(
        "probe/gap_share",
        0.5,
        "engine weights look stale: the probe's gap is {:.0%} of what stops the run; see "
        "engine.log, or it is low precision: engine.dtype",
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
        "the policy is far from its reference (KL {:.1f} a token): lower learner.lr, or raise "
        "algorithm.kl_coef",
    ),
    "language": _language,
}
