"""Enters Linux namespaces: no network, no other processes, and a root file system of its own.

The process that runs `unshare` cannot define the users of its namespace. Its parent writes them
with `map_users`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

from grpo.rewards.workers.inside import system
from grpo.rewards.workers.inside.system import check, libc

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
# Arguments of open_tree(2), mount_setattr(2) and move_mount(2).
AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
OPEN_TREE_CLONE = 1
MOVE_MOUNT_F_EMPTY_PATH = 4

NOBODY = 65534  # user and group in the sandbox
# The new root is mounted over this folder. It exists on every system, and nothing in it is needed.
ROOT = "/proc"
FOLDER = "/sandbox"  # the only folder that a program can write to
FOLDER_OPTIONS = f"size=16m,nr_inodes=1024,mode=700,uid={NOBODY},gid={NOBODY}"
HOST_NAME = b"sandbox"
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


def unshare() -> None:
    """Leaves the namespaces of the machine. The next child is process 1 of a new pid namespace.

    Raises:
        OSError: The system does not allow it.
    """
    flags = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    check(libc.unshare(flags), "unshare")


def map_users(pid: int) -> None:
    """Makes NOBODY the only user and group in the user namespace of a child process.

    For root it is the machine's user NOBODY, if the system allows it. Otherwise it is the user of
    this process under another name.

    Raises:
        OSError: The system does not allow it.
    """
    if os.geteuid() == 0:
        with contextlib.suppress(PermissionError):
            _write_maps(pid, NOBODY, NOBODY)
            return
    with contextlib.suppress(PermissionError):
        _write_text(f"/proc/{pid}/setgroups", "deny")
    _write_maps(pid, os.geteuid(), os.getegid())


def _write_maps(pid: int, uid: int, gid: int) -> None:
    _write_text(f"/proc/{pid}/uid_map", f"{NOBODY} {uid} 1")
    _write_text(f"/proc/{pid}/gid_map", f"{NOBODY} {gid} 1")


def _write_text(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def become_nobody() -> None:
    """Changes to the user and group NOBODY and leaves all other groups that the system allows."""
    with contextlib.suppress(PermissionError):  # without root, the kernel forbids it
        os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def change_root(prefixes: list[str]) -> None:
    """Builds a new root file system in memory and changes into it, as user NOBODY.

    It has SYSTEM_PATHS and the folders of the interpreter, read-only, and a place for FOLDER.

    Args:
        prefixes: The folders of the interpreter.

    Raises:
        OSError: The system does not allow it.
    """
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    # NOBODY may be unable to reach the interpreter, for example in /root.
    parts = [_RootPart(path) for path in _outermost([*SYSTEM_PATHS, *prefixes])]
    become_nobody()
    _mount("tmpfs", ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=1024,mode=755")
    for part in parts:
        part.show()
    os.mkdir(ROOT + FOLDER)
    os.chdir(ROOT)
    pivot_root = system.syscall_number(system.PIVOT_ROOT, "pivot_root")
    check(libc.syscall(pivot_root, b".", b"."), "pivot_root")
    # The old root is now mounted over the new one.
    check(libc.umount2(b".", MNT_DETACH), "umount")
    os.chdir("/")
    _mount("none", "/", None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
    check(libc.sethostname(HOST_NAME, len(HOST_NAME)), "sethostname")


class Folder:
    """The folder FOLDER of a sandbox."""

    def __init__(self) -> None:
        """Mounts it. Raises OSError if it fails."""
        self._mount()

    def _mount(self) -> None:
        _mount("tmpfs", FOLDER, "tmpfs", MS_NOSUID | MS_NODEV, FOLDER_OPTIONS)
        self._changed_at = os.stat(FOLDER).st_ctime_ns  # a program cannot set it

    def clear(self) -> None:
        """Replaces the folder by a new one, unless it is unchanged. Raises OSError if it fails."""
        if os.stat(FOLDER).st_ctime_ns != self._changed_at:
            os.chdir("/")
            check(libc.umount2(FOLDER.encode(), MNT_DETACH), f"umount {FOLDER}")
            self._mount()


def _outermost(paths: list[str]) -> list[str]:
    """Returns the paths that exist, without repeats and without those inside an earlier one."""
    chosen: list[str] = []
    for path in paths:
        is_inside = any(path == other or path.startswith(other + "/") for other in chosen)
        if os.path.lexists(path) and not is_inside:
            chosen.append(path)
    return chosen


class _RootPart:
    """A file, folder or link of the machine that is visible in the new root, read-only."""

    def __init__(self, path: str) -> None:
        """Opens the file or folder with all that is mounted in it. Raises OSError if it fails."""
        self._path = path
        self._link = os.readlink(path) if os.path.islink(path) else None
        self._is_folder = os.path.isdir(path)
        self._tree = -1
        if self._link is None:
            flags = OPEN_TREE_CLONE | os.O_CLOEXEC | AT_RECURSIVE
            tree = libc.syscall(system.OPEN_TREE, AT_FDCWD, path.encode(), ctypes.c_uint(flags))
            self._tree = check(tree, f"open_tree {path}")
            self._make_read_only()

    def _make_read_only(self) -> None:
        # struct mount_attr: attributes to set, to clear, propagation, user namespace.
        attributes = (ctypes.c_uint64 * 4)(MS_RDONLY | MS_NOSUID)
        result = libc.syscall(
            system.MOUNT_SETATTR,
            self._tree,
            b"",
            ctypes.c_uint(AT_EMPTY_PATH | AT_RECURSIVE),
            attributes,
            ctypes.c_size_t(ctypes.sizeof(attributes)),
        )
        check(result, f"mount_setattr {self._path} (Linux 5.12)")

    def show(self) -> None:
        """Makes it visible. Raises OSError if it fails."""
        target = ROOT + self._path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if self._link is not None:
            os.symlink(self._link, target)
            return
        if self._is_folder:
            os.mkdir(target)
        else:
            os.close(os.open(target, os.O_CREAT, 0o644))
        flags = ctypes.c_uint(MOVE_MOUNT_F_EMPTY_PATH)
        result = libc.syscall(system.MOVE_MOUNT, self._tree, b"", AT_FDCWD, target.encode(), flags)
        check(result, f"move_mount {target}")
        os.close(self._tree)


def _mount(
    source: str, target: str, kind: str | None, flags: int, options: str | None = None
) -> None:
    encoded_kind = None if kind is None else kind.encode()
    encoded_options = None if options is None else options.encode()
    result = libc.mount(
        source.encode(), target.encode(), encoded_kind, ctypes.c_ulong(flags), encoded_options
    )
    check(result, f"mount {target}")
