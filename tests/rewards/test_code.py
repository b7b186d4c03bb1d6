"""The code reward.

Correct programs pass, wrong and hostile programs do not, and the sandbox isolates them.
"""

import ctypes
import os
import time
from pathlib import Path

import pytest

from grpo.types import Completion, Problem, UserError
from rewards import code
from rewards.workers import sandbox
from rewards.workers.sandbox import SandboxUnavailableError, run

SQUARE = Problem(
    id="c/0",
    question="Square a number.",
    answer="",
    source="t",
    meta={"test_list": ["assert square(3) == 9", "assert square(-2) == 4"]},
)
HUMAN = Problem(
    id="c/1",
    question='import math\n\ndef root(x: float) -> float:\n    """The square root."""\n',
    answer="",
    source="t",
    meta={
        "entry_point": "root",
        "test": "def check(candidate):\n    assert "
        "candidate(9.0) == 3.0\n    assert candidate(2.25) == 1.5\n",
    },
)
ADD = Problem(
    id="c/2",
    question="Add.",
    answer="",
    source="t",
    meta={"io": [{"input": "1 2\n", "output": "3\n"}, {"input": "5 6", "output": "11"}]},
)

try:
    code.prepare()
    NAMESPACES = ""
except UserError as error:
    NAMESPACES = str(error)
sandboxed = pytest.mark.skipif(bool(NAMESPACES), reason=NAMESPACES)


def completion(text):
    return Completion(token_ids=(1,), logprobs=(), text=text, finish_reason="stop", versions=())


def fenced(program):
    return completion(f"<think>Easy.</think>\nHere:\n```python\n{program}\n```\nDone.")


def verdict_on(program, problem=SQUARE, **options):
    return code.reward(
        fenced(program),
        problem,
        **{"timeout_s": 5, "isolation": "rlimits" if NAMESPACES else "namespaces", **options},
    )


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("def square(x):\n    return x * x", SQUARE),
        ("    return math.sqrt(x)", HUMAN),
        ("def root(x):\n    return math.sqrt(x)", HUMAN),
        ("from math import sqrt as s\ndef root(x): return s(x)", HUMAN),
        ("def square(x):\n    square.calls += 1\n    return x * x\nsquare.calls = 0", SQUARE),
        (
            "def deep(n): return n and 1 + deep(n - 1)\ndef square(x): return x * x + deep(800) - "
            "800",
            SQUARE,
        ),
        ("a, b = map(int, input().split())\nprint(a + b)", ADD),
        ("if __name__ == '__main__':\n    print(sum(map(int, input().split())), end='')", ADD),
    ],
)
def test_correct_programs_pass(program, problem):
    assert verdict_on(program, problem).value == "correct"


@pytest.mark.parametrize(
    ("program", "problem", "reason"),
    [
        ("def square(x): return x + x", SQUARE, "ended with code 1"),
        ("def square(x) return", SQUARE, "ended with code 1"),
        ("print(3)", ADD, "input 1: failed"),
        ("while True: pass", SQUARE, "took too long"),
        ("import time; time.sleep(60)", ADD, "input 0: took too long"),
        ("x = bytearray(4 << 30)\ndef square(x): return x * x", SQUARE, "ended with code 1"),
        ("def square(x): return square(x)", SQUARE, "ended with code 1"),
    ],
)
def test_wrong_programs_fail_with_a_reason(program, problem, reason):
    verdict = verdict_on(program, problem, timeout_s=2)
    assert (verdict.value, verdict.reason) == ("wrong", reason)


@pytest.mark.parametrize(
    "program",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "import sys; sys.exit(97)",
        "raise SystemExit",
        "import atexit, os; atexit.register(os._exit, 0)\ndef square(x): return 1",
        "class Any:\n    def __eq__(self, other): return True\ndef square(x): return Any()",
        "class Any(int):\n    def __eq__(self, other): return True\ndef square(x): return "
        "[Any()][0]",
        "import signal, os\nos.kill(os.getpid(), signal.SIGTERM)",
        "import builtins\nbuiltins.AssertionError = None\ndef square(x): return 1",
    ],
)
def test_programs_that_cheat_are_wrong(program):
    assert verdict_on(program).value == "wrong"


