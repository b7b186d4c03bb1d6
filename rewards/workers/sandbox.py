"""Runs a hostile Python program.

The program has no network and no files but the interpreter's (read-only) and an empty folder, and
is bounded in everything.

Linux namespaces take away the network, other processes, the machine's files and escape by fork;
rlimits bound processor, memory, file size, processes and open files; the clock kills the whole
process namespace. Not stopped: bugs of the kernel, and a program that forges its own test results
inside the interpreter that runs both (see rewards/code.py). With `isolation="rlimits"` files and
network are open: no sandbox.

This file is also the program that enters the sandbox (`python -I -S sandbox.py`) before the
hostile one runs: standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from typing import Any, Literal, NamedTuple

NEW_MOUNTS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NET = (
    0x20000,
    0x4000000,
    0x8000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
READ_ONLY, NO_SUID, NO_DEVICES, REMOUNT, BIND, RECURSIVE, PRIVATE = (
    1,
    2,
    4,
    32,
    4096,
    16384,
    1 << 18,
)
PIVOT_ROOT, MOUNT_SETATTR = {"x86_64": 155, "aarch64": 41}, 442
NOBODY = 65534
OUTPUT_BYTES = 1 << 20
REFUSED = 97  # exit code: the sandbox could not be made
SYSTEM = (
    "/usr",
    "/lib",
    "/lib64",
    "/bin",
    "/etc/ld.so.cache",
    "/etc/alternatives",
    "/dev/null",
    "/dev/urandom",
    "/dev/zero",
)


class Outcome(NamedTuple):
    r"""`Outcome(code=0, output="3\n", timed_out=False)`; `code` is negative for a signal."""

    code: int
    output: str
    timed_out: bool


class NoSandbox(RuntimeError):
    """The system forbids namespaces."""


def run(
    source: str,
    stdin: str = "",
    *,
    timeout_s: float,
    memory_mb: int = 1024,
    isolation: Literal["namespaces", "rlimits"] = "namespaces",
) -> Outcome:
    """Runs Python source and returns its exit code and the first MiB of its standard output.

    Raises NoSandbox.
    """
    with (
        tempfile.TemporaryDirectory(prefix="grpo-code-") as folder,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as given,
    ):
        given.write(stdin.encode("utf-8", "replace"))
        given.seek(0)
        reader, writer = os.pipe()
        prefixes = sorted(
            {sys.prefix, sys.base_prefix, os.path.dirname(os.path.realpath(sys.executable))}
        )
        spec = {
            "folder": folder,
            "prefixes": prefixes,
            "memory": memory_mb << 20,
            "seconds": timeout_s,
            "isolation": isolation,
            "fd": reader,
        }
        command = [sys.executable, "-I", "-S", "-B", __file__, json.dumps(spec)]
        errors = subprocess.PIPE if isolation == "namespaces" else subprocess.DEVNULL
        process = subprocess.Popen(
            command,
            stdin=given,
            stdout=out,
            stderr=errors,
            pass_fds=[reader],
            env={"PATH": "/usr/bin:/bin"},
            start_new_session=True,
        )
        os.close(reader)
        try:
            with contextlib.suppress(BrokenPipeError), os.fdopen(writer, "wb") as pipe:
                pipe.write(source.encode("utf-8", "replace"))
            timed_out = False
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            timed_out, code = True, -signal.SIGKILL
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        told = ""
        if process.stderr:
            with process.stderr:  # the program's own goes nowhere: what comes is the sandbox's
                told = (
                    process.stderr.read(2000).decode(errors="replace").strip()
                    if code == REFUSED
                    else ""
                )
        if told:
            raise NoSandbox(told)
        out.seek(0)
        return Outcome(code, out.read(OUTPUT_BYTES).decode("utf-8", "replace"), timed_out)


def _enter(spec: dict[str, Any]) -> None:
    """Turns this process into the sandboxed interpreter. Never returns."""
    libc = ctypes.CDLL(None, use_errno=True)
    # PR_SET_PDEATHSIG: with the caller this process dies, and with it the namespace
    libc.prctl(1, signal.SIGKILL)
    if spec["isolation"] == "namespaces":
        try:
            privileged = _namespaces(libc)
            _fork_and_wait()
            # this is process 1 of the namespace, ours: when it ends the kernel kills all the
            # others,
            libc.prctl(1, signal.SIGKILL)
            libc.prctl(4, 0)  # PR_SET_DUMPABLE: and none of them can trace it
            _new_root(libc, spec["folder"], spec["prefixes"])
            _fork_and_wait()
            if privileged:
                os.setgroups([])
                os.setresgid(NOBODY, NOBODY, NOBODY)
                os.setresuid(NOBODY, NOBODY, NOBODY)
        except OSError as error:
            os.write(2, f"{error}".encode())
            os._exit(REFUSED)
    else:
        os.chdir(spec["folder"])
    libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    seconds = int(spec["seconds"]) + 1
    for kind, most in {
        resource.RLIMIT_AS: spec["memory"],
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: 16 << 20,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        **({resource.RLIMIT_NPROC: 64} if spec["isolation"] == "namespaces" else {}),
    }.items():
        hard = resource.getrlimit(kind)[1]
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (least, least))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.dup2(spec["fd"], 3)
    os.closerange(4, 64)
    os.set_inheritable(3, True)
    os.execve(
        sys.executable,
        [
            sys.executable,
            "-I",
            "-B",
            "-c",
            "import os; exec(compile(os.fdopen(3).read(), 'program', 'exec'))",
        ],
        {"PATH": "/usr/bin:/bin"},
    )


def _fork_and_wait() -> None:
    """Returns in a new child; the parent ends when the child does, with its code."""
    if child := os.fork():
        # orphans are process 1's too
        status = next(status for pid, status in iter(os.wait, None) if pid == child)
        os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


def _namespaces(libc: Any) -> bool:
    """Leaves the machine's namespaces; true when root could do so without a user namespace.

    Raises OSError.
    """
    own = NEW_MOUNTS | NEW_UTS | NEW_IPC | NEW_PIDS | NEW_NET
    if os.geteuid() == 0 and libc.unshare(own) == 0:
        return True
    uid, gid = os.geteuid(), os.getegid()
    _checked(libc.unshare(own | NEW_USER), "unshare")
    for name, text in {
        "setgroups": "deny",
        "gid_map": f"{NOBODY} {gid} 1",
        "uid_map": f"{NOBODY} {uid} 1",
    }.items():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return False


def _new_root(libc: Any, root: str, prefixes: list[str]) -> None:
    """Makes a new root and changes into its folder /sandbox.

    The root has the interpreter's folders, read-only. /sandbox is empty and has 16 MiB.
    """

    def mount(
        source: str, target: str, kind: str | None, flags: int, data: str | None = None
    ) -> None:
        encoded = [each.encode() if each is not None else None for each in (source, target, kind)]
        _checked(
            libc.mount(*encoded, ctypes.c_ulong(flags), data.encode() if data else None),
            f"mount {target}",
        )

    mount("none", "/", None, RECURSIVE | PRIVATE)
    mount("tmpfs", root, "tmpfs", NO_SUID | NO_DEVICES, "size=32m,mode=755")
    for path in dict.fromkeys([*SYSTEM, *prefixes]):
        target = root + path
        if not os.path.exists(path) or os.path.lexists(target):  # inside one that is there already
            continue
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.mkdir(target)
        else:
            os.close(os.open(target, os.O_CREAT, 0o644))
        mount(path, target, None, BIND | RECURSIVE)
        # to set; to clear; propagation; user namespace
        attributes = (ctypes.c_uint64 * 4)(READ_ONLY | NO_SUID)
        # recursive
        call = libc.syscall(
            MOUNT_SETATTR,
            -100,
            target.encode(),
            ctypes.c_uint(0x8000),
            attributes,
            ctypes.c_size_t(32),
        )
        _checked(call, f"mount_setattr {target} (Linux 5.12)")
    os.mkdir(root + "/sandbox")
    mount(
        "tmpfs",
        root + "/sandbox",
        "tmpfs",
        NO_SUID | NO_DEVICES,
        f"size=16m,mode=777,uid={os.geteuid()}",
    )
    with contextlib.suppress(OSError), open("/proc/sys/user/max_user_namespaces", "w") as file:
        if os.geteuid() != 0:  # of this namespace only
            file.write("0")
    os.chdir(root)
    _checked(libc.syscall(PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    _checked(libc.umount2(b".", 2), "umount")  # MNT_DETACH: the old root lay over the new one
    os.chdir("/")
    mount("none", "/", None, BIND | REMOUNT | READ_ONLY | NO_SUID | NO_DEVICES)
    os.chdir("/sandbox")


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    _enter(json.loads(sys.argv[1]))
