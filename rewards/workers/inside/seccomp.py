"""The system calls of a sandboxed program: a list of those that it may use.

Every other call fails as if the kernel did not have it (ENOSYS). A program can compute, allocate
memory, use threads, read the files that it sees, and write in its folder. It cannot start
processes, run another executable, open sockets, create memory that its limit does not count (memfd,
shared memory), send signals to others, or use keyrings, namespaces, ptrace, io_uring, bpf, and so
on.

libseccomp translates the names to the numbers of the architecture and builds the filter. It is part
of every system with systemd or apt.
"""

from __future__ import annotations

import ctypes
import errno
import os

from grpo.rewards.workers.inside.system import check, libc

LIBRARY = "libseccomp.so.2"
# Actions and comparisons of libseccomp.
SCMP_ACT_ALLOW = 0x7FFF0000
SCMP_ACT_ERRNO = 0x00050000
SCMP_CMP_EQ = 4
SCMP_CMP_MASKED_EQ = 7
UNKNOWN_CALL = -1  # libseccomp is older than the call
# Options of prctl(2).
PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2
INSTRUCTION_BYTES = 8
MAX_FILTER_BYTES = 4096 * INSTRUCTION_BYTES

# Flags of clone(2): what a thread shares with its process, and new namespaces.
CLONE_OF_THREAD = 0x10000 | 0x800 | 0x400 | 0x200 | 0x100  # THREAD, SIGHAND, FILES, FS, VM
CLONE_NEW = 0x7E020000
MAP_TYPE = 0x0F  # of the flags of mmap(2)
MAP_PRIVATE = 0x02
AF_UNIX = 1
CLOSE_RANGE_CLOEXEC = 4

# Calls that are allowed with all arguments.
ALLOWED_CALLS = """
    read pread64 readv preadv preadv2 write pwrite64 writev pwritev pwritev2 lseek close
    open openat openat2 dup dup2 dup3 pipe pipe2 eventfd2
    fsync fdatasync sync_file_range fadvise64 readahead sendfile copy_file_range umask
    stat fstat lstat newfstatat statx statfs fstatfs access faccessat faccessat2 readlink readlinkat
    getdents getdents64 getcwd chdir fchdir
    brk munmap mremap mprotect madvise mincore msync
    futex futex_waitv set_robust_list get_robust_list set_tid_address rseq membarrier arch_prctl
    gettid getpid getppid getpgid getpgrp getsid getuid geteuid getgid getegid getresuid getresgid
    getgroups capget exit exit_group restart_syscall
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack
    pause alarm setitimer getitimer nanosleep clock_nanosleep clock_gettime clock_getres
    gettimeofday time times getrusage getrlimit sysinfo uname getrandom getcpu
    sched_yield sched_getaffinity sched_getparam sched_getscheduler sched_get_priority_max
    sched_get_priority_min getpriority
    poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait
    epoll_pwait2 timerfd_create timerfd_settime timerfd_gettime
    recvfrom shutdown getsockname getpeername wait4 waitid
"""
# Calls that change files and send signals. In their own namespaces, programs have a folder and
# reach no other process. Landlock does not restrict all of these calls.
CALLS_IN_NAMESPACES = """
    creat ftruncate truncate fallocate mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2
    link linkat symlink symlinkat chmod fchmod fchmodat utimensat utime utimes futimesat kill tgkill
"""

# Calls that are allowed for some values of an argument: (call, index of the argument, values).
ALLOWED_VALUES = (
    # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_GETPIPE_SZ. Locks and larger
    # pipes would use memory of the kernel.
    ("fcntl", 1, (0, 1, 2, 3, 4, 1030, 1032)),
    # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
    ("ioctl", 1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),
    # PR_GET_DUMPABLE, PR_SET_NAME, PR_GET_NAME, PR_CAPBSET_READ, and PR_SET_VMA, with which the
    # allocator names its memory
    ("prctl", 0, (3, 15, 16, 23, 0x53564D41)),
    ("prlimit64", 0, (0,)),  # of this process
    ("socketpair", 0, (AF_UNIX,)),  # for the event loop of asyncio
    ("sendto", 4, (0,)),  # to the other end, not to an address
    # Without CLOSE_RANGE_UNSHARE, which gives a thread descriptors of its own.
    ("close_range", 2, (0, CLOSE_RANGE_CLOEXEC)),
)


class _Comparison(ctypes.Structure):
    """struct scmp_arg_cmp of libseccomp."""

    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


class _Program(ctypes.Structure):
    """struct sock_fprog of the kernel: the number of instructions of a filter, and the first."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


class Filter:
    """The filter of system calls. It is built once, and each job loads it."""

    def __init__(self, *, is_isolated: bool) -> None:
        """Builds the filter.

        Args:
            is_isolated: Whether the process is in its own namespaces.

        Raises:
            OSError: libseccomp is missing or refuses a rule.
        """
        try:
            self._library = ctypes.CDLL(LIBRARY)
        except OSError:
            raise OSError(
                errno.ENOENT, f"{LIBRARY} is missing (Debian and Ubuntu: apt install libseccomp2)"
            ) from None
        self._library.seccomp_init.restype = ctypes.c_void_p
        context = self._library.seccomp_init(ctypes.c_uint32(SCMP_ACT_ERRNO | errno.ENOSYS))
        self._context = ctypes.c_void_p(context)
        for call in ALLOWED_CALLS.split():
            self._allow(call)
        for call, argument, values in ALLOWED_VALUES:
            for value in values:
                self._allow(call, _Comparison(argument, SCMP_CMP_EQ, value, 0))
        # A new thread, not a new process. The flags are the first argument.
        mask = CLONE_OF_THREAD | CLONE_NEW
        self._allow("clone", _Comparison(0, SCMP_CMP_MASKED_EQ, mask, CLONE_OF_THREAD))
        # Pages of a shared mapping outlive the address space that the limit counts.
        self._allow("mmap", _Comparison(3, SCMP_CMP_MASKED_EQ, MAP_TYPE, MAP_PRIVATE))
        if is_isolated:
            for call in CALLS_IN_NAMESPACES.split():
                self._allow(call)
        self._instructions = self._export()

    def load(self) -> None:
        """Restricts this process for good. It must have PR_SET_NO_NEW_PRIVS.

        Raises:
            OSError: The kernel does not allow it.
        """
        length = len(self._instructions) // INSTRUCTION_BYTES
        program = _Program(length, self._instructions)
        result = libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program))
        check(result, "seccomp")

    def _allow(self, call: str, *comparisons: _Comparison) -> None:
        number = self._library.seccomp_syscall_resolve_name(call.encode())
        if number == UNKNOWN_CALL:
            return
        result = self._library.seccomp_rule_add_array(
            self._context,
            ctypes.c_uint32(SCMP_ACT_ALLOW),
            number,
            len(comparisons),
            (_Comparison * len(comparisons))(*comparisons),
        )
        if result < 0:
            raise OSError(-result, f"seccomp rule for {call}: {os.strerror(-result)}")

    def _export(self) -> bytes:
        """Returns the instructions of the filter."""
        file = os.memfd_create("filter")
        result = self._library.seccomp_export_bpf(self._context, file)
        if result < 0:
            raise OSError(-result, f"seccomp_export_bpf: {os.strerror(-result)}")
        instructions = os.pread(file, MAX_FILTER_BYTES, 0)
        os.close(file)
        return instructions