def test_the_program_is_the_last_block_of_the_visible_answer():
    assert (
        code.extract_program(
            "<think>```python\nbad\n```</think>```\nfirst\n```\nthen\n```py\nlast\n```"
        )
        == "last\n"
    )
    assert code.extract_program("<think>x</think><answer>print(1)</answer>") == "print(1)"
    assert (
        code.extract_program("<think>x</think><answer>See\n```python\nprint(2)\n```\n</answer>")
        == "print(2)\n"
    )
    assert (
        code.extract_program("no program") is None
        and code.extract_program("```python\nnever closed") is None
    )
    # a regular expression would take hours
    assert code.extract_program("```" + " " * 10**6 + "\n```" * 10**5) == "\n"
    assert code.reward(completion("nothing"), SQUARE).reason == "no program"
    assert (
        code.reward(fenced("print(1)"), Problem(id="m", question="2+2?", answer="4", source="t"))
        is None
    )


@sandboxed
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
        ("import os; os.setuid(0)", "") if os.geteuid() == 0 else ("open('/x')", ""),
        ("open('own', 'w').write('ok'); print(open('own').read())", "ok\n"),
        ("f = open('big', 'wb')\nfor _ in range(40): f.write(bytes(1 << 20))", ""),
        ("import os; print(os.environ.get('HOME'), len(os.listdir('.')))", "None 0\n"),
        ("import os; print(os.path.exists('/dev/shm'), os.getpid(), os.getppid())", "False 2 1\n"),
    ],
)
def test_the_sandbox_has_no_network_no_files_and_no_other_processes(program, output):
    outcome = run(program, timeout_s=5)
    assert outcome.output == output, outcome
    assert not outcome.timed_out
    assert (outcome.code == 0) == bool(output)


@sandboxed
def test_no_process_survives_the_sandbox(tmp_path):
    def processes():
        return {path for path in Path("/proc").iterdir() if path.name.isdigit()}

    before = processes()
    program = (
        "import os, time\nfor _ in range(5):\n    if os.fork() == 0:\n        os.setsid(); "
        "time.sleep(60)\ntime.sleep(60)"
    )
    escape = "import ctypes; ctypes.CDLL(None).prctl(1, 0)\n"  # does not die with its parent
    outcome = run(escape + program, timeout_s=1)
    assert outcome.timed_out
    time.sleep(0.2)
    for path in processes() - before:
        if (path / "cmdline").exists():
            command = (path / "cmdline").read_text()
            assert "exec(compile" not in command
            assert "_sandbox" not in command


@sandboxed
def test_a_flood_of_output_is_cut_and_a_fork_bomb_ends():
    outcome = run("while True: print('x' * 10000)", timeout_s=5)
    assert outcome.code != 0 and len(outcome.output) <= sandbox.MAX_OUTPUT_BYTES
    start = time.monotonic()
    run("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", timeout_s=1)
    assert time.monotonic() - start < 10


def test_without_namespaces_it_fails_unless_rlimits_are_chosen(monkeypatch):
    def forbidden(*_, isolation, **__):
        if isolation == "namespaces":
            raise SandboxUnavailableError("[Errno 1] unshare: Operation not permitted")
        return sandbox.Outcome(0, "42\n", False)

    monkeypatch.setattr(code, "run", forbidden)
    with pytest.raises(
        UserError,
        match=r"forbids the namespaces .*Operation not permitted.*options: \{isolation: rlimits\}",
    ):
        code.prepare()
    code.prepare(isolation="rlimits")
    with pytest.raises(UserError, match="expected namespaces or rlimits"):
        code.prepare(isolation="docker")


@pytest.mark.skipif(
    os.geteuid() != 0 or bool(NAMESPACES),
    reason="without root, every test uses a user namespace",
)
def test_the_sandbox_works_without_the_privileges_of_root():
    child = os.fork()
    # CAP_SYS_ADMIN (21) leaves the bounding set: the sandbox must make a user namespace
    if child == 0:
        ctypes.CDLL(None).prctl(24, 21)
        outcome = run("import os; print(os.getuid(), os.path.exists('/etc/passwd'))", timeout_s=10)
        os._exit(0 if outcome.output == "65534 False\n" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
