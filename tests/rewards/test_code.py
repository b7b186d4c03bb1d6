"""The code reward: verdicts on correct, wrong and cheating programs, and the sandbox."""

import contextlib
import ctypes
import os
import threading
import time
from pathlib import Path

import pytest

from grpo.types import Completion, Problem, UserError
from rewards import code
from rewards.workers import sandbox
from rewards.workers.sandbox import SandboxUnavailableError, run

MBPP_SQUARE = Problem(
    id="c/0",
    question="Square a number.",
    answer="",
    source="t",
    meta={"test_list": ["assert square(3) == 9", "assert square(-2) == 4"]},
)
HUMANEVAL_ROOT = Problem(
    id="c/1",
    question='import math\n\ndef root(x: float) -> float:\n    """The square root."""\n',
    answer="",
    source="t",
    meta={
        "entry_point": "root",
        "test": (
            "def check(candidate):\n"
            "    assert candidate(9.0) == 3.0\n"
            "    assert candidate(2.25) == 1.5\n"
        ),
    },
)
IO_ADD = Problem(
    id="c/2",
    question="Add.",
    answer="",
    source="t",
    meta={"io": [{"input": "1 2\n", "output": "3\n"}, {"input": "5 6", "output": "11"}]},
)

try:
    code.prepare()
except UserError as error:
    SANDBOX_ERROR = str(error)
    ISOLATION = "rlimits"
else:
    SANDBOX_ERROR = ""
    ISOLATION = "namespaces"
requires_sandbox = pytest.mark.skipif(bool(SANDBOX_ERROR), reason=SANDBOX_ERROR)

# A program that fails because the sandbox drops the privileges of root. Without root there are none
# to drop: a program that fails for another reason keeps the number of tests the same.
BECOME_ROOT = "import os; os.setuid(0)" if os.geteuid() == 0 else "open('/x')"

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_CAPBSET_DROP = 24
CAP_SYS_ADMIN = 21


def completion(text):
    return Completion(token_ids=(1,), logprobs=(), text=text, finish_reason="stop", versions=())


def fenced(program):
    return completion(f"<think>Easy.</think>\nHere:\n```python\n{program}\n```\nDone.")


def verdict_on(program, problem=MBPP_SQUARE, timeout_s=5):
    return code.reward(fenced(program), problem, timeout_s=timeout_s, isolation=ISOLATION)


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("def square(x):\n    return x * x", MBPP_SQUARE),
        ("    return math.sqrt(x)", HUMANEVAL_ROOT),
        ("def root(x):\n    return math.sqrt(x)", HUMANEVAL_ROOT),
        ("from math import sqrt as s\ndef root(x): return s(x)", HUMANEVAL_ROOT),
        ("def square(x):\n    square.calls += 1\n    return x * x\nsquare.calls = 0", MBPP_SQUARE),
        (
            "def depth(n): return n and 1 + depth(n - 1)\n"
            "def square(x): return x * x + depth(800) - 800",
            MBPP_SQUARE,
        ),
        ("a, b = map(int, input().split())\nprint(a + b)", IO_ADD),
        ("if __name__ == '__main__':\n    print(sum(map(int, input().split())), end='')", IO_ADD),
    ],
)
def test_correct_programs_pass(program, problem):
    assert verdict_on(program, problem).value == "correct"


@pytest.mark.parametrize(
    ("program", "problem", "reason"),
    [
        ("def square(x): return x + x", MBPP_SQUARE, "ended with code 1"),
        ("def square(x) return", MBPP_SQUARE, "ended with code 1"),
        ("print(3)", IO_ADD, "input 1: failed"),
        ("while True: pass", MBPP_SQUARE, "took too long"),
        ("import time; time.sleep(60)", IO_ADD, "input 0: took too long"),
        ("x = bytearray(4 << 30)\ndef square(x): return x * x", MBPP_SQUARE, "ended with code 1"),
        ("def square(x): return square(x)", MBPP_SQUARE, "ended with code 1"),
    ],
)
def test_wrong_programs_fail_with_a_reason(program, problem, reason):
    verdict = verdict_on(program, problem, timeout_s=2)
    assert verdict.value == "wrong"
    assert verdict.reason == reason


@pytest.mark.parametrize(
    "program",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "import sys; sys.exit(97)",
        "raise SystemExit",
        "import atexit, os; atexit.register(os._exit, 0)\ndef square(x): return 1",
        "class Any:\n    def __eq__(self, other): return True\ndef square(x): return Any()",
        "class Any(int):\n"
        "    def __eq__(self, other): return True\n"
        "def square(x): return [Any()][0]",
        "import signal, os\nos.kill(os.getpid(), signal.SIGTERM)",
        "import builtins\nbuiltins.AssertionError = None\ndef square(x): return 1",
    ],
)
def test_programs_that_cheat_are_wrong(program):
    assert verdict_on(program).value == "wrong"


