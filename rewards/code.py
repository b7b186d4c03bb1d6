"""Code reward: does the completion's program pass its tests?

Each test run is a process in a sandbox; workers/sandbox.py describes the isolation. The tests come
with the problem, in `Problem.meta`:

- HumanEval: `test` and `entry_point`.
- MBPP: `test_list` and `test_setup_code`.
- Programs that read and write: `io`, a list of `{"input": ..., "output": ...}`. The output is
  compared outside of the sandbox.

The tests of functions (HumanEval, MBPP) run in the interpreter of the program. Two simple ways to
cheat fail: ending before the tests (`exit(0)`), and returning an object that equals everything. A
program that targets the test harness can still forge a pass, for example by replacing `exec` or by
reading the token that marks success. Inspect the programs in the samples of a run.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from grpo.types import Completion, Problem, UserError, Verdict
from rewards.verifier.parse import final_answer, visible
from rewards.verifier.verdicts import CORRECT, wrong
from rewards.workers.sandbox import Outcome, SandboxUnavailableError, run

TIMEOUT_S = 120.0  # time limit of one call in a worker of the pool
OVERHEAD_S = 10  # part of TIMEOUT_S that is reserved for everything but the test runs
MAX_CHARS = 50_000
# Runs a program and its function tests. It prints the token when all tests have passed. The tests
# call the program's functions through wrappers that reject objects with an __eq__ of the program;
# the program's own calls do not use the wrappers.
HARNESS = """
import functools, json, os, sys
program, setup, tests, entry_point, token = json.loads({spec!r})
namespace = {{"__name__": "__main__"}}
exec(compile(setup, "setup", "exec"), namespace)
setup_names = set(namespace)
exec(compile(program, "program", "exec"), namespace)
test_namespace = dict(namespace)

