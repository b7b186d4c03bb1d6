"""The trusted process of a sandbox: enters it, then runs one job after the other.

Each job is a fork of the keeper, so it starts within a few milliseconds and has nothing of earlier
jobs. It reads from no descriptor that a job can write to. With namespaces, the keeper is process 1
of the pid namespace: it receives no signals of jobs, and when it ends, the kernel kills them.

Messages on the control socket (JSON, one per packet):

    to the worker      {"unshared": true}, the worker then defines the users of the namespace
    from the worker    {"mapped": true}
    to the worker      {"ready": true} or {"unavailable": "unshare: Operation not permitted"}
    from the worker    {"target": ..., "memory": ..., "cpu_s": ...}, with the job's descriptors
    from the worker    {"kill": true}, if the job must end
    to the worker      {"ended": exit code}, minus the signal that ended it, when all is cleared
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import stat
import sys
from typing import Any

from grpo.rewards.workers.inside import child, landlock, namespaces, system
from grpo.rewards.workers.inside.seccomp import Filter

MAX_MESSAGE_BYTES = 1 << 16


def main() -> None:
    """Enters the sandbox and runs jobs until the worker closes the control socket.

    The argument of the process is JSON: `control` (descriptor of the socket), `isolation`,
    `prefixes` (the interpreter's folders) and `modules` (to import before the sandbox is closed).
    """
    spec = json.loads(sys.argv[1])
    control = socket.socket(fileno=spec["control"])
    # Process 1 of a pid namespace receives only signals for which it has a handler.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        _import_all(spec["modules"])
        owner = os.pidfd_open(os.getppid())
        is_isolated = spec["isolation"] == "namespaces"
        system.join_new_session_keyring()
        if is_isolated:
            namespaces.unshare()
            _send(control, {"unshared": True})
            if not _receive(control)[0].get("mapped"):
                os._exit(0)
        _become_keeper(control, owner)
        if is_isolated:
            namespaces.change_root(spec["prefixes"])
        else:
            _restrict_without_namespaces(spec["prefixes"])
        # If the process that waits dies, this process dies. (A change of the user resets it.)
        system.set_process_option(system.PR_SET_PDEATHSIG, signal.SIGKILL)
        system.set_process_option(system.PR_SET_DUMPABLE, 0)
        keeper = _Keeper(control, is_isolated)
    except Exception as error:
        _send(control, {"unavailable": str(error)})
        os._exit(0)
    gc.collect()
    gc.freeze()  # the collector would copy these objects in each job
    _send(control, {"ready": True})
    while keeper.run_next_job():
        pass
    os._exit(0)


def _import_all(modules: list[str]) -> None:
    """Imports modules and the interpreter's additional packages, which then need no files."""
    import site

    site.main()
    for module in modules:
        importlib.import_module(module)


def _become_keeper(control: socket.socket, owner: int) -> None:
    """Returns in a child process, which is process 1 of a new pid namespace, if there is one.

    The calling process waits until the child or the owner of the sandbox ends. The child ends with
    it, although the control socket may be open in a fork of the owner.
    """
    pid = os.fork()
    if pid == 0:
        os.close(owner)
        # A signal to the process group of a job must not reach the process that waits.
        os.setsid()
        return
    poller = select.poll()
    poller.register(owner, select.POLLIN)
    poller.register(os.pidfd_open(pid), select.POLLIN)
    control.close()
    poller.poll()
    os._exit(0)


def _restrict_without_namespaces(prefixes: list[str]) -> None:
    """Restricts the user and the files of this process, without namespaces.

    Raises:
        OSError: The system does not allow it.
    """
    os.chdir("/")
    if os.geteuid() == 0 and all(_is_open_to_all(prefix) for prefix in prefixes):
        namespaces.become_nobody()
    if landlock.is_available():
        landlock.allow_only_reading([*namespaces.SYSTEM_PATHS, *prefixes])


def _is_open_to_all(folder: str) -> bool:
    """Returns whether every user can reach the files in a folder."""
    while folder != "/":
        if not os.stat(folder).st_mode & stat.S_IXOTH:
            return False
        folder = os.path.dirname(folder)
    return True


class _Keeper:
    """Runs jobs that arrive on the control socket."""

    def __init__(self, control: socket.socket, is_isolated: bool) -> None:
        self._control = control
        self._is_isolated = is_isolated
        child.limit_resources_of_all_jobs(is_isolated)
        self._folder = namespaces.Folder() if is_isolated else None
        self._system_calls = Filter(is_isolated=is_isolated)

    def run_next_job(self) -> bool:
        """Runs one job. Returns False if the worker has closed the control socket."""
        message, descriptors = _receive(self._control)
        if "target" not in message:
            return bool(message)  # {"kill": true} for a job that has just ended
        pid = os.fork()
        if pid == 0:
            self._control.close()
            child.run_job(message, descriptors, self._system_calls, self._is_isolated)
        for descriptor in descriptors:
            os.close(descriptor)
        is_connected = self._wait_for_end(pid)
        code = self._clear(pid)
        if is_connected:
            _send(self._control, {"ended": code})
        return is_connected

    def _wait_for_end(self, pid: int) -> bool:
        """Waits for the end of a job, or for the worker's message to end it.

        Returns False if the worker has closed the control socket.
        """
        job = os.pidfd_open(pid)
        poller = select.poll()
        poller.register(job, select.POLLIN)
        poller.register(self._control, select.POLLIN)
        ready = [descriptor for descriptor, _ in poller.poll()]
        os.close(job)
        if self._control.fileno() not in ready:
            return True
        message, _ = _receive(self._control)
        return bool(message)

    def _clear(self, pid: int) -> int:
        """Kills the processes of a job and empties its folder. Returns its exit code."""
        if self._is_isolated:
            _kill(-1)  # all processes of the namespace but this one
        else:
            _kill(pid)
        _, status = os.waitpid(pid, 0)
        if self._folder is not None:
            self._folder.clear()
        return os.waitstatus_to_exitcode(status)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _send(control: socket.socket, message: dict[str, Any]) -> None:
    try:
        control.send(json.dumps(message).encode())
    except BrokenPipeError:
        os._exit(0)  # the worker has ended


def _receive(control: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Returns the next message and its descriptors, {} if the worker has closed the socket."""
    data, descriptors, _, _ = socket.recv_fds(control, MAX_MESSAGE_BYTES, child.NUM_DESCRIPTORS)
    return (json.loads(data) if data else {}), descriptors
