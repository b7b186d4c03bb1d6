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

from grpo.types import Verdict
from rewards.workers import pool as pool_module
from rewards.workers.pool import Failure, Pool

CALLS = """
import os, signal, struct, sys, time
TRIES = os.path.join(os.path.dirname(__file__), "tries")
def double(x): return 2 * x
def spin():
    while True: pass
def spin_deaf():
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals)); spin()
def doze(): time.sleep(60)
def hoard(): return len(bytearray(8 << 30))
def crash(): os.abort()
def talk(): print("noise", flush=True); os.write(1, b"more"); return "said"
def die_once():
    if not os.path.exists(TRIES):
        open(TRIES, "w").close(); os.kill(os.getpid(), signal.SIGKILL)
    return "alive"
def fail(): raise KeyError("what")
def pid(): return os.getpid()
def nothing(): return None
def unsendable(): return lambda: 1
def grow(x, *, by=1): return x + by
def stop_in_answer():
    os.write(int(sys.argv[1]), struct.pack("!i", 1000) + b"x")
    os.kill(os.getpid(), signal.SIGSTOP)
def close_pipe():
    os.close(int(sys.argv[1])); time.sleep(60)
"""


@pytest.fixture(scope="module")
def pool():
    with Pool(2, memory_gb=2) as pool:
        yield pool


@pytest.fixture
def calls(tmp_path, monkeypatch):
    (tmp_path / "pool_calls.py").write_text(CALLS)
    monkeypatch.syspath_prepend(str(tmp_path))


def run(pool, name, *arguments, timeout_s=5.0, **options):
    return pool.map(
        f"pool_calls:{name}", list(arguments) or [()], timeout_s=timeout_s, options=options
    )


@pytest.fixture
def fresh(calls):
    """A pool whose workers can import pool_calls."""
    with Pool(2, memory_gb=2) as pool:
        yield pool


def test_answers_have_the_order_of_the_calls(fresh):
    assert run(fresh, "double", *[(i,) for i in range(100)]) == [2 * i for i in range(100)]
    assert run(fresh, "grow", (1,), by=5) == [6]
    assert run(fresh, "nothing", (), ()) == [None, None]
    assert run(fresh, "talk") == ["said"]  # its output does not disturb the protocol
    assert len(set(run(fresh, "pid", *[()] * 50))) <= 2


@pytest.mark.parametrize("name", ["spin", "spin_deaf"])
def test_a_call_that_computes_too_long_is_killed(fresh, name):
    run(fresh, "double", (1,), (2,))
    start = time.monotonic()
    assert run(fresh, name, timeout_s=1.0) == [Failure(kind="timeout", reason="longer than 1 s")]
    assert time.monotonic() - start < 10
    assert fresh.counts == {"calls": 3, "timeout": 1, "restarts": 1}
    assert run(fresh, "double", (3,)) == [6]


def test_a_call_without_processor_time_is_repeated_once_and_then_lost(fresh):
    (lost,) = run(fresh, "doze", timeout_s=0.3)
    assert lost.kind == "lost" and "processor time" in lost.reason
    assert fresh.counts["lost"] == 2


def test_a_worker_killed_from_outside_costs_one_retry(fresh):
    assert run(fresh, "die_once") == ["alive"]
    assert fresh.counts == {"calls": 1, "lost": 1, "restarts": 1}


def test_an_idle_worker_killed_from_outside_costs_nothing(fresh):
    for pid in set(run(fresh, "pid", *[()] * 20)):
        os.kill(pid, signal.SIGKILL)
    assert run(fresh, "double", *[(i,) for i in range(20)]) == [2 * i for i in range(20)]


def test_a_frozen_worker_that_does_not_read_a_large_call_is_replaced(fresh):
    run(fresh, "double", (1,))
    (pid,) = run(fresh, "pid")
    os.kill(pid, signal.SIGSTOP)
    text = "x" * 2_000_000  # more than a socket's buffer
    (answer,) = run_within(20, lambda: run(fresh, "double", (text,), timeout_s=1.0))
    assert answer == 2 * text
    assert fresh.counts["lost"] == 1 and fresh.counts["restarts"] == 1
    assert run(fresh, "pid") != [pid]


def test_a_worker_that_freezes_in_its_answer_is_replaced_and_the_call_is_lost(fresh):
    run(fresh, "double", (1,))
    (lost,) = run_within(20, lambda: run(fresh, "stop_in_answer", timeout_s=0.5))
    assert lost.kind == "lost" and fresh.counts["lost"] == 2
    assert run(fresh, "double", (3,)) == [6]


