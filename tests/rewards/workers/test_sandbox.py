"""The sandbox: attacks on it, its limits, and its three uses (one program, many, a session)."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from code_problems import isolation

from grpo.rewards.workers import sandbox as sandbox_module
from grpo.rewards.workers.inside import keeper, landlock, namespaces
from grpo.rewards.workers.sandbox import (
    Sandbox,
    SandboxLostError,
    SandboxUnavailableError,
    run,
)
from grpo.rewards.workers.session import Session
from grpo.rewards.workers.stopwatch import MAX_STARVATION, Stopwatch, TimeLimitError

requires_namespaces = pytest.mark.skipif(
    isolation() != "namespaces", reason="the system does not allow namespaces"
)
requires_landlock = pytest.mark.skipif(
    not landlock.is_available(), reason="the kernel has no Landlock"
)

PR_CAPBSET_DROP = 24
CAP_SYS_ADMIN = 21


@pytest.fixture(scope="module", params=["namespaces", "rlimits"])
def sandbox(request):
    """A warm sandbox of each isolation."""
    if request.param == "namespaces" and isolation() != "namespaces":
        pytest.skip("the system does not allow namespaces")
    if request.param == "rlimits" and not landlock.is_available():
        pytest.skip("without Landlock, files are open")
    with Sandbox(isolation=request.param) as warm_sandbox:
        yield warm_sandbox


@pytest.fixture(scope="module")
def isolated():
    """A warm sandbox with namespaces."""
    with Sandbox() as warm_sandbox:
        yield warm_sandbox


# Programs that print "done" if the attack succeeds. `call(number, ...)` is a system call.
CALL = """
import ctypes, errno, os, platform, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    result = libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
"""
# Numbers from 424 on are the same on all architectures, the others are those of x86_64.
SYSTEM_CALLS = {
    "fork": "57",
    "vfork": "58",
    "execve": "59, b'/bin/true', None, None",
    "clone3": "435, (ctypes.c_uint64 * 11)(), 88",
    "unshare user namespace": "272, 0x10000000",
    "unshare nothing": "272, 0",
    "setns": "308, 0, 0",
    "ptrace": "101, 0, 0, 0, 0",
    "process_vm_readv": "310, 1, 0, 0, 0, 0, 0",
    "keyctl": "250, 0, -3, 0",
    "add_key": "248, b'user', b'name', b'value', 5, -3",
    "request_key": "249, b'user', b'name', None, -3",
    "memfd_create": "319, b'name', 0",
    "memfd_secret": "447, 0",
    "shmget": "29, 0, 1 << 20, 0o1600",
    "semget": "64, 0, 1, 0o1600",
    "msgget": "68, 0, 0o1600",
    "mq_open": "240, b'name', 0o102, 0o600, None",
    "mount": "165, b'none', b'/sandbox', b'tmpfs', 0, None",
    "umount": "166, b'/sandbox', 2",
    "open_tree": "428, -100, b'/', 1",
    "fsopen": "430, b'proc', 0",
    "pivot_root": "155, b'/sandbox', b'/sandbox'",
    "chroot": "161, b'/sandbox'",
    "bpf": "321, 0, None, 0",
    "perf_event_open": "298, None, 0, -1, -1, 0",
    "io_uring_setup": "425, 8, None",
    "userfaultfd": "323, 1",
    "mlock": "149, None, 4096",
    "timer_create": "222, 0, None, None",
    "inotify_init": "253",
    "fanotify_init": "300, 0, 0",
    "personality": "135, 0x0040000",
    "setsid": "112",
    "setpgid": "109, 0, 0",
    "setpriority": "141, 0, 0, 5",
    "sched_setscheduler": "144, 0, 0, None",
    "seccomp": "317, 0, 0, None",
    "mknod": "133, b'/sandbox/null', 0o20666, 0x103",
    "sethostname": "170, b'name', 4",
    "settimeofday": "164, None, None",
    "reboot": "169, 0, 0, 0, None",
    "kexec_load": "246, 0, 0, None, 0",
    "init_module": "175, None, 0, None",
    "name_to_handle_at": "303, -100, b'/', None, None, 0",
    "pidfd_open": "434, 1, 0",
    "setxattr": "188, b'/sandbox', b'user.a', b'b', 1, 0",
    "landlock_create_ruleset": "444, None, 0, 1",
}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are those of x86_64")
@pytest.mark.parametrize("name", SYSTEM_CALLS)
def test_a_system_call_that_is_not_listed_does_not_exist(sandbox, name):
    program = (
        f"{CALL}\ntry:\n    print('done', call({SYSTEM_CALLS[name]}))\n"
        "except OSError as error:\n    print(error.errno)"
    )
    outcome = sandbox.run(program, timeout_s=5)
    assert outcome.output == "38\n"  # ENOSYS


ATTACKS = {
    "internet": "socket.create_connection(('127.0.0.1', 22), 2)",
    "name lookup": "socket.getaddrinfo('example.org', 80)",
    "unix socket": "socket.socket(socket.AF_UNIX)",
    "vsock": "socket.socket(socket.AF_VSOCK)",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "packets": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "raw socket": "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "internet socket pair": "socket.socketpair(socket.AF_INET)",
    "descriptors to others": "socket.send_fds(socket.socketpair()[0], [b'x'], [0])",
    "passwords": "open('/etc/passwd').read()",
    "this project": f"open({__file__!r}).read()",
    "homes": "os.listdir('/home')",
    "temporary files": "open('/tmp/x', 'w')",
    "shared memory": "open('/dev/shm/x', 'w')",
    "terminal": "open('/dev/tty', 'w')",
    "environment of the parent": "open(f'/proc/{os.getppid()}/environ').read()",
    "memory of the parent": "open(f'/proc/{os.getppid()}/mem', 'rb')",
    "processes": "os.listdir('/proc')",
    "kernel settings": "open('/proc/sys/kernel/hostname', 'w')",
    "devices": "os.listdir('/sys')",
    "write to the interpreter": "open(os.path.join(sys.prefix, 'x'), 'w')",
    "write to the system": "open('/usr/x', 'w')",
    "write to the root": "open('/x', 'w')",
    "remove the interpreter": "os.unlink(os.path.realpath(sys.executable))",
    "change of user": "os.setuid(0)",
    "change of groups": "os.setgroups([0])",
    "more memory": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "more time": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (-1, -1))",
    "limits of the parent": "import resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU)",
    "kill the parent": "os.kill(os.getppid(), 9); import time; time.sleep(0.2); assert 0",
    "kill all": "os.kill(-1, 9); import time; time.sleep(0.2); assert 0",
    "shell": "assert os.system('true') == 0",
    "subprocess": "import subprocess; subprocess.run(['/bin/true'], check=True)",
    "multiprocessing": "import multiprocessing; multiprocessing.Process(target=print).start()",
    "large pipe": "import fcntl; fcntl.fcntl(os.pipe()[0], 1031, 1 << 20)",
    "file locks": "import fcntl; fcntl.lockf(os.open('x', 66, 384), fcntl.LOCK_EX)",
    "large file": "f = open('big', 'wb')\nfor _ in range(40): f.write(bytes(1 << 20))",
    "many files": "for i in range(2000): open(f'file-{i}', 'w')",
    "many descriptors": "files = [os.open('/dev/null', 0) for _ in range(100)]",
    "memory": "x = bytearray(4 << 30)",
    "mapped memory": "import mmap; x = mmap.mmap(-1, 4 << 30)",
    "standard input": "os.write(0, b'x')",
    "another standard input": "os.ftruncate(0, 1 << 20)",
    "shared memory that outlives its addresses": "import mmap; mmap.mmap(-1, 1 << 20)",
    "shared file": "import mmap; mmap.mmap(os.open('/dev/zero', 2), 4096, mmap.MAP_SHARED)",
    "descriptors of a thread": "call(436, 1000, 2000, 2)",
    "thread with descriptors of its own": "call(56, 0x10000 | 0x800 | 0x200 | 0x100, 0, 0, 0, 0)",
    "thread in a new namespace": "call(56, 0x10010f00, 0, 0, 0, 0)",
    "datagram to a socket of the machine": (
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', '/dev/log')"
    ),
    "datagram to an abstract socket": (
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', '\\0name')"
    ),
    "owner of a socket": "socket.socketpair()[0].getsockopt(socket.SOL_SOCKET, 17, 12)",
    "rights of the interpreter": "os.chmod(os.path.realpath(sys.executable), 0o4777)",
    "times of the interpreter": "os.utime(os.path.realpath(sys.executable), (1, 1))",
    "truncation of the interpreter": "os.truncate(os.path.realpath(sys.executable), 0)",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_on_the_sandbox_fails(sandbox, name):
    outcome = sandbox.run(f"{CALL}\n{ATTACKS[name]}\nprint('done')", timeout_s=5)
    assert outcome.output == "", outcome
    assert outcome.code != 0


@requires_namespaces
@pytest.mark.parametrize(
    ("program", "output"),
    [
        ("open('new', 'w').write('ok'); print(open('new').read())", "ok\n"),
        ("import os; print({os.getuid(), os.getgid(), *os.getgroups()})", "{65534}\n"),
        ("import os; print(os.getpid() > 1, os.getppid())", "True 1\n"),
        ("import os; print(sorted(os.listdir('/dev')))", "['null', 'urandom', 'zero']\n"),
        ("import os; print(len(os.listdir('.')), os.getcwd())", "0 /sandbox\n"),
        ("import asyncio\nasync def f(): return 3\nprint(asyncio.run(f()))", "3\n"),
        (
            "from concurrent.futures import ThreadPoolExecutor as T\n"
            "with T(8) as pool: print(sum(pool.map(abs, range(9))))",
            "36\n",
        ),
        ("import numpy as np; print(np.linalg.det(np.eye(3)))", "1.0\n"),
        (
            "import sys; sys.setrecursionlimit(5000)\n"
            "def f(n): return n and 1 + f(n - 1)\nprint(f(3000))",
            "3000\n",
        ),
        ("import tempfile; f = tempfile.TemporaryFile(); f.write(b'x'); print(f.tell())", "1\n"),
        (
            "import signal\nsignal.signal(signal.SIGALRM, lambda *a: print('alarm'))\n"
            "signal.setitimer(signal.ITIMER_REAL, 0.05); signal.pause()",
            "alarm\n",
        ),
        ("print('a'); import atexit; atexit.register(print, 'b')", "a\nb\n"),
        ("import threading; threading.Timer(0.05, print, ['late']).start()", "late\n"),
        ("print('ü 漢 😀', input())", "ü 漢 😀 é\n"),
        ("print(hash('a'), {'a', 'b', 'c'})", None),
    ],
)
def test_an_ordinary_program_works(isolated, program, output):
    outcome = isolated.run(program, "é", timeout_s=10)
    assert outcome.code == 0, outcome
    assert outcome.limit is None
    if output is None:  # the same in each run
        output = run(program, timeout_s=10).output
    assert outcome.output == output


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("exit(3)", 3),
        ("import sys; sys.exit('message')", 1),
        ("import os; os._exit(4)", 4),
        ("1/0", 1),
        ("def f(", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("import ctypes; ctypes.string_at(0)", -signal.SIGSEGV),
    ],
)
@requires_namespaces
def test_the_outcome_has_the_exit_code(isolated, program, code):
    outcome = isolated.run(program, timeout_s=5)
    assert (outcome.code, outcome.limit) == (code, None)


@pytest.mark.parametrize(
    ("program", "limit"),
    [
        ("while True: pass", "time"),
        ("import time; time.sleep(60)", "time"),
        ("input = open(0).read; import os; os.close(1)\nwhile True: pass", "time"),
        ("import signal; signal.pause()", "time"),
        ("while True: print('x' * 10_000)", "output"),
    ],
)
def test_a_program_is_ended_at_its_limit(sandbox, program, limit):
    start = time.monotonic()
    outcome = sandbox.run(program, timeout_s=0.5)
    assert (outcome.code, outcome.limit) == (-signal.SIGKILL, limit)
    assert len(outcome.output) <= sandbox_module.MAX_OUTPUT_BYTES
    assert time.monotonic() - start < 5


def test_jobs_leave_nothing_for_the_next_one(sandbox):
    first = sandbox.run(
        "import builtins, os, sys\nbuiltins.secret = 1\nsys.modules['secret'] = sys\n"
        "try:\n    open('secret', 'w')\n    os.chmod('.', 0)\nexcept OSError: pass",
        timeout_s=5,
    )
    assert first.code == 0
    second = sandbox.run(
        "import builtins, os, sys\n"
        "print(hasattr(builtins, 'secret'), 'secret' in sys.modules, os.path.exists('secret'))",
        timeout_s=5,
    )
    assert second.output == "False False False\n"


@requires_namespaces
def test_the_number_of_threads_is_limited_for_each_sandbox():
    """The limit is that of the sandbox, not of all programs with the same user."""
    start_threads = (
        "import threading, time\n"
        "threads = [threading.Thread(target=time.sleep, args=(1,)) for _ in range({})]\n"
        "for thread in threads: thread.start()\n"
        "print('done')"
    )
    with Sandbox() as first, Sandbox() as second:
        outcomes = []
        other = threading.Thread(
            target=lambda: outcomes.append(first.run(start_threads.format(50), timeout_s=10))
        )
        other.start()
        outcomes.append(second.run(start_threads.format(50), timeout_s=10))
        other.join()
        assert [outcome.output for outcome in outcomes] == ["done\n", "done\n"]
        assert first.run(start_threads.format(100), timeout_s=10).output == ""


@requires_namespaces
def test_no_process_survives_the_owner_of_the_sandbox():
    owner = subprocess.run(
        [
            sys.executable,
            "-c",
            "from grpo.rewards.workers.sandbox import Sandbox\n"
            "sandbox = Sandbox()\n"
            "target = 'grpo.rewards.workers.inside.child:run_session'\n"
            "job = sandbox.start_job(target, timeout_s=60)\n"
            "job.wait_until_ready()\n"
            "print(sandbox._process.pid, job.pid, flush=True)\n"
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    pids = [int(pid) for pid in owner.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "the sandbox is still there"
        time.sleep(0.05)


def test_a_session_keeps_its_names_and_ends_at_its_limit(sandbox):
    with Session(sandbox) as session:
        assert session.exchange("x = 1\nprint(x)", timeout_s=5) == ("1\n", "", None)
        failed = session.exchange("print(x + 1); 1 / 0", timeout_s=5)
        assert failed.output == "2\n"
        assert failed.error.endswith("ZeroDivisionError: division by zero\n")
        assert session.exchange("print(x + 2)", timeout_s=5).output == "3\n"
        assert session.exchange("while True: pass", timeout_s=0.3).limit == "time"
        with pytest.raises(ValueError, match="session has ended"):
            session.exchange("print(x)", timeout_s=5)
    with Session(sandbox) as session:
        assert session.exchange("print(globals().get('x'))", timeout_s=5).output == "None\n"
        assert session.exchange("exit(0)", timeout_s=5).limit == "exit"
    with Session(sandbox) as session:
        forged = "import os; os.write(3, b'\\0\\0\\0\\2[]')"
        assert session.exchange(forged, timeout_s=5).limit == "exit"
    assert sandbox.run("print(1)", timeout_s=5).output == "1\n"


def test_processor_time_between_the_exchanges_of_a_session_counts_for_the_next_one(sandbox):
    with Session(sandbox) as session:
        spin = (
            "import threading\n"
            "def spin():\n    while True: pass\n"
            "threading.Thread(target=spin).start()"
        )
        assert session.exchange(spin, timeout_s=0.3).limit is None
        time.sleep(0.6)
        assert session.exchange("print(1)", timeout_s=0.3).limit == "time"


@pytest.mark.parametrize(
    "answer",
    [
        "b'[]'",
        "b'null'",
        "b'{}'",
        'b\'{"output": [], "error": ""}\'',
        'b\'{"output": "a"}\'',
        "b'[' * 5000",
        'b\'{"output": "\' + b"x" * (5 << 20) + b\'", "error": ""}\'',
    ],
)
def test_a_forged_answer_ends_a_session(sandbox, answer):
    with Session(sandbox) as session:
        forgery = f"import os, struct\nd = {answer}\nos.write(3, struct.pack('!I', len(d)) + d)"
        assert session.exchange(forgery, timeout_s=5).limit == "exit"
    assert sandbox.run("print(1)", timeout_s=5).output == "1\n"


def test_a_session_that_ends_before_it_reads_is_no_error_of_the_owner(sandbox):
    with Session(sandbox) as session:
        early = (
            "import os, time\n"
            'd = b\'{"output": "", "error": "a"}\'\n'
            "os.write(3, bytes([0, 0, 0, len(d)]) + d)\ntime.sleep(0.3)\nos._exit(0)"
        )
        assert session.exchange(early, timeout_s=5).error == "a"
        assert session.exchange("#" * 100_000, timeout_s=5).limit == "exit"


def test_the_output_of_a_session_has_no_lone_surrogates(sandbox):
    with Session(sandbox) as session:
        printed = session.exchange("print('\\ud800')", timeout_s=5)
        printed.output.encode()


@pytest.mark.parametrize(
    ("source", "timeout_s"),
    [
        ("#" * (20 << 20), 5),
        ("\x01" * (3 << 20), 5),
        ("print(1)", 0),
        ("print(1)", -1),
        ("print(1)", 1e10),
        ("print(1)", float("nan")),
        ("print(1)", float("inf")),
    ],
    ids=["long", "long when it is sent", "0", "-1", "1e10", "nan", "inf"],
)
def test_wrong_arguments_leave_the_sandbox_as_it_was(sandbox, source, timeout_s):
    with pytest.raises(ValueError):
        sandbox.run(source, timeout_s=timeout_s)
    assert sandbox.run("print(1)", timeout_s=5).output == "1\n"


@requires_namespaces
def test_a_program_cannot_mark_the_folder_for_the_next_one(isolated):
    mark = (
        "import os\nfor i in range(9): open(str(i), 'w').close(); os.unlink(str(i))\n"
        "os.utime('/sandbox', ns=(123456789, 424242))"
    )
    assert isolated.run(mark, timeout_s=5).code == 0
    read = "import os; print(os.stat('/sandbox').st_mtime_ns, os.stat('/sandbox').st_atime_ns)"
    assert not {"424242", "123456789"} & set(isolated.run(read, timeout_s=5).output.split())


@requires_namespaces
def test_a_program_does_not_learn_about_the_machine(isolated):
    program = "import os, sys; print(os.uname().nodename, sys.argv, sys.orig_argv)"
    outcome = isolated.run(program, timeout_s=5)
    assert outcome.output == "sandbox ['program.py'] ['python', 'program.py']\n"


@requires_namespaces
@pytest.mark.parametrize("target", ["1", "0", "-1"])
def test_no_signal_ends_process_1(isolated, target):
    program = (
        "import os, signal\n"
        "for number in range(1, 65):\n"
        "    try:\n        signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "for number in range(1, 65):\n"
        "    if number in (9, 19, 32, 33): continue  # those end or stop the program itself\n"
        f"    try:\n        os.kill({target}, number)\n"
        "    except ProcessLookupError: pass\n"
        "print('sent')"
    )
    assert isolated.run(program, timeout_s=5).output == "sent\n"
    assert isolated.run("print(1)", timeout_s=5).output == "1\n"


@requires_namespaces
def test_no_signal_reaches_a_process_of_the_same_user_outside(monkeypatch):
    """Without root, programs have the user of the process that waits for the sandbox."""

    def map_to_this_user(pid):
        namespaces._write_text(f"/proc/{pid}/setgroups", "deny")
        namespaces._write_maps(pid, os.geteuid(), os.getegid())

    monkeypatch.setattr(namespaces, "map_users", map_to_this_user)
    with Sandbox() as warm_sandbox:
        for target in (0, -1, 1):
            program = f"import os, signal; os.kill({target}, signal.SIGTERM)"
            warm_sandbox.run(program, timeout_s=5)
        assert warm_sandbox.run("print(1)", timeout_s=5).output == "1\n"


def test_a_sandbox_ends_with_its_owner_although_a_fork_of_the_owner_lives():
    owner = (
        "import os, signal, time\n"
        "from grpo.rewards.workers.sandbox import Sandbox\n"
        "from grpo.rewards.workers.session import Session\n"
        f"sandbox = Sandbox(isolation={isolation()!r})\n"
        "session = Session(sandbox)\n"
        "print(session._job.pid, flush=True)\n"
        "if os.fork() == 0:\n    os.close(1)\n    time.sleep(5)\n    os._exit(0)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    result = subprocess.run([sys.executable, "-c", owner], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 3
    while Path(f"/proc/{int(result.stdout)}").exists():
        assert time.monotonic() < deadline, "the program is still there"
        time.sleep(0.05)


def test_a_sandbox_that_is_killed_from_outside_is_lost():
    with Sandbox(isolation=isolation()) as warm_sandbox:
        os.killpg(warm_sandbox._process.pid, signal.SIGKILL)
        with pytest.raises(SandboxLostError):
            warm_sandbox.run("print(1)", timeout_s=5)


def test_time_that_a_program_waits_for_a_processor_does_not_count():
    """Six programs of 0.5 s each share one core; each has a limit of 1 s."""
    core = {min(os.sched_getaffinity(0))}
    program = "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass"
    outcomes = []

    def run_on_one_core():
        os.sched_setaffinity(0, core)  # of this thread; the sandbox inherits it
        outcomes.append(run(program, timeout_s=1, isolation=isolation()))

    threads = [threading.Thread(target=run_on_one_core) for _ in range(6)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - start > 2  # each took longer than its limit
    assert [outcome.limit for outcome in outcomes] == [None] * 6


class WaitingClock:
    """The clock of a process that waits for a processor all the time."""

    def __init__(self):
        self.start = time.monotonic()

    def waited_s(self):
        return time.monotonic() - self.start

    def used_s(self):
        return 0.0


def test_a_program_without_processor_time_is_starved_and_not_too_slow():
    stopwatch = Stopwatch([], limit_s=0.02)
    stopwatch._clocks = [WaitingClock()]
    time.sleep(0.05)
    assert stopwatch.next_check_s() > 0
    time.sleep(0.02 * MAX_STARVATION)
    with pytest.raises(TimeLimitError) as error:
        stopwatch.next_check_s()
    assert error.value.is_starved


def test_threads_that_wait_for_each_other_do_not_extend_the_limit(sandbox):
    program = (
        "import hashlib, threading\n"
        "def spin():\n    while True: hashlib.sha256(bytes(1 << 20))\n"
        "for _ in range(20): threading.Thread(target=spin).start()"
    )
    start = time.monotonic()
    assert sandbox.run(program, timeout_s=1).code == -signal.SIGKILL
    assert time.monotonic() - start < 3


@requires_landlock
def test_rlimits_hide_the_environment_of_other_processes(monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_TRAINER", "x")
    program = (
        "import os, pathlib\n"
        "texts = [str(os.environ)]\n"
        "for path in pathlib.Path('/proc').glob('*/environ'):\n"
        "    texts.append(path.read_text())\n"
        "print('SECRET_OF_THE_TRAINER' in ''.join(texts))"
    )
    assert run(program, timeout_s=5, isolation="rlimits").output == "False\n"


@requires_namespaces
def test_a_missing_library_is_named(monkeypatch):
    script = sandbox_module.START_KEEPER.replace(
        "keeper.main()",
        "from grpo.rewards.workers.inside import seccomp; seccomp.LIBRARY = 'libmissing.so'; "
        "keeper.main()",
    )
    monkeypatch.setattr(sandbox_module, "START_KEEPER", script)
    with pytest.raises(SandboxUnavailableError, match=r"libmissing.so is missing.*libseccomp2"):
        run("print(1)", timeout_s=5)


@pytest.mark.skipif(
    os.geteuid() != 0 or isolation() != "namespaces", reason="requires root and namespaces"
)
@pytest.mark.parametrize("user", ["root without CAP_SYS_ADMIN", "another user"])
def test_the_sandbox_works_without_the_privileges_of_root(user):
    folders = (sys.prefix, sys.base_prefix)
    if user == "another user" and not all(map(keeper._is_open_to_all, folders)):
        pytest.skip("other users cannot reach this interpreter")
    child = os.fork()
    if child == 0:
        output = ""
        with contextlib.suppress(BaseException):
            if user == "another user":
                os.setresuid(12345, 12345, 12345)
            else:
                ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_SYS_ADMIN)
            program = "import os; print(os.getuid(), os.path.exists('/etc/passwd'))"
            output = run(program, timeout_s=10).output
        os._exit(0 if output == "65534 False\n" else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