def checked(value, depth=0):
    kind = type(value)
    has_own_equality = kind.__module__ == "__main__" and kind.__eq__ is not object.__eq__
    assert not has_own_equality and depth < 50, "an object with its own __eq__"
    if isinstance(value, dict):
        parts = [*value, *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = value
    else:
        parts = ()
    for part in parts:
        checked(part, depth + 1)
    return value

def wrapped(function):
    return functools.wraps(function)(lambda *args, **kwargs: checked(function(*args, **kwargs)))

for name in set(namespace) - setup_names:
    if callable(namespace[name]) and not isinstance(namespace[name], type):
        test_namespace[name] = wrapped(namespace[name])
exec(compile(tests, "tests", "exec"), test_namespace)
if entry_point:
    test_namespace["check"](test_namespace[entry_point])
os.write(1, token.encode())
os._exit(0)
"""


def prepare(
    isolation: Literal["namespaces", "rlimits"] = "namespaces", timeout_s: float = 10.0, **_: object
) -> None:
    """Checks the options and that the sandbox works on this machine.

    Raises:
        UserError: The isolation is unknown, the time limit is out of range, the system does not
            allow the sandbox, or a test program fails in it.
    """
    if not 0 < timeout_s <= TIMEOUT_S / 2:
        raise UserError(
            f"rewards.code.options.timeout_s: got {timeout_s}, expected more than 0 and at most "
            f"{TIMEOUT_S / 2:g} seconds"
        )
    if isolation not in ("namespaces", "rlimits"):
        raise UserError(
            f"rewards.code.options.isolation: got {isolation!r}, expected namespaces or rlimits"
        )
    try:
        outcome = run("print(6 * 7)", timeout_s=30, isolation=isolation)
    except SandboxUnavailableError as error:
        raise UserError(
            f"rewards.code: this system forbids the namespaces of the sandbox ({error}). Allow "
            "user namespaces (sysctl user.max_user_namespaces, docker --security-opt "
            "seccomp=unconfined). To run completions without a sandbox, at your own risk, set "
            "options: {isolation: rlimits}."
        ) from None
    if outcome.output != "42\n":
        raise UserError(f"rewards.code: a test program in the sandbox failed: {outcome}")


def reward(
    completion: Completion,
    problem: Problem,
    *,
    timeout_s: float = 10.0,
    memory_mb: int = 1024,
    isolation: Literal["namespaces", "rlimits"] = "namespaces",
) -> Verdict | None:
    """Returns the verdict on the completion's program, or None for a problem without tests.

    Args:
        completion: The completion; see `extract_program` for what counts as its program.
        problem: A problem with tests in its `meta`; see the module.
        timeout_s: Time limit of each test run. With `io`, each pair is a run.
        memory_mb: Address space of each test run, in MiB.
        isolation: `namespaces` is the sandbox. `rlimits` limits resources only: files and network
            are open.
    """
    meta = problem.meta
    if not any(meta.get(key) for key in ("test", "test_list", "io")):
        return None
    program = extract_program(completion.text)
    if program is None:
        return wrong("no program")
    if len(program) > MAX_CHARS:
        return wrong(f"longer than {MAX_CHARS} characters")
    run_limited = functools.partial(
        run, timeout_s=timeout_s, memory_mb=memory_mb, isolation=isolation
    )
    # The limit is checked before each run, so the last run can exceed it by `timeout_s`.
    time_limit_s = TIMEOUT_S - timeout_s - OVERHEAD_S
    fault = _fault_on_inputs(program, meta.get("io") or [], run_limited, time_limit_s)
    if not fault and (meta.get("test") or meta.get("test_list")):
        token = secrets.token_hex()
        outcome = run_limited(_with_tests(program, problem, token))
        fault = _fault_of(outcome, passed=outcome.output.endswith(token))
    return wrong(fault) if fault else CORRECT


def extract_program(text: str) -> str | None:
    """Returns the program of a completion, None if there is none.

    It is the last closed code block (between lines that begin with ```) of the answer. The answer
    is the content of the `<answer>` tags or, without them, the text outside the thoughts. An answer
    in tags without a code block is the program itself.
    """
    visible_text = visible(text)
    answer = final_answer(text) if "<answer>" in visible_text else None
    searched_text = visible_text if answer is None else answer
    blocks: list[str] = []
    open_block: list[str] | None = None
    for line in searched_text.splitlines():
        if line.startswith("```"):
            if open_block is None:
                open_block = []
            else:
                blocks.append("\n".join(open_block) + "\n")
                open_block = None
        elif open_block is not None:
            open_block.append(line)
    return blocks[-1] if blocks else answer


def _fault_on_inputs(
    program: str,
    pairs: Sequence[dict[str, Any]],
    run_limited: Callable[[str, str], Outcome],
    time_limit_s: float,
) -> str:
    """Runs a program on each input. Returns the first fault, "" if all outputs are right.

    `time_limit_s` applies to all runs together. It is checked before each run.
    """
    deadline = time.monotonic() + time_limit_s
    for number, pair in enumerate(pairs):
        if time.monotonic() > deadline:
            return f"took more than {time_limit_s:g} s for {number} inputs"
        outcome = run_limited(program, str(pair["input"]))
        passed = _stripped_lines(outcome.output) == _stripped_lines(str(pair["output"]))
        fault = _fault_of(outcome, passed=passed)
        if fault:
            return f"input {number}: {fault}"
    return ""


def _with_tests(program: str, problem: Problem, token: str) -> str:
    """Returns the source that runs a program and its function tests, and prints the token last."""
    meta = problem.meta
    entry_point = str(meta.get("entry_point") or "")
    setup = str(meta.get("test_setup_code") or "")
    if entry_point:
        if not re.search(rf"^def {re.escape(entry_point)}\b", program, re.MULTILINE):
            # HumanEval: the program continues the function at the end of the question.
            program = problem.question + program
        imports_and_helpers, definition, _ = problem.question.partition(f"def {entry_point}(")
        if definition:
            setup = imports_and_helpers
    tests = str(meta.get("test") or "\n".join(meta.get("test_list") or []))
    checked_function = entry_point if meta.get("test") else ""
    return HARNESS.format(spec=json.dumps([program, setup, tests, checked_function, token]))


def _fault_of(outcome: Outcome, *, passed: bool) -> str:
    """Returns the reason why a run failed, "" if it passed."""
    if outcome.timed_out:
        return "took too long"
    if outcome.code != 0:
        return f"ended with code {outcome.code}"
    return "" if passed else "failed"


def _stripped_lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
