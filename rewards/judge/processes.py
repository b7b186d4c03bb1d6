"""The two processes of a judgement: the judge runs the tests, the other one the program."""

from __future__ import annotations

import linecache
import os
import sys
import threading
import traceback
import types
from typing import Any, NoReturn

from grpo.rewards.judge.peer import Peer, RemoteObject
from grpo.rewards.workers.inside import child, frames

# Deeply nested results are compared by recursion. From Python 3.12 on, it has a limit of its own.
STACK_BYTES = 256 << 20
MAX_RECURSION = 50_000
TESTS_FILE = "tests.py"
MAX_REASON_CHARS = 300


def run_judge() -> int:
    """Runs the tests of a job and sends the verdict to the worker.

    The job: `preamble` (source of helper functions of the tests), `tests` (their source), `check`
    (a function of the tests that takes the function under test, or ""), `entry_point` (the
    expression for the function under test, or ""), `names` (what the tests use of the program) and
    `classes` (of the preamble, which the program has, too).

    The verdict: `{"passed": true}`, `{"failed": reason}`, `{"lost": reason}` if the program's
    process has ended, `{"broken": reason}` if the preamble fails or the tests use nothing of the
    program.
    """
    job = frames.receive(child.CHANNEL)
    sys.setrecursionlimit(MAX_RECURSION)
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_judge, args=(job,), daemon=True)
    thread.start()
    thread.join()
    return 0


def _judge(job: dict[str, Any]) -> None:
    module = child.new_module("__main__")
    tests = _load_tests(job, module)
    classes = {name: getattr(module, name) for name in job["classes"]}
    peer = Peer(child.PEER, is_judge=True, shared_classes=classes, on_lost=_end_as_lost)
    has_constants = _bind_names(job["names"], peer, module.__dict__)
    num_requests = peer.num_requests
    try:
        _run_tests(tests, job, module)
    except BaseException as error:
        _end({"failed": _describe(error)})
    if peer.num_requests == num_requests and not has_constants:
        _end({"broken": "the tests use nothing of the program"})
    _end({"passed": True})


def _load_tests(job: dict[str, Any], module: types.ModuleType) -> types.CodeType:
    """Runs the preamble of the tests and returns their code. Ends the process if it fails."""
    source = job["tests"]
    linecache.cache[TESTS_FILE] = (0, None, source.splitlines(True), TESTS_FILE)
    try:
        exec(compile(job["preamble"], "preamble.py", "exec"), module.__dict__)
        if "unittest" in source:
            _replace_unittest_main(module)
        return compile(source, TESTS_FILE, "exec")
    except BaseException as error:
        _end({"broken": _describe(error)})


def _run_tests(tests: types.CodeType, job: dict[str, Any], module: types.ModuleType) -> None:
    """Runs the tests. Raises an exception if one fails."""
    exec(tests, module.__dict__)
    if job["check"]:
        check = getattr(module, job["check"])
        check(eval(job["entry_point"], module.__dict__))
    else:
        _run_collected_tests(module)


def _bind_names(names: list[str], peer: Peer, namespace: dict[str, Any]) -> bool:
    """Gives the tests the program's objects, in their namespace and as the module `solution`.

    Returns whether one of them is a constant.
    """
    objects = peer.request("names", names)
    if type(objects) is not dict:
        peer.end_exchange("no names")
    solution = child.new_module("solution").__dict__
    for name in names:
        if name not in objects:
            _end({"failed": f"the program does not define {name}"})
        namespace[name] = objects[name]
        solution[name] = objects[name]
    return not all(isinstance(objects[name], RemoteObject) for name in names)


def _run_collected_tests(module: types.ModuleType) -> None:
    """Runs the tests that pytest would find: functions, classes and unittest's test cases.

    `tests.py` must consider the same names.

    Raises:
        Exception: A test raised it, or failed.
    """
    for name, value in list(vars(module).items()):
        if name.startswith("test") and isinstance(value, types.FunctionType):
            value()
        if name.startswith("Test") and isinstance(value, type) and not _is_test_case(value):
            _run_methods(value)
    if any(map(_is_test_case, vars(module).values())):
        _run_test_cases(module)


def _run_methods(kind: type) -> None:
    for name in dir(kind):
        if name.startswith("test"):
            instance: Any = kind()
            if hasattr(instance, "setup_method"):
                instance.setup_method()
            getattr(instance, name)()


def _is_test_case(value: object) -> bool:
    unittest = sys.modules.get("unittest")  # it is imported if a test imports it
    return unittest is not None and isinstance(value, type) and issubclass(value, unittest.TestCase)


def _run_test_cases(module: types.ModuleType) -> None:
    """Runs unittest's test cases of a module.

    Raises:
        AssertionError: One of them failed. The message is the last line of its report.
    """
    import unittest

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromModule(module).run(result)
    for _, report in [*result.failures, *result.errors]:
        raise AssertionError(report.strip().splitlines()[-1])
    if result.unexpectedSuccesses or result.skipped:
        raise AssertionError("a test was skipped, or passed unexpectedly")


def _replace_unittest_main(module: types.ModuleType) -> None:
    """Makes `unittest.main` raise an exception if a test fails, and not end the process."""
    import unittest

    def main(*_: object, **__: object) -> None:
        _run_test_cases(module)

    unittest.main = main  # type: ignore[assignment]


def _end_as_lost(reason: str, is_closed: bool) -> NoReturn:
    _end({"lost" if is_closed else "failed": reason})


def _end(verdict: dict[str, Any]) -> NoReturn:
    """Sends the verdict and ends the process at once."""
    frames.send(child.CHANNEL, verdict)
    os._exit(0)


def _describe(error: BaseException) -> str:
    """Returns an exception in a line, with the line of the tests that raised it."""
    description = traceback.format_exception_only(error)[-1].strip()
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == TESTS_FILE and frame.line:
            description = f"{description}: {frame.line}"
    line = " ".join(description.split())[:MAX_REASON_CHARS]
    return frames.without_surrogates(line)


def run_program() -> int:
    """Runs a program and answers the judge's calls of its functions.

    The job of the worker: `preamble` (source that runs first, such as the imports of a HumanEval
    prompt), `program`, and `classes` of the preamble.
    """
    job = frames.receive(child.CHANNEL)
    os.close(child.CHANNEL)
    namespace = child.new_module("program").__dict__
    shared_classes: dict[str, type] = {}
    peer = Peer(child.PEER, is_judge=False, shared_classes=shared_classes, on_lost=_end_program)
    try:
        exec(compile(job["preamble"], "preamble.py", "exec"), namespace)
        exec(compile(job["program"], "program.py", "exec"), namespace)
    except Exception as error:
        peer.reply_unreadable(_describe(error))
    for name in job["classes"]:
        if isinstance(namespace.get(name), type):
            shared_classes[name] = namespace[name]
    peer.serve(namespace)


def _end_program(_reason: str, _is_closed: bool) -> NoReturn:
    os._exit(0)
