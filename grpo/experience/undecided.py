"""Undecided completions: their causes, and the share of them that stops a run.

A completion is undecided if a reward failed on it or cannot read the gold answer of its problem. It
has no reward, and the run continues without it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from grpo.types import UNDECIDED_CAUSES, ScoredGroup, TrainingStoppedError, Verdict

OTHER_CAUSE = "other"
MAX_ANSWER_CHARS = 80  # of a gold answer in a message
MAX_REASON_CHARS = 200
MAX_COMPLETION_CHARS = 300


def is_undecided(verdict: Verdict | None) -> bool:
    """Returns whether a completion with this verdict is undecided."""
    return verdict is not None and verdict.value == "undecided"


def cause_counts(groups: Sequence[ScoredGroup]) -> Counter[str]:
    """Returns the number of undecided completions by cause: `{"gold answer": 8, "other": 1}`.

    A cause is one of UNDECIDED_CAUSES or OTHER_CAUSE.
    """
    counts: Counter[str] = Counter()
    for scored in groups:
        for verdict in scored.verdicts:
            if verdict is not None and is_undecided(verdict):
                counts[_cause(verdict.reason)] += 1
    return counts


def _cause(reason: str) -> str:
    for cause in UNDECIDED_CAUSES:
        if cause in reason:
            return cause
    return OTHER_CAUSE


def require_few_undecided(groups: Sequence[ScoredGroup], max_share: float) -> None:
    """Stops the run if more than `max_share` of the completions are undecided.

    They must belong to at least two problems, so that one bad row of the data never stops a run.

    Args:
        groups: The groups that a rollout has sampled, the same on all ranks.
        max_share: Share of the completions (`reward_pool.max_failed`).

    Raises:
        TrainingStoppedError: The message shows the first undecided completion.
    """
    num_completions = sum(len(scored.verdicts) for scored in groups)
    affected = [scored for scored in groups if any(map(is_undecided, scored.verdicts))]
    problem_ids = {scored.group.problem.id for scored in affected}
    counts = cause_counts(groups)
    if len(problem_ids) < 2 or counts.total() <= max_share * num_completions:
        return
    causes = ", ".join(f"{cause}: {count}" for cause, count in counts.most_common())
    error = TrainingStoppedError(
        f"{counts.total()} of the rollout's {num_completions} completions "
        f"({counts.total() / num_completions:.1%}) are undecided ({causes}), more than "
        f"reward_pool.max_failed={max_share:g}. The first one: {_describe_first(affected[0])}. "
        "Correct the data (grpo doctor lists the gold answers that cannot be read) or the reward, "
        "then continue with --resume. reward_pool.max_failed=1 continues without these completions"
    )
    # All ranks have the same groups. Rank 0 prints the message.
    error.raised_on_all_ranks = True
    error.failed_rank = 0
    raise error


def _describe_first(scored: ScoredGroup) -> str:
    """Returns the first undecided completion of a group, with its problem and reason, in a line."""
    index = [is_undecided(verdict) for verdict in scored.verdicts].index(True)
    verdict = scored.verdicts[index]
    reason = " ".join(verdict.reason.split()) if verdict is not None else ""
    problem = scored.group.problem
    text = scored.group.completions[index].text
    return (
        f"problem {problem.id}, gold answer {shorten(problem.answer, MAX_ANSWER_CHARS)!r}, reason "
        f"{shorten(reason, MAX_REASON_CHARS)!r}, completion {text[:MAX_COMPLETION_CHARS]!r}"
    )


def shorten(text: str, max_chars: int) -> str:
    """Returns a text, or its beginning and its length if it exceeds `max_chars`.

    `shorten("1234567", 3)` -> `"123... (7 characters)"`.
    """
    if len(text) <= max_chars:
        return text
    return f"{text[:max_chars]}... ({len(text):,} characters)"
