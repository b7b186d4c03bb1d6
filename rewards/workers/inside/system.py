"""System calls that Python has no functions for."""

from __future__ import annotations

import ctypes
import os

# Options of prctl(2).
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_NO_NEW_PRIVS = 38
# Numbers of system calls without a function in libc. Those from 424 on are the same on every
# architecture.
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
KEYCTL = {"x86_64": 250, "aarch64": 219}
OPEN_TREE = 428
MOVE_MOUNT = 429
MOUNT_SETATTR = 442
LANDLOCK_CREATE_RULESET = 444
LANDLOCK_ADD_RULE = 445
LANDLOCK_RESTRICT_SELF = 446

KEYCTL_JOIN_SESSION_KEYRING = 1
CAPABILITY_VERSION_3 = 0x20080522

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, call: str) -> int:
    """Returns the result of a system call.

    Raises:
        OSError: The result is negative.
    """
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


def syscall_number(numbers: dict[str, int], call: str) -> int:
    """Returns the number of a system call on this machine's architecture.

    Raises:
        OSError: The architecture is unknown.
    """
    machine = os.uname().machine
    if machine not in numbers:
        raise OSError(0, f"{call}: the sandbox supports {', '.join(numbers)}, not {machine}")
    return numbers[machine]


def set_process_option(option: int, value: int) -> None:
    """Calls prctl(2). Raises OSError if it fails."""
    check(libc.prctl(option, value, 0, 0, 0), f"prctl {option}")


def join_new_session_keyring() -> None:
    """Leaves the keyring of the login session, which can hold keys and passwords of the user."""
    number = syscall_number(KEYCTL, "keyctl")
    # A kernel without keyrings has nothing to leave.
    libc.syscall(number, KEYCTL_JOIN_SESSION_KEYRING, None)


def drop_capabilities() -> None:
    """Gives up all capabilities of the process. Raises OSError if it fails."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    no_capabilities = (ctypes.c_uint32 * 6)()
    check(libc.capset(header, no_capabilities), "capset")
