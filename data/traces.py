"""Traces: solutions with the thoughts that lead to them.

`grpo collect` writes them, and reasoning data sets publish them. A row has one of these forms:

- a question and a solution: `question` or `problem`, and `solution` (the form of `grpo collect`)
- a conversation: `messages` or `conversations`
- `prompt`, and `completion` or `response`, as text or as messages

The thoughts are in the solution, between <think> tags or the tags of Sky-T1, or in their own field.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from grpo.data.common.files import HubDataset, Row, check_split, check_unique_ids, read_rows
from grpo.types import Problem, UserError

QUESTION_FIELDS = ("question", "problem", "prompt", "instruction")
SOLUTION_FIELDS = ("solution", "trace", "completion", "response", "output", "content")
CONVERSATION_FIELDS = ("messages", "conversations")
THOUGHTS_FIELDS = ("thinking", "reasoning_content", "reasoning", "think", "thought")
USER_ROLES = ("user", "human")
ASSISTANT_ROLES = ("assistant", "gpt")
# Sky-T1's tags and their replacements.
TAG_REPLACEMENTS = {
    r"<\|begin_of_thought\|>": "<think>",
    r"<\|end_of_thought\|>": "</think>",
    r"<\|(?:begin|end)_of_solution\|>": "",
}


# The keyword parameters are the options of the data set in a config.
def load(  # noqa: PLR0913
    split: str,
    *,
    seed: int,
    path: str | None = None,
    hub: str | None = None,
    subset: str | None = None,
    malformed: list[str] | None = None,
) -> Sequence[Problem]:
    """Returns the traces as problems. Each solution is `<think>...</think>` and the text after it.

    Args:
        split: `train` or `test`; both return all traces.
        seed: Unused.
        path: A file, or a folder with traces.jsonl, such as the run directory of `grpo collect`.
        hub: A data set on the hub, used if `path` is None. Its train split is read. Example:
            `options: {hub: open-r1/OpenR1-Math-220k, subset: default}`.
        subset: The configuration of the data set on the hub.
        malformed: A list that receives the reason for each row that cannot be read, which is then
            skipped. None: such a row is an error.

    Raises:
        UserError: Neither `path` nor `hub` is set, or a row has no question, no solution or no
            thoughts.
    """
    check_split("traces", split)
    if path is None and hub is None:
        raise UserError(
            "data.traces: no data.path. Set it to a traces.jsonl or to the run directory of `grpo "
            "collect`, or set options: {hub: OWNER/NAME}."
        )
    hub_dataset = HubDataset(hub, subset, "train") if hub else None
    problems = []
    rows = read_rows(path, stems=["traces"], hub=hub_dataset, malformed=malformed)
    for index, row in enumerate(rows):
        try:
            trace = _read_trace(row)
        except UserError as error:
            if malformed is None:
                raise
            malformed.append(str(error))
            continue
        row_id = row.fields.get("id")
        problem = Problem(
            id=str(row_id) if row_id is not None else f"traces/{index}",
            question=trace.question,
            solution=trace.solution,
            answer=str(row.fields.get("answer") or ""),
            source=str(row.fields.get("source") or "traces"),
        )
        problems.append(problem)
    check_unique_ids(problems)
    return problems


class _Trace(NamedTuple):
    question: str
    solution: str


def _read_trace(row: Row) -> _Trace:
    messages = _first_value(row.fields, CONVERSATION_FIELDS)
    if messages is not None:
        question = message_of(row, messages, USER_ROLES)
        solution = message_of(row, messages, ASSISTANT_ROLES)
        thoughts = thoughts_of(messages)
    else:
        question = _text_of(row, QUESTION_FIELDS, USER_ROLES)
        solution = _text_of(row, SOLUTION_FIELDS, ASSISTANT_ROLES)
        thoughts = _first_value(row.fields, THOUGHTS_FIELDS)
    solution = with_think_tags(solution, thoughts)
    if "</think>" not in solution.partition("<think>")[2]:
        raise UserError(
            f"{row.location}: no thoughts, expected <think>...</think> in the solution or one of "
            f"the fields {', '.join(THOUGHTS_FIELDS)}"
        )
    return _Trace(question.strip(), solution.strip())


def _first_value(fields: dict[str, Any], names: Sequence[str]) -> Any:
    """Returns the value of the first field out of `names` that is not empty, None if all are."""
    for name in names:
        if fields.get(name):
            return fields[name]
    return None


def thoughts_of(messages: Any) -> Any:
    """Returns the thoughts of a conversation that are in a field of their own, None without."""
    for message in messages:
        if isinstance(message, dict):
            thoughts = _first_value(message, THOUGHTS_FIELDS)
            if thoughts is not None:
                return thoughts
    return None


def with_think_tags(solution: str, thoughts: Any) -> str:
    """Returns the solution with its thoughts between <think> tags, if it has thoughts.

    Args:
        solution: The text of the assistant.
        thoughts: The value of the separate field of the thoughts, None if there is no such field.
    """
    for pattern, tag in TAG_REPLACEMENTS.items():
        solution = re.sub(pattern, tag, solution)
    if "<think>" in solution:
        return solution
    if "</think>" in solution:  # the opening tag was the end of the prompt
        return "<think>" + solution
    if isinstance(thoughts, str):
        return f"<think>\n{thoughts.strip()}\n</think>\n{solution}"
    return solution


def _text_of(row: Row, names: Sequence[str], roles: tuple[str, ...]) -> str:
    value = _first_value(row.fields, names)
    if isinstance(value, list):
        return message_of(row, value, roles)
    if not isinstance(value, str):
        raise UserError(
            f"{row.location}: no {' or '.join(names)}. The row has the fields "
            f"{', '.join(row.fields)}."
        )
    return value


def message_of(row: Row, messages: Any, roles: tuple[str, ...]) -> str:
    """Returns the only message of a role.

    Raises:
        UserError: There is no such message, or several: a longer conversation is not a trace of one
            problem.
    """
    if not isinstance(messages, list):
        raise UserError(
            f"{row.location}: messages are a {type(messages).__name__}, expected a list"
        )
    contents = [
        message.get("content", message.get("value"))
        for message in messages
        if isinstance(message, dict) and message.get("role", message.get("from")) in roles
    ]
    if len(contents) != 1:
        raise UserError(f"{row.location}: expected one message of {roles[0]}, got {len(contents)}")
    if not isinstance(contents[0], str):
        raise UserError(
            f"{row.location}: the message of {roles[0]} is a {type(contents[0]).__name__}, "
            "expected text"
        )
    return contents[0]