def test_a_worker_that_closes_its_pipe_and_continues_is_a_crash(fresh, monkeypatch):
    monkeypatch.setattr(pool_module, "END_LIMIT_S", 0.3)
    run(fresh, "double", (1,))
    (crash,) = run_within(20, lambda: run(fresh, "close_pipe"))
    assert crash == Failure(kind="crash", reason="its worker closed its pipe and did not end")


def test_a_worker_that_does_not_end_when_killed_is_abandoned_with_a_warning(
    fresh, monkeypatch, caplog
):
    monkeypatch.setattr(pool_module, "END_LIMIT_S", 0.3)
    run(fresh, "double", (1,))
    (worker,) = fresh._workers
    with monkeypatch.context() as patch:
        patch.setattr(worker._process, "kill", lambda: None)  # as if the kernel held it
        os.kill(worker._process.pid, signal.SIGSTOP)  # it does not notice that its pipe is closed
        run_within(20, fresh.close)
    assert "did not end within 0.3 s after SIGKILL" in caplog.text
    worker._process.kill()


def test_memory_crashes_and_exceptions_are_failures_of_the_call(fresh):
    assert run(fresh, "hoard")[0].kind == "memory"
    assert run(fresh, "crash")[0].kind == "crash"
    assert run(fresh, "fail") == [Failure(kind="error", reason="KeyError: 'what'")]
    assert run(fresh, "unsendable")[0].kind == "error"


def test_a_function_that_cannot_be_loaded_raises_an_error(fresh):
    with pytest.raises(RuntimeError, match="while it loaded pool_calls:absent"):
        run(fresh, "absent")


def test_a_folder_named_rewards_does_not_shadow_the_package(tmp_path, monkeypatch):
    (tmp_path / "elsewhere" / "rewards").mkdir(parents=True)
    (tmp_path / "elsewhere" / "rewards" / "__init__.py").write_text(
        "raise RuntimeError('shadowed')"
    )
    monkeypatch.chdir(tmp_path / "elsewhere")
    with Pool(1) as pool:
        assert pool.map("rewards.accuracy:verify", [("1", "1")], timeout_s=5) == [
            Verdict(value="correct")
        ]


def test_a_pool_works_from_any_thread(fresh):
    answers = {}

    def work(i):
        answers[i] = run(fresh, "double", (i,), (i + 1,))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == {i: [2 * i, 2 * i + 2] for i in range(4)}


def test_workers_survive_the_end_of_the_thread_that_started_them(fresh):
    thread = threading.Thread(target=run, args=(fresh, "double", (1,)))
    thread.start()
    thread.join(60)
    assert run(fresh, "double", (2,)) == [4] and fresh.counts["restarts"] == 0


def test_a_forked_child_has_separate_workers(fresh):
    parent_workers = set(run(fresh, "pid", *[()] * 20))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        child_workers = set(run(fresh, "pid", *[()] * 20))
        os.write(writer, b"shared" if child_workers & parent_workers else b"ok")
        fresh.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0 and os.read(reader, 10) == b"ok"
    assert set(run(fresh, "pid", *[()] * 20)) <= parent_workers


def test_idle_workers_use_no_processor_and_end_with_their_parent(tmp_path):
    code = "from rewards.workers.pool import Pool; import time; p = Pool(1)\n"
    code += "print(p.map('os:getpid', [()], timeout_s=9)[0], flush=True); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    clock = (~worker << 3) | 2
    before = time.clock_gettime(clock)
    time.sleep(1)
    assert time.clock_gettime(clock) - before < 0.01
    parent.kill()
    parent.wait()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail(f"worker {worker} outlived its parent")


def test_the_verifier_answers_through_the_pool(pool):
    calls = [(f"<think>x</think><answer>{i}</answer>", str(i % 3)) for i in range(30)]
    verdicts = pool.map("rewards.accuracy:verify", calls, timeout_s=5)
    assert [verdict.value for verdict in verdicts] == [
        "correct" if i == i % 3 else "wrong" for i in range(30)
    ]
    assert pool.map("rewards.accuracy:verify", [(r"\sqrt{8}", r"2\sqrt{2}")], timeout_s=5) == [
        Verdict(value="correct")
    ]


def test_an_unused_pool_starts_no_process():
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with Pool(8) as pool:
        assert pool.map("os:getpid", [], timeout_s=1) == []
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime == before
