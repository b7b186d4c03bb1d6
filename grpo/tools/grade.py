"""`grpo grade`: verifies the answers in a file, or scores the samples of a run again.

A file is verified with the reward `accuracy`, a run with the rewards of its config. Neither needs a
model or an engine.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from grpo import config as configs
from grpo import json_lines
from grpo.config.reading import apply_overrides
from grpo.experience import plugins
from grpo.experience.scoring import score
from grpo.learning.advantages import unflatten
from grpo.rewards import accuracy
from grpo.rewards.workers.pool import Failure, WorkerPool
from grpo.types import Completion, Group, Problem, ScoredGroup, UserError, Verdict

PREDICTION_FIELDS = ("prediction", "completion")
GOLD_FIELDS = ("gold", "answer")
LABELS = ("correct", "wrong")
MAX_CHANGES_SHOWN = 20  # per reward
MAX_REASONS_SHOWN = 10


def grade(
    path: str,
    *,
    overrides: Sequence[str] = (),
    explain: int | None = None,
    output: str | None = None,
) -> None:
    """Prints a summary of the verdicts on a JSONL file, or of the changed rewards of a run.

    Args:
        path: A JSONL file with a prediction and a gold answer per line, or a run directory.
        overrides: Overrides `key=value` of the run's config.
        explain: Number of a line of the file, from 1. Only its verdict is printed, in detail.
        output: JSONL file for all rows with their new verdict or rewards.

    Raises:
        UserError: The file, a line or the run cannot be read. The error names the line.
    """
    is_run = Path(path).is_dir()
    if overrides and not is_run:
        raise UserError(
            f"grpo grade: {overrides[0]} overrides a run's config, but {path} is not a run"
        )
    if explain is not None:
        if is_run:
            raise UserError("grpo grade: --explain takes a line of a JSONL file, not a run")
        if output:
            raise UserError("grpo grade: --explain prints one line; remove --output")
        print(_explain_line(Path(path), explain))
        return
    if is_run:
        rows, summary = regrade(Path(path), overrides)
    else:
        rows, summary = verdicts([row for _, row in read_rows(Path(path))])
    print(summary)
    if output:
        Path(output).write_text(json_lines.to_lines(rows), encoding="utf-8")


def _explain_line(path: Path, number: int) -> str:
    for line_number, row in read_rows(path):
        if line_number == number:
            return accuracy.explain(field(row, PREDICTION_FIELDS), field(row, GOLD_FIELDS))
    raise UserError(f"{path}: has no line {number}")


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the line number and the object of each line of a JSONL file.

    Raises:
        UserError: A line is not a JSON object with a prediction and a gold answer.
    """
    for number, row in json_lines.read(path):
        for names in (PREDICTION_FIELDS, GOLD_FIELDS):
            has_text = isinstance(row, dict) and any(
                isinstance(row.get(name), str) for name in names
            )
            if not has_text:
                raise UserError(f"{path}: line {number}: needs text in {' or '.join(names)}")
        yield number, row


def field(row: dict[str, Any], names: Sequence[str]) -> str:
    """Returns the first of the fields `names` that contains text."""
    return str(next(row[name] for name in names if isinstance(row.get(name), str)))