def test_the_program_is_the_last_block_of_the_visible_answer():
    thoughts = "<think>```python\nbad\n```</think>"
    two_blocks = "```\nfirst\n```\nthen\n```py\nlast\n```"
    assert code.extract_program(thoughts + two_blocks) == "last\n"

    answer_without_block = "<think>x</think><answer>print(1)</answer>"
    assert code.extract_program(answer_without_block) == "print(1)"

    answer_with_block = "<think>x</think><answer>See\n```python\nprint(2)\n```\n</answer>"
    assert code.extract_program(answer_with_block) == "print(2)\n"

    assert code.extract_program("no program") is None
    assert code.extract_program("```python\nnever closed") is None

    # A search with a regular expression would take hours.
    assert code.extract_program("```" + " " * 10**6 + "\n```" * 10**5) == "\n"

    assert code.reward(completion("nothing"), MBPP_SQUARE).reason == "no program"
    problem_without_tests = Problem(id="m", question="2+2?", answer="4", source="t")
    assert code.reward(fenced("print(1)"), problem_without_tests) is None


@requires_sandbox
@pytest.mark.parametrize(
    ("program", "output"),
    [
        ("import socket; socket.create_connection(('127.0.0.1', 22), 2)", ""),
        ("import socket; socket.getaddrinfo('example.org', 80)", ""),
        ("open('/etc/passwd')", ""),
        (f"open({__file__!r})", ""),
        ("import os; print([p for p in os.listdir('/') if p == 'proc'])", "[]\n"),
        ("import os, sys; open(os.path.join(sys.prefix, 'x'), 'w')", ""),
        ("open('/x', 'w')", ""),
        (BECOME_ROOT, ""),
        ("open('new', 'w').write('ok'); print(open('new').read())", "ok\n"),
        ("f = open('big', 'wb')\nfor _ in range(40): f.write(bytes(1 << 20))", ""),
        ("import os; print(os.environ.get('HOME'), len(os.listdir('.')))", "None 0\n"),
        ("import os; print(os.path.exists('/dev/shm'), os.getpid(), os.getppid())", "False 2 1\n"),
    ],
)
def test_the_sandbox_has_no_network_no_files_and_no_other_processes(program, output):
    """A program whose expected output is empty must fail. All others must succeed."""
    outcome = run(program, timeout_s=5)
    assert outcome.output == output, outcome
    assert not outcome.timed_out
    if output:
        assert outcome.code == 0
    else:
        assert outcome.code != 0


def names_of_processes():
    """Returns the names of all processes. A process can give itself a name of 15 characters."""
    names = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                names.append((path / "comm").read_text().strip())
    return names


@requires_sandbox
def test_no_process_survives_the_sandbox():
    name = f"survivor-{os.getpid()}"
    program = (
        "import ctypes, os, time\n"
        "prctl = ctypes.CDLL(None).prctl\n"
        f"prctl({PR_SET_PDEATHSIG}, 0)\n"
        f"prctl({PR_SET_NAME}, b{name!r})\n"
        "for _ in range(5):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid(); time.sleep(60)\n"
        "time.sleep(60)"
    )
    seen = []
    watcher = threading.Timer(0.5, lambda: seen.extend(names_of_processes()))
    watcher.start()
    outcome = run(program, timeout_s=1)
    assert outcome.timed_out
    watcher.join()
    assert name in seen  # while the program ran
    time.sleep(0.2)
    assert name not in names_of_processes()


@requires_sandbox
def test_excessive_output_is_truncated_and_a_fork_bomb_is_stopped():
    outcome = run("while True: print('x' * 10000)", timeout_s=5)
    assert outcome.code != 0
    assert len(outcome.output) <= sandbox.MAX_OUTPUT_BYTES
    fork_bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    start = time.monotonic()
    run(fork_bomb, timeout_s=1)
    assert time.monotonic() - start < 10


def test_prepare_fails_without_namespaces_unless_rlimits_are_chosen(monkeypatch):
    def run_without_namespaces(*_, isolation, **__):
        if isolation == "namespaces":
            raise SandboxUnavailableError("[Errno 1] unshare: Operation not permitted")
        return sandbox.Outcome(code=0, output="42\n", timed_out=False)

    monkeypatch.setattr(code, "run", run_without_namespaces)
    message = r"forbids the namespaces .*Operation not permitted.*options: \{isolation: rlimits\}"
    with pytest.raises(UserError, match=message):
        code.prepare()
    code.prepare(isolation="rlimits")
    with pytest.raises(UserError, match="expected namespaces or rlimits"):
        code.prepare(isolation="docker")


@pytest.mark.skipif(
    os.geteuid() != 0 or bool(SANDBOX_ERROR),
    reason="requires root and namespaces: without root, every sandbox uses a user namespace",
)
def test_the_sandbox_works_without_the_privileges_of_root():
    """Without CAP_SYS_ADMIN in the bounding set, the sandbox must create a user namespace."""
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_SYS_ADMIN)
        outcome = run("import os; print(os.getuid(), os.path.exists('/etc/passwd'))", timeout_s=10)
        os._exit(0 if outcome.output == "65534 False\n" else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
