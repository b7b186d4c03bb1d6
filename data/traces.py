"""Traces: worked solutions with their thoughts.

`grpo collect` writes them, and published sets of reasoning traces hold them.

Read from a file or a folder with traces.jsonl: fields question | problem and solution (ours);
messages or conversations; prompt and completion | response (text or messages); the thoughts in
their own field, or marked by R1's or Sky-T1's tags.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from data.common.files import Hub, Row, check_split, rows, unique
from grpo.types import Problem, UserError

QUESTION, ANSWER = (
    ("question", "problem", "prompt", "instruction"),
    ("solution", "trace", "completion", "response", "output", "content"),
)
THOUGHTS = ("thinking", "reasoning_content", "reasoning", "think", "thought")
MARKS = {
    r"<\|begin_of_thought\|>": "<think>",
    r"<\|end_of_thought\|>": "</think>",
    r"<\|(?:begin|end)_of_solution\|>": "",
}


def load(
    split: str,
    *,
    seed: int,
    path: str | None = None,
    hub: str | None = None,
    subset: str | None = None,
) -> Sequence[Problem]:
    """The traces as problems whose solution holds `<think>...</think>` and what follows.

    Raises UserError naming a row without either.

    Without `path`, those of the hub's data set `hub`, its train split: `options: {hub:
    open-r1/OpenR1-Math-220k, subset: default}`.
    """
    check_split("traces", split)
    if path is None and hub is None:
        raise UserError(
            "data.traces: no data.path; give traces.jsonl, the run directory of `grpo collect`, "
            "or options: {hub: OWNER/NAME}"
        )
    problems = []
    for number, row in enumerate(
        rows(path, stems=["traces"], hub=Hub(hub, subset, "train") if hub else None)
    ):
        question, solution = _pair(row)
        own_id = row.fields.get("id")
        problems.append(
            Problem(
                id=str(own_id) if own_id is not None else f"traces/{number}",
                question=question,
                solution=solution,
                answer=str(row.fields.get("answer") or ""),
                source=str(row.fields.get("source") or "traces"),
            )
        )
    return unique(problems)


def _pair(row: Row) -> tuple[str, str]:
    """Returns question and solution of a row in any of the forms."""
    fields = row.fields
    turns = next((fields[key] for key in ("messages", "conversations") if fields.get(key)), None)
    if turns is not None:
        asked, answered = (
            _of_role(row, turns, ("user", "human")),
            _of_role(row, turns, ("assistant", "gpt")),
        )
        thoughts = next(
            (
                turn.get(key)
                for turn in turns
                if isinstance(turn, dict)
                for key in THOUGHTS
                if turn.get(key)
            ),
            None,
        )
    else:
        asked, answered = (
            _field(row, QUESTION, ("user", "human")),
            _field(row, ANSWER, ("assistant", "gpt")),
        )
        thoughts = next((fields[key] for key in THOUGHTS if fields.get(key)), None)
    for mark, tag in MARKS.items():
        answered = re.sub(mark, tag, answered)
    if "<think>" not in answered and "</think>" in answered:
        answered = "<think>" + answered  # the prompt held the first tag
    if "<think>" not in answered and isinstance(thoughts, str):
        answered = f"<think>\n{thoughts.strip()}\n</think>\n{answered}"
    if "</think>" not in answered.partition("<think>")[2]:
        raise UserError(
            f"{row.place}: no thoughts: expected <think>...</think> in the solution, or one of "
            f"{', '.join(THOUGHTS)}"
        )
    return asked.strip(), answered.strip()


def _field(row: Row, names: Sequence[str], roles: tuple[str, ...]) -> str:
    value = next((row.fields[name] for name in names if row.fields.get(name)), None)
    if isinstance(value, list):
        return _of_role(row, value, roles)
    if not isinstance(value, str):
        raise UserError(f"{row.place}: no {' or '.join(names)}; have {', '.join(row.fields)}")
    return value


def _of_role(row: Row, turns: Any, roles: tuple[str, ...]) -> str:
    """Returns the first message of a role. A longer conversation is not a trace of one problem."""
    found = [
        turn.get("content", turn.get("value"))
        for turn in turns
        if isinstance(turn, dict) and turn.get("role", turn.get("from")) in roles
    ]
    if len(found) != 1 or not isinstance(found[0], str):
        raise UserError(f"{row.place}: expected one message of {roles[0]}, got {len(found)}")
    return found[0]