def verdicts(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Verifies the prediction of each row in worker processes.

    Args:
        rows: Objects with a prediction and a gold answer. If rows have a `label` (correct or
            wrong), the summary compares the verdicts with the labels.

    Returns:
        The rows with the new fields `verdict` and `reason`, and a summary as text.
    """
    calls = [(field(row, PREDICTION_FIELDS), field(row, GOLD_FIELDS)) for row in rows]
    with WorkerPool() as pool:
        results = pool.map("grpo.rewards.accuracy:verify", calls, timeout_s=accuracy.TIMEOUT_S)
    graded = []
    for row, result in zip(rows, results, strict=True):
        verdict: Verdict = (
            plugins.verdict_for_failure(result) if isinstance(result, Failure) else result
        )
        graded.append({**row, "verdict": verdict.value, "reason": verdict.reason})
    return graded, "\n".join(_summary_lines(graded))


def _summary_lines(graded: list[dict[str, Any]]) -> Iterator[str]:
    """Yields the number of verdicts of each kind, the frequent reasons and the label comparison."""
    kinds = Counter(row["verdict"] for row in graded)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    yield f"{len(graded)} answers: {counts}"
    reasons = Counter(f"{row['verdict']}: {row['reason']}" for row in graded if row["reason"])
    for reason, count in reasons.most_common(MAX_REASONS_SHOWN):
        yield f"{count:8}  {reason}"
    labeled = [row for row in graded if row.get("label") in LABELS]
    if not labeled:
        return
    disagreeing_verdicts = [row["verdict"] for row in labeled if row["verdict"] != row["label"]]
    num_false_positives = disagreeing_verdicts.count("correct")
    num_false_negatives = disagreeing_verdicts.count("wrong")
    num_undecided = disagreeing_verdicts.count("undecided")
    agreement = 1 - len(disagreeing_verdicts) / len(labeled)
    yield (
        f"compared with {len(labeled)} labels: {agreement:.1%} agree, {num_false_positives} false "
        f"positives, {num_false_negatives} false negatives, {num_undecided} undecided"
    )


def regrade(run: Path, overrides: Sequence[str] = ()) -> tuple[list[dict[str, Any]], str]:
    """Scores the samples of a run again, with the rewards of its config and the current code.

    Rewards that read the prompt receive the question, because a run does not store its prompts.

    Args:
        run: The run directory.
        overrides: Overrides of its config, for example of its rewards.

    Returns:
        The rows of its samples with the new rewards, and a summary of the changes as text.

    Raises:
        UserError: `run` has no samples or no config.yaml, or a sample cannot be read.
    """
    from grpo.stages.registry import stage_for_config

    files = sorted((run / "samples").glob("*.jsonl"))
    if not files or not (run / "config.yaml").exists():
        raise UserError(f"{run}: not a run directory with samples/ and config.yaml")
    tree = apply_overrides(yaml.safe_load((run / "config.yaml").read_text()), overrides)
    stage = stage_for_config(tree)
    # Every stage that writes samples has the sections `rewards` and `reward_pool`.
    config: Any = configs.parse(tree, str(run / "config.yaml"), stage.config_class)
    rows: list[dict[str, Any]] = []
    for path in files:
        rows += [{**row, "file": path.stem} for row in json_lines.read_objects(path)]
    if not rows:
        raise UserError(f"{run}: its samples are empty")
    scored_groups: list[ScoredGroup] = []
    with WorkerPool(config.reward_pool.workers, memory_gb=config.reward_pool.memory_gb) as pool:
        # The sets of an evaluation can have different rewards.
        for settings, rows_of_rewards in itertools.groupby(
            rows, key=lambda row: config.rewards_of_samples(row["file"])
        ):
            by_problem = itertools.groupby(rows_of_rewards, key=itemgetter("file", "problem"))
            groups = [_group(list(group_rows)) for _, group_rows in by_problem]
            rewards = plugins.rewards(settings, pool)
            scored_groups += score(groups, rewards, lambda problem: problem.question)
    regraded = _with_new_rewards(rows, scored_groups)
    lines = [f"{len(rows)} completions of {len(scored_groups)} groups"]
    rows_by_reward: dict[str, list[dict[str, Any]]] = {}
    for row in regraded:
        for name in row["parts"]:
            rows_by_reward.setdefault(name, []).append(row)
    for name, rows_of_reward in rows_by_reward.items():
        lines += _changes_of_reward(name, rows_of_reward)
    return regraded, "\n".join(lines)


def _with_new_rewards(
    rows: list[dict[str, Any]], scored_groups: list[ScoredGroup]
) -> list[dict[str, Any]]:
    """Returns the rows with new `reward`, `parts` and `reason`.

    The previous rewards are in `reward_then` and `parts_then`; all other fields are unchanged.
    """
    regraded = []
    group_sizes = [len(scored.rewards) for scored in scored_groups]
    for scored, group_rows in zip(scored_groups, unflatten(rows, group_sizes), strict=True):
        for row, reward, parts, verdict in zip(
            group_rows, scored.rewards, scored.parts, scored.verdicts, strict=True
        ):
            new_values = {
                "reward_then": row["reward"],
                "parts_then": row["parts"],
                "reward": reward,
                "parts": parts,
                "reason": verdict.reason if verdict else None,
            }
            regraded.append({**row, **new_values})
    return regraded


def _changes_of_reward(name: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yields the mean of a reward before and after, and the first completions that changed."""
    values_now = [row["parts"].get(name) for row in rows]
    if all(name not in row["parts_then"] for row in rows):
        yield f"{name:12} {_mean(values_now):.4f} now, not a reward of the run"
        return
    values_then = [row["parts_then"].get(name) for row in rows]
    changed = [row for row in rows if row["parts_then"].get(name) != row["parts"].get(name)]
    yield (
        f"{name:12} {_mean(values_then):.4f} then, {_mean(values_now):.4f} now, "
        f"{len(changed)} changed"
    )
    for row in changed[:MAX_CHANGES_SHOWN]:
        values = f"{row['parts_then'].get(name)} -> {row['parts'].get(name)}"
        yield (
            f"  {row['file']} {row['problem']}: {values} ({row['reason'] or 'no reason'}) "
            f"gold {row['answer']!r}, completion ends in {row['completion'][-60:]!r}"
        )


def _mean(values: Sequence[float | None]) -> float:
    """Returns the mean of the values that are not None, NaN if there are none."""
    numbers = [value for value in values if value is not None]
    return fmean(numbers) if numbers else math.nan


def _group(rows: list[dict[str, Any]]) -> Group:
    """Returns the group of a problem from the rows of its completions."""
    problem = Problem(
        id=rows[0]["problem"],
        question=rows[0]["question"],
        answer=rows[0]["answer"],
        source="",
        meta=rows[0].get("meta") or {},
    )
    completions = tuple(
        Completion(
            token_ids=(0,) * row["tokens"],  # only their number is known, and used
            logprobs=(),
            text=row["completion"],
            finish_reason=row["finish_reason"],
            versions=(),
        )
        for row in rows
    )
    return Group(problem=problem, prompt_ids=(), completions=completions)
