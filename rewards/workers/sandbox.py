"""Runs an untrusted Python program in a sandbox.

The program has no network and no access to other processes. It sees the system's folders (see
SYSTEM_PATHS) and the interpreter's, all read-only, and an empty folder that it can write to. The
means:

- Linux namespaces isolate the network, processes and files. No child process can leave them.
- rlimits bound processor time, memory, file size, processes and open files.
- After the time limit, all processes of the namespace are killed.

Two attacks are not prevented: an attack on a bug of the kernel, and a program that forges the
result of its own tests, which run in the same interpreter (see rewards/code.py). With
`isolation="rlimits"` there is no sandbox: files and network are open.

This file is also the program that enters the sandbox (`python -I -S sandbox.py SPEC`) and then
starts the untrusted program. It runs once per untrusted program, so for a quick start it imports
only a few modules of the standard library.
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
from typing import IO, Any, Literal, NamedTuple

# Flags of unshare(2).
CLONE_NEWNS = 0x20000  # mounts
CLONE_NEWUTS = 0x4000000
CLONE_NEWIPC = 0x8000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
# Flags of mount(2). MS_RDONLY and MS_NOSUID are also attributes of mount_setattr(2).
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2  # of umount2(2)
# Arguments of mount_setattr(2).
AT_FDCWD = -100
AT_RECURSIVE = 0x8000
# Options of prctl(2).
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_NO_NEW_PRIVS = 38
# Numbers of system calls without a function in libc.
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
SYS_MOUNT_SETATTR = 442
libc = ctypes.CDLL(None, use_errno=True)

NOBODY = 65534  # user and group of the program
MAX_OUTPUT_BYTES = 1 << 20
MAX_FILE_BYTES = 16 << 20
MAX_OPEN_FILES = 64
MAX_PROCESSES = 64
SANDBOX_UNAVAILABLE = 97  # exit code
SOURCE_FD = 3  # file descriptor from which the interpreter reads the program
ENVIRONMENT = {"PATH": "/usr/bin:/bin"}
# Paths that are visible in the sandbox, read-only, in addition to the interpreter's folders.
SYSTEM_PATHS = (
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
    r"""The result of a program: `Outcome(code=0, output="3\n", timed_out=False)`.

    If a signal ended the program, `code` is 128 + the signal with the isolation `namespaces`, and
    minus the signal with `rlimits`. If the time limit is over, it is -9 (SIGKILL).
    """

    code: int
    output: str
    timed_out: bool


class SandboxUnavailableError(RuntimeError):
    """The system does not allow the namespaces of the sandbox."""


def run(
    source: str,
    stdin: str = "",
    *,
    timeout_s: float,
    memory_mb: int = 1024,
    isolation: Literal["namespaces", "rlimits"] = "namespaces",
) -> Outcome:
    """Runs a Python program and returns its exit code and output.

    Args:
        source: Source code of the program.
        stdin: Text on its standard input.
        timeout_s: Time limit, including the start of the sandbox.
        memory_mb: Address space in MiB.
        isolation: `namespaces` is the sandbox. `rlimits` limits resources only.

    Returns:
        The outcome with the first MiB of the standard output.

    Raises:
        SandboxUnavailableError: The system does not allow the sandbox.
    """
    with (
        tempfile.TemporaryDirectory(prefix="grpo-code-") as folder,
        tempfile.TemporaryFile() as stdout_file,
        tempfile.TemporaryFile() as stdin_file,
    ):
        stdin_file.write(stdin.encode("utf-8", "replace"))
        stdin_file.seek(0)
        source_reader, source_writer = os.pipe()
        interpreter_folder = os.path.dirname(os.path.realpath(sys.executable))
        spec = {
            "folder": folder,
            "prefixes": sorted({sys.prefix, sys.base_prefix, interpreter_folder}),
            "memory": memory_mb << 20,
            "seconds": timeout_s,
            "isolation": isolation,
            "fd": source_reader,
        }
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", __file__, json.dumps(spec)],
            stdin=stdin_file,
            stdout=stdout_file,
            stderr=subprocess.PIPE if isolation == "namespaces" else subprocess.DEVNULL,
            pass_fds=[source_reader],
            env=ENVIRONMENT,
            start_new_session=True,
        )
        os.close(source_reader)
        code = _send_source_and_wait(process, source, source_writer, timeout_s)
        _raise_if_unavailable(process, code)
        return Outcome(
            code=-signal.SIGKILL if code is None else code,
            output=_read_start(stdout_file),
            timed_out=code is None,
        )


def _send_source_and_wait(
    process: subprocess.Popen[bytes], source: str, source_writer: int, timeout_s: float
) -> int | None:
    """Sends the source, waits for the program, then kills its process group.

    The death of the group's leader also ends the pid namespace, with all processes in it.

    Returns:
        The exit code, None if the time limit is over.
    """
    try:
        with contextlib.suppress(BrokenPipeError), os.fdopen(source_writer, "wb") as pipe:
            pipe.write(source.encode("utf-8", "replace"))
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _raise_if_unavailable(process: subprocess.Popen[bytes], code: int | None) -> None:
    """Raises SandboxUnavailableError if the process could not enter the sandbox.

    The message comes from the standard error. A program that ends with the same code leaves it
    empty, because its standard error is /dev/null.
    """
    if process.stderr is None:
        return
    with process.stderr:
        if code == SANDBOX_UNAVAILABLE:
            message = process.stderr.read(2000).decode(errors="replace").strip()
            if message:
                raise SandboxUnavailableError(message)


def _read_start(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(MAX_OUTPUT_BYTES).decode("utf-8", "replace")


def _enter(spec: dict[str, Any]) -> None:
    """Turns this process into the sandboxed interpreter. Never returns.

    Args:
        spec: `folder` (mount point of the new root), `prefixes` (the interpreter's folders),
            `memory` (bytes), `seconds`, `isolation`, and `fd` (file descriptor of the source).
    """
    # If the caller dies, this process dies, and with it the namespace.
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if spec["isolation"] == "namespaces":
        try:
            _isolate(spec["folder"], spec["prefixes"])
        except OSError as error:
            os.write(2, f"{error}".encode())
            os._exit(SANDBOX_UNAVAILABLE)
    else:
        os.chdir(spec["folder"])
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a fork and a change of user reset it
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _limit_resources(spec["memory"], spec["seconds"], spec["isolation"])
    _start_interpreter(spec["fd"])


def _isolate(root: str, prefixes: list[str]) -> None:
    """Enters new namespaces. Returns in process 2 of the new pid namespace, as user NOBODY.

    The calling process waits for process 1, which waits for process 2; each exits with the code of
    its child.

    Raises:
        OSError: The system does not allow it.
    """
    was_root = _unshare_namespaces()
    _fork_and_wait()
    # This is process 1 of the namespace. When it ends, the kernel kills all other processes of the
    # namespace. They cannot trace it, because it is not dumpable.
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(PR_SET_DUMPABLE, 0)
    _change_root(root, prefixes)
    _fork_and_wait()
    if was_root:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def _limit_resources(memory_bytes: int, timeout_s: float, isolation: str) -> None:
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: int(timeout_s) + 1,
        resource.RLIMIT_FSIZE: MAX_FILE_BYTES,
        resource.RLIMIT_NOFILE: MAX_OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    if isolation == "namespaces":  # outside of them it would count all processes of the user
        limits[resource.RLIMIT_NPROC] = MAX_PROCESSES
    for kind, limit in limits.items():
        hard_limit = resource.getrlimit(kind)[1]
        is_unlimited = hard_limit == resource.RLIM_INFINITY
        new_limit = limit if is_unlimited else min(limit, hard_limit)
        resource.setrlimit(kind, (new_limit, new_limit))


def _start_interpreter(source_fd: int) -> None:
    """Replaces this process with an interpreter that runs the program. Never returns."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.dup2(source_fd, SOURCE_FD)
    os.closerange(SOURCE_FD + 1, MAX_OPEN_FILES)
    os.set_inheritable(SOURCE_FD, True)
    loader = f"import os; exec(compile(os.fdopen({SOURCE_FD}).read(), 'program', 'exec'))"
    os.execve(sys.executable, [sys.executable, "-I", "-B", "-c", loader], ENVIRONMENT)


def _fork_and_wait() -> None:
    """Returns in a new child process. The parent waits for the child and exits with its code.

    If a signal ended the child, the exit code is 128 + the signal.
    """
    child = os.fork()
    if child == 0:
        return
    while True:
        pid, status = os.wait()
        if pid == child:  # not an orphan: process 1 becomes the parent of all orphans
            break
    if os.WIFSIGNALED(status):
        os._exit(128 + os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


def _unshare_namespaces() -> bool:
    """Leaves the namespaces of the machine. The next child is process 1 of a new pid namespace.

    Returns:
        True if this process is root and has created no user namespace: it must still change its
        user.

    Raises:
        OSError: The system does not allow it.
    """
    namespaces = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    if os.geteuid() == 0 and libc.unshare(namespaces) == 0:
        return True
    uid = os.geteuid()
    gid = os.getegid()
    _check(libc.unshare(namespaces | CLONE_NEWUSER), "unshare")
    _write_text("/proc/self/setgroups", "deny")
    _write_text("/proc/self/gid_map", f"{NOBODY} {gid} 1")
    _write_text("/proc/self/uid_map", f"{NOBODY} {uid} 1")
    return False


def _write_text(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _change_root(root: str, prefixes: list[str]) -> None:
    """Builds a new root file system at `root` and changes into its folder /sandbox.

    The new root has the system's and the interpreter's folders, read-only, and the empty folder
    /sandbox with 16 MiB.

    Raises:
        OSError: The system does not allow it.
    """
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=32m,mode=755")
    for path in dict.fromkeys([*SYSTEM_PATHS, *prefixes]):
        is_inside_earlier_path = os.path.lexists(root + path)
        if os.path.exists(path) and not is_inside_earlier_path:
            _show_in_root(root, path)
    sandbox = root + "/sandbox"
    os.mkdir(sandbox)
    options = f"size=16m,mode=777,uid={os.geteuid()}"
    _mount("tmpfs", sandbox, "tmpfs", MS_NOSUID | MS_NODEV, options)
    _forbid_user_namespaces()
    os.chdir(root)
    _check(libc.syscall(SYS_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    # The old root is now mounted over the new one.
    _check(libc.umount2(b".", MNT_DETACH), "umount")
    os.chdir("/")
    _mount("none", "/", None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir("/sandbox")


def _show_in_root(root: str, path: str) -> None:
    """Makes a file, folder or link of the machine visible in the new root, read-only."""
    target = root + path
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT, 0o644))
    _mount(path, target, None, MS_BIND | MS_REC)
    # struct mount_attr: attributes to set, to clear, propagation, user namespace.
    attributes = (ctypes.c_uint64 * 4)(MS_RDONLY | MS_NOSUID)
    result = libc.syscall(
        SYS_MOUNT_SETATTR,
        AT_FDCWD,
        target.encode(),
        ctypes.c_uint(AT_RECURSIVE),
        attributes,
        ctypes.c_size_t(ctypes.sizeof(attributes)),
    )
    _check(result, f"mount_setattr {target} (Linux 5.12)")


def _forbid_user_namespaces() -> None:
    """Forbids user namespaces inside the user namespace of the sandbox, if it has one."""
    if os.geteuid() == 0:  # it has none; the setting would apply to the machine
        return
    with contextlib.suppress(OSError):
        _write_text("/proc/sys/user/max_user_namespaces", "0")


def _mount(
    source: str, target: str, kind: str | None, flags: int, options: str | None = None
) -> None:
    encoded_kind = None if kind is None else kind.encode()
    encoded_options = None if options is None else options.encode()
    result = libc.mount(
        source.encode(), target.encode(), encoded_kind, ctypes.c_ulong(flags), encoded_options
    )
    _check(result, f"mount {target}")


def _check(result: int, call: str) -> None:
    """Raises OSError if the result of a system call is an error."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")


if __name__ == "__main__":
    _enter(json.loads(sys.argv[1]))
