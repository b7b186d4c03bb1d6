"""The process of a job: it confines itself, then runs the program.

It is a fork of the keeper. It gives up its privileges before it reads the program.
"""

from __future__ import annotations

import atexit
import fcntl
import io
import os
import resource
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable
from typing import Any

from grpo.rewards.workers.inside import frames, namespaces, system
from grpo.rewards.workers.inside.seccomp import Filter

# File descriptors of a job, besides the standard ones.
CHANNEL = 3  # to the worker
PEER = 4  # to the process of another sandbox, if the job has one
NUM_DESCRIPTORS = 5
FIRST_COPY = 32  # above the descriptors that a job gets

MAX_FILE_BYTES = 16 << 20
MAX_OPEN_FILES = 64
MAX_THREADS = 64
MAX_PENDING_SIGNALS = 64
MAX_TEXT_CHARS = 100_000  # of the output of an exchange
EXIT_FAILED = 1


def run_job(
    job: dict[str, Any], descriptors: list[int], system_calls: Filter, is_isolated: bool
) -> None:
    """Confines this process and runs a job. Never returns.

    Args:
        job: `target` (the function to call, as `module:function`), `memory` (bytes of address
            space) and `cpu_s` (processor time).
        descriptors: Standard input, standard output, CHANNEL and optionally PEER.
        system_calls: The filter.
        is_isolated: Whether the process is in its own namespaces.
    """
    code = EXIT_FAILED
    try:
        _arrange_descriptors(descriptors)
        target = _confine(job, system_calls, is_isolated)
        # The worker learns the id of this process from the credentials of its first message.
        frames.send(CHANNEL, {"ready": True})
        code = target()
    finally:
        os._exit(code)


def _confine(job: dict[str, Any], system_calls: Filter, is_isolated: bool) -> Callable[[], int]:
    """Confines this process and returns the function to call. Ends the process if it fails."""
    try:
        system.set_process_option(system.PR_SET_PDEATHSIG, signal.SIGKILL)
        _limit(resource.RLIMIT_AS, job["memory"])
        _limit(resource.RLIMIT_CPU, job["cpu_s"])
        if is_isolated:
            os.chdir(namespaces.FOLDER)
        system.drop_capabilities()
        system.set_process_option(system.PR_SET_NO_NEW_PRIVS, 1)
        system_calls.load()
        module_name, _, name = job["target"].partition(":")
        target: Callable[[], int] = getattr(sys.modules[module_name], name)
        return target
    except BaseException as error:
        frames.send(CHANNEL, {"failed": f"{type(error).__name__}: {error}"})
        os._exit(EXIT_FAILED)


def _arrange_descriptors(descriptors: list[int]) -> None:
    """Makes `descriptors` 0, 1, CHANNEL and PEER, discards standard error, closes all others.

    The interpreter gets the streams and arguments of a new one.
    """
    # Copies with high numbers, which `dup2` below does not overwrite.
    copies = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, FIRST_COPY) for descriptor in descriptors]
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    for target, copy in zip((0, 1, CHANNEL, PEER), copies, strict=False):
        os.dup2(copy, target)
    num_open = len(descriptors) + 1  # and standard error
    os.closerange(num_open, os.sysconf("SC_OPEN_MAX"))
    _open_standard_streams()
    sys.argv = ["program.py"]
    sys.orig_argv = ["python", "program.py"]
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _open_standard_streams() -> None:
    streams = (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w"))
    for name, descriptor, mode in streams:
        stream = open(  # noqa: SIM115
            descriptor, mode, encoding="utf-8", errors="replace", closefd=False
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def limit_resources_of_all_jobs(is_isolated: bool) -> None:
    """Sets the limits of the keeper and all its jobs."""
    _limit(resource.RLIMIT_FSIZE, MAX_FILE_BYTES)
    _limit(resource.RLIMIT_NOFILE, MAX_OPEN_FILES)
    _limit(resource.RLIMIT_SIGPENDING, MAX_PENDING_SIGNALS)
    _limit(resource.RLIMIT_CORE, 0)
    if is_isolated:  # outside of a user namespace it would count all processes of the user
        _limit(resource.RLIMIT_NPROC, MAX_THREADS)


def _limit(kind: int, limit: int) -> None:
    hard_limit = resource.getrlimit(kind)[1]
    if hard_limit != resource.RLIM_INFINITY:
        limit = min(limit, hard_limit)
    resource.setrlimit(kind, (limit, limit))


def new_module(name: str) -> types.ModuleType:
    """Returns an empty module that is imported under `name`."""
    module = types.ModuleType(name)
    module.__dict__["__builtins__"] = __builtins__
    sys.modules[name] = module
    return module


def run_script() -> int:
    """Runs the program that the worker sends as a script. Returns its exit code."""
    source = frames.receive(CHANNEL)["source"]
    os.close(CHANNEL)
    try:
        exec(compile(source, "program.py", "exec"), new_module("__main__").__dict__)
        code = 0
    except SystemExit as exit_request:
        code = _exit_code(exit_request.code)
    except BaseException:
        code = EXIT_FAILED
    finish_threads_and_output()
    return code


def finish_threads_and_output() -> None:
    """Does what an interpreter does at its end."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:  # of the program's threads and functions
        return


def _exit_code(code: object) -> int:
    if code is None:
        return 0
    return code & 0xFF if isinstance(code, int) else EXIT_FAILED


def run_session() -> int:
    """Runs the sources that the worker sends, one after the other, in one namespace.

    Each answer is `{"output": ..., "error": ...}`: what the source printed, and the traceback of
    its exception or "".
    """
    namespace = new_module("__main__").__dict__
    while True:
        try:
            source = frames.receive(CHANNEL)["source"]
        except frames.FrameError:
            return 0
        sys.stdout = io.StringIO()
        error = ""
        try:
            exec(compile(source, "program.py", "exec"), namespace)
        except SystemExit as exit_request:
            return _exit_code(exit_request.code)
        except BaseException:
            error = traceback.format_exc()
        output = sys.stdout.getvalue() if isinstance(sys.stdout, io.StringIO) else ""
        frames.send(CHANNEL, {"output": output[:MAX_TEXT_CHARS], "error": error[-MAX_TEXT_CHARS:]})
