"""`grpo grade`: gives verdicts on a file of answers, or on an old run's samples.

A run's samples are judged under today's rules, and what changed is told. There is no model and no
engine.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from grpo import config as configs
from grpo.experience import plugins
from grpo.experience.scoring import score
from grpo.types import Completion, Group, Problem, ScoredGroup, UserError
from rewards import accuracy
from rewards.workers.pool import Failure, Pool

PREDICTION, GOLD = ("prediction", "completion"), ("gold", "answer")
CHANGES_SHOWN = 20


def grade(path: str, *, explain: int | None = None, output: str | None = None) -> None:
    """Prints a summary of the verdicts on a JSONL file, or what has changed for a run directory.

    With `explain` it prints that line of the JSONL file in detail. `output`: a JSONL file for every
    row with its new verdict. Raises UserError naming the line that cannot be read.
    """
    if Path(path).is_dir():
        if explain is not None:
            raise UserError("grpo grade: --explain takes a line of a JSONL file")
        rows, told = regrade(Path(path))
    elif explain is not None:
        if output:
            raise UserError("grpo grade: --explain shows one line; leave --output out")
        rows = list(itertools.islice(read_rows(Path(path)), max(explain, 0)))
        if not 1 <= explain <= len(rows):
            raise UserError(f"{path}: has no line {explain}")
        told = accuracy.explain(field(rows[-1], PREDICTION), field(rows[-1], GOLD))
    else:
        rows, told = verdicts(list(read_rows(Path(path))))
    print(told)
    if output:
        Path(output).write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a JSONL file that have a prediction and a gold answer.

    Raises UserError with the line's number.
    """
    for number, row in _json_lines(path):
        for names in (PREDICTION, GOLD):
            if not isinstance(row, dict) or not any(
                isinstance(row.get(name), str) for name in names
            ):
                raise UserError(f"{path}, line {number}: needs text in {' or '.join(names)}")
        yield row


def field(row: dict[str, Any], names: Sequence[str]) -> str:
    """Returns the row's text under the first of `names` that has one."""
    return str(next(row[name] for name in names if isinstance(row.get(name), str)))


def verdicts(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Returns the rows with `verdict` and `reason`, and a summary.

    Rows with a `label` (correct or wrong) are compared with it.
    """
    with Pool() as pool:
        calls = [(field(row, PREDICTION), field(row, GOLD)) for row in rows]
        answers = pool.map("rewards.accuracy:verify", calls, timeout_s=accuracy.TIMEOUT_S)
    found = [
        plugins.verdict_of(answer) if isinstance(answer, Failure) else answer for answer in answers
    ]
    graded = [
        row | {"verdict": verdict.value, "reason": verdict.reason}
        for row, verdict in zip(rows, found, strict=True)
    ]
    lines = [
        f"{len(rows)} answers: "
        + ", ".join(f"{n} {kind}" for kind, n in Counter(v.value for v in found).most_common())
    ]
    lines += [
        f"{n:8}  {why}"
        for why, n in Counter(f"{v.value}: {v.reason}" for v in found if v.reason).most_common(10)
    ]
    judged = [
        (row["label"], row["verdict"]) for row in graded if row.get("label") in ("correct", "wrong")
    ]
    if judged:
        right = sum(label == verdict for label, verdict in judged)
        false = Counter(verdict for label, verdict in judged if label != verdict)
        lines.append(
            f"against {len(judged)} labels: {right / len(judged):.1%} agree, {false['correct']} "
            "false positives, "
            f"{false['wrong']} false negatives, {false['undecided']} undecided"
        )
    return graded, "\n".join(lines)


def regrade(run: Path) -> tuple[list[dict[str, Any]], str]:
    """Returns a run's samples with today's parts and rewards, and a text.

    The text tells how they differ from what the run has written.
    """
    from grpo.stages.registry import stage_of

    files = sorted((run / "samples").glob("*.jsonl"))
    if not files or not (run / "config.yaml").exists():
        raise UserError(f"{run}: is no run directory with samples and a config.yaml")
    tree = yaml.safe_load((run / "config.yaml").read_text())
    # every stage that writes samples has rewards
    config: Any = configs.parse(tree, str(run / "config.yaml"), stage_of(tree).config_class)
    rows = [row | {"file": file.stem} for file in files for _, row in _json_lines(file)]
    groups = [
        list(rows_of)
        for _, rows_of in itertools.groupby(rows, key=lambda row: (row["file"], row["problem"]))
    ]
    with Pool(config.reward_pool.workers, memory_gb=config.reward_pool.memory_gb) as pool:
        rewards = plugins.rewards(config.rewards, pool)
        scored = score(
            [_group(rows_of) for rows_of in groups], rewards, lambda problem: problem.question
        )
    return _changes(rows, scored)


def _changes(
    rows: list[dict[str, Any]], scored: list[ScoredGroup]
) -> tuple[list[dict[str, Any]], str]:
    new = [
        row
        | {
            "reward_then": row["reward"],
            "parts_then": row["parts"],
            "reward": reward,
            "parts": part,
            "reason": verdict and verdict.reason,
        }
        for row, (reward, part, verdict) in zip(
            rows,
            (
                each
                for group in scored
                for each in zip(group.rewards, group.parts, group.verdicts, strict=True)
            ),
            strict=True,
        )
    ]
    lines = [f"{len(rows)} completions of {len(scored)} groups"]
    for name in new[0]["parts"]:
        then, now = ([row[key].get(name) for row in new] for key in ("parts_then", "parts"))
        changed = [row for row, a, b in zip(new, then, now, strict=True) if a != b]
        means = [
            sum(known) / len(known)
            if (known := [value for value in values if value is not None])
            else float("nan")
            for values in (then, now)
        ]
        lines.append(f"{name:12} {means[0]:.4f} then, {means[1]:.4f} now, {len(changed)} changed")
        for row in changed[:CHANGES_SHOWN]:
            told = (
                f"  {row['file']} {row['problem']}: {row['parts_then'].get(name)} -> "
                f"{row['parts'].get(name)}"
            )
            lines.append(
                f"{told} ({row['reason'] or 'no reason'}) gold {row['answer']!r}, ended in "
                f"{row['completion'][-60:]!r}"
            )
    return new, "\n".join(lines)


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields each line's number and value; an empty last line is none.

    Raises UserError with the line's number.
    """
    try:
        # splitlines knows more ends than JSONL has
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip() and number == len(lines):
            return
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: no JSON: {error}") from None


def _group(rows: list[dict[str, Any]]) -> Group:
    first = rows[0]
    problem = Problem(
        id=first["problem"],
        question=first["question"],
        answer=first["answer"],
        source="",
        meta=first.get("meta") or {},
    )
    completions = tuple(
        Completion(
            token_ids=(0,) * row["tokens"],
            logprobs=(),
            text=row["completion"],
            finish_reason=row["finish_reason"],
            versions=(),
        )
        for row in rows
    )
    return Group(problem=problem, prompt_ids=(), completions=completions)
