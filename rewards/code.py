"""Code reward: does the completion's program pass its tests?

Run in a sandbox (see workers/sandbox.py for what it stops), one process a test run.

Tests come with the problem, in `meta`: HumanEval's `test` and `entry_point`; MBPP's `test_list` and
`test_setup_code`; or `io`, a list of `{"input": ..., "output": ...}` for programs that read and
write. A program that ends before its tests (`exit(0)`) fails, so does a function that returns an
object of its own class that is equal to everything. Function tests run in the program's
interpreter, so a program that sets out to can still forge a pass (replace `exec`, read its judge's
mark): read the samples. `io` tests are judged outside.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from typing import Literal

from grpo.types import Completion, Problem, UserError, Verdict
from rewards.verifier.parse import final_answer, visible
from rewards.workers.sandbox import NoSandbox, Outcome, run

TIMEOUT_S = 120.0  # of the whole call, in a worker of the pool
MAX_CHARS = 50_000
JUDGE = """
import functools, json, os, sys
program, setup, tests, check, token = json.loads({spec!r})
space = {{"__name__": "__main__"}}
exec(compile(setup, "setup", "exec"), space)
before = set(space)
exec(compile(program, "program", "exec"), space)
judged = dict(space)  # the program's own calls stay as they are

def honest(value, depth=0):
    own = type(value).__module__ == "__main__" and type(value).__eq__ is not object.__eq__
    assert not own and depth < 50, "an object with an equality of its own"
    if isinstance(value, dict):
        parts = [*value, *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = value
    else:
        parts = ()
    for part in parts:
        honest(part, depth + 1)
    return value

def guarded(function):
    return functools.wraps(function)(lambda *args, **kwargs: honest(function(*args, **kwargs)))

for name in set(space) - before:
    if callable(space[name]) and not isinstance(space[name], type):
        judged[name] = guarded(space[name])
exec(compile(tests, "tests", "exec"), judged)
if check:
    judged["check"](judged[check])
os.write(1, token.encode())
os._exit(0)
"""


def prepare(
    isolation: Literal["namespaces", "rlimits"] = "namespaces", timeout_s: float = 10.0, **_: object
) -> None:
    """Checks that this machine can make the sandbox, and that the options are usable.

    Raises UserError when the sandbox cannot be made, the isolation is unknown, or the time limit is
    of no use.
    """
    if not 0 < timeout_s <= TIMEOUT_S / 2:
        raise UserError(
            f"rewards.code.options.timeout_s: got {timeout_s}; give up to {TIMEOUT_S / 2:g} seconds"
        )
    if isolation not in ("namespaces", "rlimits"):
        raise UserError(
            f"rewards.code.options.isolation: got {isolation!r}; give namespaces or rlimits"
        )
    try:
        outcome = run("print(6 * 7)", timeout_s=30, isolation=isolation)
    except NoSandbox as error:
        raise UserError(
            f"rewards.code: this system forbids the namespaces of the sandbox ({error}). Allow "
            "user namespaces "
            "(sysctl user.max_user_namespaces, docker --security-opt seccomp=unconfined), or run "
            "completions without a sandbox, "
            "at your own risk: options: {isolation: rlimits}"
        ) from None
    if outcome.output != "42\n":
        raise UserError(f"rewards.code: a first program in the sandbox failed: {outcome}")


def reward(
    completion: Completion,
    problem: Problem,
    *,
    timeout_s: float = 10.0,
    memory_mb: int = 1024,
    isolation: Literal["namespaces", "rlimits"] = "namespaces",
) -> Verdict | None:
    """The verdict on the completion's program, or None for a problem without tests.

    `timeout_s`: of each run (`io`: of each pair).
    """
    meta = problem.meta
    if not any(meta.get(key) for key in ("test", "test_list", "io")):
        return None
    program = extract(completion.text)
    if program is None or len(program) > MAX_CHARS:
        return Verdict(
            value="wrong",
            reason="no program" if program is None else f"longer than {MAX_CHARS} characters",
        )
    limits = {"timeout_s": timeout_s, "memory_mb": memory_mb, "isolation": isolation}
    end = time.monotonic() + TIMEOUT_S - timeout_s - 10
    for number, pair in enumerate(meta.get("io") or []):
        if time.monotonic() > end:
            return Verdict(
                value="wrong",
                reason=f"took more than {TIMEOUT_S - timeout_s - 10:g} s for {number} inputs",
            )
        outcome = run(program, str(pair["input"]), **limits)  # type: ignore[arg-type]
        if fault := _fault(outcome, _lines(outcome.output) == _lines(str(pair["output"]))):
            return Verdict(value="wrong", reason=f"input {number}: {fault}")
    if meta.get("test") or meta.get("test_list"):
        token = secrets.token_hex()
        outcome = run(_judged(program, problem, token), **limits)  # type: ignore[arg-type]
        if fault := _fault(outcome, outcome.output.endswith(token)):
            return Verdict(value="wrong", reason=fault)
    return Verdict(value="correct")


def extract(text: str) -> str | None:
    """The program of a completion.

    It is the last fenced block of the answer, or the whole of what stands in `<answer>` tags.
    """
    answer = final_answer(text) if "<answer>" in visible(text) else None
    blocks: list[str] = []
    block: list[str] | None = None
    for line in (visible(text) if answer is None else answer).splitlines():
        if line.startswith("```"):
            if block is not None:
                blocks.append("\n".join(block) + "\n")
            block = [] if block is None else None
        elif block is not None:
            block.append(line)
    return blocks[-1] if blocks else answer


def _judged(program: str, problem: Problem, token: str) -> str:
    """Returns the source that runs a program and its function tests.

    The source prints the token when all tests have passed.
    """
    meta = problem.meta
    entry = str(meta.get("entry_point") or "")
    if entry and not re.search(rf"^def {re.escape(entry)}\b", program, re.MULTILINE):
        # HumanEval: the completion goes on where the prompt ends
        program = problem.question + program
    before, found, _ = problem.question.partition(f"def {entry}(") if entry else ("", "", "")
    # the prompt's imports and helpers
    setup = before if found else str(meta.get("test_setup_code") or "")
    tests = str(meta.get("test") or "\n".join(meta.get("test_list") or []))
    return JUDGE.format(
        spec=json.dumps([program, setup, tests, entry if meta.get("test") else "", token])
    )


def _fault(outcome: Outcome, right: bool) -> str:
    if outcome.timed_out:
        return "took too long"
    if outcome.code != 0:
        return f"ended with code {outcome.code}"
    return "" if right else "failed"


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
