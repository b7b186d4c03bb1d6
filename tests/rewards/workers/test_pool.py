"""The worker pool: time limits, lost and crashed workers, and idle workers."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
from limits import run_within

from grpo.rewards.workers import pool as pool_module
from grpo.rewards.workers.pool import Failure, WorkerPool
from grpo.types import Verdict

# Source of the module pool_functions, which the workers import.
POOL_FUNCTIONS = '''
import os
import signal
import struct
import sys
import time
from pathlib import Path

PIPE_FD = int(sys.argv[1])  # the worker's end of the pipe to the pool
FIRST_ATTEMPT = Path(__file__).with_name("first_attempt")


def double(value):
    return 2 * value


def add(value, *, summand=1):
    return value + summand


def return_none():
    return None


def return_unpicklable():
    return lambda: 1


def worker_pid():
    return os.getpid()


def print_and_return():
    print("noise", flush=True)
    os.write(1, b"more noise")
    return "answer"


def raise_key_error():
    raise KeyError("missing")


def compute_forever():
    while True:
        pass


def compute_forever_with_blocked_signals():
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
    compute_forever()


def sleep():
    time.sleep(60)


def allocate_8_gib():
    return len(bytearray(8 << 30))


def abort():
    os.abort()


def die_in_first_attempt():
    if not FIRST_ATTEMPT.exists():
        FIRST_ATTEMPT.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def freeze_in_answer():
    """Announces an answer of 1000 bytes, sends one of them and stops."""
    os.write(PIPE_FD, struct.pack("!i", 1000) + b"x")
    os.kill(os.getpid(), signal.SIGSTOP)


def close_pipe():
    os.close(PIPE_FD)
    time.sleep(60)
'''


@pytest.fixture
def pool_functions(tmp_path, monkeypatch):
    """Makes pool_functions importable in workers that start afterwards."""
    (tmp_path / "pool_functions.py").write_text(POOL_FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture
def pool(pool_functions):
    """A pool without workers. Its workers can import pool_functions."""
    with WorkerPool(2, memory_gb=2) as pool:
        yield pool


@pytest.fixture(scope="module")
def verifier_pool():
    with WorkerPool(2, memory_gb=2) as pool:
        yield pool


def call(pool, function, *calls, timeout_s=5.0, **options):
    """Calls a function of pool_functions once per tuple of arguments, or once without arguments."""
    if not calls:
        calls = [()]
    return pool.map(f"pool_functions:{function}", list(calls), timeout_s=timeout_s, options=options)


def worker_pids(pool, num_calls=20):
    """Returns the process ids of the workers that answer the calls."""
    no_arguments = [()] * num_calls
    return set(call(pool, "worker_pid", *no_arguments))


def test_the_answers_are_in_the_order_of_the_calls(pool):
    calls = [(i,) for i in range(100)]
    assert call(pool, "double", *calls) == [2 * i for i in range(100)]
    assert call(pool, "add", (1,), summand=5) == [6]
    assert call(pool, "return_none", (), ()) == [None, None]
    # The output of a function does not interfere with the protocol of the pipe.
    assert call(pool, "print_and_return") == ["answer"]
    assert len(worker_pids(pool, num_calls=50)) <= 2


@pytest.mark.parametrize("function", ["compute_forever", "compute_forever_with_blocked_signals"])
def test_a_call_that_exceeds_its_time_limit_is_killed(pool, function):
    call(pool, "double", (1,), (2,))
    start = time.monotonic()
    results = call(pool, function, timeout_s=1.0)
    assert results == [Failure(kind="timeout", reason="longer than 1 s")]
    assert time.monotonic() - start < 10
    assert pool.counts == {"calls": 3, "timeout": 1, "restarts": 1}
    assert call(pool, "double", (3,)) == [6]


def test_a_call_without_processor_time_is_repeated_once_and_then_lost(pool):
    (failure,) = call(pool, "sleep", timeout_s=0.3)
    assert failure.kind == "lost"
    assert "processor time" in failure.reason
    assert pool.counts["lost"] == 2


def test_a_call_is_repeated_if_its_worker_is_killed_from_outside(pool):
    assert call(pool, "die_in_first_attempt") == ["alive"]
    assert pool.counts == {"calls": 1, "lost": 1, "restarts": 1}


def test_no_call_fails_if_idle_workers_are_killed_from_outside(pool):
    for pid in worker_pids(pool):
        os.kill(pid, signal.SIGKILL)
    calls = [(i,) for i in range(20)]
    assert call(pool, "double", *calls) == [2 * i for i in range(20)]


def test_a_frozen_worker_that_does_not_read_a_large_call_is_replaced(pool):
    call(pool, "double", (1,))
    (pid,) = call(pool, "worker_pid")
    os.kill(pid, signal.SIGSTOP)
    text = "x" * 2_000_000  # larger than the buffer of a socket
    (answer,) = run_within(20, lambda: call(pool, "double", (text,), timeout_s=1.0))
    assert answer == 2 * text
    assert pool.counts["lost"] == 1
    assert pool.counts["restarts"] == 1
    assert call(pool, "worker_pid") != [pid]


def test_a_worker_that_freezes_while_it_sends_its_answer_is_replaced_and_the_call_is_lost(pool):
    call(pool, "double", (1,))
    (failure,) = run_within(20, lambda: call(pool, "freeze_in_answer", timeout_s=0.5))
    assert failure.kind == "lost"
    assert pool.counts["lost"] == 2
    assert call(pool, "double", (3,)) == [6]


def test_a_worker_that_closes_its_pipe_without_ending_counts_as_a_crash(pool, monkeypatch):
    monkeypatch.setattr(pool_module, "END_LIMIT_S", 0.3)
    call(pool, "double", (1,))
    (failure,) = run_within(20, lambda: call(pool, "close_pipe"))
    assert failure == Failure(kind="crash", reason="its worker closed its pipe and did not end")


def test_a_worker_that_does_not_end_when_killed_is_abandoned_with_a_warning(
    pool, monkeypatch, caplog
):
    monkeypatch.setattr(pool_module, "END_LIMIT_S", 0.3)
    call(pool, "double", (1,))
    (worker,) = pool._workers
    with monkeypatch.context() as patch:
        # Without a signal from `kill`, the worker is like a process that is stuck in the kernel.
        patch.setattr(worker._process, "kill", lambda: None)
        # A stopped worker does not notice that its pipe is closed.
        os.kill(worker._process.pid, signal.SIGSTOP)
        run_within(20, pool.close)
    assert "did not end within 0.3 s after SIGKILL" in caplog.text
    worker._process.kill()


def test_memory_exhaustion_crashes_and_exceptions_are_failures_of_the_call(pool):
    assert call(pool, "allocate_8_gib")[0].kind == "memory"
    assert call(pool, "abort")[0].kind == "crash"
    exception = Failure(kind="error", reason="KeyError: 'missing'")
    assert call(pool, "raise_key_error") == [exception]
    assert call(pool, "return_unpicklable")[0].kind == "error"


def test_a_function_that_cannot_be_loaded_raises_an_error(pool):
    with pytest.raises(RuntimeError, match="while it loaded pool_functions:absent"):
        call(pool, "absent")


def test_a_folder_named_rewards_does_not_shadow_the_package(tmp_path, monkeypatch):
    package = tmp_path / "elsewhere" / "rewards"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('shadowed')")
    monkeypatch.chdir(tmp_path / "elsewhere")
    with WorkerPool(1) as pool:
        verdicts = pool.map("grpo.rewards.accuracy:verify", [("1", "1")], timeout_s=5)
    assert verdicts == [Verdict(value="correct")]


def test_a_pool_can_be_used_from_several_threads(pool):
    answers = {}

    def double_two_numbers(i):
        answers[i] = call(pool, "double", (i,), (i + 1,))

    threads = [threading.Thread(target=double_two_numbers, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == {i: [2 * i, 2 * i + 2] for i in range(4)}


def test_workers_survive_the_end_of_the_thread_that_started_them(pool):
    thread = threading.Thread(target=call, args=(pool, "double", (1,)))
    thread.start()
    thread.join(60)
    assert call(pool, "double", (2,)) == [4]
    assert pool.counts["restarts"] == 0


def test_a_forked_child_has_separate_workers(pool):
    parent_workers = worker_pids(pool)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        child_workers = worker_pids(pool)
        os.write(writer, b"shared" if child_workers & parent_workers else b"separate")
        pool.close()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert os.read(reader, 10) == b"separate"
    assert worker_pids(pool) <= parent_workers


def test_an_idle_worker_uses_no_processor_time_and_ends_with_its_parent():
    program = (
        "import time\n"
        "from grpo.rewards.workers.pool import WorkerPool\n"
        "pool = WorkerPool(1)\n"
        "print(pool.map('os:getpid', [()], timeout_s=9)[0], flush=True)\n"
        "time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    worker_pid = int(parent.stdout.readline())
    clock = (~worker_pid << 3) | 2  # CPUCLOCK_SCHED of a process, see clock_getcpuclockid(3)
    cpu_s_before = time.clock_gettime(clock)
    time.sleep(1)
    assert time.clock_gettime(clock) - cpu_s_before < 0.01
    parent.kill()
    parent.wait()
    assert ends_within_5_s(worker_pid), f"worker {worker_pid} outlived its parent"


def ends_within_5_s(pid):
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_the_verifier_runs_in_the_pool(verifier_pool):
    calls = []
    expected = []
    for answer in range(30):
        gold = answer % 3
        calls.append((f"<think>x</think><answer>{answer}</answer>", str(gold)))
        expected.append("correct" if answer == gold else "wrong")
    verdicts = verifier_pool.map("grpo.rewards.accuracy:verify", calls, timeout_s=5)
    assert [verdict.value for verdict in verdicts] == expected
    roots = [(r"\sqrt{8}", r"2\sqrt{2}")]
    verdicts = verifier_pool.map("grpo.rewards.accuracy:verify", roots, timeout_s=5)
    assert verdicts == [Verdict(value="correct")]


def test_an_unused_pool_starts_no_process():
    cpu_s_before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with WorkerPool(8) as pool:
        assert pool.map("os:getpid", [], timeout_s=1) == []
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime == cpu_s_before
