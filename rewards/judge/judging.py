"""Judges a program by the tests of its functions: starts two processes, reads the verdict."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, TypeVar

from grpo.rewards.judge.tests import FunctionTests
from grpo.rewards.verifier.verdicts import CORRECT, wrong
from grpo.rewards.workers.sandbox import (
    Isolation,
    Job,
    JobEndedError,
    Outcome,
    Sandbox,
    SandboxLostError,
)
from grpo.rewards.workers.stopwatch import Stopwatch, TimeLimitError
from grpo.types import Verdict

# What programs and tests import most often is imported once, before the jobs.
COMMON_MODULES = "bisect collections copy functools heapq itertools math operator random re string"
MODULES = ("grpo.rewards.judge.processes", *COMMON_MODULES.split())
JUDGE_MEMORY_MB = 2048

Result = TypeVar("Result")


class CodeJudge:
    """Two warm sandboxes: one for programs, one for the tests of their functions.

    It is used by one thread. A sandbox starts when it is needed, and is replaced if it is killed
    from outside.
    """

    def __init__(self, *, memory_mb: int, isolation: Isolation) -> None:
        """Stores the limits of programs; see `Sandbox`."""
        self._memory_mb = memory_mb
        self._isolation: Isolation = isolation
        self._program_sandbox: Sandbox | None = None
        self._judge_sandbox: Sandbox | None = None

    def close(self) -> None:
        """Ends the sandboxes."""
        for sandbox in (self._program_sandbox, self._judge_sandbox):
            if sandbox is not None:
                sandbox.close()
        self._program_sandbox = None
        self._judge_sandbox = None

    def run(
        self, program: str, stdin: str, timeout_s: float, max_real_s: float | None = None
    ) -> Outcome:
        """Runs a program with a standard input; see `Sandbox.run`.

        Raises:
            SandboxLostError: The sandbox was killed from outside, twice.
            SandboxUnavailableError: The system does not allow the sandbox.
        """
        return self._repeat_if_lost(
            lambda: self._sandbox_of_programs().run(
                program, stdin, timeout_s=timeout_s, max_real_s=max_real_s
            )
        )

    def judge_functions(
        self,
        program: str,
        tests: FunctionTests,
        timeout_s: float,
        max_real_s: float | None = None,
    ) -> Verdict:
        """Returns the verdict on a program.

        Args:
            program: Source code.
            tests: The tests of its functions.
            timeout_s: Time limit of program and tests together; see `Stopwatch`.
            max_real_s: Limit of real time; see `Stopwatch`.

        Raises:
            SandboxLostError: A sandbox was killed from outside, twice.
            SandboxUnavailableError: The system does not allow the sandbox.
        """
        return self._repeat_if_lost(lambda: self._judge_once(program, tests, timeout_s, max_real_s))

    def _repeat_if_lost(self, action: Callable[[], Result]) -> Result:
        try:
            return self._close_on_error(action)
        except SandboxLostError:
            return self._close_on_error(action)

    def _close_on_error(self, action: Callable[[], Result]) -> Result:
        try:
            return action()
        except BaseException:  # a job may still run
            self.close()
            raise

    def _sandbox_of_programs(self) -> Sandbox:
        if self._program_sandbox is None:
            self._program_sandbox = Sandbox(
                memory_mb=self._memory_mb, isolation=self._isolation, modules=MODULES
            )
        return self._program_sandbox

    def _sandbox_of_judge(self) -> Sandbox:
        if self._judge_sandbox is None:
            self._judge_sandbox = Sandbox(
                memory_mb=JUDGE_MEMORY_MB, isolation=self._isolation, modules=MODULES
            )
        return self._judge_sandbox

    def _judge_once(
        self, program: str, tests: FunctionTests, timeout_s: float, max_real_s: float | None
    ) -> Verdict:
        program_job, judge_job = self._start_jobs(timeout_s)
        stopwatch = Stopwatch([judge_job.pid, program_job.pid], timeout_s, max_real_s)
        try:
            _send_program(program_job, program, tests, stopwatch)
            judge_job.send(_job_of_judge(tests), stopwatch)
            report = judge_job.receive(stopwatch)
        except TimeLimitError as error:
            return time_limit_verdict(is_starved=error.is_starved)
        except JobEndedError:
            report = {"failed": f"the judge ended with code {judge_job.end()}"}
        finally:
            program_job.kill()
            judge_job.end()
            exit_code = program_job.end()
        return _verdict(report, exit_code)

    def _start_jobs(self, timeout_s: float) -> tuple[Job, Job]:
        """Starts the processes of the program and the judge, with a socket between them."""
        program_end, judge_end = socket.socketpair()
        with program_end, judge_end:
            program_job = self._sandbox_of_programs().start_job(
                "grpo.rewards.judge.processes:run_program",
                timeout_s=timeout_s,
                peer=program_end.fileno(),
            )
            judge_job = self._sandbox_of_judge().start_job(
                "grpo.rewards.judge.processes:run_judge",
                timeout_s=timeout_s,
                peer=judge_end.fileno(),
            )
        program_job.wait_until_ready()
        judge_job.wait_until_ready()
        return program_job, judge_job


def time_limit_verdict(*, is_starved: bool) -> Verdict:
    """Returns the verdict on a program whose time is over."""
    if is_starved:
        return Verdict(value="undecided", reason="the program got too little processor time")
    return wrong("took too long")


def _send_program(job: Job, program: str, tests: FunctionTests, stopwatch: Stopwatch) -> None:
    message = {
        "preamble": tests.program_preamble,
        "program": program,
        "classes": tests.classes,
    }
    try:
        job.send(message, stopwatch)
    except JobEndedError as error:
        raise SandboxLostError(f"the process of a program ended early ({error})") from None


def _job_of_judge(tests: FunctionTests) -> dict[str, Any]:
    return {
        "preamble": tests.preamble,
        "tests": tests.tests,
        "check": tests.check,
        "entry_point": tests.entry_point,
        "names": tests.names,
        "classes": tests.classes,
    }


def _verdict(report: dict[str, Any], exit_code: int) -> Verdict:
    """Returns the verdict of the judge's report; see `processes.run_judge`."""
    if "passed" in report:
        return CORRECT
    if "broken" in report:
        return Verdict(value="undecided", reason=f"the tests cannot be run: {report['broken']}")
    if "failed" in report:
        return wrong(report["failed"])
    return wrong(f"ended with code {exit_code}")
