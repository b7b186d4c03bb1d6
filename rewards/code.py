"""Code reward: does the completion's program pass its tests?

The tests come with the problem, in `Problem.meta`:

- HumanEval: `test` and `entry_point`.
- MBPP: `test_list` and `test_setup_code`.
- Programs that read and write: `io`, a list of `{"input": ..., "output": ...}`.

The program runs in a sandbox (workers/sandbox.py). It never sees the tests: those of functions run
in another process (judge/), and an output is compared outside of the sandbox. docs/code_reward.md
lists what this stops and what not.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Sequence
from typing import Any

from grpo.rewards.judge.judging import CodeJudge, time_limit_verdict
from grpo.rewards.judge.tests import RefusedTestsError, is_python, read_function_tests
from grpo.rewards.verifier.parse import final_answer, visible
from grpo.rewards.verifier.verdicts import CORRECT, wrong
from grpo.rewards.workers.sandbox import (
    DEFAULT_MEMORY_MB,
    MAX_OUTPUT_BYTES,
    Isolation,
    Outcome,
    SandboxLostError,
    SandboxUnavailableError,
)
from grpo.types import Completion, Problem, UserError, Verdict

TIMEOUT_S = 120.0  # time limit of one call in a worker of the pool
OVERHEAD_S = 10  # part of TIMEOUT_S that is reserved for everything but the test runs
MAX_CHARS = 50_000
MIN_MEMORY_MB = 64
MAX_MEMORY_MB = 1 << 20
TRIAL_PROGRAM = "import json, random; memory = bytearray(16 << 20); print(6 * 7)"
TRIAL_TIMEOUT_S = 30


def prepare(
    isolation: Isolation = "namespaces",
    timeout_s: float = 10.0,
    memory_mb: int = DEFAULT_MEMORY_MB,
) -> None:
    """Checks the options, and that a program runs in the sandbox on this machine.

    Raises:
        UserError: An option is wrong, the system does not allow the sandbox, or the memory is too
            little for Python.
    """
    if not _is_number(timeout_s) or not 0 < timeout_s <= TIMEOUT_S / 2:
        raise UserError(
            f"rewards.code.options.timeout_s: got {timeout_s!r}, expected more than 0 and at most "
            f"{TIMEOUT_S / 2:g} seconds"
        )
    if isolation not in ("namespaces", "rlimits"):
        raise UserError(
            f"rewards.code.options.isolation: got {isolation!r}, expected namespaces or rlimits"
        )
    if not isinstance(memory_mb, int) or not MIN_MEMORY_MB <= memory_mb <= MAX_MEMORY_MB:
        raise UserError(
            f"rewards.code.options.memory_mb: got {memory_mb!r}, expected a whole number from "
            f"{MIN_MEMORY_MB} to {MAX_MEMORY_MB}"
        )
    judge = CodeJudge(memory_mb=memory_mb, isolation=isolation)
    try:
        outcome = judge.run(TRIAL_PROGRAM, "", TRIAL_TIMEOUT_S)
    except SandboxUnavailableError as error:
        raise UserError(
            f"rewards.code: this system does not allow the sandbox ({error}). Allow user "
            "namespaces (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, "
            "kernel.apparmor_restrict_unprivileged_userns; docker --security-opt "
            "seccomp=unconfined). To run completions without namespaces, at your own risk, set "
            "options: {isolation: rlimits}."
        ) from None
    except SandboxLostError as error:
        raise UserError(f"rewards.code: the sandbox does not start: {error}") from None
    finally:
        judge.close()
    if outcome.output != "42\n":
        raise UserError(
            f"rewards.code: a small program failed in the sandbox ({outcome}). Python may have "
            f"too little memory: raise rewards.code.options.memory_mb={memory_mb}."
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_problem(problem: Problem) -> Problem:
    """Returns the problem if its tests can be judged.

    Raises:
        ValueError: They cannot. The message is the reason.
    """
    read_function_tests(problem)
    pairs = problem.meta.get("io") or []
    if not isinstance(pairs, list | tuple):
        raise ValueError("io: expected a list")
    for number, pair in enumerate(pairs):
        for field in ("input", "output"):
            if not isinstance(pair, dict) or not isinstance(pair.get(field), str):
                raise ValueError(f"io: element {number} has no text {field!r}")
        if len(pair["output"].encode()) > MAX_OUTPUT_BYTES:
            raise ValueError(f"io: the output of element {number} is longer than 1 MiB")
    return problem


@functools.cache
def _judge(memory_mb: int, isolation: Isolation) -> CodeJudge:
    """Returns the judge of this process. Its sandboxes end with the process."""
    return CodeJudge(memory_mb=memory_mb, isolation=isolation)


def reward(
    completion: Completion,
    problem: Problem,
    *,
    timeout_s: float = 10.0,
    memory_mb: int = DEFAULT_MEMORY_MB,
    isolation: Isolation = "namespaces",
) -> Verdict | None:
    """Returns the verdict on the completion's program, or None for a problem without tests.

    Args:
        completion: The completion; see `extract_program` for what counts as its program.
        problem: A problem with tests in its `meta`; see the module.
        timeout_s: Time limit of each test run, in seconds on an idle machine: the time that the
            program waits for a processor does not count. With `io`, each pair is a run.
        memory_mb: Address space of each test run, in MiB.
        isolation: `namespaces` is the sandbox. `rlimits` does without namespaces; see
            workers/sandbox.py.
    """
    meta = problem.meta
    if not any(meta.get(key) for key in ("test", "test_list", "io")):
        return None
    program = extract_program(completion.text)
    if program is None:
        return wrong("no program")
    if len(program) > MAX_CHARS:
        return wrong(f"longer than {MAX_CHARS} characters")
    judge = _judge(memory_mb, isolation)
    deadline = time.monotonic() + TIMEOUT_S - OVERHEAD_S
    try:
        verdict = _verdict_on_outputs(judge, program, meta.get("io") or [], timeout_s, deadline)
        if verdict.value != "correct":
            return verdict
        tests = read_function_tests(problem)
        if tests is None:
            return verdict
        max_real_s = deadline - time.monotonic()
        return judge.judge_functions(_complete(program, problem), tests, timeout_s, max_real_s)
    except (RefusedTestsError, SandboxLostError) as error:
        return Verdict(value="undecided", reason=f"not judged: {error}")


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


def _verdict_on_outputs(
    judge: CodeJudge,
    program: str,
    pairs: Sequence[dict[str, Any]],
    timeout_s: float,
    deadline: float,
) -> Verdict:
    """Runs a program on each input. Returns the verdict on its outputs; correct without inputs.

    All runs together have the time limit of the pool, less the last run, which can exceed it. A
    program that reaches the deadline (of `time.monotonic`) with time left is starved.
    """
    time_left_s = TIMEOUT_S - timeout_s - OVERHEAD_S
    for number, pair in enumerate(pairs):
        if time_left_s <= 0:
            return wrong(f"took too long for {number} inputs together")
        max_real_s = deadline - time.monotonic()
        if max_real_s <= 0:
            return time_limit_verdict(is_starved=True)
        outcome = judge.run(program, pair["input"], timeout_s, max_real_s)
        time_left_s -= outcome.elapsed_s
        if outcome.limit == "starved":
            return time_limit_verdict(is_starved=True)
        fault = _fault(outcome, pair["output"])
        if fault:
            return wrong(f"input {number}: {fault}")
    return CORRECT


def _fault(outcome: Outcome, expected_output: str) -> str:
    """Returns why a run failed, "" if it passed."""
    if outcome.limit == "time":
        return "took too long"
    if outcome.limit == "output":
        return "printed too much"
    if outcome.code != 0:
        return f"ended with code {outcome.code}"
    is_equal = _stripped_lines(outcome.output) == _stripped_lines(expected_output)
    return "" if is_equal else "failed"


def _complete(program: str, problem: Problem) -> str:
    """Returns a program that defines the function under test.

    A HumanEval completion may continue the function at the end of the question.
    """
    entry_point = str(problem.meta.get("entry_point") or "")
    is_continuation = entry_point and not re.search(
        rf"^(async )?def {re.escape(entry_point)}\b", program, re.MULTILINE
    )
    has_function = f"def {entry_point}(" in problem.question
    if is_continuation and has_function and is_python(problem.question):
        return problem.question + program
    return program


def _stripped_lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
