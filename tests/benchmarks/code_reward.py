"""Measures the code reward: verdicts on reference solutions, verdicts per second, and latency.

    .venv/bin/python tests/benchmarks/code_reward.py [PROBLEMS.jsonl ...] [--workers 2]

The files are HumanEval and MBPP, as published or with the field `answer`: `prompt` or `text`,
`canonical_solution` or `code`, and the tests. Each reference solution must be correct, and each
must be wrong when the functions that the tests use return None.

Speed: the verdicts of a worker pool on a program whose test needs 10 ms of processor time, and the
time from the source of a program to its output in a sandbox that is started for it.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

from grpo.rewards import code
from grpo.rewards.judge.tests import read_function_tests
from grpo.rewards.workers.pool import WorkerPool
from grpo.rewards.workers.sandbox import run
from grpo.types import Completion, Problem, Verdict

META_FIELDS = ("entry_point", "test", "test_list", "test_setup_code")
NUM_CALLS = 400
NUM_REPEATS = 3
BUSY_PROGRAM = """
import time

def work(x):
    end = time.process_time() + 0.010
    while time.process_time() < end:
        pass
    return x
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    with WorkerPool(arguments.workers) as pool:
        for path in arguments.files:
            report_references(path, pool)
        report_speed(pool, arguments.workers)
    report_latency()


def report_references(path: Path, pool: WorkerPool) -> None:
    problems = []
    solutions = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        problems.append(read_row(row))
        solutions.append(str(first_field(row, "canonical_solution", "code", "answer")))
    refused = []
    for problem in problems:
        try:
            code.read_problem(problem)
        except ValueError as error:
            refused.append(f"{problem.id}: {error}")
    emptied = [
        without_bodies(solution, problem)
        for solution, problem in zip(solutions, problems, strict=True)
    ]
    print(f"{path.name}: {len(problems)} problems, {len(refused)} refused", *refused, sep="\n  ")
    for name, programs in (("reference solutions", solutions), ("functions return None", emptied)):
        start = time.monotonic()
        verdicts = judge(programs, problems, pool)
        seconds = time.monotonic() - start
        counts = Counter(verdict.value for verdict in verdicts)
        print(f"  {name}: {dict(counts)}, {len(verdicts) / seconds:.0f} per second")


def first_field(row: dict[str, Any], *names: str) -> Any:
    for name in names:
        if name in row:
            return row[name]
    raise SystemExit(f"a row has none of the fields {', '.join(names)}: {list(row)}")


def read_row(row: dict[str, Any]) -> Problem:
    return Problem(
        id=str(first_field(row, "task_id", "id")),
        question=first_field(row, "prompt", "text", "problem"),
        answer="",
        source="benchmark",
        meta={field: row[field] for field in META_FIELDS if field in row},
    )


def without_bodies(solution: str, problem: Problem) -> str:
    """Returns a solution in which the functions that the tests use return None."""
    tests = read_function_tests(problem)
    assert tests is not None
    tree = ast.parse(code._complete(solution, problem))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in tests.names:
            node.body = [ast.Return(ast.Constant(None))]
    return ast.unparse(ast.fix_missing_locations(tree))


def judge(programs: list[str], problems: list[Problem], pool: WorkerPool) -> list[Verdict]:
    calls = []
    for program, problem in zip(programs, problems, strict=True):
        text = f"```python\n{program}\n```"
        completion = Completion(
            token_ids=(), logprobs=(), text=text, finish_reason="stop", versions=()
        )
        calls.append((completion, problem))
    return pool.map("grpo.rewards.code:reward", calls, timeout_s=code.TIMEOUT_S)


def report_speed(pool: WorkerPool, num_workers: int) -> None:
    cases = {
        "function": {"test_list": ["assert work(3) == 3"]},
        "input and output": {"io": [{"input": "3", "output": "3"}]},
    }
    for name, meta in cases.items():
        problem = Problem(id=name, question="?", answer="", source="benchmark", meta=meta)
        program = BUSY_PROGRAM + ("print(work(int(input())))" if "io" in meta else "")
        rates = []
        for _ in range(NUM_REPEATS + 1):  # the first time starts the sandboxes
            start = time.monotonic()
            verdicts = judge([program] * NUM_CALLS, [problem] * NUM_CALLS, pool)
            rates.append(NUM_CALLS / (time.monotonic() - start))
            assert all(verdict.value == "correct" for verdict in verdicts)
        shown = ", ".join(f"{rate:.0f}" for rate in rates[1:])
        print(f"{name}, tests of 10 ms, {num_workers} workers: {shown} verdicts per second")


def report_latency() -> None:
    for isolation in ("namespaces", "rlimits"):
        seconds = []
        for _ in range(30):
            start = time.monotonic()
            run("print(1)", timeout_s=10, isolation=isolation)
            seconds.append(time.monotonic() - start)
        print(
            f"one program in a new sandbox ({isolation}): median "
            f"{1000 * statistics.median(seconds):.0f} ms, longest {1000 * max(seconds):.0f} ms"
        )


if __name__ == "__main__":
    main()
