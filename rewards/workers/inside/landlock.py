"""Restricts the files that a process can open, without namespaces (Landlock, Linux 5.13)."""

from __future__ import annotations

import ctypes
import os

from grpo.rewards.workers.inside import system
from grpo.rewards.workers.inside.system import check, libc

CREATE_RULESET_VERSION = 1  # flag: return the version of the interface
RULE_PATH_BENEATH = 1
# Rights of the first version of the interface. Later versions have more.
ALL_RIGHTS = (1 << 13) - 1
EXECUTE = 1 << 0
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
RIGHTS_SINCE_VERSION = {2: 1 << 13, 3: 1 << 14, 5: 1 << 15}  # refer, truncate, ioctl of devices


def is_available() -> bool:
    """Returns whether the kernel has Landlock."""
    return _version() >= 1


def _version() -> int:
    version: int = libc.syscall(
        system.LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), CREATE_RULESET_VERSION
    )
    return version


def allow_only_reading(paths: list[str]) -> None:
    """Forbids this process and its children all files but those beneath `paths`, which are read.

    Raises:
        OSError: The kernel does not allow it.
    """
    rights = ALL_RIGHTS
    kernel_version = _version()
    for version, right in RIGHTS_SINCE_VERSION.items():
        if kernel_version >= version:
            rights |= right
    handled = (ctypes.c_uint64 * 1)(rights)
    ruleset = check(
        libc.syscall(system.LANDLOCK_CREATE_RULESET, handled, ctypes.c_size_t(8), 0),
        "landlock_create_ruleset",
    )
    for path in paths:
        if os.path.exists(path):
            _allow_reading(ruleset, path)
    system.set_process_option(system.PR_SET_NO_NEW_PRIVS, 1)
    check(libc.syscall(system.LANDLOCK_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


class _PathBeneath(ctypes.Structure):
    """struct landlock_path_beneath_attr."""

    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def _allow_reading(ruleset: int, path: str) -> None:
    rights = READ_FILE
    if path == os.devnull:
        rights |= WRITE_FILE
    if os.path.isdir(path):
        rights |= READ_DIR | EXECUTE
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = _PathBeneath(rights, descriptor)
    result = libc.syscall(
        system.LANDLOCK_ADD_RULE, ruleset, RULE_PATH_BENEATH, ctypes.byref(rule), 0
    )
    check(result, f"landlock_add_rule {path}")
    os.close(descriptor)
